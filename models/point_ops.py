"""Point searches: farthest point sampling, nearest neighbors, inverse-distance interpolation.

The `backend` of a search is one of utils.choices.POINT_OPS:

- "auto": k-d trees (SciPy) and NumPy on CPU; on CUDA "triton" where Triton can be imported, else "torch".
- "torch": chunked direct differences in plain PyTorch, on any device.
- "triton": the kernels of `models.point_ops_triton`, on float32 CUDA tensors.
- "extension": the CUDA extensions pointnet2_ops and knn_cuda, which are optional.

All points are float tensors, in meters; a wrong shape or dtype is a ValueError.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.choices import POINT_OPS
from utils.errors import InputError

# Modules that these backends import. Both backends need CUDA tensors.
CUDA_MODULES = {"triton": ("triton",), "extension": ("pointnet2_ops.pointnet2_utils", "knn_cuda")}

# The CUDA operation of the original (pointnet2_ops) takes points with |p|^2 up to this, in m^2, for padding.
FPS_IGNORED_SQUARED_NORM = 1e-3
FPS_INITIAL_SQUARED_DISTANCE = 1e10
INTERPOLATION_EPSILON = 1e-8
MAX_BLOCK_ENTRIES = 1 << 26  # distances in memory at a time: 256 MB


def farthest_point_sample(points: Tensor, n: int, backend: str = "auto") -> Tensor:
    """Pick n of points (B, N, 3), each the farthest from those already picked; returns their indices (B, n) int64.

    The first pick is point 0. Points with |p|^2 <= 1e-3 are never picked after it; once all others are picked, picks
    repeat. Squared distances are direct differences in the dtype of `points`; the lowest index wins a tie.
    Plain form: `reference.farthest_point_sample`.
    """
    _check_points("points", points)
    backend = _choose_backend(backend, points)
    if not 1 <= n <= points.shape[1]:
        raise ValueError(f"cannot pick {n} of {points.shape[1]} points")
    if backend == "extension":
        sampling = importlib.import_module("pointnet2_ops.pointnet2_utils")
        return sampling.furthest_point_sample(points.contiguous(), n).long()
    if backend == "triton":
        coordinates = points.mT.contiguous()
        return _triton_kernels().farthest_point_sample(coordinates, _initial_distances(coordinates), n)
    sample_one = _farthest_point_sample_numpy if backend == "host" else _farthest_point_sample_torch
    return torch.stack([sample_one(cloud, n) for cloud in points])


def knn(queries: Tensor, points: Tensor, k: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Find the k of points (B, N, 3) that are nearest to each of queries (B, M, 3). Plain form: `reference.knn`.

    Returns:
        distance (B, M, k), Euclidean (not squared), ascending, meters; index (B, M, k) int64 into the N points.
    """
    _check_search(queries, points, k)
    backend = _choose_backend(backend, points)
    if backend == "extension":
        search = importlib.import_module("knn_cuda").KNN(k=k, transpose_mode=True)
        distance, index = search(points.contiguous(), queries.contiguous())
        return distance, index.long()
    if backend == "triton":
        return _triton_kernels().knn(queries, points, k)
    search_one = _knn_kd_tree if backend == "host" else _knn_direct
    return _join(torch.stack, [search_one(q, p, k) for q, p in zip(queries, points, strict=True)])


def three_nn_weights(points: Tensor, centers: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Interpolation weights of the three centers (B, G, 3) nearest to each of points (B, N, 3), by direct differences.

    Plain form: alpha of `reference.three_nn_interpolate`, with `exact_distances`.

    Returns:
        weight (B, N, 3), positive, summing to 1: 1 / (d^2 + 1e-8), normalized; index (B, N, 3) int64 into the centers.
    """
    distance, index = knn(points, centers, 3, backend)
    return _inverse_distance_weights(distance.square()), index


def three_nn_weights_expanded(points: Tensor, centers: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`three_nn_weights` from |p|^2 + |c|^2 - 2 p c in fp32, the arithmetic of the published results.

    Half a meter from the camera, rounding changes d^2 by up to 6e-8 m^2, more than the 1e-8 added to it, and can make
    it negative. Features near the centers change by up to 0.4 %, enough to change a few coreset picks in a hundred.
    For two points in a thousand, rounding makes the third and fourth nearest center equally far. All backends except
    "triton" compute this in PyTorch. Plain form: alpha of `reference.three_nn_interpolate`.
    """
    _check_search(points, centers, 3)
    if _choose_backend(backend, points) == "triton":
        squared, index = _triton_kernels().three_nearest(points, centers, expanded=True)
    else:
        squared, index = _join(torch.stack, map(_three_nearest_expanded, points, centers))
    return _inverse_distance_weights(squared), index


def three_nn_interpolate(points: Tensor, centers: Tensor, features: Tensor) -> Tensor:
    """Interpolate features (B, G, C) from centers (B, G, 3) to points (B, N, 3): (B, N, C).

    PointNet++ (Qi et al. 2017), Eq. 2 with k = 3, p = 2. Plain form: `reference.three_nn_interpolate`.
    """
    weight, index = three_nn_weights(points, centers)
    batch = torch.arange(len(features), device=features.device)[:, None, None]
    return (features[batch, index] * weight[..., None].to(features.dtype)).sum(dim=2)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise an InputError unless the backend can be imported and works on the device."""
    modules = CUDA_MODULES.get(backend, ())
    if modules and device.type != "cuda":
        raise InputError(f"--point_ops {backend} needs a GPU, but the device is {device}. Use --point_ops auto.")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"{module} cannot be imported ({error}). Install it or use --point_ops auto.") from None


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim != 3 or points.shape[-1] != 3 or not points.is_floating_point():
        raise ValueError(f"{name} must be a (B, N, 3) float tensor, got {tuple(points.shape)} {points.dtype}")


def _check_search(queries: Tensor, points: Tensor, k: int) -> None:
    _check_points("queries", queries)
    _check_points("points", points)
    if len(queries) != len(points):
        raise ValueError(f"queries and points differ in batch size: {len(queries)} and {len(points)}")
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f"cannot find {k} neighbors among {points.shape[1]} points")


def _choose_backend(backend: str, points: Tensor) -> str:
    """`backend`, or for "auto" the fastest one for these points; "host" means k-d trees and NumPy."""
    if backend not in POINT_OPS:
        raise ValueError(f"backend is {backend!r}, expected one of {POINT_OPS}")
    if backend == "triton" and points.dtype != torch.float32:
        raise ValueError(f"the Triton kernels take float32 points, got {points.dtype}")
    if backend in CUDA_MODULES and not points.is_cuda:
        raise ValueError(f"{backend} works on CUDA tensors, got one on {points.device}")
    if backend != "auto":
        return backend
    if points.device.type == "cpu":
        return "host"
    kernels = points.is_cuda and points.dtype == torch.float32 and importlib.util.find_spec("triton") is not None
    return "triton" if kernels else "torch"


def _triton_kernels() -> Any:
    return importlib.import_module("models.point_ops_triton")


def _join(how: Any, pairs: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (values, index) pairs with torch.stack or torch.cat."""
    values, index = zip(*pairs, strict=True)
    return how(values), how(index)


def _inverse_distance_weights(squared: Tensor) -> Tensor:
    denominator = squared + INTERPOLATION_EPSILON
    # zero only if rounding made a square negative
    weight = 1.0 / denominator.masked_fill(denominator == 0, INTERPOLATION_EPSILON)
    return weight / weight.sum(dim=-1, keepdim=True)


def _initial_distances(coordinates: Tensor) -> Tensor:
    """Initial squared distances (..., N) for coordinates (..., 3, N): -1 for points that are never picked."""
    ignored = coordinates.square().sum(dim=-2) <= FPS_IGNORED_SQUARED_NORM
    return torch.where(ignored, -1.0, FPS_INITIAL_SQUARED_DISTANCE).to(coordinates.dtype)


def _farthest_point_sample_torch(points: Tensor, n: int) -> Tensor:
    coordinates = points.T.contiguous()  # (3, N): each coordinate is one contiguous run
    nearest = _initial_distances(coordinates)
    picks = torch.zeros(n, dtype=torch.int64, device=points.device)
    difference = torch.empty_like(coordinates)
    pick = picks[:1]
    for i in range(1, n):
        torch.sub(coordinates, coordinates[:, pick], out=difference)
        torch.minimum(nearest, difference.square_().sum(dim=0), out=nearest)
        pick = nearest.argmax(dim=0, keepdim=True)
        picks[i : i + 1] = pick
    return picks


def _farthest_point_sample_numpy(points: Tensor, n: int) -> Tensor:
    """`_farthest_point_sample_torch` in NumPy, which is faster in many small steps because it starts no threads."""
    coordinates = np.ascontiguousarray(points.numpy().T)  # (3, N)
    nearest = np.full(len(points), FPS_INITIAL_SQUARED_DISTANCE, coordinates.dtype)
    nearest[np.square(coordinates).sum(axis=0) <= FPS_IGNORED_SQUARED_NORM] = -1.0
    picks = np.zeros(n, dtype=np.int64)
    difference = np.empty_like(coordinates)
    for i in range(1, n):
        np.subtract(coordinates, coordinates[:, picks[i - 1], None], out=difference)
        np.minimum(nearest, np.square(difference, out=difference).sum(axis=0), out=nearest)
        picks[i] = nearest.argmax()
    return torch.from_numpy(picks)


def _knn_kd_tree(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from scipy.spatial import cKDTree

    distance, index = cKDTree(points.numpy()).query(queries.numpy(), k=np.arange(1, k + 1))
    return torch.from_numpy(distance).to(queries.dtype), torch.from_numpy(index)


def _knn_direct(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search in chunks of queries; peak memory is one block of MAX_BLOCK_ENTRIES distances."""
    chunks = queries.split(max(1, MAX_BLOCK_ENTRIES // len(points)))
    distances = (torch.cdist(chunk, points, compute_mode="donot_use_mm_for_euclid_dist") for chunk in chunks)
    return _join(torch.cat, (distance.topk(k, largest=False, sorted=True) for distance in distances))


def _three_nearest_expanded(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Expanded squares (N, 3), ascending, and index (N, 3); peak memory as in `_knn_direct`."""
    norms = centers.square().sum(dim=1)
    found = []
    for chunk in points.split(max(1, MAX_BLOCK_ENTRIES // len(centers))):
        squared = (-2 * (chunk @ centers.T)).add_(chunk.square().sum(dim=1, keepdim=True)).add_(norms)
        smallest, index = squared.topk(min(4, len(centers)), largest=False, sorted=True)
        tied = smallest[:, 2] == smallest[:, -1]  # third and fourth center; the original takes the order of torch.sort
        index[tied, :3] = squared[tied].sort(dim=1).indices[:, :3]
        found.append((smallest[:, :3], index[:, :3]))
    return _join(torch.cat, found)

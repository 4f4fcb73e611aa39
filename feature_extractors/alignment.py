"""Point feature alignment (PFA): features of group centers become a grid of xyz patches.

Fast form of `reference.three_nn_interpolate` and `reference.project_and_pool`. Both steps are linear in the features g
(G, C) of the centers. Interpolation to the N points is A g, where A (N, G) has three weights for each point. The two
poolings together are a sparse matrix P (grid**2, N). A pooling window is a rectangle, so an entry of P is the product
of a row's weight and a column's. (P A) g gives the patches without the paper's feature plane (C, S, S).
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.point_ops import three_nn_weights, three_nn_weights_expanded
from models.point_transformer import PointFeatures


def valid_pixels(xyz: Tensor) -> Tensor:
    """(S, S) bool, True where a pixel of xyz (3, S, S) holds a point: all three coordinates are non-zero and finite."""
    return ((xyz != 0) & torch.isfinite(xyz)).all(dim=0)


def align_to_patches(
    point_features: PointFeatures,
    xyz: Tensor,
    grid: int,
    *,
    exact_distances: bool = False,
    masked: bool = False,
    point_ops: str = "auto",
) -> Tensor:
    """Interpolate to every valid point, project to the pixels, pool to the patch grid.

    Args:
        point_features: of G centers, or of the N valid points themselves.
        xyz: (3, S, S) float32, meters, invalid pixels exactly 0, with N valid points.
        exact_distances: interpolate with direct differences instead of expanded squares.
        masked: average only pixels with a point, and pad the first pooling, AvgPool2d(3, stride 1), by one pixel; the
            second is AdaptiveAvgPool2d(grid). Otherwise the background counts as zero.

    Returns:
        (grid**2, C), row-major; a patch without a valid point is exactly 0.
    """
    valid = valid_pixels(xyz)
    patch, weight = pooling_weights(valid, grid, masked)  # (N, K) each
    features, centers = point_features
    if centers is None:
        pooled = features.new_zeros(grid**2, features.shape[1])
        for k in range(patch.shape[1]):
            pooled.index_add_(0, patch[:, k], weight[:, k, None].to(features.dtype) * features)
        return pooled
    points = xyz[:, valid].T.contiguous()  # (N, 3)
    interpolation = three_nn_weights if exact_distances else three_nn_weights_expanded
    alpha, nearest = (each[0] for each in interpolation(points[None], centers[None], point_ops))  # (N, 3) each
    mixing = features.new_zeros(grid**2 * len(centers))
    entries = patch[:, :, None] * len(centers) + nearest[:, None, :]  # (N, K, 3) flat positions in (grid**2, G)
    mixing.index_add_(0, entries.flatten(), (weight[:, :, None] * alpha[:, None, :]).flatten().to(mixing.dtype))
    return mixing.view(grid**2, len(centers)) @ features


def near_points(xyz_patches: Tensor, grid: int) -> Tensor:
    """Patches near a point of the cloud: (grid**2,) bool, row-major.

    They hold a point or are next to an xyz patch with one. `xyz_patches` (n, C) are row-major over a square grid, which
    may differ, and exactly 0 where there is no point.
    """
    side = math.isqrt(len(xyz_patches))
    occupied = (xyz_patches != 0).any(dim=1).float().view(1, 1, side, side)
    reached = F.max_pool2d(occupied, 3, stride=1, padding=1)
    return F.adaptive_max_pool2d(reached, grid).flatten() > 0


def pooling_weights(valid: Tensor, grid: int, masked: bool) -> tuple[Tensor, Tensor]:
    """Patches (N, K) int64 that each of the N True pixels of valid (S, S) contributes to, and weights (N, K) float32.

    Unused entries have weight 0. For `masked` see align_to_patches.
    """
    bins, shares = _axis_pooling(len(valid), grid, masked, valid.device)
    row, column = valid.nonzero(as_tuple=True)
    patch = (bins[row][:, :, None] * grid + bins[column][:, None, :]).flatten(1)
    weight = (shares[row][:, :, None] * shares[column][:, None, :]).flatten(1)
    if masked:
        total = weight.new_zeros(grid**2).index_add_(0, patch.flatten(), weight.flatten())
        weight = weight / total.clamp_min(torch.finfo(weight.dtype).tiny)[patch]
    return patch, weight.float()


@lru_cache(maxsize=8)
def _axis_pooling(size: int, grid: int, masked: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both poolings along one axis: for each of `size` pixels its bins (size, m) int64 and shares (size, m) float64."""
    first = (np.abs(np.subtract.outer(np.arange(size), np.arange(size))) <= 1) / 3  # the mean of three pixels
    kept = first if masked else first[1:-1]  # without padding there are no windows around the border pixels
    second = np.zeros((grid, len(kept)))
    for i in range(grid):  # the bins of AdaptiveAvgPool: floor of the start, ceiling of the end
        start, stop = i * len(kept) // grid, -(-(i + 1) * len(kept) // grid)
        second[i, start:stop] = 1 / (stop - start)
    pooling = (second @ kept).T  # (size, grid)
    width = int((pooling > 0).sum(axis=1).max())
    bins = np.argsort(-pooling, axis=1, kind="stable")[:, :width]
    shares = np.take_along_axis(pooling, bins, axis=1)
    return torch.from_numpy(bins).to(device), torch.from_numpy(shares).to(device)

"""Point feature alignment (PFA): features of group centers become a grid of xyz patches.

Fast form of `reference.three_nn_interpolate` and `reference.project_and_pool`. Both steps are linear in the features g
(G, C) of the centers. Interpolation to the N points is A g, where A (N, G) has three weights for each point. The two
poolings together are a sparse matrix P (grid**2, N). A pooling window is a rectangle, so an entry of P is the product
of a row's weight and a column's. (P A) g gives the patches without the paper's feature plane (C, S, S).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.point_ops import three_nn_weights, three_nn_weights_expanded
from models.point_transformer import PointFeatures
from utils.memory import upload


class Clouds(NamedTuple):
    """Valid points of B organized clouds of S x S pixels, padded with zeros to the N points of the largest."""

    points: Tensor  # (B, N, 3) float32, meters
    pixels: Tensor  # (B, N) int64, pixel of each point: row * S + column
    counts: list[int]  # valid points of each cloud
    size: int  # S

    def each(self) -> list[Tensor]:
        """Valid points (N_b, 3) of each cloud."""
        return [points[:count] for points, count in zip(self.points, self.counts, strict=True)]

    @property
    def is_point(self) -> Tensor:
        """Mask (B, N) bool, False for padding."""
        number = torch.arange(self.points.shape[1], device=self.points.device)
        return number < upload(torch.tensor(self.counts), self.points.device)[:, None]


def pack_clouds(planes: Sequence[Tensor], device: torch.device | str = "cpu") -> Clouds:
    """Collect the valid points of organized clouds (3, S, S) float32, meters, and copy them to `device`.

    The clouds are on the CPU, where the number of valid points is known without waiting for a GPU.
    """
    valid = [valid_pixels(xyz) for xyz in planes]
    points = [xyz[:, where].T for xyz, where in zip(planes, valid, strict=True)]
    pixels = [where.flatten().nonzero()[:, 0] for where in valid]
    padded, places = (upload(pad_sequence(each, batch_first=True), device) for each in (points, pixels))
    return Clouds(padded, places, [len(each) for each in points], planes[0].shape[-1])


def valid_pixels(xyz: Tensor) -> Tensor:
    """(S, S) bool, True where a pixel of xyz (3, S, S) holds a point: all three coordinates are non-zero and finite."""
    return ((xyz != 0) & torch.isfinite(xyz)).all(dim=0)


def align_to_patches(
    point_features: Sequence[PointFeatures],
    clouds: Clouds,
    grid: int,
    *,
    exact_distances: bool = False,
    masked: bool = False,
    point_ops: str = "auto",
) -> Tensor:
    """Interpolate to every valid point, project to the pixels, pool to the patch grid.

    Args:
        point_features: features of each cloud, at G centers or at the valid points themselves.
        clouds: valid points of B clouds.
        exact_distances: interpolate with direct differences instead of expanded squares.
        masked: average only pixels with a point, and pad the first pooling, AvgPool2d(3, stride 1), by one pixel; the
            second is AdaptiveAvgPool2d(grid). Otherwise the background counts as zero.

    Returns:
        (B, grid**2, C), row-major; a patch without a valid point is exactly 0.
    """
    patch, weight = pooling_weights(clouds, grid, masked)  # (B, N, K) each
    sample = torch.arange(len(patch), device=patch.device)[:, None, None]
    flat = sample * grid**2 + patch  # index among the patches of all samples
    width, dtype = point_features[0].features.shape[1], point_features[0].features.dtype
    weight = weight.to(dtype)
    if point_features[0].centers is None:
        features = pad_sequence([each.features for each in point_features], batch_first=True)  # (B, N, C)
        pooled = features.new_zeros(len(patch) * grid**2, width)
        for k in range(patch.shape[2]):
            pooled.index_add_(0, flat[..., k].flatten(), (weight[..., k, None] * features).flatten(0, 1))
        return pooled.view(len(patch), grid**2, width)
    features = torch.stack([each.features for each in point_features])  # (B, G, C)
    centers = torch.stack([each.centers for each in point_features if each.centers is not None])  # (B, G, 3)
    groups = centers.shape[1]
    interpolation = three_nn_weights if exact_distances else three_nn_weights_expanded
    alpha, nearest = interpolation(clouds.points, centers, point_ops)  # (B, N, 3) each
    mixing = features.new_zeros(len(patch) * grid**2 * groups)
    entries = flat[..., None] * groups + nearest[:, :, None]  # (B, N, K, 3) flat positions in (B, grid**2, G)
    mixing.index_add_(0, entries.flatten(), (weight[..., None] * alpha[:, :, None].to(dtype)).flatten())
    return mixing.view(len(patch), grid**2, groups) @ features


def occupied_patches(xyz: Tensor, grid: int, masked: bool) -> Tensor:
    """Mask (grid**2,) bool, row-major, of the patches of xyz (3, S, S) with a point. `masked`: see align_to_patches."""
    pooling = torch.from_numpy(_axis_pooling(xyz.shape[-1], grid, masked))
    return (pooling.T @ valid_pixels(xyz).double() @ pooling).flatten() > 0


def near_points(occupied: Tensor, grid: int) -> Tensor:
    """Mask (grid**2,) bool, row-major, of the patches near a point of the cloud.

    Such a patch holds a point or is next to an xyz patch with one. `occupied` (n,) bool is True for the xyz patches
    with a point, row-major over a square grid of any side.
    """
    side = math.isqrt(len(occupied))
    reached = F.max_pool2d(occupied.float().view(1, 1, side, side), 3, stride=1, padding=1)
    return F.adaptive_max_pool2d(reached, grid).flatten() > 0


def pooling_weights(clouds: Clouds, grid: int, masked: bool) -> tuple[Tensor, Tensor]:
    """Patches (B, N, K) int64 that each point contributes to, and weights (B, N, K) float32.

    Unused entries and padding have weight 0. For `masked` see align_to_patches.
    """
    bins, shares = _axis_bins(clouds.size, grid, masked, clouds.pixels.device)
    row, column = clouds.pixels // clouds.size, clouds.pixels % clouds.size
    patch = (bins[row][..., :, None] * grid + bins[column][..., None, :]).flatten(2)
    weight = (shares[row][..., :, None] * shares[column][..., None, :]).flatten(2) * clouds.is_point[..., None]
    if masked:
        total = weight.new_zeros(len(patch), grid**2).scatter_add_(1, patch.flatten(1), weight.flatten(1))
        total = total.gather(1, patch.flatten(1)).view_as(weight)
        weight = weight / total.clamp_min_(torch.finfo(weight.dtype).tiny)
    return patch, weight.float()


@lru_cache(maxsize=8)
def _axis_pooling(size: int, grid: int, masked: bool) -> NDArray[np.float64]:
    """Matrix (size, grid) of both poolings along one axis: the share of each pixel in each bin."""
    first = (np.abs(np.subtract.outer(np.arange(size), np.arange(size))) <= 1) / 3  # the mean of three pixels
    kept = first if masked else first[1:-1]  # without padding there are no windows around the border pixels
    second = np.zeros((grid, len(kept)))
    for i in range(grid):  # the bins of AdaptiveAvgPool: floor of the start, ceiling of the end
        start, stop = i * len(kept) // grid, -(-(i + 1) * len(kept) // grid)
        second[i, start:stop] = 1 / (stop - start)
    return (second @ kept).T


@lru_cache(maxsize=8)
def _axis_bins(size: int, grid: int, masked: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bins (size, m) int64 that each pixel is part of in `_axis_pooling`, and its shares (size, m) float64 in them."""
    pooling = _axis_pooling(size, grid, masked)
    width = int((pooling > 0).sum(axis=1).max())
    bins = np.argsort(-pooling, axis=1, kind="stable")[:, :width]
    shares = np.take_along_axis(pooling, bins, axis=1)
    return torch.from_numpy(bins).to(device), torch.from_numpy(shares).to(device)

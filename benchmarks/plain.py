"""The obvious twin of every fast routine: what one writes first, in PyTorch, NumPy and scikit-learn.

The results are those of the project under the reference protocol (tests/test_benchmarks.py holds the two against each
other); nothing is chunked, folded, shared or kept for later.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor

from benchmarks.workload import Networks
from models.group_encoder import GroupEncoder
from models.point_transformer import PointTransformer
from models.rgb_backbone import VisionTransformerBackbone
from utils.records import Sample

# Features


def make_plain(networks: Networks) -> Networks:
    """Set networks to attention in single steps, and batch norm to the statistics of the cloud, as in training."""
    for module in (*networks.rgb.modules(), *networks.xyz.modules()):
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = False  # timm: softmax(q k^T / sqrt(d)) v, written out
    networks.xyz.encoder.train()
    return networks


@torch.inference_mode()
def extract(networks: Networks, sample: Sample, grid: int) -> dict[str, Tensor]:
    """xyz (grid**2, C_xyz) and rgb (rgb_grid**2, C_rgb) patches of one sample."""
    assert sample.xyz is not None
    assert sample.rgb is not None
    xyz = sample.xyz
    points = xyz[:, (xyz != 0).all(dim=0)].T
    tokens, centers = point_tokens(networks.xyz, points)
    return {"xyz": pooled_plane(tokens, centers, xyz, grid), "rgb": rgb_patches(networks.rgb, sample.rgb)}


def rgb_patches(backbone: VisionTransformerBackbone, rgb: Tensor) -> Tensor:
    """(grid_size**2, C) of a picture (3, S, S): the network of timm itself."""
    return backbone.model.forward_features(rgb[None])[0, backbone.prefix_tokens :]


def point_tokens(network: PointTransformer, points: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (G, C) and centers (G, 3) of points (N, 3)."""
    groups, centers = group(points, network.num_group, network.group_size)
    tokens = network.reduce_dim(encode_groups(network.encoder, groups))[None]
    return transform(network, tokens, centers), centers


def group(points: Tensor, num_group: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Groups (G, K, 3) relative to their centers, and centers (G, 3): sampling, then the sorted distance matrix."""
    centers = points[farthest_points(points, num_group)]
    distances = torch.cdist(centers, points, compute_mode="donot_use_mm_for_euclid_dist")
    neighbors = distances.sort(dim=1).indices[:, :group_size]
    return points[neighbors] - centers[:, None], centers


def farthest_points(points: Tensor, n: int) -> list[int]:
    nearest = torch.full((len(points),), 1e10)
    nearest[points.square().sum(dim=1) <= 1e-3] = -1.0  # padding, to the customary CUDA op
    picks = [0]
    for _ in range(n - 1):
        squared = (points - points[picks[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, squared)
        picks.append(int(nearest.argmax()))
    return picks


def encode_groups(encoder: GroupEncoder, groups: Tensor) -> Tensor:
    """Tokens (G, C) of groups (G, K, 3), by the layers of the paper on all points."""
    local = encoder.first_conv(groups.transpose(1, 2))  # (G, 256, K)
    maximum = local.amax(dim=2, keepdim=True).expand_as(local)
    return encoder.second_conv(torch.cat([maximum, local], dim=1)).amax(dim=2)


def transform(network: PointTransformer, tokens: Tensor, centers: Tensor) -> Tensor:
    """(G, 3 * width) of tokens (1, G, width)."""
    position = network.pos_embed(centers)[None]
    outputs = []
    for index, block in enumerate(network.blocks["blocks"].children()):
        tokens = block(tokens + position)
        if index in network.taken:
            outputs.append(network.norm(tokens)[0])
    return torch.cat(outputs, dim=1)


def pooled_plane(tokens: Tensor, centers: Tensor, xyz: Tensor, grid: int) -> Tensor:
    """Interpolate tokens (G, C) to every valid pixel of xyz (3, S, S), pool the (C, S, S) plane: (grid**2, C)."""
    valid = (xyz != 0).all(dim=0)
    points = xyz[:, valid].T
    # |p|^2 + |c|^2 - 2 p c, as the reference computes squared distances
    squared = -2 * points @ centers.T + points.square().sum(1, keepdim=True) + centers.square().sum(1)
    nearest, index = squared.sort(dim=1)
    weight = 1 / (nearest[:, :3] + 1e-8)
    weight = weight / weight.sum(dim=1, keepdim=True)
    plane = tokens.new_zeros(tokens.shape[1], *valid.shape)
    plane[:, valid] = (tokens[index[:, :3]] * weight[:, :, None]).sum(dim=1).T
    pooled = F.adaptive_avg_pool2d(F.avg_pool2d(plane[None], 3, stride=1), grid)
    return pooled[0].flatten(1).T


# Coreset


def project(rows: Tensor, eps: float, random_state: int | None) -> Tensor:
    """Sparse random projection; rows as they are where the lemma asks for more columns than there are."""
    if johnson_lindenstrauss_min_dim(len(rows), eps=eps) > rows.shape[1]:
        return rows
    projection = SparseRandomProjection(eps=eps, random_state=random_state)
    return torch.from_numpy(projection.fit_transform(rows.numpy())).float()


def greedy_coreset(rows: Tensor, n: int, stop: int | None = None) -> Tensor:
    """Greedy k-center from row 0: each pick reads all rows.

    Args:
        rows: (N, D) float32.
        n: picks.
        stop: end after so many and take the first rows left instead of the others: every pick costs the same, so the
            seconds of all are known, and memory and the size of the bank are the true ones.

    Returns:
        (n,) indices in order of selection.
    """
    picks = [0]
    nearest = torch.full((len(rows),), math.inf)
    for _ in range(min(n, stop or n) - 1):
        distance = torch.linalg.vector_norm(rows - rows[picks[-1]], dim=1)
        nearest = torch.minimum(nearest, distance)
        nearest[picks[-1]] = -1.0  # no row twice
        picks.append(int(nearest.argmax()))
    left = np.setdiff1d(np.arange(len(rows)), picks)[: n - len(picks)]
    return torch.from_numpy(np.append(picks, left))


# Scoring


def score_bank(
    patches: Tensor, bank: Tensor, size: int, divisor: float = 1.0, epsilon: float = 0.0
) -> tuple[float, Tensor]:
    """Image score, and map (size, size), of normalized patches (M, D) against a bank (N, D)."""
    distances, order = torch.cdist(patches, bank).sort(dim=1)
    nearest = distances[:, 0]
    m_test = int(nearest.argmax())
    m_star = bank[order[m_test, 0]]
    around = torch.linalg.vector_norm(bank - m_star, dim=1).sort().indices[1:3]
    s_star = nearest[m_test].double() / divisor
    to_neighbors = torch.linalg.vector_norm(bank[around] - patches[m_test], dim=1).double() / divisor
    root = math.sqrt(patches.shape[1])
    weight = 1 - torch.exp(s_star / root) / (torch.exp(to_neighbors / root).sum() + epsilon)
    return float(weight * s_star), blurred_map(nearest, size)


def blurred_map(distances: Tensor, size: int) -> Tensor:
    """Distances (grid**2,) resized to (size, size) and blurred through an 8-bit image."""
    side = math.isqrt(len(distances))
    plane = F.interpolate(distances.view(1, 1, side, side), size=(size, size), mode="bilinear")[0, 0]
    peak = plane.max()
    gray = Image.fromarray((plane / peak * 255).to(torch.uint8).numpy())
    return torch.from_numpy(np.array(gray.filter(ImageFilter.GaussianBlur(radius=4)))) / 255 * peak


# Metrics


def measure_maps(labels: Sequence[int], scores: Sequence[float], masks: np.ndarray, maps: np.ndarray) -> dict[str, Any]:
    """The metrics of utils.metrics.evaluate: one threshold at a time, region by region, a curve for each limit."""
    good = np.sort(maps[masks == 0])[::-1]
    ranks = good.size - 1 - np.linspace(0, good.size - 1, num=100, dtype=int)[::-1]
    at_ranks = [(rank / good.size, mean_overlap(masks, maps > good[rank])) for rank in ranks]
    sampled = np.array([*at_ranks, (1.0, 1.0)])
    return {
        "image_rocauc": roc_auc_score(labels, scores),
        "pixel_rocauc": roc_auc_score(masks.ravel(), maps.ravel()),
        "au_pro": area_below(sampled[:, 0], sampled[:, 1], 0.3),
        "au_pro_exact": {str(limit): area_below(*exact_curve(masks, maps), limit) for limit in (0.3, 0.1, 0.05, 0.01)},
    }


def regions_of(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected regions of a mask (H, W), bool each."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return [labels == number for number in range(1, count + 1)]


def mean_overlap(masks: np.ndarray, above: np.ndarray) -> float:
    """Mean over all regions of the share of the region that is above the threshold."""
    return float(
        np.mean([hit[region].mean() for mask, hit in zip(masks, above, strict=True) for region in regions_of(mask)])
    )


def exact_curve(masks: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False positive rate and mean overlap with every score as the threshold, pixels at it included."""
    thresholds = np.unique(maps)[::-1]
    good = np.sort(maps[masks == 0])
    overlap, count = np.zeros(len(thresholds)), 0
    for mask, plane in zip(masks, maps, strict=True):
        for region in regions_of(mask):
            scores = np.sort(plane[region])
            overlap += 1 - np.searchsorted(scores, thresholds) / scores.size
            count += 1
    fprs = 1 - np.searchsorted(good, thresholds) / good.size
    return np.append(0.0, fprs), np.append(0.0, overlap / count)


def area_below(fprs: np.ndarray, pros: np.ndarray, limit: float) -> float:
    """Trapezoid area up to the limit, divided by it."""
    inside = fprs <= limit
    fprs, pros = np.append(fprs[inside], limit), np.append(pros[inside], np.interp(limit, fprs, pros))
    return float(np.trapezoid(pros, fprs) / limit)

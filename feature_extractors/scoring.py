"""Image scores and anomaly maps of each bank, on the device of the patches, without waiting for a GPU."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from feature_extractors.memory_bank import MemoryBank

REWEIGHTING_NEIGHBORS = 3  # rows nearest to m*, including m* itself
TOP_SHARE = 0.01  # of the pixels of a map, see top_scores
BLUR_SIGMA = 4.0
BLUR_TRUNCATE = 4.0  # radius of the float Gaussian, in units of sigma; SciPy's default
# PIL's 8-bit blur of sigma 4, see box_blur.
BOX_PASSES = 3  # per axis
BOX_RADIUS = 3  # pixels: the box has 7
FIXED_POINT_BITS = 24  # weights are integers, in units of 2^-24
BOX_WEIGHT = 2130440  # of each pixel of the box
EDGE_WEIGHT = 932068  # of the pixel on either side of the box


def image_scores(
    patches: Tensor,
    distances: Tensor,
    index: Tensor,
    bank: MemoryBank,
    divisor: float = 1.0,
    epsilon: float = 0.0,
    left_out: Tensor | None = None,
) -> Tensor:
    """Image scores phi = eta |f* - m*| of PatchCore (Roth et al., CVPR 2022, Eq. 7). Plain: `reference.image_score`.

    f* is the patch farthest from the bank, m* the row nearest to f*, and m are the two rows nearest to m*:
    eta = 1 - exp(|f* - m*| / sqrt(D)) / sum_m exp(|f* - m| / sqrt(D)). Eq. 7 has no sqrt(D). The published code divides
    by it; distances grow with the square root of the width D.

    `distances` (B, P) float32 and `index` (B, P) int64 are those of the nearest row of `bank` to each of the normalized
    `patches` (B, P, D) float32 of B samples. All distances are divided by `divisor`; `epsilon` is added to the sum of
    exponentials. For `left_out` (B,) see MemoryBank.search. Returns phi (B,) float64; 0 <= eta < 1. For a bank of one
    row, phi = |f* - m*|.
    """
    f_star = distances.argmax(dim=1, keepdim=True)  # (B, 1)
    to_m_star = distances.gather(1, f_star).double() / divisor
    neighbors = bank.neighbors(index.gather(1, f_star)[:, 0], REWEIGHTING_NEIGHBORS, left_out)[:, 1:]  # the rows m
    if neighbors.shape[1] == 0:
        return to_m_star[:, 0]
    farthest = patches.gather(1, f_star[..., None].expand(-1, -1, patches.shape[2]))  # (B, 1, D)
    to_neighbors = torch.linalg.vector_norm(bank.rows[neighbors] - farthest, dim=2).double() / divisor  # (B, 2)
    root = math.sqrt(patches.shape[2])
    # Numerator and denominator are divided by exp(|f* - m*| / sqrt(D)), which could overflow.
    total = torch.exp((to_neighbors - to_m_star) / root).sum(dim=1) + epsilon * torch.exp(-to_m_star[:, 0] / root)
    return (1.0 - 1.0 / total) * to_m_star[:, 0]


def top_scores(maps: Tensor) -> Tensor:
    """Image scores (...) float64 of maps (..., H, W): the mean of the highest TOP_SHARE of the pixels of each."""
    pixels = maps.flatten(-2)
    highest = pixels.topk(max(1, int(TOP_SHARE * pixels.shape[-1])), dim=-1).values
    return highest.double().mean(dim=-1)


def anomaly_maps(distances: Sequence[Tensor], size: int, float_blur: bool = False) -> Tensor:
    """Anomaly maps psi (K, B, size, size) float32 of K banks. Plain form: `reference.anomaly_map`.

    The patch distances of B samples, K tensors (B, grid**2) float32, row-major, are resized bilinearly and blurred by
    gaussian_blur.
    """
    planes = []
    for each in distances:
        grid = math.isqrt(each.shape[1])
        patches = each.view(1, -1, grid, grid).float()
        planes.append(F.interpolate(patches, size=(size, size), mode="bilinear", align_corners=False))
    return gaussian_blur(torch.cat(planes), float_blur)


def gaussian_blur(planes: Tensor, float_blur: bool = False) -> Tensor:
    """Blur each of the non-negative maps (..., H, W) float32 with sigma 4. Plain form: in `reference.anomaly_map`.

    The reference goes through an 8-bit image: divide by the maximum, times 255, truncate, PIL's GaussianBlur(4), and
    back. `float_blur` computes the Gaussian in float64, with repeated borders as in PIL.
    """
    if float_blur:
        vertical, horizontal = (_gaussian_matrix(size, planes.device) for size in planes.shape[-2:])
        return (vertical @ planes.double() @ horizontal.T).float()
    maximum = planes.amax(dim=(-2, -1), keepdim=True)
    levels = (planes / torch.where(maximum > 0, maximum, 1.0)).mul(255).byte()
    return blur_8_bit(levels).float().div(255) * maximum


def blur_8_bit(images: Tensor) -> Tensor:
    """PIL's ImageFilter.GaussianBlur(4) of (..., H, W) uint8 images; on a GPU the same, bit for bit."""
    if images.device.type == "cpu":
        blur = ImageFilter.GaussianBlur(BLUR_SIGMA)
        planes = [Image.fromarray(plane).filter(blur) for plane in images.reshape(-1, *images.shape[-2:]).numpy()]
        return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).view_as(images)
    return box_blur(images)


def box_blur(images: Tensor) -> Tensor:
    """PIL's GaussianBlur(4) of (..., H, W) uint8 images by operations of torch.

    PIL filters each axis with three boxes of fractional radius (Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering", SSVM 2011), with repeated borders, and rounds to 8 bits after every pass.
    """
    values = images.int() - 128  # the weights add up to 2^24, so values around zero keep the sums within 32 bits
    for dim in (-1, -2):
        for _ in range(BOX_PASSES):
            values = _box_pass(values, dim)
    return (values + 128).byte()


def _box_pass(values: Tensor, dim: int) -> Tensor:
    size, reach = values.shape[dim], BOX_RADIUS + 1
    index = torch.arange(-reach, size + reach, device=values.device).clamp_(0, size - 1)
    padded = values.index_select(dim, index)
    first, second, *inner, last = (padded.narrow(dim, offset, size) for offset in range(2 * reach + 1))
    box, edges = second.clone(), first + last
    for each in inner:
        box += each
    half = 1 << (FIXED_POINT_BITS - 1)
    return box.mul_(BOX_WEIGHT).add_(edges, alpha=EDGE_WEIGHT).add_(half).bitwise_right_shift_(FIXED_POINT_BITS)


@lru_cache(maxsize=8)
def _gaussian_matrix(size: int, device: torch.device) -> Tensor:
    """Matrix (size, size) float64 that blurs along an axis, with repeated borders; row i has the weights of pixel i."""
    radius = int(BLUR_TRUNCATE * BLUR_SIGMA + 0.5)
    offset = np.arange(-radius, radius + 1)
    weight = np.exp(-0.5 * (offset / BLUR_SIGMA) ** 2)
    pixel = np.arange(size)[:, None]
    matrix = np.zeros((size, size))
    np.add.at(matrix, (pixel, (pixel + offset).clip(0, size - 1)), weight / weight.sum())
    return torch.from_numpy(matrix).to(device)

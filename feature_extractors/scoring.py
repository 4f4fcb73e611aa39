"""From a sample's patches to its image score and its anomaly map, for one bank."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor

from feature_extractors.memory_bank import MemoryBank

# The paper re-weights with the three bank rows nearest to m*, m* itself left out.
REWEIGHTING_NEIGHBORS = 3
BLUR_SIGMA = 4.0


def image_score(
    patches: Tensor,
    distances: Tensor,
    index: Tensor,
    bank: MemoryBank,
    divisor: float = 1.0,
    epsilon: float = 0.0,
) -> float:
    """The image score s of PatchCore (Roth et al., CVPR 2022, Eq. 7), as M3DM uses it.

    m_test is the patch farthest from the bank, at distance s*, and m* its nearest bank row. With N_b the bank rows
    nearest to m*, m* itself left out: w = 1 - exp(s* / sqrt(D)) / sum_{m in N_b} exp(|m_test - m| / sqrt(D)); s = w s*.

    Args:
        patches: (M, D) float32, normalised.
        distances: (M,) to the nearest bank row of each patch.
        index: (M,) that row.
        bank: the memory bank.
        divisor: distances are divided by it first.
        epsilon: added to the sum of exponentials.

    Returns:
        s; 0 <= w < 1. A bank of one row, which has no N_b, gives s = s*.
    """
    m_test = int(distances.argmax())
    s_star = float(distances[m_test]) / divisor
    neighborhood = bank.neighbors(int(index[m_test]), REWEIGHTING_NEIGHBORS)[1:]
    if len(neighborhood) == 0:
        return s_star
    to_neighbors = torch.linalg.vector_norm(bank.rows[neighborhood] - patches[m_test], dim=1).double() / divisor
    root = math.sqrt(patches.shape[1])
    # exp(s*) is taken out of the fraction, so that large distances do not overflow
    total = float(torch.exp((to_neighbors - s_star) / root).sum()) + epsilon * math.exp(-s_star / root)
    return (1.0 - 1.0 / total) * s_star


def anomaly_map(distances: Tensor, size: int, float_blur: bool = False) -> Tensor:
    """Distances on their grid become a smooth map.

    Args:
        distances: (grid**2,) float32, row-major.
        size: side of the map, pixels.
        float_blur: see gaussian_blur.

    Returns:
        (size, size) float32 on the CPU: bilinear resize, then Gaussian blur of radius 4.
    """
    grid = math.isqrt(len(distances))
    plane = distances.view(1, 1, grid, grid).float()
    resized = F.interpolate(plane, size=(size, size), mode="bilinear", align_corners=False)[0, 0].cpu()
    return gaussian_blur(resized, float_blur)


def gaussian_blur(plane: Tensor, float_blur: bool = False) -> Tensor:
    """Blur a non-negative (H, W) float32 map with sigma 4.

    The reference goes through an 8-bit image: divide by the maximum, times 255, truncate, PIL's GaussianBlur(4), and
    back. `float_blur` is the Gaussian itself, borders repeated as PIL repeats them.
    """
    if float_blur:
        return torch.from_numpy(gaussian_filter(plane.numpy(), BLUR_SIGMA, mode="nearest"))
    maximum = plane.max()
    if maximum <= 0:
        return torch.zeros_like(plane)
    image = Image.fromarray((plane / maximum).mul(255).byte().numpy())
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(radius=BLUR_SIGMA)), dtype=np.float32)
    return torch.from_numpy(blurred).div(255) * maximum

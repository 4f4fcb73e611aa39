"""AU-PRO: area under the per-region overlap curve, exact or at the 100 thresholds of the MVTec evaluation.

A region is an 8-connected component of one ground truth. At a threshold, PRO is the mean over all regions of the share
of the region above it, and FPR the share of all anomaly-free pixels above it (Bergmann et al., "The MVTec 3D-AD
Dataset", VISAPP 2022, section 4).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

EIGHT_NEIGHBORS = np.ones((3, 3), dtype=int)

Images = Sequence[ArrayLike] | NDArray  # (N, H, W), or N arrays (H, W) of any sizes
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
ThinCurve = tuple[list[float], list[float]]  # few points of a curve: false positive rates, ascending, and values


class UndefinedMetricError(ValueError):
    """The data are valid but all good or all defective, so the metric has no value."""


def au_pro(masks: Images, anomaly_maps: Images, limit: float = 0.3, num_thresholds: int | None = None) -> float:
    """Area under the PRO curve up to FPR `limit`, divided by it; arguments as in `pro_curve` and `area_to_limit`."""
    return area_to_limit(*pro_curve(masks, anomaly_maps, num_thresholds), limit)


def pro_curve(masks: Images, anomaly_maps: Images, num_thresholds: int | None = None) -> Curve:
    """PRO curve over all maps together, from the highest threshold to the lowest.

    `masks` are (N, H, W), or N arrays (H, W) of any sizes, 1 = defect (above 0.5 counts); `anomaly_maps` are float of
    the same shapes, larger = more anomalous. `num_thresholds` is None for one point per distinct score, or T for T
    equidistant ranks of the anomaly-free scores, 100 in the published metric.

    Returns fprs and pros, (P,) float64 in [0, 1], both ascending, fprs from 0 to 1 and the last point (1, 1).
    P = 1 + distinct scores, or T + 1. Peak memory of the exact curve: about 50 bytes per pixel.

    Raises UndefinedMetricError for no sample, no defective or no anomaly-free pixel (a ValueError), and ValueError for
    shapes that differ, scores that are NaN or infinite, fewer than two thresholds.
    """
    if num_thresholds is not None and num_thresholds < 2:
        raise ValueError(f"num_thresholds is {num_thresholds}; expected at least 2, or None for the exact curve")
    scores, weights = _scores_and_weights(masks, anomaly_maps)
    if not weights.any():
        raise UndefinedMetricError("no ground truth has a defective pixel, so there is no region to overlap with")
    if weights.all():
        raise UndefinedMetricError("no ground truth has an anomaly-free pixel, so there is no false positive rate")
    if num_thresholds is None:
        return _exact_curve(scores, weights)
    return _curve_at_ranks(scores, weights, num_thresholds)


def area_to_limit(fprs: NDArray, pros: NDArray, limit: float = 0.3) -> float:
    """Trapezoid area of a curve (P,), (P,) from FPR 0 to `limit`, interpolated at the limit and divided by it.

    Raises ValueError for a limit outside (0, 1], or for a curve that does not ascend from FPR 0 to the limit.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"the limit of the false positive rate is {limit}; expected a value above 0 and up to 1")
    if fprs[0] != 0 or fprs[-1] < limit or np.any(np.diff(fprs) < 0):
        raise ValueError(f"the curve runs from FPR {fprs[0]} to {fprs[-1]}; expected to ascend from 0 to {limit}")
    inside = int(np.searchsorted(fprs, limit, side="right"))  # points at the limit itself are inside
    area = np.trapezoid(pros[:inside], fprs[:inside])
    if fprs[inside - 1] < limit:
        last = slice(inside - 1, inside + 1)  # the segment that crosses the limit
        at_limit = np.interp(limit, fprs[last], pros[last])
        area += 0.5 * (pros[inside - 1] + at_limit) * (limit - fprs[inside - 1])
    return float(area / limit)


def thin_curve(fprs: NDArray, pros: NDArray, limit: float, count: int = 200) -> ThinCurve:
    """At most `count` points of a curve up to FPR `limit`, denser near 0, where it is steep."""
    wanted = limit * np.linspace(0, 1, count - 2) ** 2
    index = np.unique(np.append(0, np.searchsorted(fprs, wanted, side="right") - 1))
    return [*fprs[index].tolist(), limit], [*pros[index].tolist(), float(np.interp(limit, fprs, pros))]


def checked_pixels(masks: Images, anomaly_maps: Images) -> list[tuple[NDArray[np.bool_], NDArray]]:
    """Checked pairs of mask (H, W) bool and map (H, W) float; errors as in `pro_curve`."""
    if len(masks) != len(anomaly_maps):
        raise ValueError(f"{len(masks)} masks for {len(anomaly_maps)} anomaly maps; expected one mask for each map")
    if len(masks) == 0:
        raise UndefinedMetricError("there is no sample to evaluate")
    pairs = []
    for number, (given_mask, given_map) in enumerate(zip(masks, anomaly_maps, strict=True)):
        mask, anomaly_map = np.asarray(given_mask) > 0.5, np.asarray(given_map)
        if mask.ndim != 2 or mask.shape != anomaly_map.shape:
            shapes = f"mask of shape {mask.shape}, anomaly map of shape {anomaly_map.shape}"
            raise ValueError(f"sample {number}: {shapes}; expected the same (H, W) for both")
        if not np.isfinite(anomaly_map).all():
            raise ValueError(f"the anomaly map of sample {number} holds NaN or infinite values")
        pairs.append((mask, anomaly_map))
    return pairs


def _scores_and_weights(masks: Images, anomaly_maps: Images) -> tuple[NDArray, NDArray[np.float64]]:
    """Score (P,) and weight (P,) of all pixels: 1 / size of the pixel's region, 0 in anomaly-free pixels."""
    from scipy import ndimage

    scores, weights = [], []
    for mask, anomaly_map in checked_pixels(masks, anomaly_maps):
        regions, _ = ndimage.label(mask, structure=EIGHT_NEIGHBORS)
        weight_of = 1.0 / np.maximum(np.bincount(regions.ravel()), 1)
        weight_of[0] = 0.0  # label 0 is the anomaly-free area
        weights.append(weight_of[regions.ravel()])
        scores.append(anomaly_map.ravel())
    return np.concatenate(scores), np.concatenate(weights)


def _exact_curve(scores: NDArray, weights: NDArray[np.float64]) -> Curve:
    """Curve with (0, 0) and one point per distinct score, at which all pixels of that score are above the threshold."""
    order = np.argsort(scores)[::-1]
    scores, weights = scores[order], weights[order]
    last_of_tie = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
    false_positives = np.cumsum(weights == 0)[last_of_tie]
    overlap = np.cumsum(weights)[last_of_tie]
    # dividing by the rounded sum rather than the number of regions makes the last point exactly 1
    fprs, pros = false_positives / false_positives[-1], overlap / overlap[-1]
    return np.append(0.0, fprs), np.append(0.0, pros)


def _curve_at_ranks(scores: NDArray, weights: NDArray[np.float64], num_thresholds: int) -> Curve:
    """Curve of the official evaluation: thresholds at equidistant ranks of the anomaly-free scores, then (1, 1).

    PRO counts pixels strictly above the threshold, but FPR comes from the rank, so it is too large for tied scores.
    """
    normal = np.sort(scores[weights == 0])
    ranks = np.linspace(0, normal.size - 1, num=num_thresholds, dtype=int)[::-1]
    fprs = 1.0 - (ranks + 1) / normal.size

    defect, region_weight = scores[weights > 0], weights[weights > 0]
    order = np.argsort(defect)
    missed = np.append(0.0, np.cumsum(region_weight[order]))  # weight of the k lowest defect pixels
    pros = 1.0 - missed[np.searchsorted(defect[order], normal[ranks], side="right")] / missed[-1]
    return np.append(fprs, 1.0), np.append(pros, 1.0)

"""Metrics of one class: I-AUROC, P-AUROC and AU-PRO, and the quality of its decisions."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.au_pro import (
    Images,
    ThinCurve,
    UndefinedMetricError,
    area_to_limit,
    au_pro,
    checked_pixels,
    pro_curve,
    thin_curve,
)

LATENCY_PERCENTILES = (50, 95, 99)
REFERENCE_LIMIT = 0.3
REFERENCE_THRESHOLDS = 100  # of the official MVTec 3D-AD evaluation
EXACT_LIMITS = ("0.3", "0.1", "0.05", "0.01")  # keys of results.json
PRO_LIMIT = max(map(float, EXACT_LIMITS))  # false positive rate at which the PRO curve of the report ends

logger = logging.getLogger(__name__)


def image_rocauc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image scores (N,), larger = more anomalous, and labels (N,), 1 = defective.

    Raises UndefinedMetricError if all samples are good or all are defective, ValueError if the shapes differ or a
    score is NaN or infinite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} differ in shape; expected (N,) for both")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of sample {np.flatnonzero(~np.isfinite(scores))[0]} is NaN or infinite")
    return _rocauc(labels > 0.5, scores, "samples")


def pixel_rocauc(masks: Images, anomaly_maps: Images) -> float:
    """Area under the ROC curve of all pixels; arguments and errors as in `utils.au_pro.pro_curve`."""
    pairs = checked_pixels(masks, anomaly_maps)
    defective = np.concatenate([mask.ravel() for mask, _ in pairs])
    return _rocauc(defective, np.concatenate([anomaly_map.ravel() for _, anomaly_map in pairs]), "pixels")


def evaluate(
    labels: ArrayLike, scores: ArrayLike, masks: Images, anomaly_maps: Images
) -> tuple[dict[str, Any], ThinCurve | None]:
    """Metrics of one class under the keys of results.json, unrounded, and its PRO curve, thinned, up to PRO_LIMIT.

    Both are None, with a warning, where undefined. Arguments and ValueErrors are those of the single metrics. `au_pro`
    is the published metric (limit 0.3, 100 thresholds), `au_pro_exact` the area under the exact curve by limit.
    """
    curve = _or_none("AU-PRO (exact curve)", pro_curve, masks, anomaly_maps)
    published = masks, anomaly_maps, REFERENCE_LIMIT, REFERENCE_THRESHOLDS
    metrics = {
        "image_rocauc": _or_none("I-AUROC", image_rocauc, labels, scores),
        "pixel_rocauc": _or_none("P-AUROC", pixel_rocauc, masks, anomaly_maps),
        "au_pro": _or_none("AU-PRO (100 thresholds)", au_pro, *published),
        "au_pro_exact": {key: area_to_limit(curve[0], curve[1], float(key)) if curve else None for key in EXACT_LIMITS},
    }
    return metrics, thin_curve(curve[0], curve[1], PRO_LIMIT) if curve else None


def undefined_metrics() -> dict[str, Any]:
    """The metrics of `evaluate` without samples to measure them on, all None."""
    areas: dict[str, Any] = dict.fromkeys(("image_rocauc", "pixel_rocauc", "au_pro"))
    return areas | {"au_pro_exact": dict.fromkeys(EXACT_LIMITS)}


def decision_metrics(labels: ArrayLike, scores: ArrayLike, threshold: float | None) -> dict[str, float | None]:
    """Quality of the decision "anomalous if the score is above the threshold", under the keys of results.json.

    Labels are (N,), 1 = defective; scores (N,) finite float. Ratios with a denominator of 0 are None. Returns
    `precision`, `recall` and `false_alarm_rate` (share of good samples called anomalous) at the threshold, None without
    one; `f1`, the best F1 of any threshold, and `f1_threshold`, the largest score that gives it as a threshold, or a
    value just below all scores. f1 uses the labels: an upper bound, not an estimate.
    """
    defective, values = np.asarray(labels) > 0.5, np.asarray(scores, dtype=np.float64)
    figures: dict[str, float | None] = dict.fromkeys(("f1", "f1_threshold", "precision", "recall", "false_alarm_rate"))
    if defective.any():
        figures |= _best_f1(defective, values)
    if threshold is not None:
        alarms = values > threshold
        figures["precision"] = _share(defective, of=alarms)
        figures["recall"] = _share(alarms, of=defective)
        figures["false_alarm_rate"] = _share(alarms, of=~defective)
    return figures


def latency_percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Percentiles {"p50", "p95", "p99"} of the seconds per sample, linearly interpolated."""
    values = np.percentile(list(seconds), LATENCY_PERCENTILES).tolist()
    return {f"p{percent}": value for percent, value in zip(LATENCY_PERCENTILES, values, strict=True)}


def mean_over_classes(classes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric of `evaluate` over classes by name. None values are left out; a mean of none is None."""
    entries = classes.values()
    keys = ("image_rocauc", "pixel_rocauc", "au_pro")
    means: dict[str, Any] = {key: mean_of_known(entry[key] for entry in entries) for key in keys}
    exact = [entry["au_pro_exact"] for entry in entries]
    return means | {"au_pro_exact": {limit: mean_of_known(each[limit] for each in exact) for limit in EXACT_LIMITS}}


def _best_f1(defective: NDArray[np.bool_], scores: NDArray[np.float64]) -> dict[str, float | None]:
    """Best F1 over all distinct thresholds: the scores, and one value below all of them."""
    thresholds = np.unique(scores)[::-1]
    thresholds = np.append(thresholds, np.nextafter(thresholds[-1], -np.inf))
    called = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")
    hits = defective.sum() - np.searchsorted(np.sort(scores[defective]), thresholds, side="right")
    f1 = 2 * hits / (called + defective.sum())
    best = int(f1.argmax())  # the first maximum is at the highest threshold
    return {"f1": float(f1[best]), "f1_threshold": float(thresholds[best])}


def _share(chosen: NDArray[np.bool_], of: NDArray[np.bool_]) -> float | None:
    return float((chosen & of).sum() / of.sum()) if of.any() else None


def _rocauc(positive: NDArray[np.bool_], scores: NDArray, things: str) -> float:
    if positive.all() or not positive.any():
        label = "defective" if positive.all() else "good"
        raise UndefinedMetricError(f"all {positive.size} {things} are {label}, and a ROC curve needs both")
    from sklearn.metrics import auc, roc_curve

    return float(auc(*roc_curve(positive, scores)[:2]))


def _or_none(name: str, metric: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return metric(*arguments)
    except UndefinedMetricError as error:
        logger.warning("%s is undefined: %s", name, error)
        return None


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def deviation_of_known(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation, with the divisor n - 1; None for fewer than two values."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None

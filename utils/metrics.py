"""The figures of one class from its labels, scores, masks and maps: I-AUROC, P-AUROC and AU-PRO."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from utils.au_pro import Images, UndefinedMetricError, area_to_limit, au_pro, checked_pixels, pro_curve

REFERENCE_LIMIT = 0.3
REFERENCE_THRESHOLDS = 100  # of the official MVTec 3D-AD evaluation
EXACT_LIMITS = ("0.3", "0.1", "0.05", "0.01")  # as they are keyed in results.json

logger = logging.getLogger(__name__)


def image_rocauc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of whole parts.

    labels (N,) 0-1, 1 = defective; scores (N,) float, larger = more anomalous. Raises UndefinedMetricError where only
    one kind of part is present, ValueError for shapes that differ and scores that are NaN or infinite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} differ in shape; expected (N,) for both")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of sample {np.flatnonzero(~np.isfinite(scores))[0]} is NaN or infinite")
    return _rocauc(labels > 0.5, scores, "parts")


def pixel_rocauc(masks: Images, anomaly_maps: Images) -> float:
    """Area under the ROC curve of all pixels together; arguments and errors as in `utils.au_pro.pro_curve`."""
    pairs = checked_pixels(masks, anomaly_maps)
    defective = np.concatenate([mask.ravel() for mask, _ in pairs])
    return _rocauc(defective, np.concatenate([anomaly_map.ravel() for _, anomaly_map in pairs]), "pixels")


def evaluate(labels: ArrayLike, scores: ArrayLike, masks: Images, anomaly_maps: Images) -> dict[str, Any]:
    """The metrics of one class under the keys of results.json, unrounded.

    labels (N,) 0-1 and scores (N,) float of the parts; masks and anomaly_maps (N, H, W). `au_pro` is the published
    figure (limit 0.3, 100 thresholds), `au_pro_exact` the exact curve by limit. A metric that the data leave undefined
    is None, and a warning says why. Raises ValueError as the single metrics do.
    """

    def exact_areas() -> dict[str, float]:
        fprs, pros = pro_curve(masks, anomaly_maps)
        return {limit: area_to_limit(fprs, pros, float(limit)) for limit in EXACT_LIMITS}

    def reference_area() -> float:
        return au_pro(masks, anomaly_maps, REFERENCE_LIMIT, REFERENCE_THRESHOLDS)

    return {
        "image_rocauc": _or_none("I-AUROC", lambda: image_rocauc(labels, scores)),
        "pixel_rocauc": _or_none("P-AUROC", lambda: pixel_rocauc(masks, anomaly_maps)),
        "au_pro": _or_none("AU-PRO (100 thresholds)", reference_area),
        "au_pro_exact": _or_none("AU-PRO (exact curve)", exact_areas) or dict.fromkeys(EXACT_LIMITS),
    }


def mean_over_classes(classes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric over {class: metrics of `evaluate`}, of unrounded values; other keys are ignored.

    A value of None is left out; the mean is None where no class has a value.
    """
    means: dict[str, Any] = {
        key: _mean(metrics[key] for metrics in classes.values()) for key in ("image_rocauc", "pixel_rocauc", "au_pro")
    }
    means["au_pro_exact"] = {
        limit: _mean(metrics["au_pro_exact"][limit] for metrics in classes.values()) for limit in EXACT_LIMITS
    }
    return means


def _rocauc(positive: NDArray[np.bool_], scores: NDArray, things: str) -> float:
    if positive.all() or not positive.any():
        kind = "defective" if positive.all() else "good"
        raise UndefinedMetricError(f"all {positive.size} {things} are {kind}, and a ROC curve needs both kinds")
    return float(roc_auc_score(positive, scores))


def _or_none(name: str, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except UndefinedMetricError as error:
        logger.warning("%s is undefined: %s", name, error)
        return None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None

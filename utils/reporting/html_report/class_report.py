"""What the report keeps of an evaluated class: its figures, its curves thinned, and the shown parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from utils.au_pro import UndefinedMetricError, pro_curve
from utils.metrics import EXACT_LIMITS
from utils.reporting.html_report.gallery import Decision, JudgedPart, ReadArray, gallery, outcome

CURVE_POINTS = 200
PRO_LIMIT = max(map(float, EXACT_LIMITS))  # false positive rate at which the PRO curve is cut off

Curve = tuple[NDArray, NDArray]  # (P,) false positive rates, ascending, and (P,) what they buy


class ClassReport(NamedTuple):
    """A class on its page; the maps and predictions it comes from need not be kept."""

    name: str
    entry: Mapping[str, Any]  # of results.json
    decision: Decision | None  # None: undefined for want of defective or of good parts
    outcomes: Mapping[str, int]  # how many parts of the whole split
    roc: Curve | None
    pro: Curve | None
    good_scores: NDArray
    defective_scores: NDArray
    parts: list[dict[str, Any]]  # see `gallery`

    @property
    def total(self) -> int:
        return len(self.good_scores) + len(self.defective_scores)


def report_class(
    name: str,
    entry: Mapping[str, Any],
    parts: Sequence[JudgedPart],
    read_rgb: ReadArray,
    read_cloud: ReadArray,
    limit: int,
) -> ClassReport:
    """Condense the evaluation of a class; arguments as in `gallery`, `entry` is the class's in results.json."""
    decision = decide(entry)
    labels = np.array([part.label for part in parts])
    scores = np.array([part.prediction.score for part in parts])
    return ClassReport(
        name,
        entry,
        decision,
        Counter(outcome(part, decision) for part in parts),
        _roc(labels, scores),
        _pro(parts),
        scores[labels == 0],
        scores[labels == 1],
        gallery(parts, decision, limit, read_rgb, read_cloud),
    )


def decide(entry: Mapping[str, Any]) -> Decision | None:
    """The calibrated threshold of a class, else the one of the best F1, else None."""
    calibrated = entry.get("threshold")
    if calibrated is not None:
        source = (
            f"calibrated on {calibrated['parts']} good parts of the {calibrated['source']} split for a false-alarm "
            f"rate of {calibrated['target_fpr']:.3g}"
        )
        least = 1 / (calibrated["parts"] + 1)
        if calibrated["target_fpr"] < least * (1 - 1e-9):
            source += f", though so few parts allow {least:.2g} at best"
        if calibrated["source"] == "training":
            source += "; the scores of training parts run low, so that more alarms are to be expected"
        return Decision(calibrated["image"], source)
    if entry.get("f1_threshold") is not None:
        return Decision(entry["f1_threshold"], "not calibrated, the one of the best F1 on these very parts")
    return None


def _roc(labels: NDArray, scores: NDArray) -> Curve | None:
    if labels.all() or not labels.any():
        return None
    fprs, tprs, _ = roc_curve(labels, scores)
    return fprs, tprs


def _pro(parts: Sequence[JudgedPart]) -> Curve | None:
    try:
        fprs, pros = pro_curve(
            [part.mask.numpy() for part in parts], [part.prediction.anomaly_map.numpy() for part in parts]
        )
    except UndefinedMetricError:
        return None
    return thin_curve(fprs, pros)


def thin_curve(fprs: NDArray, pros: NDArray) -> Curve:
    """The exact curve up to PRO_LIMIT through at most CURVE_POINTS of its points, dense where it is steep, near 0."""
    wanted = PRO_LIMIT * np.linspace(0, 1, CURVE_POINTS - 2) ** 2
    index = np.unique(np.append(0, np.searchsorted(fprs, wanted, side="right") - 1))
    return np.append(fprs[index], PRO_LIMIT), np.append(pros[index], np.interp(PRO_LIMIT, fprs, pros))

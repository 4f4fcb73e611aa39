"""Report of an evaluated class: metrics, thinned curves, scores, and the shown samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from utils.au_pro import UndefinedMetricError, pro_curve
from utils.metrics import EXACT_LIMITS
from utils.records import SampleResult
from utils.reporting.html_report.gallery import Decision, ReadArray, gallery, outcome

CURVE_POINTS = 200
PRO_LIMIT = max(map(float, EXACT_LIMITS))  # false positive rate at which the PRO curve ends

Curve = tuple[list[float], list[float]]  # false positive rates, ascending, and the curve's values at them


class ClassReport(msgspec.Struct, frozen=True):
    """One class of the report, without its maps, so small enough to keep."""

    name: str
    entry: dict[str, Any]  # of results.json
    decision: Decision | None  # None: undefined without defective or without good samples
    outcomes: dict[str, int]  # number of samples of the whole split
    roc: Curve | None
    pro: Curve | None
    good_scores: list[float]
    defective_scores: list[float]
    samples: list[dict[str, Any]] = msgspec.field(name="parts")  # see `gallery`

    @property
    def total(self) -> int:
        return len(self.good_scores) + len(self.defective_scores)


def report_class(
    name: str,
    entry: Mapping[str, Any],
    samples: Sequence[SampleResult],
    read_rgb: ReadArray,
    read_cloud: ReadArray,
    limit: int,
) -> ClassReport:
    """Condense the evaluation of a class; `entry` is its entry in results.json, the other arguments as in `gallery`."""
    decision = decide(entry)
    labels = np.array([sample.label for sample in samples])
    scores = np.array([sample.prediction.score for sample in samples])
    return ClassReport(
        name,
        dict(entry),
        decision,
        dict(Counter(outcome(sample, decision) for sample in samples)),
        _roc(labels, scores),
        _pro(samples),
        scores[labels == 0].tolist(),
        scores[labels == 1].tolist(),
        gallery(samples, decision, limit, read_rgb, read_cloud),
    )


def decide(entry: Mapping[str, Any]) -> Decision | None:
    """Return the calibrated threshold of a class, else the threshold of the best F1, else None."""
    calibrated = entry.get("threshold")
    if calibrated is not None:
        source = (
            f"calibrated on {calibrated['parts']} good samples of the {calibrated['source']} split for a false-alarm "
            f"rate of {calibrated['target_fpr']:.3g}"
        )
        lowest = 1 / (calibrated["parts"] + 1)
        if calibrated["target_fpr"] < lowest * (1 - 1e-9):
            source += f", though so few samples allow {lowest:.2g} at best"
        if calibrated["source"] == "training":
            source += "; training samples score low, so expect more false alarms"
        return Decision(calibrated["image"], source)
    if entry.get("f1_threshold") is not None:
        return Decision(entry["f1_threshold"], "not calibrated, but the threshold of the best F1 on these samples")
    return None


def _roc(labels: NDArray, scores: NDArray) -> Curve | None:
    from sklearn.metrics import roc_curve

    if labels.all() or not labels.any():
        return None
    fprs, tprs, _ = roc_curve(labels, scores)
    return fprs.tolist(), tprs.tolist()


def _pro(samples: Sequence[SampleResult]) -> Curve | None:
    masks = [sample.mask.numpy() for sample in samples]
    maps = [sample.prediction.anomaly_map.numpy() for sample in samples]
    try:
        return thin_curve(*pro_curve(masks, maps))
    except UndefinedMetricError:
        return None


def thin_curve(fprs: NDArray, pros: NDArray) -> Curve:
    """Thin the exact curve up to PRO_LIMIT to at most CURVE_POINTS of its points, denser near 0, where it is steep."""
    wanted = PRO_LIMIT * np.linspace(0, 1, CURVE_POINTS - 2) ** 2
    index = np.unique(np.append(0, np.searchsorted(fprs, wanted, side="right") - 1))
    end = float(np.interp(PRO_LIMIT, fprs, pros))
    return [*fprs[index].tolist(), PRO_LIMIT], [*pros[index].tolist(), end]

"""Report of an evaluated class: its entry of results.json, the PRO curve, and the shown samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from utils.au_pro import ThinCurve
from utils.records import SampleResult
from utils.reporting.html_report.gallery import Decision, ReadArray, gallery, outcome


class ClassReport(msgspec.Struct, frozen=True):
    """One class of the report, without its maps, so small enough to keep."""

    name: str
    entry: dict[str, Any]  # of results.json
    pro: ThinCurve | None
    samples: list[dict[str, Any]]  # of the gallery

    @property
    def total(self) -> int:
        return len(self.entry["samples"])

    @property
    def defective(self) -> int:
        return sum(sample["label"] for sample in self.entry["samples"])

    @property
    def decision(self) -> Decision | None:
        """Threshold of the class, see `decide`."""
        return decide(self.entry)

    @property
    def outcomes(self) -> Counter[str]:
        """Number of samples by outcome."""
        threshold = self.decision and self.decision.threshold
        return Counter(outcome(sample["label"], sample["score"], threshold) for sample in self.entry["samples"])


def report_class(
    name: str,
    entry: Mapping[str, Any],
    samples: Sequence[SampleResult],
    pro_curve: ThinCurve | None,
    read_rgb: ReadArray,
    read_cloud: ReadArray,
    limit: int,
) -> ClassReport:
    """Condense an evaluation: `entry` of results.json, `pro_curve` of `metrics.evaluate`, the rest as in `gallery`.

    The samples are those of the entry, in its order.
    """
    severities = [sample["severity"] for sample in entry["samples"]]
    shown = gallery(samples, severities, decide(entry), limit, read_rgb, read_cloud)
    return ClassReport(name, dict(entry), pro_curve, shown)


def decide(entry: Mapping[str, Any]) -> Decision | None:
    """Return the calibrated threshold of a class, else the threshold of the best F1, else None."""
    calibrated = entry["threshold"]
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
        return Decision(calibrated["image"], source, calibrated["pixel"])
    if entry["f1_threshold"] is not None:
        return Decision(entry["f1_threshold"], "not calibrated, but the threshold of the best F1 on these samples")
    return None

"""Page of the comparison of two runs, with signed bars."""

from utils.reporting.comparison import Comparison, MetricDifference, Pair, signed
from utils.reporting.html_report.page import render_page

LEAST_SCALE = 0.01  # smallest difference that may fill a bar, so that rounding does not look like progress


def comparison_page(comparison: Comparison) -> str:
    """The page as text."""
    metrics = comparison.metrics
    return render_page(
        "comparison.html",
        title="B against A",
        comparison=comparison,
        headings=[_heading(metric.title) for metric in metrics],
        pairs_of=lambda name: [(metric, metric.classes[name]) for metric in metrics],
        means=[(metric, metric.mean) for metric in metrics],
        kind=_kind,
        share=_share,
        signed=signed,
        least_scale=LEAST_SCALE,
    )


def _heading(title: str) -> tuple[str, str]:
    """Name and detail of a metric: "AU-PRO" and "limit 0.3 exact curve"."""
    name, _, detail = title.replace(" at ", ", ").partition(", ")
    return name, detail.replace(", ", " ")


def _kind(metric: MetricDifference, pair: Pair) -> str:
    """Class of a cell: gain, loss, or none if three decimals show no difference."""
    if pair.difference is None or signed(pair.difference) == "0.000":
        return ""
    return "gain" if metric.sign * pair.difference > 0 else "loss"


def _share(metric: MetricDifference, pair: Pair) -> float:
    """Length of a bar, percent."""
    differences = [each.difference for each in metric.classes.values()]
    scale = max([LEAST_SCALE, *(abs(each) for each in differences if each is not None)])
    return 100 * min(abs(pair.difference or 0) / scale, 1)

"""Comparison of two runs: metrics of each class, their differences, and the arguments and versions that differ."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS
from utils.reporting.html_report.page import render_page
from utils.reporting.results_json import ClassResults, read_results
from utils.reporting.tables import UNDEFINED, aligned, number, one_line

LEAST_SCALE = 0.01  # smallest difference that fills a bar, so that rounding does not look like progress
LOWER_IS_BETTER = "False-alarm rate at the calibrated threshold (lower is better)"


class Pair(NamedTuple):
    """A metric in both runs; None where it is undefined."""

    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a


class MetricDifference(NamedTuple):
    """One metric in both runs, by class."""

    title: str
    sign: int  # 1: more is better, -1: less is better
    classes: dict[str, Pair]
    mean: Pair  # over the classes for which both runs have a value
    averaged: int  # number of these classes

    @property
    def mean_label(self) -> str:
        return "Mean" if self.averaged == len(self.classes) else f"Mean of the {self.averaged} that both have"

    def change(self, pair: Pair) -> str:
        """Style of a cell: gain, loss, or "" if three decimals show no difference."""
        if pair.difference is None or signed(pair.difference) == "0.000":
            return ""
        return "gain" if self.sign * pair.difference > 0 else "loss"

    def share(self, pair: Pair) -> float:
        """Length of a bar, percent."""
        differences = [each.difference for each in self.classes.values()]
        scale = max([LEAST_SCALE, *(abs(each) for each in differences if each is not None)])
        return 100 * min(abs(pair.difference or 0) / scale, 1)


class Comparison(NamedTuple):
    """Run B against run A."""

    names: tuple[str, str]  # files and methods
    metrics: list[MetricDifference]
    remarks: list[str]  # sentences on classes that are not compared
    args: dict[str, tuple[str, str]]  # arguments that differ, as text
    versions: dict[str, tuple[str, str]]  # likewise


def compare(path_a: Path, path_b: Path) -> Comparison:
    """Compare two results.json files; errors as in `read_results`."""
    a, b = read_results(path_a), read_results(path_b)
    both = [name for name in a.classes if name in b.classes]
    metrics = list(_differences(a.classes, b.classes, both))
    return Comparison(
        (f"{path_a} ({a.args.get('method_name', '?')})", f"{path_b} ({b.args.get('method_name', '?')})"),
        metrics,
        list(_remarks(a.classes, b.classes)) + ([] if metrics else ["The runs share no class with a metric."]),
        _differing(a.args, b.args),
        _differing(a.versions, b.versions),
    )


def _metrics_of(entry: ClassResults) -> dict[str, float | None]:
    """Metrics of a class by title."""
    return {
        "I-AUROC": entry.image_rocauc,
        "P-AUROC": entry.pixel_rocauc,
        f"AU-PRO, limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds": entry.au_pro,
        **{f"AU-PRO, limit {limit}, exact curve": entry.au_pro_exact.get(limit) for limit in EXACT_LIMITS},
        "F1 at its best threshold": entry.f1,
        "Precision at the calibrated threshold": entry.precision,
        "Recall at the calibrated threshold": entry.recall,
        LOWER_IS_BETTER: entry.false_alarm_rate,
    }


def _differences(
    a: Mapping[str, ClassResults], b: Mapping[str, ClassResults], names: list[str]
) -> Iterator[MetricDifference]:
    """Differences of every metric that either run has for one of the classes."""
    of_a, of_b = ({name: _metrics_of(run[name]) for name in names} for run in (a, b))
    for title in _metrics_of(ClassResults()):
        pairs = {name: Pair(of_a[name][title], of_b[name][title]) for name in names}
        if all(pair == (None, None) for pair in pairs.values()):
            continue
        defined = [pair for pair in pairs.values() if pair.difference is not None]
        mean = Pair(*np.mean(np.array(defined, dtype=float), axis=0).tolist()) if defined else Pair(None, None)
        yield MetricDifference(title, -1 if title == LOWER_IS_BETTER else 1, pairs, mean, len(defined))


def _remarks(a: Mapping[str, ClassResults], b: Mapping[str, ClassResults]) -> Iterator[str]:
    for run, own, other in (("A", a, b), ("B", b, a)):
        if alone := [one_line(name) for name in own if name not in other]:
            yield f"Only in {run}, and left out of the means: {', '.join(alone)}."
    for name in a:
        counts = (len(a[name].samples), len(b[name].samples) if name in b else 0)
        if all(counts) and counts[0] != counts[1]:
            yield f"{one_line(name)} has {counts[0]} test samples in A, {counts[1]} in B."


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    def text(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"

    pairs = {key: (text(a, key), text(b, key)) for key in dict.fromkeys([*a, *b])}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def comparison_page(comparison: Comparison) -> str:
    """Format the comparison as HTML, with a signed bar for each difference."""
    return render_page(
        "comparison.html",
        title="B against A",
        comparison=comparison,
        headings=[_heading(metric.title) for metric in comparison.metrics],
        signed=signed,
        least_scale=LEAST_SCALE,
    )


def _heading(title: str) -> tuple[str, str]:
    """Name and detail of a metric: "AU-PRO" and "limit 0.3 exact curve"."""
    name, _, detail = title.replace(" at ", ", ").partition(", ")
    return name, detail.replace(", ", " ")


def signed(value: float | None) -> str:
    """Text of a difference with its sign; 0.000 has none."""
    text = UNDEFINED if value is None else f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def format_comparison(comparison: Comparison) -> str:
    """Format the comparison as aligned text."""
    blocks = [[f"A: {one_line(comparison.names[0])}", f"B: {one_line(comparison.names[1])}"]]
    for metric in comparison.metrics:
        pairs = [*metric.classes.items(), (metric.mean_label, metric.mean)]
        rows = [[one_line(label), number(pair.a), number(pair.b), signed(pair.difference)] for label, pair in pairs]
        blocks.append([metric.title, *aligned([["", "A", "B", "B - A"], *rows])])
    blocks += [[remark] for remark in comparison.remarks]
    for title, differing in (("Arguments", comparison.args), ("Versions", comparison.versions)):
        if differing:
            blocks.append([f"{title} that differ:", *(f"  {key}: {a} -> {b}" for key, (a, b) in differing.items())])
    return "\n\n".join("\n".join(block) for block in blocks)

"""Charts as inline SVG or HTML, colored by the style sheet and readable without a script."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from utils.reporting.html_report.page import environment

WIDTH, HEIGHT = 340, 240
LEFT, TOP, RIGHT, FLOOR = 52, 12, 328, 200  # edges of the plot
SEVERITIES = (-1, 5)  # axis of a strip plot, the same for all classes and runs
EDGE = 2.0  # margin on both sides of the axis, percent of the width of a strip plot
GOLDEN = 0.618  # spreads the dots of a row evenly over its height
NO_SEVERITY = "image score; there is no severity without a threshold above the median of good samples"


class Axis(NamedTuple):
    """Limits, ticks and name of the horizontal axis."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str


def curve_chart(
    xs: ArrayLike, ys: ArrayLike, x_axis: Axis, y_label: str, title: str, point: tuple[float, float] | None = None
) -> Markup:
    """A curve (P,), (P,) with y in [0, 1], the area below it, and its point at the threshold."""
    template = environment().get_template("chart.svg")
    px, py = _across(xs, x_axis), _up(ys)
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(px, py, strict=True))
    svg = template.render(
        {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "floor": FLOOR},
        x_axis=x_axis,
        y_label=y_label,
        title=title,
        paths=[("area", f"M{px[0]:.1f} {FLOOR}L{line}L{px[-1]:.1f} {FLOOR}Z"), ("curve", f"M{line}")],
        point=None if point is None else (float(_across(point[0], x_axis)), float(_up(point[1]))),
        across=_across,
        up=_up,
    )
    return Markup(svg)  # noqa: S704 (the template has escaped its values)


def _across(values: ArrayLike, axis: Axis) -> NDArray:
    return LEFT + (np.asarray(values) - axis.low) / (axis.high - axis.low) * (RIGHT - LEFT)


def _up(values: ArrayLike) -> NDArray:
    return FLOOR - np.asarray(values) * (FLOOR - TOP)


class StripRow(NamedTuple):
    """The samples of one folder of a split."""

    name: str
    note: str
    defective: bool
    dots: list[tuple[float, float, str, str]]  # x and y in percent, path, and value


class Strip(NamedTuple):
    """Strip plot; x is in percent of its width."""

    label: str
    ticks: list[tuple[float, str]]
    threshold: float | None
    rows: list[StripRow]


def strip_plot(samples: Sequence[Mapping[str, Any]], threshold: float | None) -> Strip:
    """Strip plot of samples of results.json, at least one: a dot at the severity, or at the score without severities.

    Each folder has a row, with the good samples first. Severities beyond SEVERITIES are drawn at the edges.
    """
    by_severity = all(sample["severity"] is not None for sample in samples)
    key, label, marked = "score", NO_SEVERITY, threshold
    ticks: Sequence[float]
    if by_severity:
        key, label, marked = "severity", "severity", 1.0
        ticks = range(SEVERITIES[0], SEVERITIES[1] + 1)
    else:
        scores = [sample["score"] for sample in samples]
        ticks = sorted({min(scores), max(scores)} | ({threshold} if threshold is not None else set()))

    def place(value: float) -> float:
        return round(float(np.interp(value, (ticks[0], ticks[-1]), (EDGE, 100 - EDGE))), 2)

    folders: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample[key]):
        folders.setdefault(PurePosixPath(sample["path"]).parent.name, []).append(sample)
    rows = []
    for name, group in sorted(folders.items(), key=lambda each: (each[1][0]["label"], each[0])):
        heights = [round(14 + 72 * ((0.5 + k * GOLDEN) % 1), 1) for k in range(len(group))]
        dots = [(place(each[key]), y, each["path"], f"{each[key]:.3g}") for each, y in zip(group, heights, strict=True)]
        rows.append(StripRow(name, _row_note(group, threshold), bool(group[0]["label"]), dots))
    return Strip(label, [(place(x), f"{x:.3g}") for x in ticks], None if marked is None else place(marked), rows)


def _row_note(samples: Sequence[Mapping[str, Any]], threshold: float | None) -> str:
    count = len(samples)
    if threshold is None:
        return f"{count} sample{'s' * (count != 1)}"
    called = sum(sample["score"] > threshold for sample in samples)
    return f"{'found' if samples[0]['label'] else 'false alarms'}: {called} of {count}"

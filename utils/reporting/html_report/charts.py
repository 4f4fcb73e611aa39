"""Charts as inline SVG or HTML, colored by the style sheet and readable without a script."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from utils.reporting.html_report.page import environment

WIDTH, HEIGHT = 340, 240
LEFT, TOP, RIGHT, FLOOR = 52, 12, 328, 200  # edges of the plot
SEVERITIES = (-1, 5)  # axis of a strip plot, the same for all classes and runs
EDGE = 2.0  # percent of the width of a strip plot beside its axis
GOLDEN = 0.618  # spreads the dots of a row evenly over its height


class Axis(NamedTuple):
    """Limits, ticks and name of an axis."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str


def curve_chart(
    xs: ArrayLike, ys: ArrayLike, x_axis: Axis, y_label: str, title: str, point: tuple[float, float] | None = None
) -> Markup:
    """A curve (P,), (P,) with y in [0, 1], the area below it, and its point at the threshold."""
    y_axis = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), y_label)
    px, py = _across(np.asarray(xs), x_axis), _up(np.asarray(ys), y_axis)
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(px, py, strict=True))
    paths = [("area", f"M{px[0]:.1f} {FLOOR}L{line}L{px[-1]:.1f} {FLOOR}Z"), ("curve", f"M{line}")]
    if point is None:
        return _render(x_axis, y_axis, title, paths=paths)
    x, y = float(_across(point[0], x_axis)), float(_up(point[1], y_axis))
    # A good curve runs along the top, so the label of a high point goes below it.
    note = _note(x, y + 18 if y < TOP + 90 else y - 10, 8)
    return _render(x_axis, y_axis, title, paths=paths, point=(x, y), note=note)


class Dot(NamedTuple):
    """A sample in a strip plot: its place in percent, and its value."""

    x: float
    y: float
    path: str
    text: str


class StripRow(NamedTuple):
    """The samples of one folder of a split."""

    name: str
    note: str
    defective: bool
    dots: list[Dot]


class Strip(NamedTuple):
    """Strip plot; places are in percent of its width."""

    label: str
    ticks: list[tuple[float, str]]
    threshold: float | None
    rows: list[StripRow]


def strip_plot(samples: Sequence[Mapping[str, Any]], threshold: float | None) -> Strip:
    """A dot for each of the samples of results.json, at least one: at its severity, or at its score without one.

    Each folder has a row, the good samples the first. Severities beyond SEVERITIES are drawn at the edges.
    """
    by_severity = all(sample["severity"] is not None for sample in samples)
    key, marked = ("severity", 1.0) if by_severity else ("score", threshold)
    scores = [sample["score"] for sample in samples] + ([] if threshold is None else [threshold])
    low, high = SEVERITIES if by_severity else (min(scores), max(scores))
    ticks = range(low, high + 1) if by_severity else sorted({low, high, low if marked is None else marked})
    place = partial(_percent, low=low, high=high)
    folders: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample[key]):
        folders.setdefault(PurePosixPath(sample["path"]).parent.name, []).append(sample)
    rows = [
        StripRow(
            name,
            _row_note(group, threshold),
            bool(group[0]["label"]),
            [
                Dot(place(each[key]), round(14 + 72 * ((0.5 + k * GOLDEN) % 1), 1), each["path"], f"{each[key]:.3g}")
                for k, each in enumerate(group)
            ],
        )
        for name, group in sorted(folders.items(), key=lambda each: (each[1][0]["label"], each[0]))
    ]
    label = (
        "severity" if by_severity else "image score; no severity without a threshold above the median of good samples"
    )
    return Strip(
        label, [(place(tick), f"{tick:.3g}") for tick in ticks], None if marked is None else place(marked), rows
    )


def _percent(value: float, low: float, high: float) -> float:
    """Place of a value on an axis, percent of the strip plot's width."""
    span = max(high - low, 1e-12 * max(abs(low), abs(high)), 1e-300)
    return round(EDGE + (100 - 2 * EDGE) * min(max((value - low) / span, 0.0), 1.0), 2)


def _row_note(samples: Sequence[Mapping[str, Any]], threshold: float | None) -> str:
    if threshold is None:
        return f"{len(samples)} samples"
    called = sum(sample["score"] > threshold for sample in samples)
    return f"{called} of {len(samples)} {'found' if samples[0]['label'] else 'false alarms'}"


def _note(x: float, y: float, gap: float) -> dict[str, Any]:
    """Place of the threshold's label, on the roomier side of its mark."""
    left = x > WIDTH / 2
    return {"x": x - gap if left else x + gap, "y": y, "anchor": "end" if left else "start"}


def _render(x_axis: Axis, y_axis: Axis, title: str, **shapes: Any) -> Markup:
    """Render the chart with the paths, the point and the note in `shapes`."""
    edges = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "floor": FLOOR}
    values = {"x_axis": x_axis, "y_axis": y_axis, "title": title, "point": None, "note": None}
    svg = environment().get_template("chart.svg").render(values | edges | shapes, across=_across, up=_up)
    return Markup(svg)  # noqa: S704 (the template has escaped its values)


def _across(values: ArrayLike, axis: Axis) -> NDArray:
    return LEFT + (np.asarray(values) - axis.low) / (axis.high - axis.low) * (RIGHT - LEFT)


def _up(values: ArrayLike, axis: Axis) -> NDArray:
    return FLOOR - (np.asarray(values) - axis.low) / (axis.high - axis.low) * (FLOOR - TOP)

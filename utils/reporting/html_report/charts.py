"""Charts as inline SVG, colored by the style sheet and readable without a script."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from utils.reporting.html_report.page import environment

WIDTH, HEIGHT = 340, 240
LEFT, TOP, RIGHT, FLOOR = 52, 12, 328, 200  # edges of the plot
MOST_BINS = 28


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


def histogram(good: ArrayLike, defective: ArrayLike, threshold: float | None, title: str) -> Markup:
    """Histogram of the scores of good (G,) and defective (D,) samples, at least one, with a line at the threshold."""
    scores = {"good": np.asarray(good, dtype=float), "defective": np.asarray(defective, dtype=float)}
    edges = _edges(np.concatenate([*scores.values(), [] if threshold is None else [threshold]]), threshold)
    # A score on an edge counts to the left, since a score equal to the threshold is no alarm.
    counts = {name: np.histogram(-each, -edges[::-1])[0][::-1] for name, each in scores.items()}
    tallest = max(int(each.max()) for each in counts.values())
    low, high = float(edges[0]), float(edges[-1])
    x_axis = Axis(low, high, (low, (low + high) / 2, high), "image score")
    y_axis = Axis(0, tallest * 1.12, sorted({0, (tallest + 1) // 2, tallest}), "samples")
    paths = [(name, _bars(edges, each, x_axis, y_axis)) for name, each in counts.items() if each.any()]
    if threshold is None:
        return _render(x_axis, y_axis, title, paths=paths)
    x = float(_across(threshold, x_axis))
    paths.append(("threshold", f"M{x:.1f} {TOP}V{FLOOR}"))
    return _render(x_axis, y_axis, title, paths=paths, note=_note(x, TOP + 9, 4))


def _edges(values: NDArray, threshold: float | None) -> NDArray:
    """Edges of equal bins over all values; the threshold is one of them."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # equal but for rounding
        reach = max(0.5, abs(low) / 2)
        low, high = low - reach, high + reach
    bins = int(np.clip(2.5 * np.sqrt(values.size), 8, MOST_BINS))
    step = (high - low) / bins
    if threshold is None:
        return np.linspace(low, high, bins + 1)
    below, above = max(1, math.ceil((threshold - low) / step - 1e-9)), math.ceil((high - threshold) / step - 1e-9)
    edges = threshold + step * np.arange(-below, above + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # no sample may fall outside by rounding
    return edges


def _bars(edges: NDArray, counts: NDArray, x_axis: Axis, y_axis: Axis) -> str:
    x, tops = _across(edges, x_axis), _up(counts, y_axis)
    return "".join(f"M{x[k]:.1f} {FLOOR}V{tops[k]:.1f}h{x[k + 1] - x[k]:.1f}V{FLOOR}Z" for k in np.flatnonzero(counts))


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

"""Charts as inline SVG: readable without a script, colored by the style sheet, so that they follow dark mode."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.reporting.html_report.markup import escape

WIDTH, HEIGHT = 340, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40  # around the plot
MOST_BINS = 28


class Axis(NamedTuple):
    """What an axis shows: its limits, where its marks stand, and its name."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str


class Point(NamedTuple):
    """A marked point of a curve."""

    x: float
    y: float
    label: str


def curve_chart(
    xs: ArrayLike, ys: ArrayLike, x_axis: Axis, y_label: str, title: str, point: Point | None = None
) -> str:
    """A curve (P,), (P,) over [0, 1] with the area below it, and a point on it."""
    y_axis = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), y_label)
    px, py = _across(np.asarray(xs), x_axis), _up(np.asarray(ys), y_axis)
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(px, py, strict=True))
    floor = HEIGHT - BOTTOM
    marks = [
        f'<path class="area" d="M{px[0]:.1f} {floor}L{line}L{px[-1]:.1f} {floor}Z"/>',
        f'<path class="curve" d="M{line}"/>',
    ]
    if point is not None:
        x, y = _across(point.x, x_axis), _up(point.y, y_axis)
        below = y + 18 if y < TOP + 90 else y - 10  # away from the curve, which runs along the top where it is good
        marks.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        marks.append(_note(float(x), float(below), 8, point.label))
    return _chart(x_axis, y_axis, marks, title)


def histogram(good: ArrayLike, defective: ArrayLike, threshold: float | None, title: str) -> str:
    """How many good and defective parts have which score, with a line at the threshold.

    good (G,) and defective (D,) float scores, of which at least one is there.
    """
    good, defective = np.asarray(good, dtype=float), np.asarray(defective, dtype=float)
    edges = _edges(np.concatenate([good, defective, [] if threshold is None else [threshold]]), threshold)
    low, high = float(edges[0]), float(edges[-1])
    counts = {  # a score of an edge is in the bin to its left, as one of the threshold is no alarm
        kind: np.histogram(-scores, -edges[::-1])[0][::-1]
        for kind, scores in (("good", good), ("defective", defective))
    }
    tallest = max(int(each.max()) for each in counts.values())
    x_axis = Axis(low, high, (low, (low + high) / 2, high), "image score")
    y_axis = Axis(0, tallest * 1.12, sorted({0, (tallest + 1) // 2, tallest}), "parts")
    marks = [_bars(edges, each, x_axis, y_axis, kind) for kind, each in counts.items()]
    if threshold is not None:
        x = float(_across(threshold, x_axis))
        marks.append(f'<path class="threshold" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        marks.append(_note(x, TOP + 9, 4, "threshold"))
    return _chart(x_axis, y_axis, marks, title)


def _note(x: float, y: float, gap: float, text: str) -> str:
    """A text beside a mark, on the side where there is more room."""
    anchor, shift = ("end", -gap) if x > WIDTH / 2 else ("start", gap)
    return f'<text class="note" x="{x + shift:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _edges(values: NDArray, threshold: float | None) -> NDArray:
    """Edges of equal bins over all values, the threshold being one of them."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # equal, but for rounding
        reach = max(0.5, abs(low) / 2)
        low, high = low - reach, high + reach
    bins = int(np.clip(2.5 * np.sqrt(values.size), 8, MOST_BINS))
    step = (high - low) / bins
    if threshold is None:
        return np.linspace(low, high, bins + 1)
    below, above = max(1, math.ceil((threshold - low) / step - 1e-9)), math.ceil((high - threshold) / step - 1e-9)
    edges = threshold + step * np.arange(-below, above + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # rounding must lose no part
    return edges


def _bars(edges: NDArray, counts: NDArray, x_axis: Axis, y_axis: Axis, kind: str) -> str:
    steps = []
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            x, top = float(_across(left, x_axis)), float(_up(count, y_axis))
            width = float(_across(right, x_axis)) - x
            steps.append(f"M{x:.1f} {HEIGHT - BOTTOM}V{top:.1f}h{width:.1f}V{HEIGHT - BOTTOM}Z")
    return f'<path class="{kind}" d="{"".join(steps)}"/>' if steps else ""


def _chart(x_axis: Axis, y_axis: Axis, marks: Sequence[str], title: str) -> str:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks:
        y = float(_up(tick, y_axis))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in x_axis.ticks:
        x = float(_across(tick, x_axis))
        label = f"{tick:.3g}"
        anchor = "end" if tick == x_axis.high else "start" if tick == x_axis.low and len(label) > 3 else "middle"
        parts.append(f'<path class="grid" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}">{label}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')
    parts += marks
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_axis.label)}</text>')
    parts.append(
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}</text></svg>'
    )
    return "".join(parts)


def _across(values: ArrayLike, axis: Axis) -> NDArray:
    return LEFT + (np.asarray(values) - axis.low) / (axis.high - axis.low) * (WIDTH - LEFT - RIGHT)


def _up(values: ArrayLike, axis: Axis) -> NDArray:
    return HEIGHT - BOTTOM - (np.asarray(values) - axis.low) / (axis.high - axis.low) * (HEIGHT - TOP - BOTTOM)

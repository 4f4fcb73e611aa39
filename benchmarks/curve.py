"""Figure of the cost of fitting a class against its number of training samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.class_run import ClassRun
from benchmarks.figures import new_axes, save_figure

SAMPLES = (10, 400)  # range of the figure; the largest class of MVTec 3D-AD has 361
QUADRATIC = ("pick", "score")  # stages of the plain form whose time grows with the square of the samples
DURATIONS = {0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}  # ticks
STYLES = {"plain": ("0.35", "s"), "fp32": ("tab:blue", "o"), "bf16": ("tab:orange", "^")}


def seconds_law(runs: Sequence[ClassRun]) -> Callable[[np.ndarray], np.ndarray]:
    """Time of the plain form by number of training samples, from its largest run: a linear and a quadratic part."""
    last = runs[-1]
    square = sum(last.seconds[stage] for stage in QUADRATIC)
    return lambda samples: (last.seconds["fit"] - square) * samples / last.train + square * (samples / last.train) ** 2


def memory_law(runs: Sequence[ClassRun]) -> Callable[[np.ndarray], np.ndarray]:
    """Peak GB of the plain form: a line through its first and last run, or from its start if there is only one run."""
    first, last = runs[0], runs[-1]
    below = (first.train, first.peak_mb) if len(runs) > 1 else (0, first.start_mb)
    slope = (last.peak_mb - below[1]) / (last.train - below[0])
    return lambda samples: (last.peak_mb + slope * (samples - last.train)) / 1024


def draw_curve(path: Path, runs: Mapping[str, Sequence[ClassRun]]) -> None:
    """Draw fitting time and peak memory: measured points, and the law of the plain form as a dashed line."""
    left, right = new_axes(9.6, 4.0, columns=2)
    beyond = np.geomspace(min(SAMPLES[0], runs["plain"][0].train), SAMPLES[1], 50)
    _draw_law(left, beyond, seconds_law(runs["plain"])(beyond), lambda value: f"{value / 3600:.2g} h")
    _draw_law(right, beyond, memory_law(runs["plain"])(beyond), lambda value: f"{value:.2g} GB")
    for form, found in runs.items():
        color, marker = STYLES[form]
        label = "plain form" if form == "plain" else f"this repository, {form}"
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "label": label,
            "linestyle": "" if form == "plain" else "-",
        }
        samples = [run.train for run in found]
        left.plot(samples, [run.seconds["fit"] for run in found], markersize=6, **style)
        right.plot(samples, [run.peak_mb / 1024 for run in found], markersize=6, **style)
    left.set_yticks(list(DURATIONS), labels=list(DURATIONS.values()))
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g} GB"))
    left.set_title("Time to fit a class")
    right.set_title("Peak resident memory")
    left.legend(frameon=False)
    save_figure(left, path)


def _draw_law(axes: Axes, samples: np.ndarray, values: np.ndarray, describe: Callable[[float], str]) -> None:
    color, _ = STYLES["plain"]
    axes.plot(samples, values, "--", color=color, linewidth=1.2, zorder=1, label="scaling law of the plain form")
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": color}
    axes.annotate(describe(values[-1]), (samples[-1], values[-1]), (-4, 4), **place)
    axes.set(xscale="log", yscale="log", xlabel="training samples")
    axes.set_xticks([10, 20, 40, 100, 200, 400], labels=["10", "20", "40", "100", "200", "400"])
    axes.minorticks_off()
    axes.set_ymargin(0.1)
    axes.grid(which="major", color="0.92")
    axes.set_axisbelow(True)

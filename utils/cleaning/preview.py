"""Contact sheet of scans before and after cleaning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.cleaning.cloud_cleaning import CleanScan
from utils.scans.files import atomic_path
from utils.scans.organized_pc import valid_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
COLUMNS = ("image", "depth", "cleaned image", "cleaned depth")


class Pair(NamedTuple):
    """A scan before and after cleaning; `clean` is None if the scan was refused."""

    rgb: np.ndarray  # (H, W, 3) uint8
    xyz: np.ndarray  # (H, W, 3) float32, meters
    clean: CleanScan | None
    reason: str = ""  # why the scan was refused or is doubtful


def write_preview(path: Path, pairs: Mapping[str, Pair]) -> None:
    """Draw a row for each named scan, with the reason to doubt or refuse it. The cleaned depth sets the colors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(COLUMNS), 2.6 * len(pairs) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(pairs), len(COLUMNS), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axes, (name, pair) in zip(rows, pairs.items(), strict=True):
        shown = pair.xyz if pair.clean is None else pair.clean.xyz
        depth = shown[..., 2][valid_mask(shown)]
        limits = (float(depth.min()), float(depth.max())) if depth.size else (0.0, 1.0)
        axes[0].imshow(pair.rgb)
        _draw_depth(axes[1], pair.xyz, limits)
        if pair.clean is not None:
            axes[2].imshow(pair.clean.rgb)
            _draw_depth(axes[3], pair.clean.xyz, limits)
        axes[0].set_ylabel(name, fontsize=8, parse_math=False)
        status = f"{'refused' if pair.clean is None else 'doubtful'}: {pair.reason}" if pair.reason else ""
        axes[2].set_xlabel(textwrap.fill(status, 44), fontsize=7, parse_math=False)
    for each, title in zip(rows[0], COLUMNS, strict=True):
        each.set_title(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_depth(axes: Axes, xyz: np.ndarray, limits: tuple[float, float]) -> None:
    depth = np.where(valid_mask(xyz), xyz[..., 2], np.nan)
    axes.set_facecolor("black")  # no measurement
    axes.imshow(depth, cmap="viridis_r", vmin=limits[0], vmax=limits[1])

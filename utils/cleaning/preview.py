"""Contact sheet of scans before and after cleaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.errors import InputError
from utils.scans.files import atomic_path
from utils.scans.organized_pc import valid_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
COLUMNS = ("image", "depth", "cleaned image", "cleaned depth")


class Pair(NamedTuple):
    """A scan before and after cleaning."""

    rgb: np.ndarray  # (H, W, 3) uint8
    xyz: np.ndarray  # (H, W, 3) float32, meters
    clean_rgb: np.ndarray  # (S, S, 3)
    clean_xyz: np.ndarray  # (S, S, 3)
    clean_gt: np.ndarray | None = None  # (S, S)


def check_format(path: Path) -> None:
    """Raise InputError for a path whose suffix names no format of a contact sheet."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--preview {path} names no image format. End it in one of {', '.join(FORMATS)}.")


def write_preview(path: Path, pairs: Mapping[str, Pair]) -> None:
    """Draw a row for each named scan, in the format of the suffix. The cleaned depth sets the colors of both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(COLUMNS), 2.6 * len(pairs) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(pairs), len(COLUMNS), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axes, (name, pair) in zip(rows, pairs.items(), strict=True):
        depth = pair.clean_xyz[..., 2][valid_mask(pair.clean_xyz)]
        limits = (float(depth.min()), float(depth.max()))
        axes[0].imshow(pair.rgb)
        _draw_depth(axes[1], pair.xyz, limits)
        axes[2].imshow(pair.clean_rgb)
        _draw_depth(axes[3], pair.clean_xyz, limits)
        axes[0].set_ylabel(name, fontsize=8, parse_math=False)
    for each, title in zip(rows[0], COLUMNS, strict=True):
        each.set_title(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_depth(axes: Axes, xyz: np.ndarray, limits: tuple[float, float]) -> None:
    depth = np.where(valid_mask(xyz), xyz[..., 2], np.nan)
    axes.set_facecolor("black")  # no measurement
    axes.imshow(depth, cmap="viridis_r", vmin=limits[0], vmax=limits[1])

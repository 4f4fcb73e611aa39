"""Images of predictions: anomaly maps as the official evaluation reads them, overlays, and a figure per sample."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from utils.scans.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FUSED = "fused"  # key of the fused map in `scale`, beside the names of the banks
HEAT = "inferno"
OUTLINE = "#00e5ff"  # cyan is not a heat color, so it shows on image and heat alike
OVERLAY_OPACITY = 0.85  # at the upper end of the scale
FAINT = 0.8  # the heat begins at this share of the way from the lower end to the threshold
PANEL_INCHES, GAP, HEAD, FOOT = 2.1, 0.08, 0.52, 0.36  # a panel, between panels, above and below the row
DPI = 110
OVERLAY_SIDE = 1024  # pixels of an overlay at most


class _Panel(NamedTuple):
    title: str
    image: NDArray | None = None  # (H, W, 3) uint8, at the bottom
    heat: NDArray | None = None  # (S, S) float, above it
    limits: tuple[float, float] = (0.0, 1.0)  # of the heat colors
    outlined: NDArray | None = None  # (S, S) bool, on top


def resize_map(anomaly_map: NDArray, size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a map (S, S) bilinearly to `size` = (H, W), with align_corners False."""
    import torch

    tensor = torch.as_tensor(np.asarray(anomaly_map, dtype=np.float32))[None, None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def save_anomaly_map(path: Path | str, anomaly_map: NDArray, size: tuple[int, int]) -> None:
    """Write a map (S, S) as float32 tiff of `size` = (H, W), which MVTec's official evaluation reads."""
    import tifffile

    with atomic_path(path) as temporary:
        tifffile.imwrite(temporary, resize_map(anomaly_map, size), photometric="minisblack")


def color_scale(maps: Iterable[NDArray]) -> tuple[float, float]:
    """Color limits (lo, hi) for all maps (S, S) of one class: the lowest value and the 99.9 % quantile."""
    values = np.concatenate([np.ravel(each) for each in maps])
    lo, hi = float(values.min()), float(np.quantile(values, 0.999))
    hi = hi if hi > lo else float(values.max())  # for maps with only a few different pixels
    return (lo, hi) if hi > lo else (lo, lo + 1.0)


def threshold_scale(threshold: float) -> tuple[float, float]:
    """Color limits (lo, hi) with a detector's pixel threshold in the middle, the same for all its predictions."""
    reach = abs(threshold) or 1.0
    return threshold - reach, threshold + reach


def heat_strength(values: NDArray, scale: tuple[float, float]) -> NDArray:
    """Position of values between color limits (lo, hi), from 0 to 1."""
    return np.clip((values - scale[0]) / (scale[1] - scale[0]), 0, 1)


def heat_colors(strength: NDArray) -> NDArray[np.uint8]:
    """Colors (…, 3) of values (…) from 0 to 1."""
    import matplotlib

    return matplotlib.colormaps[HEAT](strength, bytes=True)[..., :3]


def save_overlay(
    path: Path | str, image: NDArray | None, anomaly_map: NDArray, scale: tuple[float, float], threshold: float | None
) -> None:
    """Write a PNG without margin or text: the map in heat colors over the gray image.

    The PNG has the size of the `image` (H, W, 3) uint8, or without one of the map, but at most OVERLAY_SIDE pixels a
    side. The map (h, w) has the same view, `scale` is (lo, hi) of `threshold_scale`. Values above the threshold are
    outlined, and values far below it show the image alone; without a threshold the heat begins at lo.
    """
    import matplotlib

    height, width = np.shape(anomaly_map if image is None else image)[:2]
    shrink = min(1.0, OVERLAY_SIDE / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    heat = resize_map(anomaly_map, size)
    colors = matplotlib.colormaps[HEAT](heat_strength(heat, scale))[..., :3] * 255
    if image is not None:
        smaller = Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX) if shrink < 1 else image
        start = scale[0] if threshold is None else scale[0] + FAINT * (threshold - scale[0])
        opacity = OVERLAY_OPACITY * heat_strength(heat, (start, scale[1]))[..., None]
        colors = opacity * colors + (1 - opacity) * _gray(np.asarray(smaller))
    if threshold is not None:
        _outline_pixels(colors, heat > threshold)
    with atomic_path(path) as temporary:
        Image.fromarray(colors.round().astype(np.uint8)).save(temporary)


def _outline_pixels(colors: NDArray, mask: NDArray[np.bool_]) -> None:
    """Draw the border of each region of the mask (H, W) into colors (H, W, 3), with a dark line around it."""
    width = max(1, round(max(mask.shape) / 200))
    inner = ndimage.binary_erosion(mask, iterations=width)
    colors[ndimage.binary_dilation(mask, iterations=width) & ~mask] = 0
    colors[mask & ~inner] = list(bytes.fromhex(OUTLINE[1:]))


def save_prediction_figure(
    path: Path | str,
    image: NDArray | None,
    mask: NDArray | None,
    bank_maps: Mapping[str, NDArray],
    anomaly_map: NDArray,
    scale: Mapping[str, tuple[float, float]],
    title: str,
) -> None:
    """Write a PNG of panels: image, ground truth, each bank's map, the fused map, and the same over the image.

    The image is (H, W, 3) uint8 of any size, the mask (S, S) with 1 = defect, which is outlined; each may be None. Maps
    are (S, S) float, those of the banks before decision fusion; a single one equal to the fused map is left out.
    `scale` has (lo, hi) of each bank and of FUSED, the same for all figures of a class (see `color_scale`). Raises
    ValueError for a map without a usable scale.
    """
    same = len(bank_maps) == 1 and all(np.array_equal(each, anomaly_map) for each in bank_maps.values())
    banks = {} if same else bank_maps
    for name in (*banks, FUSED):
        if name not in scale or not scale[name][0] < scale[name][1]:
            raise ValueError(f"The color scale of {name} is {scale.get(name)}. Pass (lo, hi) with lo below hi.")

    defect = None if mask is None else np.asarray(mask) > 0.5
    panels = [] if image is None else [_Panel("image", image)]
    if defect is not None:
        panels.append(_Panel("ground truth" if defect.any() else "ground truth: good", image, outlined=defect))
    panels += [_Panel(name, heat=bank_map, limits=scale[name]) for name, bank_map in banks.items()]
    panels.append(_Panel(f"{FUSED} map" if banks else "anomaly map", heat=anomaly_map, limits=scale[FUSED]))
    if image is not None:
        panels.append(_Panel("overlay", _gray(image), anomaly_map, scale[FUSED], defect))

    figure = _draw(panels, np.shape(anomaly_map if image is None else image)[:2], title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _draw(panels: list[_Panel], size: tuple[int, ...], title: str) -> "Figure":
    """All panels in one row over the extent (H, W) = `size`; without pyplot, which would keep every figure alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = size
    panel_height = PANEL_INCHES * height / width
    row_width = (PANEL_INCHES + GAP) * len(panels) + GAP
    inches = np.array([max(row_width, 0.085 * len(title)), HEAD + panel_height + FOOT])  # room for the title
    figure = Figure(figsize=tuple(inches))
    FigureCanvasAgg(figure)
    figure.text(GAP / inches[0], 1 - 0.08 / inches[1], title, fontsize=10, va="top", parse_math=False)
    for number, panel in enumerate(panels):
        left = GAP + number * (PANEL_INCHES + GAP)
        axes = figure.add_axes(tuple(np.array([left, FOOT, PANEL_INCHES, panel_height]) / [*inches, *inches]))
        axes.set(xticks=[], yticks=[], facecolor="black")
        axes.set_title(panel.title, fontsize=9, pad=4, parse_math=False)
        heat = _draw_layers(axes, panel, extent=(0, width, height, 0))
        if heat is not None and panel.image is None:
            bar_axes = figure.add_axes(tuple(np.array([left, FOOT - 0.17, PANEL_INCHES, 0.1]) / [*inches, *inches]))
            bar = figure.colorbar(heat, cax=bar_axes, orientation="horizontal", ticks=panel.limits)
            low, high = bar.ax.set_xticklabels([f"{limit:.3g}" for limit in panel.limits], fontsize=7)
            low.set_horizontalalignment("left")
            high.set_horizontalalignment("right")
    return figure


def _draw_layers(axes: "Axes", panel: _Panel, extent: tuple[int, int, int, int]) -> "AxesImage | None":
    """Draw image, heat and outline of a panel over one extent; return the heat for its color bar."""
    heat = None
    if panel.image is not None:
        axes.imshow(panel.image, extent=extent, aspect="auto")
    if panel.heat is not None:
        low, high = panel.limits
        # Low values let the image show.
        alpha = None if panel.image is None else OVERLAY_OPACITY * heat_strength(panel.heat, panel.limits)
        heat = axes.imshow(panel.heat, extent=extent, aspect="auto", cmap=HEAT, vmin=low, vmax=high, alpha=alpha)
    if panel.outlined is not None:
        _outline(axes, panel.outlined, extent)
    axes.set(xlim=extent[:2], ylim=extent[2:])
    return heat


def _outline(axes: "Axes", mask: NDArray[np.bool_], extent: tuple[int, int, int, int]) -> None:
    """Draw the border of each region, also along the edge of the image; a dark line below keeps it legible."""
    padded = np.pad(mask, 1).astype(float)
    if not padded.any():  # contour would warn
        return
    _, width, height, _ = extent
    rows, columns = mask.shape
    x = (np.arange(-1, columns + 1) + 0.5) * width / columns  # pixel centers
    y = (np.arange(-1, rows + 1) + 0.5) * height / rows
    axes.contour(x, y, padded, levels=[0.5], colors="black", linewidths=2.2)
    axes.contour(x, y, padded, levels=[0.5], colors=OUTLINE, linewidths=1.1)


def _gray(image: NDArray) -> NDArray:
    """Remove the colors of an image (H, W, 3), so that only the heat has colors."""
    luma = np.asarray(image) @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luma[..., None], 3, axis=2).round().astype(np.uint8)

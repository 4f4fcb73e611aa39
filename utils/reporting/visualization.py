"""Images of predictions: anomaly maps as the official evaluation reads them, overlays, and a figure per sample."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from utils.errors import escape_controls
from utils.scans.files import atomic_path
from utils.scans.images import shrink_image

FUSED = "fused"  # key of the fused map in `scale`, beside the names of the banks
HEAT = "inferno"
OUTLINE = "#00e5ff"  # cyan is not a heat color, so it shows on image and heat alike
OVERLAY_OPACITY = 0.85  # at the upper end of the scale
FAINT = 0.8  # the heat begins at this share of the way from the lower end to the threshold
PANEL, GAP, HEAD, FOOT = 240, 9, 52, 38  # pixels: width of a panel, between panels, above and below the row
BAR = 8  # pixels: height of a color bar


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

    The PNG has the size of the `image` (H, W, 3) uint8, or without one of the map, after `shrink_image`. The map (h, w)
    has the same view, `scale` its color limits (lo, hi). Values above the threshold are outlined, and values far
    below it show the image alone; without a threshold the heat begins at lo.
    """
    import matplotlib

    base = shrink_image(np.zeros(np.shape(anomaly_map), np.uint8) if image is None else image)
    heat = resize_map(anomaly_map, base.shape[:2])
    colors = matplotlib.colormaps[HEAT](heat_strength(heat, scale))[..., :3] * 255
    if image is not None:
        start = scale[0] if threshold is None else scale[0] + FAINT * (threshold - scale[0])
        opacity = OVERLAY_OPACITY * heat_strength(heat, (start, scale[1]))[..., None]
        colors = opacity * colors + (1 - opacity) * _gray(base)
    if threshold is not None:
        _outline_pixels(colors, heat > threshold)
    with atomic_path(path) as temporary:
        Image.fromarray(colors.round().astype(np.uint8)).save(temporary)


def _outline_pixels(colors: NDArray, mask: NDArray[np.bool_]) -> None:
    """Draw the border of each region of the mask (H, W) into colors (H, W, 3), with a dark line around it."""
    width = max(2, round(max(mask.shape) / 200))
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
        figure.save(temporary, compress_level=1)  # in a quarter of the default's time, a quarter larger


def _draw(panels: list[_Panel], size: tuple[int, ...], title: str) -> Image.Image:
    """All panels in one row, each with the aspect ratio of `size` (H, W), under the title."""
    height = max(1, round(PANEL * size[0] / size[1]))
    text, row_width = escape_controls(title), GAP + (PANEL + GAP) * len(panels)
    large, middle, small = (_font(points) for points in (15, 13, 11))
    width = max(row_width, 2 * GAP + round(large.getlength(text)))
    figure = Image.new("RGB", (width, HEAD + height + FOOT), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, 8), text, "black", large)
    for number, panel in enumerate(panels):
        left, bottom = GAP + number * (PANEL + GAP), HEAD + height
        draw.text((left + PANEL / 2, HEAD - 6), panel.title, "black", middle, anchor="ms")
        figure.paste(Image.fromarray(_panel_pixels(panel, (height, PANEL))), (left, HEAD))
        if panel.image is None and panel.heat is not None:
            bar = np.tile(heat_colors(np.linspace(0, 1, PANEL)), (BAR, 1, 1))
            figure.paste(Image.fromarray(bar), (left, bottom + 6))
            for limit, x, anchor in zip(panel.limits, (left, left + PANEL), ("la", "ra"), strict=True):
                draw.text((x, bottom + 8 + BAR), f"{limit:.3g}", "black", small, anchor=anchor)
    return figure


def _panel_pixels(panel: _Panel, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Image, heat and outline of a panel, one above the other, (H, W, 3) uint8 of `size` (H, W)."""
    colors = np.zeros((*size, 3))
    if panel.image is not None:
        colors = np.array(Image.fromarray(panel.image).resize(size[::-1], Image.Resampling.BOX), dtype=np.float64)
    if panel.heat is not None:
        strength = heat_strength(resize_map(panel.heat, size), panel.limits)
        # Low values let the image show.
        opacity = np.ones((*size, 1)) if panel.image is None else OVERLAY_OPACITY * strength[..., None]
        colors = opacity * heat_colors(strength) + (1 - opacity) * colors
    if panel.outlined is not None:
        outlined = Image.fromarray(panel.outlined).resize(size[::-1], Image.Resampling.NEAREST)
        _outline_pixels(colors, np.asarray(outlined))
    return colors.round().astype(np.uint8)


@cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    """The font of matplotlib's figures, which has most letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), points)


def _gray(image: NDArray) -> NDArray:
    """Remove the colors of an image (H, W, 3), so that only the heat has colors."""
    luma = np.asarray(image) @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luma[..., None], 3, axis=2).round().astype(np.uint8)

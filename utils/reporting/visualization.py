"""Images of predictions: maps as the official evaluation reads them, and drawings for figures and the report."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from utils.records import Prediction
from utils.reporting.messages import escape_controls
from utils.scans.files import atomic_path

FUSED = "fused"  # key of the fused map in `scale`, beside the names of the banks
HEAT = "inferno"
NEUTRAL = 128  # gray of pixels without a point
PREDICTED, TRUTH = "#ff3ddb", "#00e5ff"  # outlines; visible on images and on heat colors
LINES = {1: "#000000", 2: PREDICTED, 3: TRUTH}  # colors of `Drawing.lines`
MARGIN = 1.12  # side of the drawn square, as a multiple of the object's
PANEL, GAP, LINE = 320, 10, 19  # pixels: side of a panel, space between panels, height of a line of text
BAR = 9  # pixels: height of a color bar

NEAREST = Image.Resampling.NEAREST

Scale = tuple[float, float]  # values of the lowest and the highest color


class Drawing:
    """Images of one sample, cropped to the object, of the same `size` (H, W) with sides of at most `side` pixels.

    The image (h, w, 3) or (h, w) uint8, the map (h, w) float, the mask (h, w) with 1 = defect, and the mask `valid`
    (h, w) of the pixels with a point show the same view in any resolution. All but the map may be None. The object is
    the box around the valid pixels, else the whole view. Pixels whose map is above `threshold` are outlined.
    """

    def __init__(
        self,
        image: NDArray | None,
        anomaly_map: NDArray,
        threshold: float | None = None,
        mask: NDArray | None = None,
        valid: NDArray | None = None,
        side: int = PANEL,
    ) -> None:
        self.image, self.anomaly_map, self.threshold, self.mask, self.valid = image, anomaly_map, threshold, mask, valid
        view = next(each for each in (image, valid, anomaly_map) if each is not None).shape
        self.box = left, top, right, bottom = object_box(valid)
        height, width = (bottom - top) * view[0], (right - left) * view[1]
        scale = side / max(height, width)
        self.size = max(1, round(height * scale)), max(1, round(width * scale))

    def resized(self, plane: NDArray, how: Image.Resampling = Image.Resampling.BILINEAR) -> NDArray:
        """The drawn part of a plane (h, w) or (h, w, 3) of the view, at the drawing's size."""
        height, width = plane.shape[:2]
        left, top, right, bottom = self.box
        box = left * width, top * height, right * width, bottom * height
        return np.asarray(Image.fromarray(plane).resize(self.size[::-1], how, box))

    def picture(self) -> NDArray[np.uint8]:
        """The image (H, W, 3)."""
        assert self.image is not None, "there is no image to draw"
        return self.resized(self.image, Image.Resampling.LANCZOS)

    def heat(self, plane: NDArray, scale: Scale) -> NDArray[np.uint8]:
        """Heat colors (H, W, 3) of a map, and gray where no point was measured."""
        colors = heat_colors(heat_strength(self.resized(plane.astype(np.float32)), scale))
        if self.valid is not None:
            colors[~self.resized(self.valid, NEAREST)] = NEUTRAL
        return colors

    def lines(self) -> NDArray[np.uint8]:
        """Outlines (H, W) of the predicted and the true defects: keys of LINES, 0 elsewhere."""
        drawn = np.zeros(self.size, np.uint8)
        if self.threshold is not None:
            above = self.resized(self.anomaly_map.astype(np.float32)) > self.threshold
            _outline(drawn, above if self.valid is None else above & silhouette(self.resized(self.valid, NEAREST)), 2)
        if self.mask is not None:
            inside = self.resized((self.mask > 0.5).astype(np.float32), Image.Resampling.BOX)
            _outline(drawn, inside > 0, 3)  # keeps even the smallest defect
        return drawn

    def outlined(self) -> NDArray[np.uint8]:
        """The image with the outlines."""
        colors, lines = self.picture().copy(), self.lines()
        for number, color in LINES.items():
            colors[lines == number] = list(bytes.fromhex(color[1:]))
        return colors


def silhouette(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The valid pixels (H, W), with small gaps between them closed and holes filled."""
    from scipy import ndimage

    reach = max(1, round(max(valid.shape) / 100))
    closed = ndimage.binary_closing(np.pad(valid, reach), iterations=reach)[reach:-reach, reach:-reach]
    return ndimage.binary_fill_holes(closed)


def _outline(drawn: NDArray[np.uint8], region: NDArray[np.bool_], number: int) -> None:
    """Draw the border of a region (H, W), with a dark line around it."""
    from scipy import ndimage

    width = max(1, round(max(region.shape) / 100))
    line = region & ~ndimage.binary_erosion(region, iterations=width)
    drawn[ndimage.binary_dilation(region, iterations=width) & ~region & (drawn < 2)] = 1
    drawn[line] = number


def object_box(valid: NDArray[np.bool_] | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the square around the valid pixels (H, W), as shares of W and H."""
    if valid is None or not valid.any():
        return 0, 0, 1, 1
    ends = [np.flatnonzero(valid.any(axis=1 - axis))[[0, -1]] + (0, 1) for axis in (0, 1)]
    reach = MARGIN * max(high - low for low, high in ends) / 2
    (top, bottom), (left, right) = (
        (max(0.0, (low + high) / 2 - reach) / length, min(float(length), (low + high) / 2 + reach) / length)
        for (low, high), length in zip(ends, valid.shape, strict=True)
    )
    return left, top, right, bottom


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


def color_scale(maps: Iterable[NDArray], threshold: float | None = None) -> Scale:
    """Color limits for all maps (S, S) of a class. The lower is their median, and the threshold is in the middle.

    The upper limit is the 99.9 % quantile if there is no threshold, or none above the median.
    """
    values = np.concatenate([np.ravel(each) for each in maps])
    low = float(np.median(values))
    if threshold is not None and threshold > low:
        return low, 2 * threshold - low
    high = float(np.quantile(values, 0.999))
    high = high if high > low else float(values.max())  # for maps with only a few different pixels
    return (low, high) if high > low else (low, low + 1.0)


def color_scales(predictions: Sequence[Prediction], threshold: float | None) -> dict[str, Scale]:
    """Color limits of the fused map, under the key FUSED, and of the map of each bank, as in `color_scale`."""
    scales = {FUSED: color_scale([each.anomaly_map.numpy() for each in predictions], threshold)}
    for bank in predictions[0].bank_maps:
        scales[bank] = color_scale([each.bank_maps[bank].numpy() for each in predictions])
    return scales


def bar_labels(scale: Scale, threshold: float | None) -> list[str]:
    """Labels of the color bar of a `color_scale` at its left end, in its middle and at its right end."""
    low, high = scale
    if threshold is None or threshold <= low:
        return [f"{low:.3g}", "", f"{high:.3g}"]
    return ["0", "threshold", "2"]


def heat_strength(values: NDArray, scale: Scale) -> NDArray:
    """Position of values between the color limits, from 0 to 1."""
    return np.clip((values - scale[0]) / (scale[1] - scale[0]), 0, 1)


def heat_colors(strength: NDArray) -> NDArray[np.uint8]:
    """Colors (…, 3) of values (…) from 0 to 1."""
    import matplotlib

    return matplotlib.colormaps[HEAT](strength, bytes=True)[..., :3]


def caption(name: str, severity: float | None, anomalous: bool | None) -> str:
    """Line above a figure: the name of the sample, its severity and the decision."""
    decision = {True: "anomalous", False: "good", None: "no threshold"}[anomalous]
    return f"{name}: {decision}" + ("" if severity is None else f", severity {severity:z.2f} (threshold 1)")


class _Panel(NamedTuple):
    words: Sequence[tuple[str, str]]  # of the title, each with the color of the square before it, or ""
    pixels: NDArray[np.uint8]  # (H, W, 3)
    labels: Sequence[str] = ()  # of the color bar; none for an image


def save_figure(
    path: Path | str,
    title: str,
    image: NDArray | None,
    anomaly_map: NDArray,
    scale: Mapping[str, Scale],
    threshold: float | None = None,
    mask: NDArray | None = None,
    valid: NDArray | None = None,
    bank_maps: Mapping[str, NDArray] | None = None,
) -> None:
    """Write a PNG of panels below a title: the image, the image with outlines, the map of each bank, the fused map.

    Arrays as in `Drawing`. The map of a single bank is the fused map, so it is left out. `scale` has the limits of each
    bank and of FUSED, the same for all figures of a class (see `color_scales`).
    """
    banks = bank_maps if bank_maps and len(bank_maps) > 1 else {}
    drawing = Drawing(image, anomaly_map, threshold, mask, valid)
    panels = []
    if image is not None:
        legend = [(PREDICTED, "predicted")] if threshold is not None else []
        if mask is not None:
            legend.append((TRUTH, "ground truth" if (mask > 0.5).any() else "ground truth: good"))
        panels = [_Panel([("", "image")], drawing.picture()), _Panel(legend, drawing.outlined())]
    for name, plane in banks.items():
        panels.append(_Panel([("", f"{name} map")], drawing.heat(plane, scale[name]), bar_labels(scale[name], None)))
    heat, labels = drawing.heat(anomaly_map, scale[FUSED]), bar_labels(scale[FUSED], threshold)
    panels.append(_Panel([("", f"{FUSED} map" if banks else "anomaly map")], heat, labels))
    with atomic_path(path) as temporary:
        _draw(panels, title).save(temporary, compress_level=1)  # takes a quarter of the time of the default


def _draw(panels: Sequence[_Panel], title: str) -> Image.Image:
    """All panels in one row under the title."""
    height, width = panels[0].pixels.shape[:2]
    column = max(width, PANEL // 2)
    text, (large, small) = escape_controls(title), (_font(15), _font(12))
    row = GAP + (column + GAP) * len(panels)
    top = GAP + 2 * LINE + 6
    figure = Image.new(
        "RGB", (max(row, 2 * GAP + round(large.getlength(text))), top + height + BAR + LINE + 9), "white"
    )
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, 8), text, "black", large)
    for number, panel in enumerate(panels):
        left = GAP + number * (column + GAP)
        figure.paste(Image.fromarray(panel.pixels), (left, top))
        x = left
        for color, word in panel.words:
            if color:
                draw.rectangle((x, top - 17, x + 11, top - 6), color, "black")
                x += 17
            draw.text((x, top - 5), word, "black", small, anchor="ls")
            x += round(small.getlength(word)) + 14
        if panel.labels:
            bar = np.tile(heat_colors(np.linspace(0, 1, width)), (BAR, 1, 1))
            figure.paste(Image.fromarray(bar), (left, top + height + 5))
            for label, share, anchor in zip(panel.labels, (0, 0.5, 1), ("la", "ma", "ra"), strict=True):
                draw.text((left + share * width, top + height + BAR + 7), label, "black", small, anchor=anchor)
    return figure


@cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    """The font of matplotlib's figures, which has most letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), points)

"""Shown samples of a class: the choice, their images as data URIs, and their clouds, thinned and packed."""

import base64
import gzip
import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.records import SampleResult
from utils.reporting.visualization import FUSED, LINES, Drawing, Scale, bar_labels, color_scales, heat_strength
from utils.scans.organized_pc import valid_mask

VIEW_SIDE = 280  # pixels: longer side of a drawing
CLOUD_POINTS = 8000  # of a 3D view, at most
ERROR_SHARE = 0.75  # largest share of wrong samples among those shown, if there are enough others
HIT, MISS, FALSE_ALARM, CORRECT_PASS = "hit", "miss", "false alarm", "correct pass"
WRONG = (MISS, FALSE_ALARM)
UNDECIDED = "no threshold"

ReadArray = Callable[[int], NDArray | None]  # by the number of the sample


class Decision(NamedTuple):
    """Score above which a sample counts as anomalous, and the source of this threshold in words."""

    threshold: float
    source: str
    pixel: float | None = None  # threshold of the anomaly map


def outcome(label: int, score: float, threshold: float | None) -> str:
    """Outcome of a sample with a label, 1 = defective: hit, miss, false alarm or correct pass."""
    if threshold is None:
        return UNDECIDED
    if score > threshold:
        return HIT if label else FALSE_ALARM
    return MISS if label else CORRECT_PASS


def outcome_of(sample: SampleResult, decision: Decision | None) -> str:
    return outcome(sample.label, sample.prediction.score, None if decision is None else decision.threshold)


def choose_samples(samples: Sequence[SampleResult], decision: Decision | None, limit: int) -> list[int]:
    """Numbers of at most `limit` samples in the order of the gallery.

    Misses and false alarms come first, starting with the farthest from the threshold. The others follow, starting with
    the nearest. If not all fit, they are taken from each type of defect in turn, spread over its scores.
    """
    limit = min(limit, len(samples))

    def margin(i: int) -> float:
        return 0.0 if decision is None else abs(samples[i].prediction.score - decision.threshold)

    wrong = [i for i in range(len(samples)) if outcome_of(samples[i], decision) in WRONG]
    wrong.sort(key=lambda i: (-margin(i), samples[i].path))
    others = sorted(set(range(len(samples))) - set(wrong), key=lambda i: (margin(i), samples[i].path))
    wrong = wrong[: max(math.ceil(ERROR_SHARE * limit), limit - len(others))]
    by_defect: dict[str, list[int]] = {}
    for i in others:
        by_defect.setdefault(PurePosixPath(samples[i].path).parent.name, []).append(i)
    queues = [[group[k] for k in spread_order(len(group))] for _, group in sorted(by_defect.items())]
    in_turn = [i for i in chain.from_iterable(zip_longest(*queues)) if i is not None]
    kept = set(in_turn[: limit - len(wrong)])
    return wrong + [i for i in others if i in kept]


def spread_order(count: int) -> list[int]:
    """Order 0 to count - 1 so that the first few are spread over all: the ends, the middle, the middles of halves, …"""
    order = [0, count - 1][:count]
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


def gallery(
    samples: Sequence[SampleResult],
    severities: Sequence[float | None],
    decision: Decision | None,
    limit: int,
    read_rgb: ReadArray,
    read_cloud: ReadArray,
) -> list[dict[str, Any]]:
    """Return at most `limit` of the `samples` as plain data for the page's script, about 130 kB each.

    `read_rgb` returns (H, W, 3) uint8 or None; `read_cloud` (H, W, 3) float, meters, invalid pixels exactly 0, or None.
    """
    chosen = choose_samples(samples, decision, limit)
    if not chosen:
        return []
    pixel = None if decision is None else decision.pixel
    scales = color_scales([sample.prediction for sample in samples], pixel)
    return [
        {"outcome": outcome_of(samples[i], decision), "severity": severities[i]}
        | _view(samples[i], pixel, read_rgb(i), read_cloud(i), scales)
        for i in chosen
    ]


def _view(
    sample: SampleResult,
    threshold: float | None,
    image: NDArray | None,
    cloud: NDArray | None,
    scales: Mapping[str, Scale],
) -> dict[str, Any]:
    fused = sample.prediction.anomaly_map.numpy()
    mask = None if sample.mask is None else sample.mask.numpy()
    valid = None if cloud is None else valid_mask(cloud)
    name, picture = ("depth", _depths(cloud)) if image is None else ("image", image)
    drawing = Drawing(picture, fused, threshold, mask, valid, VIEW_SIDE)
    maps = {bank: plane.numpy() for bank, plane in sample.prediction.bank_maps.items()}
    maps = {FUSED: fused} | (maps if len(maps) > 1 else {})  # a single bank's map is the fused map
    return {
        "path": sample.path,
        "defect": PurePosixPath(sample.path).parent.name,
        "label": sample.label,
        "score": sample.prediction.score,
        "size": drawing.size[::-1],
        "view": None if picture is None else {"name": name, "image": _jpeg(drawing.picture())},
        "lines": _lines_uri(drawing.lines()),
        "truth": mask is not None and bool((mask > 0.5).any()),
        "maps": {bank: _jpeg(drawing.heat(plane, scales[bank])) for bank, plane in maps.items()},
        "bar": bar_labels(scales[FUSED], threshold),
        "scores": sample.prediction.bank_scores if len(maps) > 1 else {},
        "cloud": None if cloud is None else pack_cloud(cloud, image, fused, scales[FUSED], mask),
    }


def pack_cloud(
    cloud: NDArray, image: NDArray | None, anomaly_map: NDArray, scale: Scale, mask: NDArray | None = None
) -> dict[str, Any] | None:
    """Thin a cloud (H, W, 3) on its grid to at most CLOUD_POINTS, and pack it with image, map and mask alike.

    Returns:
        None if no point is valid, else "points": N; "grid": rows R and columns C; "data": base64 of gzip of x, y, z (N
        int16 each, little-endian; "origin" + value * "step" is in millimeters), score (N uint8, 0 and 255 at the ends
        of `scale`), true defect (N uint8, 0 or 1), if "colored" red, green, blue (N uint8 each), and the valid pixels
        of the grid (R * C bits, the highest of a byte first).
    """
    cloud = _thinned(cloud)
    valid = valid_mask(cloud)
    if not valid.any():
        return None
    points = cloud[valid].astype(np.float64) * 1000
    low, high = points.min(axis=0), points.max(axis=0)
    origin = (low + high) / 2
    step = max(float((high - low).max()) / 65534, 1e-9)
    strength = heat_strength(_on_grid(anomaly_map, valid.shape)[valid], scale)
    defect = np.zeros(len(points), np.uint8) if mask is None else _on_grid(mask > 0.5, valid.shape)[valid]
    planes = [np.rint((points - origin) / step).T.astype("<i2"), np.rint(255 * strength).astype(np.uint8), defect]
    if image is not None:
        planes.append(_on_grid(image, valid.shape)[valid].T)
    planes.append(np.packbits(valid))
    packed = gzip.compress(b"".join(np.ascontiguousarray(each).tobytes() for each in planes), 6, mtime=0)
    return {
        "points": len(points),
        "grid": valid.shape,
        "origin": origin.round(3).tolist(),
        "step": step,
        "colored": image is not None,
        "data": base64.b64encode(packed).decode(),
    }


def _thinned(cloud: NDArray) -> NDArray:
    """Thin a cloud to the finest grid of its proportions with at most CLOUD_POINTS valid pixels."""
    height, width = cloud.shape[:2]
    share = math.sqrt(min(1.0, CLOUD_POINTS / max(int(valid_mask(cloud).sum()), 1)))
    while True:
        thinned = _on_grid(cloud, (max(1, int(height * share)), max(1, int(width * share))))
        if int(valid_mask(thinned).sum()) <= CLOUD_POINTS:
            return thinned
        share *= 0.98


def _on_grid(plane: NDArray, grid: tuple[int, ...]) -> NDArray:
    """Pixels of a plane (H, W, …) at the middles of R rows and C columns of cells: (R, C, …)."""
    rows, columns = ((2 * np.arange(n) + 1) * side // (2 * n) for n, side in zip(grid, plane.shape[:2], strict=True))
    return plane[rows][:, columns]


def _depths(cloud: NDArray | None) -> NDArray[np.uint8] | None:
    """Gray image (H, W) of the depths of a cloud (H, W, 3), with the nearest point white; None without a point."""
    if cloud is None or not (valid := valid_mask(cloud)).any():
        return None
    depth = cloud[..., 2]
    low, high = np.quantile(depth[valid], [0.005, 0.995])
    return np.where(valid, 255 - 200 * np.clip((depth - low) / max(high - low, 1e-9), 0, 1), 0).astype(np.uint8)


def _lines_uri(lines: NDArray[np.uint8]) -> str | None:
    """The outlines of a drawing as a transparent PNG; None without an outline."""
    if not lines.any():
        return None
    palette = Image.fromarray(lines).convert("P")
    palette.putpalette([0, 0, 0, *chain.from_iterable(bytes.fromhex(color[1:]) for color in LINES.values())])
    return _data_uri(palette, "PNG", transparency=bytes([0, 150, 255, 255]))


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    return _data_uri(Image.fromarray(pixels), "JPEG", quality=82)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

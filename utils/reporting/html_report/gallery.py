"""Shown samples of a class: the choice, their images as data URIs, and their clouds, thinned and packed."""

import base64
import gzip
import io
import math
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from utils.records import SampleResult
from utils.reporting.visualization import FUSED, OUTLINE, color_scale, heat_colors, heat_strength
from utils.scans.organized_pc import valid_mask

VIEW_SIDE = 224  # pixels of an image's longer side
CLOUD_POINTS = 8000  # of a 3D view, at most
ERROR_SHARE = 0.75  # largest share of wrong samples among those shown, if there are enough others
HIT, MISS, FALSE_ALARM, CORRECT_PASS = "hit", "miss", "false alarm", "correct pass"
WRONG = (MISS, FALSE_ALARM)
UNDECIDED = "no threshold"

ReadArray = Callable[[int], NDArray | None]  # by the number of the sample
Scales = dict[str, tuple[float, float]]  # color limits by bank


class Decision(NamedTuple):
    """Score above which a sample counts as defective, and the source of this threshold in words."""

    threshold: float
    source: str


def outcome(sample: SampleResult, decision: Decision | None) -> str:
    """Outcome of a sample: hit, miss, false alarm or correct pass."""
    if decision is None:
        return UNDECIDED
    if sample.prediction.score > decision.threshold:
        return HIT if sample.label else FALSE_ALARM
    return MISS if sample.label else CORRECT_PASS


def choose_samples(samples: Sequence[SampleResult], decision: Decision | None, limit: int) -> list[int]:
    """Numbers of at most `limit` samples in the order of the gallery.

    Misses and false alarms come first, starting with the farthest from the threshold. The others follow, starting with
    the nearest. If not all fit, they are taken from each type of defect in turn, spread over its scores.
    """
    limit = min(limit, len(samples))

    def margin(i: int) -> float:
        return 0.0 if decision is None else abs(samples[i].prediction.score - decision.threshold)

    wrong = [i for i in range(len(samples)) if outcome(samples[i], decision) in WRONG]
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
    samples: Sequence[SampleResult], decision: Decision | None, limit: int, read_rgb: ReadArray, read_cloud: ReadArray
) -> list[dict[str, Any]]:
    """Return at most `limit` of a test split's `samples` as plain data for the page's script, about 115 kB each.

    `read_rgb` returns (H, W, 3) uint8 or None; `read_cloud` (H, W, 3) float, meters, invalid pixels exactly 0, or None.
    """
    chosen = choose_samples(samples, decision, limit)
    if not chosen:
        return []
    scales = {FUSED: _scale([sample.prediction.anomaly_map.numpy() for sample in samples])}
    for bank in samples[0].prediction.bank_maps:
        scales[bank] = _scale([sample.prediction.bank_maps[bank].numpy() for sample in samples])
    return [_view(samples[i], decision, read_rgb(i), read_cloud(i), scales) for i in chosen]


def _scale(maps: list[NDArray]) -> tuple[float, float]:
    """Color limits for all maps of a class; the lower half of the values gets one color, so the rest stands out."""
    low, high = color_scale(maps)
    median = float(np.median(np.stack(maps)))
    return (median, high) if median < high else (low, high)


def _view(
    sample: SampleResult, decision: Decision | None, image: NDArray | None, cloud: NDArray | None, scales: Scales
) -> dict[str, Any]:
    fused = sample.prediction.anomaly_map.numpy()
    height, width = fused.shape if image is None else image.shape[:2]
    size = max(1, round(VIEW_SIDE * width / max(height, width))), max(1, round(VIEW_SIDE * height / max(height, width)))
    maps = {name: plane.numpy() for name, plane in sample.prediction.bank_maps.items()}
    maps = maps if len(maps) > 1 else {}  # a single bank's map is the fused map
    colors = {name: heat_colors(heat_strength(plane, scales[name])) for name, plane in {**maps, FUSED: fused}.items()}
    heat = {name: Image.fromarray(each).resize(size, Image.Resampling.BILINEAR) for name, each in colors.items()}
    return {
        "path": sample.path,
        "defect": PurePosixPath(sample.path).parent.name,
        "label": sample.label,
        "score": sample.prediction.score,
        "outcome": outcome(sample, decision),
        "size": size,
        "view": _background(image, cloud, size),
        "truth": _outline(sample.mask.numpy() > 0.5, size),
        "maps": {name: _data_uri(plane, "JPEG", quality=82) for name, plane in heat.items()},
        "scores": sample.prediction.bank_scores if maps else {},
        "cloud": None if cloud is None else pack_cloud(cloud, image, fused, scales[FUSED]),
    }


def pack_cloud(
    cloud: NDArray, image: NDArray | None, anomaly_map: NDArray, scale: tuple[float, float]
) -> dict[str, Any] | None:
    """Thin a cloud (H, W, 3) on its grid to at most CLOUD_POINTS, and pack it with image and map at the same places.

    Returns:
        None if no point is valid, else "points": N; "grid": rows R and columns C; "data": base64 of gzip of x, y, z (N
        int16 each, little-endian; "origin" + value * "step" is in millimeters), score (N uint8, of which 0 and 255 are
        the "limits"), if "colored" red, green, blue (N uint8 each), and a mask of the grid (R * C bits, the highest of
        a byte first).
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
    planes = [np.rint((points - origin) / step).T.astype("<i2"), np.rint(255 * strength).astype(np.uint8)]
    if image is not None:
        planes.append(_on_grid(image, valid.shape)[valid].T)
    planes.append(np.packbits(valid))
    packed = gzip.compress(b"".join(np.ascontiguousarray(each).tobytes() for each in planes), 6, mtime=0)
    return {
        "points": len(points),
        "grid": valid.shape,
        "origin": origin.round(3).tolist(),
        "step": step,
        "limits": list(scale),
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


def _background(image: NDArray | None, cloud: NDArray | None, size: tuple[int, int]) -> dict[str, str] | None:
    """The image, else the depths of the cloud with the nearest point white, else None."""
    if image is not None:
        shown = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
        return {"name": "image", "image": _data_uri(shown, "JPEG", quality=82)}
    if cloud is None or not (valid := valid_mask(cloud)).any():
        return None
    depth = cloud[..., 2]
    low, high = np.quantile(depth[valid], [0.005, 0.995])
    gray = np.where(valid, 255 - 200 * np.clip((depth - low) / max(high - low, 1e-9), 0, 1), 0).astype(np.uint8)
    shown = Image.fromarray(gray).resize(size, Image.Resampling.BOX)
    return {"name": "depth", "image": _data_uri(shown, "JPEG", quality=82)}


def _outline(mask: NDArray[np.bool_], size: tuple[int, int]) -> str | None:
    """Borders of the defects as a transparent PNG, with a dark line beside them; None without a defect."""
    if not mask.any():
        return None
    shares = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
    inside = np.pad(np.asarray(shares) > 0, 2)  # the smallest defect stays, and one at the edge is closed there
    line, dark = (
        (ndimage.binary_dilation(inside, iterations=k) & ~ndimage.binary_erosion(inside, iterations=k))[2:-2, 2:-2]
        for k in (1, 2)
    )
    palette = Image.fromarray(np.where(line, 1, np.where(dark, 2, 0)).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, *bytes.fromhex(OUTLINE[1:]), 0, 0, 0])
    return _data_uri(palette, "PNG", transparency=bytes([0, 255, 150]))


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

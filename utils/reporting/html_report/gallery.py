"""The shown parts of a class: which ones, their pictures as data URIs, and their point clouds, thinned and packed."""

import base64
import gzip
import io
import math
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from utils.records import Prediction
from utils.reporting.visualization import FUSED, HEAT, OUTLINE, color_scale
from utils.scans.organized_pc import valid_mask

VIEW_SIDE = 224  # pixels of the longer side of a picture
CLOUD_POINTS = 8000  # of a 3D view, at most
ERROR_SHARE = 0.75  # of the shown parts at most are wrong ones, as long as there are enough others
HIT, MISS, FALSE_ALARM, CORRECT_PASS = "hit", "miss", "false alarm", "correct pass"
WRONG = (MISS, FALSE_ALARM)
UNJUDGED = "not judged"

ReadArray = Callable[[int], NDArray | None]  # by the number of the part


class JudgedPart(Protocol):
    """A part of the test split and what the detector said about it."""

    @property
    def path(self) -> str: ...  # "test/hole/000"
    @property
    def label(self) -> int: ...  # 1 = defective
    @property
    def mask(self) -> Tensor: ...  # (S, S) uint8, 1 = defect
    @property
    def prediction(self) -> Prediction: ...


class Decision(NamedTuple):
    """Above which score a part counts as defective, and where that comes from."""

    threshold: float
    source: str  # as a page says it

    def outcome(self, label: int, score: float) -> str:
        if score > self.threshold:
            return HIT if label else FALSE_ALARM
        return MISS if label else CORRECT_PASS


def outcome(part: JudgedPart, decision: Decision | None) -> str:
    return UNJUDGED if decision is None else decision.outcome(part.label, part.prediction.score)


def choose_parts(parts: Sequence[JudgedPart], decision: Decision | None, limit: int) -> list[int]:
    """The numbers of at most `limit` parts in the order of the gallery.

    Misses and false alarms come first, the farthest from the threshold first. The others follow, the nearest to it
    first; where there is no room for all, from each type of defect in turn, spread over its scores.
    """
    if limit >= len(parts):
        limit = len(parts)

    def margin(i: int) -> float:
        return 0.0 if decision is None else abs(parts[i].prediction.score - decision.threshold)

    wrong = [i for i in range(len(parts)) if outcome(parts[i], decision) in WRONG]
    wrong.sort(key=lambda i: (-margin(i), parts[i].path))
    others = sorted(set(range(len(parts))) - set(wrong), key=lambda i: (margin(i), parts[i].path))
    room = max(math.ceil(ERROR_SHARE * limit), limit - len(others))
    wrong = wrong[:room]
    by_defect: dict[str, list[int]] = {}
    for i in others:
        by_defect.setdefault(_defect(parts[i].path), []).append(i)
    queues = [[group[k] for k in spread_order(len(group))] for _, group in sorted(by_defect.items())]
    in_turn = [i for i in chain.from_iterable(zip_longest(*queues)) if i is not None]
    kept = set(in_turn[: limit - len(wrong)])
    return wrong + [i for i in others if i in kept]


def spread_order(count: int) -> list[int]:
    """0 to count - 1 such that any first few are spread over all: the ends, the middle, the middles of the halves, …"""
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
    parts: Sequence[JudgedPart],
    decision: Decision | None,
    limit: int,
    read_rgb: ReadArray,
    read_cloud: ReadArray,
) -> list[dict[str, Any]]:
    """The shown parts as plain data for the script of the page, some 115 kB each.

    Args:
        parts: the whole test split of a class.
        decision: what makes a part a hit or a miss.
        limit: how many are shown at most.
        read_rgb: (H, W, 3) uint8 of a part, or None; called once for each shown part.
        read_cloud: (H, W, 3) float, meters, an invalid pixel exactly 0, or None; likewise.
    """
    chosen = choose_parts(parts, decision, limit)
    if not chosen:
        return []
    scales = {FUSED: _scale([part.prediction.anomaly_map.numpy() for part in parts])}
    for bank in parts[0].prediction.bank_maps:
        scales[bank] = _scale([part.prediction.bank_maps[bank].numpy() for part in parts])
    return [_view(parts[i], decision, read_rgb(i), read_cloud(i), scales) for i in chosen]


def _scale(maps: list[NDArray]) -> tuple[float, float]:
    """The color limits of all maps of a class, the lower half of their values in one color: the rest stands out."""
    low, high = color_scale(maps)
    median = float(np.median(np.stack(maps)))
    return (median, high) if median < high else (low, high)


def _view(
    part: JudgedPart,
    decision: Decision | None,
    photo: NDArray | None,
    cloud: NDArray | None,
    scales: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    fused = part.prediction.anomaly_map.numpy()
    height, width = fused.shape if photo is None else photo.shape[:2]
    size = max(1, round(VIEW_SIDE * width / max(height, width))), max(1, round(VIEW_SIDE * height / max(height, width)))
    maps = {name: plane.numpy() for name, plane in part.prediction.bank_maps.items()}
    if len(maps) == 1:  # a single bank's map is the fused map
        maps = {}
    return {
        "path": part.path,
        "defect": _defect(part.path),
        "label": part.label,
        "score": part.prediction.score,
        "outcome": outcome(part, decision),
        "size": size,
        "view": _base_picture(photo, cloud, size),
        "truth": _outline(part.mask.numpy() > 0.5, size),
        "maps": {name: _heat(plane, scales[name], size) for name, plane in {**maps, FUSED: fused}.items()},
        "scores": part.prediction.bank_scores if maps else {},
        "cloud": None if cloud is None else pack_cloud(cloud, photo, fused, scales[FUSED]),
    }


def pack_cloud(
    cloud: NDArray, photo: NDArray | None, anomaly_map: NDArray, scale: tuple[float, float]
) -> dict[str, Any] | None:
    """A point cloud (H, W, 3) thinned on its grid to at most CLOUD_POINTS, with photo and map at the same places.

    Returns:
        "points": N; "grid": rows and columns, R and C; "data": base64 of gzip of x, y, z (N int16 each, little-endian),
        score (N uint8), where "colored" red, green, blue (N uint8 each), and the pixels of the grid that hold a point
        (R * C bits, the highest of a byte first): the points are these in their order. A coordinate in millimeters is
        "origin" + value * "step". "limits": the scores of 0 and 255. None where no point is valid.
    """
    cloud = _thinned(cloud)
    valid = valid_mask(cloud)
    if not valid.any():
        return None
    points = cloud[valid].astype(np.float64) * 1000
    low, high = points.min(axis=0), points.max(axis=0)
    origin = (low + high) / 2
    step = max(float((high - low).max()) / 65534, 1e-9)
    strength = np.clip((_on_grid(anomaly_map, valid.shape)[valid] - scale[0]) / (scale[1] - scale[0]), 0, 1)
    planes = [np.rint((points - origin) / step).T.astype("<i2"), np.rint(255 * strength).astype(np.uint8)]
    if photo is not None:
        planes.append(_on_grid(photo, valid.shape)[valid].T)
    planes.append(np.packbits(valid))
    packed = gzip.compress(b"".join(np.ascontiguousarray(each).tobytes() for each in planes), mtime=0)
    return {
        "points": len(points),
        "grid": valid.shape,
        "origin": origin.round(3).tolist(),
        "step": step,
        "limits": list(scale),
        "colored": photo is not None,
        "data": base64.b64encode(packed).decode(),
    }


def heat_colors() -> list[str]:
    """The colors of the maps from lowest to highest, as a style sheet writes them."""
    colors = matplotlib.colormaps[HEAT](np.linspace(0, 1, 32), bytes=True)[:, :3]
    return ["#" + bytes(color).hex() for color in colors]


def _thinned(cloud: NDArray) -> NDArray:
    """A cloud on the finest grid, of its proportions, that leaves at most CLOUD_POINTS valid pixels."""
    height, width = cloud.shape[:2]
    share = math.sqrt(min(1.0, CLOUD_POINTS / max(int(valid_mask(cloud).sum()), 1)))
    while True:
        thinned = _on_grid(cloud, (max(1, int(height * share)), max(1, int(width * share))))
        if int(valid_mask(thinned).sum()) <= CLOUD_POINTS:
            return thinned
        share *= 0.98


def _on_grid(image: NDArray, grid: tuple[int, ...]) -> NDArray:
    """The pixels of an image (H, W, …) at the middles of R rows and C columns of cells: (R, C, …)."""
    rows, columns = (
        (2 * np.arange(count) + 1) * side // (2 * count) for count, side in zip(grid, image.shape[:2], strict=True)
    )
    return image[rows][:, columns]


def _base_picture(photo: NDArray | None, cloud: NDArray | None, size: tuple[int, int]) -> dict[str, str] | None:
    """The part as it was seen: its photo, else the depths of its scan, the nearest point white, else nothing."""
    if photo is not None:
        return {
            "name": "photo",
            "picture": _jpeg(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)),
        }
    if cloud is None or not (valid := valid_mask(cloud)).any():
        return None
    depth = cloud[..., 2]
    low, high = np.quantile(depth[valid], [0.005, 0.995])
    gray = np.where(valid, 255 - 200 * np.clip((depth - low) / max(high - low, 1e-9), 0, 1), 0).astype(np.uint8)
    return {"name": "depth", "picture": _jpeg(Image.fromarray(gray).resize(size, Image.Resampling.BOX))}


def _heat(plane: NDArray, scale: tuple[float, float], size: tuple[int, int]) -> str:
    strength = np.clip((plane - scale[0]) / (scale[1] - scale[0]), 0, 1)
    colored = matplotlib.colormaps[HEAT](strength, bytes=True)[..., :3]
    return _jpeg(Image.fromarray(colored).resize(size, Image.Resampling.BILINEAR))


def _outline(mask: NDArray[np.bool_], size: tuple[int, int]) -> str | None:
    """The borders of the defects as a transparent PNG, with a dark line beside them; None where there is no defect."""
    if not mask.any():
        return None
    shares = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
    resized = np.asarray(shares) > 0  # so that the smallest defect stays
    inside = np.pad(resized, 2)  # so that a defect at the edge of the picture is closed there
    line = (ndimage.binary_dilation(inside) & ~ndimage.binary_erosion(inside))[2:-2, 2:-2]
    dark = (ndimage.binary_dilation(inside, iterations=2) & ~ndimage.binary_erosion(inside, iterations=2))[2:-2, 2:-2]
    palette = Image.fromarray(np.where(line, 1, np.where(dark, 2, 0)).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, *bytes.fromhex(OUTLINE[1:]), 0, 0, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", optimize=True, transparency=bytes([0, 255, 150]))
    return _data_uri("png", buffer)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return _data_uri("jpeg", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _defect(path: str) -> str:
    """test/hole/000: hole."""
    return PurePosixPath(path).parent.name

"""Check of the coordinates of organized point clouds, applied wherever a cloud enters the program."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.choices import UNITS
from utils.errors import InputError
from utils.records import METERS, CloudForm, SampleFiles
from utils.scans.organized_pc import MAX_COORDINATE, as_cloud, read_organized_pc, valid_mask

NEAREST = 0.032  # meters; point sampling skips nearer points (see docs/DATA.md), so no object lies there
FARTHEST = 20.0  # meters; if an object is farther away, its coordinates have another unit
MAX_RATIO = 5.0  # between the median distances of a cloud and of its class
MAX_SHARE = 0.01  # of the pixels with the same point, and of the points behind the camera
SATURATED = 10.0  # times the median z: no wall behind an object is that far
MIN_DISTINCT = 0.1  # share of the points that differ from one another
DRAWN = 4_000  # points that are checked in a larger cloud


def checked_cloud(name: Path | str, xyz: np.ndarray, form: CloudForm = METERS, unit_fix: str = "") -> np.ndarray:
    """Convert `xyz` (H, W, 3) float, stored in a `form`, to float32 meters; a missing pixel becomes (0, 0, 0).

    A large cloud is checked at a fixed random sample of its points, in a few milliseconds. `unit_fix` is the fix for a
    wrong unit, by default --xyz_unit. Raises InputError, which names the cloud `name`, if its points form no surface,
    are too near or too far for this unit or for its class, or lie behind the camera.
    """
    cloud = as_cloud(xyz)
    if form.missing_value is not None:
        np.copyto(cloud, 0, where=cloud[..., 2:] == np.float32(form.missing_value))
    measured = cloud[..., 2] != 0
    if not measured.any():
        problem = f"{name} has no valid point (three finite coordinates, none of them zero)"
        raise InputError(f"{problem}. Restore the sample from its source and preprocess it again, or remove it.")
    drawn = np.flatnonzero(measured)
    if len(drawn) > DRAWN:
        drawn = drawn[np.random.default_rng(0).integers(len(drawn), size=DRAWN)]
    points = cloud.reshape(-1, 3)[drawn].astype(np.float64)
    _require_surface(name, points, measured, form.camera_frame)
    stored = float(np.median(np.linalg.norm(points, axis=1)))
    distance = stored * UNITS[form.unit]
    problem = f"The median point of {name} is {distance:.4g} m away"
    if not (NEAREST if form.camera_frame else 0) <= distance <= FARTHEST:
        fitting = " or ".join(unit for unit, scale in UNITS.items() if NEAREST <= stored * scale <= FARTHEST)
        unit = f"Give --xyz_unit {fitting} if that is the unit of all clouds, or convert this one."
        fix = unit_fix or (unit if fitting else "Convert its coordinates.")
        raise InputError(f"{problem}, expected an object between {NEAREST:g} and {FARTHEST:g} m. {fix}")
    if form.distance is not None and not 1 / MAX_RATIO < distance / form.distance < MAX_RATIO:
        raise InputError(f"{problem}, but those of its class {form.distance:.4g} m. Convert it to their unit.")
    if form.unit != "m":
        cloud *= np.float32(UNITS[form.unit])
    reach = float(max(cloud.max(), -cloud.min()))
    if reach > MAX_COORDINATE:
        problem = f"The coordinates of {name} reach {reach:.4g} m, expected at most {MAX_COORDINATE:g}"
        raise InputError(f"{problem}. Set pixels without a measurement to 0, or give their z with --missing_value.")
    behind = float((points[:, 2] < 0).mean())
    if form.camera_frame and behind > MAX_SHARE:
        problem = f"{behind:.0%} of the points of {name} lie behind the camera (z below 0)"
        raise InputError(f"{problem}. Rotate the clouds: x to the right, y down, z away from the camera.")
    return cloud


def class_distance(samples: Sequence[SampleFiles]) -> float | None:
    """Median distance of a few clouds of a class, meters, or None. Bad clouds are reported when they are used."""
    distances = []
    for path, form in ((each.xyz, each.form) for each in spread(samples) if each.xyz):
        with suppress(InputError):
            cloud = checked_cloud(path, read_organized_pc(path), form)
            distances.append(float(np.median(np.linalg.norm(cloud[valid_mask(cloud)], axis=1))))
    return float(np.median(distances)) if distances else None


def spread(samples: Sequence[SampleFiles]) -> list[SampleFiles]:
    """At most five samples, evenly spaced from the first to the last."""
    count = min(5, len(samples))
    return [samples[round(i * (len(samples) - 1) / max(1, count - 1))] for i in range(count)]


def _require_surface(name: Path | str, points: np.ndarray, measured: np.ndarray, camera_frame: bool) -> None:
    """Raise InputError if the points (N, 3) of the pixels `measured` (H, W) repeat, or lie in one row or column.

    The same point in many pixels marks missing ones. The same z may be that of a wall; it marks missing pixels only if
    it is behind the camera and most others are not, too far in any unit, or by far the largest (saturated pixels).
    """
    x, y, z = points.T
    levels = np.unique(z)
    in_front = camera_frame and np.median(levels) > 0
    saturated = z > max(SATURATED * np.median(levels), 2 * levels[-2:][0])  # a wall has several z
    impossible = (z < 0) & in_front | saturated & in_front | (np.abs(z) > MAX_COORDINATE / min(UNITS.values()))
    identity = np.where(impossible, z, x + np.pi * y + np.e * z)  # in practice equal only for equal points
    _, first, counts = np.unique(identity, return_index=True, return_counts=True)
    share = float(counts.max() / len(points) * measured.mean())
    if share > MAX_SHARE and counts.max() > 2 * np.median(counts):  # the others are rarer
        value = str(np.float32(z[first[counts.argmax()]])).removesuffix(".0")  # shortest text that reads back the same
        problem = f"{share:.0%} of the pixels of {name} hold z = {value}, too many for real measurements"
        fix = f"Give --missing_value={value} if it marks missing pixels; otherwise restore the file."
        raise InputError(f"{problem}. {fix}")
    if len(counts) < MIN_DISTINCT * len(points) or min(measured.any(axis=axis).sum() for axis in (0, 1)) < 2:
        problem = f"The points of {name} are almost all the same, or lie in one row or column of pixels"
        raise InputError(f"{problem}; expected a surface. Restore it from its source, or remove the sample.")

"""Files of parts to judge, outside a dataset: found by file, folder or pattern, paired by stem, read in any format.

parts = find_samples("photos/", "scans/*.pcd", CLOUD_SUFFIXES)
cloud = read_cloud(Path("scans/017.pcd"))
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.choices import UNITS
from utils.cleaning.cloud_cleaning import CleaningRule
from utils.errors import InputError
from utils.records import SampleFiles
from utils.scans.depth_camera import Camera, read_depth_png
from utils.scans.files import FILE_SUFFIXES, cannot_read
from utils.scans.organized_pc import as_cloud, read_organized_pc, valid_mask
from utils.scans.point_files import read_npy, read_pcd, read_ply

IMAGE_SUFFIXES = FILE_SUFFIXES["rgb"]
CLOUD_SUFFIXES = (*FILE_SUFFIXES["xyz"], ".npy", ".pcd", ".ply")
DEPTH_SUFFIXES = (".png",)  # with the intrinsics of the camera
NEAREST = 0.032  # meters; points nearer than this are left out (see docs/DATA.md), so no part lies there
FARTHEST = 20.0  # meters; a part that is farther away than this is not, its coordinates are in another unit
ASPECT_TOLERANCE = 0.01
LONGEST_NAME = 220  # bytes of a stem: a file name has 255, and those of maps and overlays are longer


class FoundSamples(NamedTuple):
    """What was found of the parts that were asked for."""

    samples: list[SampleFiles]  # complete, sorted by name
    incomplete: list[tuple[SampleFiles, str]]  # and what each lacks, or has too much


def cloud_suffixes(camera: Camera | None) -> tuple[str, ...]:
    """Suffixes of what can be read as a cloud with this camera, or without one."""
    return CLOUD_SUFFIXES if camera is None else (*CLOUD_SUFFIXES, *DEPTH_SUFFIXES)


def find_samples(rgb: str | None, xyz: str | None, suffixes: Sequence[str] = CLOUD_SUFFIXES) -> FoundSamples:
    """Find the files of parts.

    Args:
        rgb: a photograph, a folder of them or a pattern such as "line/*/photo_*.png"; None: parts need none.
        xyz: the same of point clouds.
        suffixes: of point clouds, see `cloud_suffixes`.

    Returns:
        the parts. Files are paired by stem; a single file of each kind needs no common stem, and the part then bears
        the name of the photograph. Where both are given a part needs both.

    Raises:
        InputError: there is no file, or no part is complete.
    """
    photos = None if rgb is None else _by_stem(rgb, IMAGE_SUFFIXES, "--rgb")
    clouds = None if xyz is None else _by_stem(xyz, suffixes, "--xyz")
    if photos and clouds and Path(rgb or "").is_file() and Path(xyz or "").is_file():
        clouds = dict(zip(photos, clouds.values(), strict=True))
    by_kind = {kind: files for kind, files in (("photo", photos), ("scan", clouds)) if files is not None}
    found = FoundSamples([], [])
    for name in sorted(set().union(*by_kind.values())):
        paths = {kind: files.get(name, []) for kind, files in by_kind.items()}
        part = SampleFiles(name, *(next(iter(paths.get(kind, [])), None) for kind in ("photo", "scan")))  # type: ignore[arg-type]
        fault = _fault(name, paths)
        if fault:
            found.incomplete.append((part, fault))
        else:
            found.samples.append(part)
    if not found.samples:
        raise InputError(
            f"none of {len(found.incomplete)} parts can be judged, the first, {found.incomplete[0][0].path}, because "
            f"{found.incomplete[0][1]}"
        )
    return found


def _fault(name: str, paths: Mapping[str, list[Path]]) -> str:
    """What is wrong with the files of a part, by kind, else nothing."""
    length = len(os.fsencode(name))
    if length > LONGEST_NAME:
        return f"its name has {length} bytes, expected at most {LONGEST_NAME}: rename its files"
    for kind, of_kind in paths.items():
        if len(of_kind) > 1:
            return f"{of_kind[0]} and {of_kind[1]} share a stem: give one folder at a time, or rename one of them"
        if not of_kind:
            lone = next(others[0] for others in paths.values() if others)
            return f"{lone} has no {kind} of the same stem: add it, or remove this file"
    return ""


def _by_stem(given: str, suffixes: Sequence[str], flag: str) -> dict[str, list[Path]]:
    """The files that a flag names by stem, each list sorted; InputError where there are none."""
    if not given:
        raise InputError(f"{flag} is empty: name a file, a folder, or a pattern in quotes")
    path = Path(given)
    try:
        if path.is_file():
            if path.suffix.lower() not in suffixes:
                raise InputError(f"{flag} {path} is none of {', '.join(suffixes)}{_hint(path, flag)}")
            return {path.stem: [path]}
        candidates = path.iterdir() if path.is_dir() else _matches(path)
        files = sorted(each for each in candidates if each.is_file() and not each.name.startswith("."))
    except OSError as error:
        raise cannot_read(path, error) from error
    except InputError:
        raise
    except ValueError as error:  # of pathlib, about "**" within a name
        raise InputError(f"{flag} {path} is no pattern ({error}): write it as in 'line/**/*.png'") from error
    found: dict[str, list[Path]] = {}
    for each in files:
        if each.suffix.lower() in suffixes:
            found.setdefault(each.stem, []).append(each)
    if not found:
        if not files:
            what = "an empty folder" if path.is_dir() else "no file, no folder and no pattern that any file matches"
            raise InputError(f"{flag} {path} is {what}: name a file, a folder, or a pattern in quotes")
        raise InputError(f"{flag} {path} holds none of {', '.join(suffixes)}{_hint(files[0], flag)}")
    return found


def _hint(path: Path, flag: str) -> str:
    depth = flag == "--xyz" and path.suffix.lower() in DEPTH_SUFFIXES
    return ": a depth picture needs --intrinsics" if depth else f", but {path.name}: convert it, or name other files"


def _matches(pattern: Path) -> list[Path]:
    """The paths that match a pattern, whose parts up to the first one with a wildcard are a folder."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    return [] if first is None else list(Path(*parts[:first]).glob(str(Path(*parts[first:]))))


def read_cloud(
    path: Path, camera: Camera | None = None, unit: str = "m", image_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read an organized point cloud, the format told by the suffix.

    Args:
        path: .tiff, .tif, .npy, .pcd, .ply, or, with a camera, a depth .png.
        camera: that took the depth picture.
        unit: a key of UNITS, that of the coordinates; a depth picture has the scale of its camera instead.
        image_size: (H, W) of the photo of the same view, see `read_ply`.

    Returns:
        (H, W, 3) float32, meters, camera frame; a pixel without a measurement is exactly (0, 0, 0).

    Raises:
        InputError: what the reader of the format raises, or coordinates that cannot be meters.
    """
    suffix = path.suffix.lower()
    if suffix in DEPTH_SUFFIXES:
        if camera is None:
            raise InputError(f"{path} is a depth picture: give the intrinsics of its camera with --intrinsics")
        return _in_meters(path, read_depth_png(path, camera), *["correct the depth_scale of its camera"] * 2)
    if suffix == ".npy":
        xyz = read_npy(path)
    elif suffix == ".pcd":
        xyz = read_pcd(path)
    elif suffix == ".ply":
        xyz = read_ply(path, image_size)
    else:
        xyz = read_organized_pc(path)
    meters = as_cloud(np.multiply(xyz, UNITS[unit], dtype=np.result_type(xyz.dtype, np.float32)))
    if unit == "m":
        return _in_meters(path, meters, "give --xyz_unit mm if its numbers are millimeters", "convert its coordinates")
    return _in_meters(path, meters, "convert its coordinates", f"leave out --xyz_unit {unit} if its numbers are meters")


def _in_meters(path: Path, xyz: np.ndarray, if_far: str, if_near: str) -> np.ndarray:
    """`xyz` if its coordinates can be meters, else an InputError with one of these mends."""
    points = xyz[valid_mask(xyz)].astype(np.float64)
    if not len(points):
        return xyz
    middle, reach = float(np.median(np.linalg.norm(points, axis=1))), float(np.abs(points).max())
    if not NEAREST <= middle <= FARTHEST:
        raise InputError(
            f"the median point of {path} is {middle:.4g} m away, expected a part between {NEAREST:g} and {FARTHEST:g} "
            f"m: {if_far if middle > FARTHEST else if_near}"
        )
    if reach > CleaningRule.max_extent:
        raise InputError(
            f"the coordinates of {path} reach {reach:.4g} m, expected at most {CleaningRule.max_extent:g}: set pixels "
            "without a measurement to 0, or restore the scan if it is damaged"
        )
    return xyz


def check_same_view(name: str, photo: np.ndarray, xyz: np.ndarray, same_pixels: bool) -> None:
    """Refuse a photo (H, W, 3) and a cloud (h, w, 3) that cannot show the same view.

    Both are resized to the same square, so that one may have more pixels than the other.

    Args:
        name: of the part.
        photo: its photograph.
        xyz: its point cloud.
        same_pixels: cleaning looks at both pixel by pixel.

    Raises:
        InputError: the sizes differ, or where these may, the aspect.
    """
    (height, width), (rows, columns) = photo.shape[:2], xyz.shape[:2]
    if (height, width) == (rows, columns):
        return
    if same_pixels or abs(height * columns - rows * width) > ASPECT_TOLERANCE * rows * width:
        expected = "the same pixels, which cleaning needs" if same_pixels else "the same view"
        raise InputError(
            f"the photo of {name} has {height} x {width} pixels (H x W), its scan {rows} x {columns}, expected "
            f"{expected}: map the photo to the pixels of the scan"
        )

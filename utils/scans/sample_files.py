"""Files of samples outside a dataset, given as file, folder or pattern, paired by stem, and read in any format.

found = find_samples("images/", "clouds/*.pcd")
cloud = read_cloud(Path("clouds/017.pcd"))
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from utils.errors import InputError
from utils.records import METERS, CloudForm, SampleFiles
from utils.scans.cloud_check import checked_cloud
from utils.scans.depth_camera import Camera, back_project, read_depth_png
from utils.scans.files import FILE_SUFFIXES, LONGEST_NAME
from utils.scans.organized_pc import organized_pc_header, read_organized_pc
from utils.scans.point_files import read_npy, read_pcd, read_ply

IMAGE_SUFFIXES, TIFF_SUFFIXES = FILE_SUFFIXES["rgb"], FILE_SUFFIXES["xyz"]
CLOUD_SUFFIXES = (*TIFF_SUFFIXES, ".npy", ".pcd", ".ply")
DEPTH_SUFFIXES = (".png",)  # of depth images alone; .tiff and .npy hold clouds or depth maps
ASPECT_TOLERANCE = 0.01


class FoundSamples(NamedTuple):
    samples: list[SampleFiles]  # complete, sorted by name
    incomplete: list[tuple[SampleFiles, str]]  # with the problem of each

    @property
    def files(self) -> list[SampleFiles]:
        """All samples."""
        return [*self.samples, *(files for files, _ in self.incomplete)]


def find_samples(
    rgb: str | Sequence[str] | None,
    xyz: str | Sequence[str] | None,
    depth: bool = False,
    xyz_flag: str = "--xyz",
    required: bool = True,
) -> FoundSamples:
    """Find the files of samples, paired by stem.

    Args:
        rgb: an image, a folder of images or a pattern such as "line/*/image_*.png", or several of these; None without
            images.
        xyz: the same for point clouds. If both are given, a sample needs both. A single image and a single cloud need
            not have the same stem; the sample then has the name of the image.
        depth: True if depth images count as clouds, because their camera is known.
        xyz_flag: name of the flag that gave `xyz`, for errors.
        required: False if files may still arrive, so that none need exist yet.

    Raises InputError if files are `required` and there is none, or no sample is complete; OSError for an unreadable
    folder.
    """
    by_kind: dict[str, dict[str, list[Path]]] = {}
    images, clouds = ([each] if isinstance(each, str) else each for each in (rgb, xyz))
    if images is not None:
        by_kind["image"] = _by_stem(images, IMAGE_SUFFIXES, "--rgb", required)
    if clouds is not None:
        suffixes = CLOUD_SUFFIXES + (DEPTH_SUFFIXES if depth else ())
        by_kind["cloud"] = _by_stem(clouds, suffixes, xyz_flag, required)
    if len(by_kind) == 2:  # a .tiff in a folder of both is a cloud, even before the first image arrives
        used = {path for files in by_kind["cloud"].values() for path in files if path.suffix.lower() in TIFF_SUFFIXES}
        unused = {stem: [each for each in files if each not in used] for stem, files in by_kind["image"].items()}
        by_kind["image"] = {stem: files for stem, files in unused.items() if files}
    single = all(given and len(given) == 1 and Path(given[0]).is_file() for given in (images, clouds))
    if single and all(by_kind.values()):
        by_kind["cloud"] = dict(zip(by_kind["image"], by_kind["cloud"].values(), strict=True))
    found = FoundSamples([], [])
    paired = set.intersection(*map(set, by_kind.values()))
    alone = {
        kind: sorted(files[0].name for stem, files in by_stem.items() if stem not in paired)
        for kind, by_stem in by_kind.items()
    }
    for stem in sorted(set().union(*by_kind.values())):
        paths = {kind: files.get(stem, []) for kind, files in by_kind.items()}
        image, cloud = (next(iter(paths.get(kind, [])), None) for kind in ("image", "cloud"))
        name = next(files[0].stem for files in paths.values() if files)  # `stem` may be in another Unicode form
        sample = SampleFiles(name, image, cloud)
        if problem := _problem(name, paths, alone):
            found.incomplete.append((sample, problem))
        else:
            found.samples.append(sample)
    if required and not found.samples:
        sample, problem = found.incomplete[0]
        raise InputError(f"None of {len(found.incomplete)} samples is complete. The first is {sample.path}: {problem}")
    return found


def _problem(name: str, paths: Mapping[str, list[Path]], alone: Mapping[str, list[str]]) -> str:
    """Return the problem of a sample with these files by kind, or ""; `alone` names the files without a partner."""
    length = len(os.fsencode(name))
    if length > LONGEST_NAME:
        return f"Its name has {length} bytes, expected at most {LONGEST_NAME}. Rename its files."
    for kind, files in paths.items():
        if len(files) > 1:
            return f"{files[0]} and {files[1]} share a stem. Rename one, or give a pattern that leaves one out."
        if not files:
            partner = next(others[0] for others in paths.values() if others)
            problem = f"{partner} has no {kind} of the same stem"
            if not alone[kind]:
                return f"{problem}. Add it, or remove this file."
            listing = ", ".join(alone[kind][:3]) + (", ..." if len(alone[kind]) > 3 else "")
            return f"{problem} (unpaired: {listing}). Rename the right one, add the missing file, or remove this one."
    return ""


def _by_stem(given: Sequence[str], suffixes: Sequence[str], flag: str, required: bool) -> dict[str, list[Path]]:
    """Return the files that a flag names, by stem, each list sorted; InputError if there are none but `required`."""
    files = list(dict.fromkeys(path for each in given for path in _named_files(each, flag, required)))
    # Broken links, pipes and folders with such a suffix count: reading them reports each as a problem.
    fitting = [each for each in files if each.suffix.lower() in suffixes]
    if flag == "--rgb":  # a folder may hold images and clouds
        fitting = [each for each in fitting if each.suffix.lower() not in TIFF_SUFFIXES] or fitting
    found: dict[str, list[Path]] = {}
    for each in fitting:
        found.setdefault(normalize("NFC", each.stem), []).append(each)
    if found or not required:
        return found
    path = Path(given[0])
    other = next((each for each in files if each.suffix.lower() not in IMAGE_SUFFIXES), files[0])
    if flag != "--rgb" and other.suffix.lower() in DEPTH_SUFFIXES:
        raise InputError(f"{flag} {path} names depth images. Give the intrinsics of their camera with --intrinsics.")
    raise InputError(f"{flag} {path} names {other.name}, expected {', '.join(suffixes)}. Convert the files.")


def _named_files(given: str, flag: str, required: bool) -> list[Path]:
    """Return the files that one value of a flag names, sorted, without hidden ones; errors as in `_by_stem`."""
    path = Path(given)
    if path.is_file():
        return [path]
    matches = glob(given, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    candidates = path.iterdir() if given and path.is_dir() else map(Path, matches)
    files = sorted(each for each in candidates if not each.name.startswith("."))
    if not files and required:
        raise InputError(f"{flag} {given!r} names no file. Give a file, a folder with files, or a pattern in quotes.")
    return files


def stamp_of(files: SampleFiles) -> str:
    """Identify the image and the cloud of a sample by path, size and time of the last change: 16 hexadecimal digits."""
    parts: list[object] = []
    for path in (files.rgb, files.xyz):
        try:
            status = None if path is None else path.stat()
        except OSError:  # such as a broken link
            status = None
        place = None if path is None else str(path.absolute())
        parts.append((place, status and (status.st_size, status.st_mtime_ns)))
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def read_cloud(
    path: Path,
    camera: Camera | None = None,
    image_size: tuple[int, int] | None = None,
    form: CloudForm = METERS,
) -> np.ndarray:
    """Read an organized point cloud in the format that its suffix names.

    `path` is a .tiff, .tif, .npy, .pcd or .ply file, or with the camera that took it a depth map (see `holds_depth`).
    A depth map has the scale of its camera instead of a unit, and a missing_value in meters. `image_size` is as in
    `read_ply`.

    Returns (H, W, 3) float32, meters; a pixel without a measurement is exactly (0, 0, 0). Raises InputError if the file
    cannot be read in its format, or `checked_cloud` refuses it.
    """
    suffix, depth = path.suffix.lower(), camera is not None
    if suffix in DEPTH_SUFFIXES and not depth:
        raise InputError(f"{path} is a depth image. Give the intrinsics of its camera with --intrinsics.")
    readers: dict[str, Callable[[Path], np.ndarray]] = {
        ".npy": partial(read_npy, depth=depth), ".png": read_depth_png,
        ".pcd": read_pcd, ".ply": partial(read_ply, image_size=image_size),
    }  # fmt: skip
    array = readers.get(suffix, partial(read_organized_pc, depth=depth))(path)
    if camera is None or array.shape[2:] == (3,):
        return checked_cloud(path, array, form)
    high, wide = array.shape[:2]
    expected = (camera.height or high, camera.width or wide)
    if expected != (high, wide):
        problem = f"{path} has {high} x {wide} pixels (H x W), the intrinsics say {expected[0]} x {expected[1]}"
        raise InputError(f"{problem}. Give matching ones.")
    cloud = back_project(array.reshape(high, wide), camera)
    return checked_cloud(path, cloud, CloudForm(missing_value=form.missing_value), "Correct the depth_scale.")


def holds_depth(path: Path) -> bool:
    """Return True for a depth image, and for a .tiff or .npy that holds no cloud, so that it may be a depth map."""
    suffix = path.suffix.lower()
    try:
        if suffix in CLOUD_SUFFIXES[:-2]:
            (read_npy if suffix == ".npy" else organized_pc_header)(path)
    except InputError:
        return True
    return suffix in DEPTH_SUFFIXES


def check_camera_flags(clouds: Sequence[Path], xyz_unit: str | None) -> None:
    """Raise InputError if --intrinsics, or a unit given beside them, applies to none of the clouds."""
    if not any(map(holds_depth, clouds)):
        raise InputError("--intrinsics only applies to depth images, but there are none. Remove it, or pass some.")
    if xyz_unit and all(map(holds_depth, clouds)):
        raise InputError("--xyz_unit does not apply to depth images. Set depth_scale in --intrinsics instead.")


def check_same_view(name: str, rgb: np.ndarray, xyz: np.ndarray) -> None:
    """Raise InputError for an image (H, W, 3) and a cloud (h, w, 3) of a sample that cannot show the same view.

    Only their aspect ratios must agree, because both are resized to the same square.
    """
    (height, width), (rows, columns) = rgb.shape[:2], xyz.shape[:2]
    if abs(height * columns - rows * width) > ASPECT_TOLERANCE * rows * width:
        problem = f"The image of {name} has {height} x {width} pixels (H x W), but its cloud {rows} x {columns}"
        raise InputError(f"{problem}; expected the same view. Map the image to the pixels of the cloud.")

"""Convert Eyecandies, as published, to organized point clouds in the layout of MVTec 3D-AD, background removed.

    python utils/preprocess_eyecandies.py --dataset_path Eyecandies --target_dir datasets/eyecandies
    python utils/preprocess_eyecandies.py --dataset_path Eyecandies --target_dir datasets/eyecandies \
        --classes Confetto --light 2

It reads <Class>/{train,val,test_public}/data/<number>_{depth.png,info_depth.yaml,pose.txt,image_<light>.png,mask.png}
and writes <Class>/{train/good,validation/good,test/good,test/bad}/{rgb,xyz,gt}/<number>.*, with gt only for the test
split. For repeated runs and exit codes, see utils/preprocessing.py.
"""

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os.path import normpath
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import yaml

from utils.cleaning.journal import Journal, Scan
from utils.cleaning.scan_processing import Result, Summary, process_scans, report, write_results
from utils.command_line import MOST_WORKERS, Parser
from utils.errors import InputError
from utils.reporting.messages import exit_on_error, start_messages
from utils.scans.files import check_folder, read_bytes, subfolders
from utils.scans.images import defect_mask, open_image, read_image

VERSION = 2  # of the conversion: raise it when the same sample gives another result or record

# From Bonfiglioli et al., ACCV 2022, and the background rule of M3DM's published results.
FOCAL_LENGTH = 711.11  # pixels
LIGHTS = range(6)
BOX_TOP, BOX_DEPTH, BOX_HALF_WIDTH = -0.02, 1.8, 1.0  # meters, in the frame of the table, see `background`
SCALE = (0.1, -0.1, 0.1)  # of the reordered axes
SPLITS = {"train": "train", "val": "validation", "test_public": "test"}  # folder of Eyecandies: folder of MVTec 3D-AD
_SAMPLE_FILE = re.compile(r"(\d+)_(?:depth\.png|info_depth\.yaml|pose\.txt|image_\d\.png|mask\.png)")


@dataclass(frozen=True)
class Config:
    """Flags of the script."""

    dataset_path: Path
    target_dir: Path
    classes: Sequence[str] | None
    light: int
    workers: int
    missing_value: int = 0


def meters_of(stored: np.ndarray, low: float, high: float, missing: int = 0) -> np.ndarray:
    """Convert 16-bit depth (H, W) to float64 meters; 0 and `missing`, which mark missing measurements, become 0."""
    return np.where(np.isin(stored, (0, missing)), 0.0, stored / 65535 * (high - low) + low)


def unproject(depth: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Compute the point of each pixel: depth * inv(K pose) (u, v, 1, 1 / depth), for column u and row v.

    K is the pinhole camera of FOCAL_LENGTH whose principal point is the image center (w / 2, h / 2).
    `depth` is (H, W) float64, meters, 0 where missing; `pose` the (4, 4) of the camera. Returns (H, W, 3) float64,
    meters, in the frame of the pose; NaN where missing.
    """
    height, width = depth.shape
    camera = np.array([[FOCAL_LENGTH, 0, width / 2, 0], [0, FOCAL_LENGTH, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    inverse = np.linalg.inv(camera @ pose)[:3]
    v, u = np.mgrid[:height, :width]
    points = np.stack([u * depth, v * depth, depth, np.ones_like(depth)], axis=-1) @ inverse.T
    return np.where((depth > 0)[..., None], points, np.nan)


def background(points: np.ndarray) -> np.ndarray:
    """Mark the pixels outside a box on the table, which do not show the candy.

    The middle pixels of the first and last row show the table. The box is rotated about x, so that the line between
    them is its z axis, and starts at the last row. In its frame, background has y > -0.02, z > 1.8 or |x| > 1.

    `points` are (H, W, 3) float64, meters, of `unproject`. Returns (H, W) bool, True also where the measurement is
    missing. Raises InputError if one of the two middles is missing, or they are the same point.
    """
    middle = points.shape[1] // 2
    first, last = points[0, middle], points[-1, -middle]
    _, along_y, along_z = first - last
    length = float(np.hypot(along_y, along_z))
    if not length > 0:
        problem = "the depth in the middle of the first or last row is missing, or both are the same"
        raise InputError(f"The table cannot be found: {problem}. Leave the sample out.")
    cos, sin = along_z / length, along_y / length
    x = points[..., 0]
    y, z = points[..., 1] - last[1], points[..., 2] - last[2]
    inside = (cos * y - sin * z <= BOX_TOP) & (sin * y + cos * z <= BOX_DEPTH) & (np.abs(x) <= BOX_HALF_WIDTH)
    return ~inside  # comparisons with NaN are False: a missing point is not inside


def organized_cloud(depth: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return the cloud (H, W, 3) float32 of the published results: axes (x, z, y) times SCALE, background exactly 0.

    Arguments and errors as in `unproject` and `background`.
    """
    points = unproject(depth, pose)
    return np.where(background(points)[..., None], 0, points[..., [0, 2, 1]] * SCALE).astype(np.float32)


def find_scans(root: Path, classes: Sequence[str] | None, light: int) -> tuple[list[Scan], dict[str, str]]:
    """Find the samples of the published layout. Any of its files is enough to find a sample.

    Returns the scans as they will be written, and the reason for each unreadable mask. Raises InputError if a class is
    not there or there are no samples, OSError if a folder cannot be read.
    """
    check_folder(root, "Give the folder that holds the classes of Eyecandies.")
    folders = {folder.name: folder for folder in subfolders(root)}
    if unknown := sorted(set(classes or ()) - folders.keys()):
        raise InputError(f"{root} has no class {unknown[0]}. --classes takes {', '.join(folders) or 'nothing here'}.")
    scans: list[Scan] = []
    failed: dict[str, str] = {}
    for name, split in itertools.product(sorted(set(classes or folders)), SPLITS):
        data = folders[name] / split / "data"
        found = [_SAMPLE_FILE.fullmatch(path.name) for path in data.iterdir()] if data.is_dir() else []
        for number in sorted({match[1] for match in found if match}):
            try:
                scans.append(_scan_of(data / number, f"{name}/{SPLITS[split]}", light))
            except InputError as error:
                failed[f"{name}/{SPLITS[split]}/{int(number):03d}"] = str(error)
    if not scans and not failed:
        problem = f"{root} holds no <Class>/train/data/<number>_depth.png"
        raise InputError(f"{problem}. Give the folder that holds the classes.")
    return scans, failed


def _scan_of(prefix: Path, split: str, light: int) -> Scan:
    """Return the scan of the files `prefix`_*. A test scan goes to the folder bad if its mask has a defect."""
    sources = {
        "xyz": tuple(Path(f"{prefix}_{ending}") for ending in ("depth.png", "info_depth.yaml", "pose.txt")),
        "rgb": (Path(f"{prefix}_image_{light}.png"),),
    }
    defect = "good"
    if split.endswith("/test"):
        sources["gt"] = (Path(f"{prefix}_mask.png"),)
        defect = "bad" if _read_mask(sources["gt"][0]).any() else "good"
    return Scan(f"{split}/{defect}/{int(prefix.name):03d}", sources)


def convert_files(scan: Scan, config: Config) -> Result:
    """Convert one sample and write the results under temporary names.

    Raises InputError or OSError if a file cannot be read or written, sizes differ, or the table cannot be found.
    """
    depth, limits, pose = scan.sources["xyz"]
    arrays = {"xyz": organized_cloud(_read_depth(depth, limits, config.missing_value), _read_pose(pose))}
    if not arrays["xyz"].any():
        raise InputError(f"Nothing of {depth} lies inside the box on the table. Leave the sample out.")
    arrays["rgb"] = read_image(scan.sources["rgb"][0])
    if "gt" in scan.sources:
        arrays["gt"] = _read_mask(scan.sources["gt"][0]).astype(np.uint8) * 255
    height, width = arrays["xyz"].shape[:2]
    for modality, array in arrays.items():
        if array.shape[:2] != (height, width):
            found = f"{scan.sources[modality][0]} is {array.shape[0]} x {array.shape[1]}"
            raise InputError(f"{found}, its depth {height} x {width} (H x W). Copy them again from the dataset.")
    return write_results(scan, arrays, config.target_dir), ""


def preprocess(config: Config) -> Summary:
    """Convert every sample that is new or has changed; errors as in `find_scans`, `Journal` and `process_scans`."""
    target = config.target_dir
    if target.resolve() == config.dataset_path.resolve():
        raise InputError(f"--target_dir {target} is the dataset itself. Give another folder.")
    scans, failed = find_scans(config.dataset_path, config.classes, config.light)
    flags = {"light": config.light, "missing_value": config.missing_value}
    journal = Journal(target, {"converter": "eyecandies", "version": VERSION} | flags)
    return process_scans(scans, journal, partial(convert_files, config=config), config.workers, failed)


def _read_depth(path: Path, limits: Path, missing: int) -> np.ndarray:
    text = read_bytes(limits, "record")
    try:
        normalization = yaml.safe_load(text)["normalization"]
        low, high = float(normalization["min"]), float(normalization["max"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        raise InputError(f"{limits} cannot be read, expected normalization: min, max. Copy it again.") from None
    if not 0 < low < high < np.inf:
        raise InputError(f"{limits} has the depths {low} to {high}, expected 0 < min < max in meters. Copy it again.")
    with open_image(path) as image:
        stored, mode = np.asarray(image), image.mode
    if not mode.startswith("I"):
        raise InputError(f"{path} holds an image of mode {mode}, expected 16-bit gray. Copy it again from the dataset.")
    return meters_of(stored.astype(np.float64), low, high, missing)


def _read_pose(path: Path) -> np.ndarray:
    text = read_bytes(path, "record")
    try:
        pose = np.array([line.split() for line in text.strip().splitlines()], dtype=np.float64)
        valid = pose.shape == (4, 4) and np.isfinite(pose).all() and np.linalg.matrix_rank(pose) == 4
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"{path} holds no invertible 4 x 4 matrix. Copy it again from the dataset.")
    return pose


def _read_mask(path: Path) -> np.ndarray:
    with open_image(path) as image:
        return defect_mask(image)


def parse_args(argv: Sequence[str] | None) -> Config:
    """Read the flags."""
    parser = Parser((__doc__ or "").split("\n\n")[0], {"workers": (1, MOST_WORKERS), "missing_value": (0, 65535)})
    parser.add_argument("--dataset_path", type=Path, required=True, help="folder that holds the classes as published")
    parser.add_argument("--target_dir", type=Path, required=True, help="folder for the converted classes")
    parser.add_argument("--classes", nargs="+", type=normpath, help="classes to convert (default: all)")
    parser.add_argument("--light", type=int, default=4, choices=LIGHTS, help="light whose image becomes rgb")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; by default one per core")
    parser.add_argument("--missing_value", type=int, default=0, help="stored depth of missing pixels, besides 0")
    return Config(**vars(parser.parse_args(argv)))


@exit_on_error("interrupted. Run the same command to continue.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    config = parse_args(argv)
    start_messages("%(message)s")
    return report(preprocess(config))


if __name__ == "__main__":
    sys.exit(main())

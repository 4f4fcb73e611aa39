"""Convert clouds and depth images of any supported format to the files of a dataset.

    python utils/convert.py scans/ --xyz_unit mm --output parts/bracket/train/good
    python utils/convert.py "line/*.pcd" --rgb images/ --output parts/bracket/train/good
    python utils/convert.py depth/ --rgb color/ --intrinsics camera.json --output parts/bracket/train/good

SOURCE is an organized point cloud (.tiff, .npy, .pcd, .ply) or, with --intrinsics, a depth image (.png, .tiff, .npy).
Each becomes xyz/<stem>.tiff (float32, meters) in --output. The image with the same stem, beside the source or in --rgb,
becomes rgb/<stem>.png. An image of another size than its cloud is scaled to the pixels of the cloud.

Clouds are not cleaned: utils/preprocessing.py does that afterwards. No existing file is replaced.
Exit code: 0 all converted, 1 some could not be converted, 2 bad arguments, or nothing to convert.
"""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from utils.command_line import FILE_BOUNDS, Parser, add_file_flags
from utils.errors import InputError
from utils.records import CloudForm, SampleFiles
from utils.reporting.messages import exit_on_error, show, start_messages, warn_once
from utils.reporting.progress import progress_bar
from utils.scans.depth_camera import Camera, read_camera
from utils.scans.files import (
    FILE_SUFFIXES,
    FOLDERS,
    FilesByModality,
    atomic_path,
    files_by_modality,
    locked,
    make_folder,
)
from utils.scans.images import read_image, set_max_megapixels
from utils.scans.organized_pc import read_organized_pc, write_organized_pc
from utils.scans.sample_files import (
    IMAGE_SUFFIXES,
    FoundSamples,
    check_camera_flags,
    check_same_view,
    find_samples,
    read_cloud,
)

SPLITS = ("train", "validation", "test")
Arrays = dict[str, np.ndarray]  # by modality: xyz (H, W, 3) float32, meters, and rgb (H, W, 3) uint8


@dataclass(frozen=True)
class Config:
    """Flags of the script, with the camera read from its file."""

    sources: Sequence[str]
    output: Path
    rgb: str | None
    camera: Camera | None
    form: CloudForm

    @property
    def dataset(self) -> Path:
        """Folder of the classes; InputError if the output is not <dataset>/<class>/<split>/<defect>."""
        folders = (self.output if len(self.output.parents) > 2 else self.output.absolute()).parents
        if len(folders) < 3 or folders[0].name not in SPLITS:
            problem = f"--output {self.output} is not in the folder of a split ({', '.join(SPLITS)})"
            raise InputError(f"{problem}. Give <dataset>/<class>/<split>/<defect>, such as parts/bracket/train/good.")
        return folders[2]

    def file(self, modality: str, name: str) -> Path:
        """Path of a result."""
        return self.output / FOLDERS[modality][0] / f"{name}{FILE_SUFFIXES[modality][0]}"


def find_sources(config: Config) -> FoundSamples:
    """Find the clouds and their images; if one cloud has an image beside it, all need one.

    Raises InputError as `find_samples`, and for flags about depth images that do not fit the files.
    """
    depth = config.camera is not None
    found = find_samples(config.rgb, config.sources, depth, "SOURCE")
    samples = [*found.samples, *(each for each, _ in found.incomplete)]
    clouds = [each.xyz for each in samples if each.xyz is not None]
    if depth:
        check_camera_flags(clouds, None if config.form.unit == "m" else config.form.unit)
    images = [] if config.rgb else _images_beside(clouds)
    return find_samples(images, config.sources, depth, "SOURCE") if images else found


def _images_beside(clouds: Sequence[Path]) -> list[str]:
    """Return the images with the folder and the stem of a cloud."""
    used, folders = set(clouds), {path.parent for path in clouds}
    wanted = {(path.parent, normalize("NFC", path.stem)) for path in clouds}
    images = [path for folder in folders for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    beside = [path for path in images if (path.parent, normalize("NFC", path.stem)) in wanted]
    return [str(path) for path in beside if path not in used]


def read_sample(files: SampleFiles, config: Config) -> Arrays:
    """Read a cloud and its image, at the size of the cloud; InputError if they cannot be read or differ in view."""
    assert files.xyz is not None, "every sample has a cloud"
    if files.rgb is None:
        return {"xyz": read_cloud(files.xyz, config.camera, form=config.form)}
    image = read_image(files.rgb)
    xyz = read_cloud(files.xyz, config.camera, image.shape[:2], config.form)
    check_same_view(files.path, image, xyz)
    (height, width), (rows, columns) = image.shape[:2], xyz.shape[:2]
    if (height, width) != (rows, columns):
        problem = f"{files.rgb} has {height} x {width} pixels (H x W), its cloud {rows} x {columns}"
        warn_once("size", files.rgb.parent, f"{problem}. Such images are scaled. Check that both show the same view.")
        image = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
    return {"xyz": xyz, "rgb": image}


def new_files(files: SampleFiles, arrays: Arrays, existing: FilesByModality) -> Arrays:
    """Return the arrays that no file holds yet; InputError if a file of this stem holds anything else."""
    new: Arrays = {}
    for modality, array in arrays.items():
        old = existing[modality].get(normalize("NFC", files.path), ())
        if not old:
            new[modality] = array
        elif not _holds(old[0], modality, array):
            problem = f"{old[0]} exists and differs from the new file"
            raise InputError(f"{problem}. Remove it, rename {files.xyz}, or choose another --output.")
    return new


def _holds(path: Path, modality: str, array: np.ndarray) -> bool:
    with suppress(InputError):
        return np.array_equal(read_organized_pc(path) if modality == "xyz" else read_image(path), array)
    return False


def write_sample(name: str, arrays: Mapping[str, np.ndarray], config: Config) -> None:
    """Write the files of a sample, each completely or not at all; InputError if one cannot be written."""
    for modality, array in arrays.items():
        path = config.file(modality, name)
        if modality == "xyz":
            write_organized_pc(path, array)
        else:
            with atomic_path(path) as temporary:
                Image.fromarray(array).save(temporary)


def convert(config: Config) -> int:
    """Convert all samples, print the outcome, and return the exit code."""
    dataset, found = config.dataset, find_sources(config)
    make_folder(config.output, "--output")
    failed = len(found.incomplete)
    for files, problem in found.incomplete:
        _show_problem(files.path, problem)
    results = [config.file(modality, each.path) for each in found.samples for modality in ("xyz", "rgb")]
    with locked(config.output, "--output", results):
        existing = files_by_modality(config.output)
        progress = progress_bar(found.samples, unit="sample")
        for files in progress:
            try:
                arrays = new_files(files, read_sample(files, config), existing)
            except InputError as error:
                failed += 1
                with progress.external_write_mode():
                    _show_problem(files.path, str(error))
                continue
            write_sample(files.path, arrays, config)
    total = len(found.samples) + len(found.incomplete)
    show(f"converted {total - failed} of {total} samples to {config.output}")
    if not any(each.rgb for each in found.samples):
        problem = "There are no images beside the clouds. Methods that use images need them: give --rgb."
        show(problem, level=logging.WARNING)
    if failed < total:
        command = f"python utils/preprocessing.py {shlex.quote(str(dataset))}"
        show(f"The clouds are not cleaned. Once all samples are converted, run {command}")
    return int(failed > 0)


def _show_problem(name: str, problem: str) -> None:
    show(f"convert.py: {name} could not be converted: {problem}", sys.stderr, logging.ERROR)


def parse_args(argv: Sequence[str] | None) -> Config:
    """Read the flags, and the camera; InputError if its file is wrong."""
    parser = Parser(__doc__, FILE_BOUNDS)
    text = "cloud or depth image, folder of them, or quoted pattern: .tiff, .npy, .pcd, .ply, .png (--intrinsics)"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=text)
    text = "folder of the samples: <dataset>/<class>/<split>/<defect>"
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=text)
    text = "image, folder of images, or quoted pattern; by default the images beside the sources"
    parser.add_argument("--rgb", help=text)
    text = "JSON file with fx, fy, cx, cy and depth_scale of the depth camera, see docs/DATA.md"
    parser.add_argument("--intrinsics", type=Path, metavar="JSON", help=text)
    add_file_flags(parser.add_argument)
    args = parser.parse_args(argv)
    set_max_megapixels(args.max_megapixels)
    camera = None if args.intrinsics is None else read_camera(args.intrinsics)
    return Config(args.sources, args.output, args.rgb, camera, CloudForm(args.xyz_unit, args.missing_value))


@exit_on_error("interrupted. Run the same command to continue.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    config = parse_args(argv)
    start_messages("%(message)s")
    return convert(config)


if __name__ == "__main__":
    sys.exit(main())

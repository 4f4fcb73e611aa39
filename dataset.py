"""From a dataset folder to samples: class lists, the index of files paired by stem, and the loader.

The layout is that of MVTec 3D-AD; a good test scan may lack its ground truth, and a method of one modality needs
no files of the other:

    <dataset>/<class>/train/good/{rgb,xyz}/000.{png,tiff}
    <dataset>/<class>/validation/good/{rgb,xyz}/...
    <dataset>/<class>/test/{good,<defect>,...}/{rgb,xyz,gt}/...

    files = index_split("datasets/mvtec3d/bagel", "test", frozenset({"rgb", "xyz"}))

A part that lies in memory becomes a sample by `make_sample`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import InputError
from utils.records import Sample, SampleFiles
from utils.scans.files import FILE_SUFFIXES, files_by_stem, subfolders
from utils.scans.images import defect_mask, open_image, to_rgb
from utils.scans.organized_pc import check_organized, organized_pc_header, read_organized_pc, resize_nearest, valid_mask

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item", covariant=True)

MVTEC3D_CLASSES = ("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire")
EYECANDIES_CLASSES = (
    "CandyCane", "ChocolateCookie", "ChocolatePraline", "Confetto", "GummyBear",
    "HazelnutTruffle", "LicoriceSandwich", "Lollipop", "Marshmallow", "PeppermintCandy",
)  # fmt: skip
DATASET_CLASSES = {"mvtec3d": MVTEC3D_CLASSES, "eyecandies": EYECANDIES_CLASSES}

_PUBLISHED = {
    "mvtec3d": "MVTec 3D-AD from https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    "eyecandies": "Eyecandies from https://eyecan-ai.github.io/eyecandies",
}
_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL_BYTES = 65536  # some writers put a trailer of their own behind the end marker
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def find_classes(dataset_path: Path | str, dataset_type: str, chosen: Sequence[str] | None = None) -> list[str]:
    """The classes to run: `chosen` (any folders in the same layout), or every published class that is there.

    `dataset_type` is a key of DATASET_CLASSES. Chosen names keep their order, published ones that of their list.
    Raises InputError when the dataset folder, a chosen class, or every published class is missing.
    """
    root = Path(dataset_path)
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder: download {_PUBLISHED[dataset_type]}, preprocess it as the README tells, "
            "and name its folder with --dataset_path"
        )
    found = [path.name for path in subfolders(root)]
    listing = ", ".join(found) or "no folder"
    if not chosen:
        classes = [name for name in DATASET_CLASSES[dataset_type] if name in found]
        if not classes:
            raise InputError(
                f"{root} holds none of the {dataset_type} classes but {listing}: name the class folders with "
                "--classes, or another dataset folder with --dataset_path"
            )
        return classes
    for name in chosen:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InputError(f"class {name!r} is not a plain folder name: put the folders before it in --dataset_path")
        if not (root / name).is_dir():
            raise InputError(f"class {name!r} is not in {root}, which holds {listing}: name these with --classes")
    return list(dict.fromkeys(chosen))


def class_folders(dataset_path: Path | str) -> list[str]:
    """Names of all folders of a dataset that hold a split, whatever they are called; InputError where it is unreadable.

    A folder in it that cannot be read counts: what is wrong with it is for the reader of its splits to tell.
    """
    names = []
    for folder in subfolders(Path(dataset_path)):
        try:
            splits = {path.name for path in subfolders(folder)}
        except InputError:
            splits = {"test"}
        if splits & {"train", "validation", "test"}:
            names.append(folder.name)
    return names


def index_split(class_folder: Path | str, split: str, modalities: frozenset[str]) -> list[SampleFiles]:
    """The scans of "train", "validation" or "test", sorted by (defect, stem) and paired by stem.

    `modalities` ("rgb", "xyz" or both) are those the method needs: every scan has them. Files of the other one are
    recorded where they are. Raises InputError when there is no scan, a needed partner or the ground truth of a
    defective test scan is missing, or two files of one folder share a stem.
    """
    files, problems = pair_split(class_folder, split, modalities)
    if problems:
        raise InputError(problems[0])
    return files


def pair_split(class_folder: Path | str, split: str, modalities: frozenset[str]) -> tuple[list[SampleFiles], list[str]]:
    """`index_split` of the scans that are complete, and what it would raise for the others."""
    if split not in ("train", "validation", "test") or not modalities or not modalities <= {"rgb", "xyz"}:
        raise ValueError(f"split {split!r} with modalities {sorted(modalities)}: unknown split or modality")
    root = Path(class_folder) / split
    try:
        folders = subfolders(root) if split == "test" else [root / "good"]
    except InputError as error:
        return [], [str(error)]
    if not folders:
        return [], [f"no test scans in {root}: expected a folder good and one for each type of defect"]
    files: list[SampleFiles] = []
    problems: list[str] = []
    for folder in folders:
        found, faults = _pair_folder(folder, modalities)
        files += found
        problems += faults
    return files, problems


def _pair_folder(folder: Path, modalities: frozenset[str]) -> tuple[list[SampleFiles], list[str]]:
    split, defect = folder.parent.name, folder.name
    try:
        found = {name: files_by_stem(folder / name, name) for name in FILE_SUFFIXES}
    except InputError as error:
        return [], [str(error)]
    stems = sorted(set().union(*(found[name] for name in modalities)))
    if not stems:
        needed = " and ".join(sorted(modalities))
        kind = "training" if split == "train" else split
        return [], [f"no {kind} files in {folder}: fill its folder {needed}, or remove {folder}"]
    doubled = [files for each in found.values() for files in each.values() if len(files) > 1]
    problems = [
        f"{files[0]} and {files[1].name} are two files of one scan: run the preprocessing again if it was "
        "interrupted, else keep one of them"
        for files in doubled
    ]
    label = int(defect != "good") if split == "test" else None
    partners = {}
    if len(modalities) == 2:
        partners = {"xyz": f"{len(found['rgb'])} rgb files", "rgb": f"{len(found['xyz'])} xyz files"}
    if label == 1:
        partners["gt"] = f"{len(stems)} defective scans"
    problems += filter(None, (_missing(folder, name, found[name], stems, each) for name, each in partners.items()))
    unclear = {files[0].stem for files in doubled}
    rgb, xyz, gt = ({stem: files[0] for stem, files in found[name].items()} for name in ("rgb", "xyz", "gt"))
    needed_stems = [stem for stem in stems if stem not in unclear and all(stem in found[name] for name in partners)]
    return [
        SampleFiles(f"{split}/{defect}/{stem}", rgb.get(stem), xyz.get(stem), gt.get(stem), label)
        for stem in needed_stems
    ], problems


def _missing(folder: Path, name: str, found: Mapping[str, Sequence[Path]], stems: list[str], partners: str) -> str:
    """What is wrong with the folder `name` if it lacks files of these stems, else nothing."""
    missing = [stem for stem in stems if stem not in found]
    if not missing:
        return ""
    suffix = next(iter(found.values()))[0].suffix if found else FILE_SUFFIXES[name][0]
    listing = ", ".join(stem + suffix for stem in missing[:5]) + (", ..." if len(missing) > 5 else "")
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"{len(found)} {name} files for {partners} in {folder}: {listing} {verb} missing; "
        f"restore what {folder / name} lacks or remove the other files of these scans"
    )


def check_files(files: Iterable[SampleFiles], modalities: frozenset[str]) -> None:
    """Find broken files before a long run: headers and ends of `modalities` and ground truth, and equal sizes.

    Nothing is decoded, so thousands of files take seconds. Raises InputError at the first scan that fails.
    """
    for scan in tqdm(files, desc="Checking files", delay=2, leave=False):
        check_scan(scan, modalities)


def check_scan(scan: SampleFiles, modalities: frozenset[str]) -> None:
    """`check_files` of one scan."""
    sizes: dict[Path, tuple[int, int]] = {}
    if "rgb" in modalities and scan.rgb is not None:
        sizes[scan.rgb] = _image_size(scan.rgb)
    if "xyz" in modalities and scan.xyz is not None:
        sizes[scan.xyz] = organized_pc_header(scan.xyz)
    if scan.label is not None and scan.mask is not None:
        sizes[scan.mask] = _image_size(scan.mask)
    for (first, expected), (path, size) in pairwise(sizes.items()):
        if size != expected:
            raise InputError(
                f"{first} has {expected[0]} x {expected[1]} pixels (height x width), {path} {size[0]} x {size[1]}: "
                "a scan's files show one view pixel by pixel, so run the preprocessing again if it was interrupted, "
                "else restore them and preprocess them together"
            )


def original_size(files: SampleFiles) -> tuple[int, int]:
    """(H, W) in pixels of the scan before any resize: of its ground truth, else its photo, else its point cloud."""
    image = files.mask or files.rgb
    if image is not None:
        return _image_size(image)
    assert files.xyz is not None, "an indexed scan has at least one modality"
    return organized_pc_header(files.xyz)


def _image_size(path: Path) -> tuple[int, int]:
    """(H, W) from the header of a PNG or JPEG; InputError when the file is none or lacks its end."""
    with open_image(path) as image:
        width, height = image.size
        marker = _END_MARKERS[image.format or ""]
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            if marker not in file.read():
                raise OSError("the end of the file is missing")
    return height, width


def read_rgb(files: SampleFiles) -> np.ndarray | None:
    """The scan's photo, (H, W, 3) uint8, or None where it has none; InputError when it cannot be decoded."""
    if files.rgb is None:
        return None
    with open_image(files.rgb) as image:
        return np.array(to_rgb(image))


def make_sample(path: str, rgb: np.ndarray | None, xyz: np.ndarray | None, img_size: int) -> Sample:
    """One view of a part from arrays, as a detector judges it; S = img_size, the aspect is not kept.

    Args:
        path: what the sample is called, in errors too.
        rgb: (H, W, 3) uint8 photograph, or None where the method needs none; resized bicubic (antialiased), then
            ImageNet-normalized.
        xyz: (H, W, 3) float, meters, camera frame, or None likewise; resized nearest. A pixel with a coordinate that is
            zero, NaN or infinite has no measurement.
        img_size: side of the result, pixels: that of the detector's config.

    Raises:
        InputError: an array of another shape or type, or a point cloud without a valid point.
    """
    return Sample(
        path,
        rgb=None if rgb is None else _rgb_tensor(path, rgb, img_size),
        xyz=None if xyz is None else _xyz_tensor(path, xyz, img_size),
    )


def _rgb_tensor(path: str, rgb: np.ndarray, img_size: int) -> Tensor:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise InputError(
            f"the photograph of {path} is an array of {' x '.join(map(str, rgb.shape))} {rgb.dtype}, expected "
            "H x W x 3 uint8: convert it to 8-bit RGB"
        )
    import torch  # here, because the class lists above are read where flags are parsed

    image = Image.fromarray(rgb).resize((img_size, img_size), Image.Resampling.BICUBIC)
    # NumPy, not torch: in a loader thread each torch operation would start a pool of threads of its own.
    pixels = (np.asarray(image, dtype=np.float32) / 255 - _IMAGENET_MEAN) / _IMAGENET_STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _xyz_tensor(path: str, xyz: np.ndarray, img_size: int) -> Tensor:
    check_organized(f"the point cloud of {path}", xyz.shape, xyz.dtype)
    resized = resize_nearest(xyz, img_size)
    planes = resized.numpy()
    valid = valid_mask(planes.transpose(1, 2, 0))
    if not valid.any():
        raise InputError(
            f"{path} has no valid point (three finite coordinates, none of them zero): restore the scan from its "
            "source and preprocess it again, or remove it"
        )
    planes[:, ~valid] = 0
    return resized


def _load_mask(path: Path | None, img_size: int) -> Tensor:
    """Ground truth as (1, S, S) uint8: whatever is neither zero nor black is a defect."""
    import torch

    if path is None:
        return torch.zeros(1, img_size, img_size, dtype=torch.uint8)
    with open_image(path) as image:
        defect = defect_mask(image)
    resized = Image.fromarray(defect.astype(np.uint8)).resize((img_size, img_size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)[None])


class AnomalyDataset:
    """The scans of one split as Samples (see `make_sample`), with only the modalities that the method needs.

    Mask (resized nearest) and label are those of the test split. An item raises InputError when a file cannot be read,
    or when a point cloud has no valid point.
    """

    def __init__(self, files: Sequence[SampleFiles], modalities: frozenset[str], img_size: int) -> None:
        self.files = files
        self.modalities = modalities
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        files, size = self.files[index], self.img_size
        sample = make_sample(
            str(files.xyz or files.rgb or files.path),  # an error names the file
            read_rgb(files) if "rgb" in self.modalities else None,
            read_organized_pc(files.xyz) if "xyz" in self.modalities and files.xyz else None,
            size,
        )
        mask = _load_mask(files.mask, size) if files.label is not None else None
        return sample._replace(path=files.path, mask=mask, label=files.label)


class Indexed(Protocol[Item]):
    """What items can be asked of by number, in any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


def load_samples(dataset: Indexed[Item], num_workers: int) -> Iterator[Item]:
    """Yield the items of an AnomalyDataset, say, in order, read ahead by `num_workers` threads (0: by none).

    Each thread is ahead by two items at most.

    Threads, since decoding, resizing and reading release the interpreter lock: an InputError arrives as it is, nothing
    is pickled and nothing forks beside CUDA. Closing the iterator early ends them.
    """
    if num_workers == 0:
        yield from (dataset[index] for index in range(len(dataset)))
        return
    indices = iter(range(len(dataset)))
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="load_samples")
    try:
        pending = deque(pool.submit(dataset.__getitem__, index) for index in islice(indices, 2 * num_workers))
        while pending:
            sample = pending.popleft().result()
            pending.extend(pool.submit(dataset.__getitem__, index) for index in islice(indices, 1))
            yield sample
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

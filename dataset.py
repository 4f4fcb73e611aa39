"""Samples of a dataset folder: class lists, the index of files paired by stem, and the loader.

The layout is that of MVTec 3D-AD, shown below. A good test sample needs no ground truth, and a method of one modality
needs no files of the other:

    <dataset>/<class>/train/good/{rgb,xyz}/000.{png,tiff}
    <dataset>/<class>/validation/good/{rgb,xyz}/...
    <dataset>/<class>/test/{good,<defect>,...}/{rgb,xyz,gt}/...

    files = index_split("datasets/mvtec3d/bagel", "test", frozenset({"rgb", "xyz"}))
    for sample in load_samples(AnomalyDataset(files, frozenset({"rgb", "xyz"}), img_size=224), num_workers=4): ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from utils.errors import InputError
from utils.records import METERS, CloudForm, Sample, SampleFiles
from utils.reporting.messages import warn_once
from utils.reporting.progress import progress_bar
from utils.scans.cloud_check import checked_cloud
from utils.scans.files import FILE_SUFFIXES, GOOD, check_folder, files_by_modality, fix_of_missing, is_good, subfolders
from utils.scans.images import defect_mask, defect_share, image_size, open_image, read_image
from utils.scans.organized_pc import check_organized, organized_pc_header, read_organized_pc, resize_nearest

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
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def find_classes(dataset_path: Path | str, dataset_type: str, chosen: Sequence[str] | None = None) -> list[str]:
    """Return the classes to run: the `chosen` folders in their order, or the published classes that are there.

    `dataset_type` is a key of DATASET_CLASSES. Raises InputError if the dataset folder, a chosen class, or every
    published class is missing.
    """
    root = Path(dataset_path)
    source = f"Download {_PUBLISHED[dataset_type]}, preprocess it as the README describes"
    check_folder(root, f"{source}, and give its folder with --dataset_path.")
    found = [path.name for path in subfolders(root)]
    listing = ", ".join(found) or "no folder"
    for name in chosen or ():
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InputError(f"Class {name!r} is not a plain folder name. Put the folders before it in --dataset_path.")
        if not (root / name).is_dir():
            raise InputError(f"Class {name!r} is not in {root}, which holds {listing}. Name these with --classes.")
    classes = list(dict.fromkeys(chosen or (name for name in DATASET_CLASSES[dataset_type] if name in found)))
    if not classes:
        problem = f"{root} holds none of the {dataset_type} classes, only {listing}"
        raise InputError(f"{problem}. Name these with --classes, or another dataset with --dataset_path.")
    return classes


def class_folders(dataset_path: Path | str) -> list[str]:
    """Return the names of all folders of a dataset that hold a split; InputError if a folder is unreadable."""
    splits = {"train", "validation", "test"}
    return [
        folder.name for folder in subfolders(Path(dataset_path)) if splits & {path.name for path in subfolders(folder)}
    ]


def index_split(class_folder: Path | str, split: str, modalities: frozenset[str]) -> list[SampleFiles]:
    """Return the samples of "train", "validation" or "test", paired by stem, sorted by (defect, stem).

    Every sample has files of the `modalities` ("rgb", "xyz" or both), and of the other one if there are any. Raises
    InputError if there is no sample, a needed file or the ground truth of a defective test sample is missing, or two
    files of one folder share a stem.
    """
    files, problems = pair_split(class_folder, split, modalities)
    if problems:
        raise InputError(problems[0])
    return files


def pair_split(class_folder: Path | str, split: str, modalities: frozenset[str]) -> tuple[list[SampleFiles], list[str]]:
    """Return the complete samples of a split as `index_split` does, and its errors for the others.

    Raises InputError if a folder is unreadable.
    """
    root = Path(class_folder) / split
    files: list[SampleFiles] = []
    problems: list[str] = []
    good = [] if split == "test" else good_folders(root) or [root / GOOD]
    filled = [folder for folder in good if any(files_by_modality(folder).values())]
    folders = filled or good or subfolders(root)
    if len(filled) > 1:
        problems.append(f"{filled[0]} and {filled[1]} both hold good samples. Move these into one folder.")
    if not folders:
        fix = "" if root.is_dir() else " A class that --classes names needs no test split."
        problems.append(f"No test samples in {root}. Expected a folder good and one for each type of defect.{fix}")
    for folder in folders:
        if is_good(folder.name) and folder.name.casefold() != GOOD:
            warn_once(
                "name", folder, f"The name of {folder} marks its samples as good. Rename it if they are defective."
            )
        complete, faults = _pair_folder(folder, modalities)
        files += complete
        problems += faults
    return files, problems


def good_folders(split_folder: Path) -> list[Path]:
    """Return the folders of good samples in a split, sorted; usually one. Raises InputError if it cannot be read."""
    return [folder for folder in subfolders(split_folder) if is_good(folder.name)]


def _pair_folder(folder: Path, modalities: frozenset[str]) -> tuple[list[SampleFiles], list[str]]:
    split, defect = folder.parent.name, folder.name
    found = files_by_modality(folder)
    stems = sorted(set().union(*(found[name] for name in modalities)))
    if not stems:
        name = "training" if split == "train" else split
        return [], [f"No {name} files in {folder}. Fill its folder {' and '.join(sorted(modalities))}, or remove it."]
    doubled = [files for by_stem in found.values() for files in by_stem.values() if len(files) > 1]
    problems = [
        f"{files[0]} and {files[1].name} are two files of one sample. Run the preprocessing again if it was "
        "interrupted; otherwise keep only one."
        for files in doubled
    ]
    complete = {stem for stem in stems if all(len(by_stem.get(stem, ())) < 2 for by_stem in found.values())}
    label = int(not is_good(defect)) if split == "test" else None
    for name in FILE_SUFFIXES:
        missing = [stem for stem in stems if stem not in found[name]]
        if missing and (name in modalities or (name == "gt" and label == 1)):
            complete.difference_update(missing)
            suffix = next(iter(found[name].values()))[0].suffix if found[name] else FILE_SUFFIXES[name][0]
            listing = ", ".join(stem + suffix for stem in missing[:5]) + (", ..." if len(missing) > 5 else "")
            problems.append(
                f"{len(found[name])} {name} files for {len(stems)} samples in {folder}: {listing} "
                f"{'is' if len(missing) == 1 else 'are'} missing{fix_of_missing(folder, name, found, modalities)}"
            )
    samples = []
    for stem in complete:
        rgb, xyz, mask = (found[name].get(stem, (None,))[0] for name in ("rgb", "xyz", "gt"))
        stored = next(path.stem for path in (xyz, rgb) if path is not None)  # `stem` may be in another Unicode form
        samples.append(SampleFiles(f"{split}/{defect}/{stored}", rgb, xyz, mask, label))
    return sorted(samples, key=lambda files: files.path), problems


def check_files(files: Iterable[SampleFiles], modalities: frozenset[str]) -> None:
    """Check, before a long run, that the files of `modalities` and the ground truth are complete and of equal size.

    Only ground truth is decoded. Of other files, headers and ends are read, so thousands take seconds. Wrong ground
    truth gives one warning per folder. Raises InputError at the first bad sample.
    """
    for sample in progress_bar(files, desc="Checking files", unit="sample", delay=2):
        check_sample_files(sample, modalities)
        if sample.mask is not None and sample.label is not None:
            problem = defect_share(sample.mask, bool(sample.label))[1]
            warn_once("truth", sample.mask.parent, problem and f"{problem} Check the other files of its folder, too.")


def check_sample_files(files: SampleFiles, modalities: frozenset[str]) -> None:
    """Check one sample as `check_files` does."""
    sizes: dict[Path, tuple[int, int]] = {}
    if "rgb" in modalities and files.rgb is not None:
        sizes[files.rgb] = image_size(files.rgb)
    if "xyz" in modalities and files.xyz is not None:
        sizes[files.xyz] = organized_pc_header(files.xyz)
    if files.label is not None and files.mask is not None:
        sizes[files.mask] = image_size(files.mask)
    for (first, expected), (path, size) in pairwise(sizes.items()):
        if size != expected:
            raise InputError(
                f"{first} has {expected[0]} x {expected[1]} pixels (H x W), but {path} has {size[0]} x {size[1]}. Run "
                "the preprocessing again if it was interrupted; otherwise restore the sample and preprocess it."
            )


def original_size(files: SampleFiles) -> tuple[int, int]:
    """Return (H, W) in pixels before resizing, of the ground truth if there is one, else the image, else the cloud."""
    image = files.mask or files.rgb
    if image is not None:
        return image_size(image)
    assert files.xyz is not None, "an indexed sample has at least one modality"
    return organized_pc_header(files.xyz)


def read_rgb(files: SampleFiles) -> np.ndarray | None:
    """Read the image, (H, W, 3) uint8, or None if there is none; InputError if it cannot be decoded."""
    return None if files.rgb is None else read_image(files.rgb)


def read_xyz(files: SampleFiles) -> np.ndarray | None:
    """Read the cloud, (H, W, 3) float32, meters, or None if there is none; InputError as in `checked_cloud`."""
    return None if files.xyz is None else checked_cloud(files.xyz, read_organized_pc(files.xyz), files.form)


def make_sample(
    path: str, rgb: np.ndarray | None, xyz: np.ndarray | None, img_size: int, form: CloudForm = METERS
) -> Sample:
    """Make the sample `path` from arrays in memory, with S = img_size pixels; the aspect ratio is not kept.

    `rgb` is (H, W, 3) uint8; it is resized bicubic (antialiased) and ImageNet-normalized. `xyz` is (H, W, 3) float
    in the given `form`, by default meters, camera frame; it is resized by nearest neighbor. A pixel with a coordinate
    that is zero, NaN or infinite has no measurement. Either is None if the method does not need it.

    Raises InputError if an array has another shape or type, or `checked_cloud` refuses the cloud.
    """
    import torch  # here, because the flag parsers need the class lists above without torch

    sample = Sample(path)
    if rgb is not None:
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            shape = " x ".join(map(str, rgb.shape))
            problem = f"The image of {path} is {shape} {rgb.dtype}, expected H x W x 3 uint8"
            raise InputError(f"{problem}. Convert it to RGB.")
        image = Image.fromarray(rgb).resize((img_size, img_size), Image.Resampling.BICUBIC)
        # NumPy, not torch: in a loader thread each torch operation would start its own pool of threads.
        pixels = (np.asarray(image, dtype=np.float32) / 255 - _IMAGENET_MEAN) / _IMAGENET_STD
        sample = sample._replace(rgb=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    if xyz is not None:
        check_organized(f"The point cloud of {path}", xyz.shape, xyz.dtype)
        sample = sample._replace(xyz=resize_nearest(checked_cloud(path, xyz, form), img_size))
    return sample


@dataclass(frozen=True)
class AnomalyDataset:
    """Samples of one split (see `make_sample`), with only the modalities that the method needs.

    Samples of the test split have a mask (resized by nearest neighbor) and a label. Reading a sample raises InputError
    if a file cannot be read or `checked_cloud` refuses the cloud.
    """

    files: Sequence[SampleFiles]
    modalities: frozenset[str]
    img_size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        import torch

        files = self.files[index]
        sample = make_sample(
            str(files.xyz or files.rgb or files.path),  # an error names the file
            read_rgb(files) if "rgb" in self.modalities else None,
            read_organized_pc(files.xyz) if "xyz" in self.modalities and files.xyz else None,
            self.img_size,
            files.form,
        )
        sample = sample._replace(path=files.path, label=files.label)
        if files.label is None:
            return sample
        size = (self.img_size, self.img_size)
        defect = Image.new("L", size)  # without a mask file, no pixel is defective
        if files.mask is not None:
            with open_image(files.mask) as image:
                defect = Image.fromarray(defect_mask(image).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        return sample._replace(mask=torch.from_numpy(np.array(defect)[None]))


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items while a thread produces the next one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as thread:
        pending = thread.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class Indexed(Protocol[Item]):
    """Items by number; any thread may read them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


def load_samples(dataset: Indexed[Item], num_workers: int) -> Iterator[Item]:
    """Yield the items of a dataset in order. `num_workers` threads read two items ahead each (0: no threads).

    Threads suffice because decoding and resizing release the interpreter lock. Closing the iterator ends the threads.
    """
    if num_workers == 0:
        yield from (dataset[index] for index in range(len(dataset)))
        return
    indices = iter(range(len(dataset)))
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="load_samples")
    try:
        pending = deque(pool.submit(dataset.__getitem__, index) for index in islice(indices, 2 * num_workers))
        while pending:
            item = pending.popleft().result()
            pending.extend(pool.submit(dataset.__getitem__, index) for index in islice(indices, 1))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Dataset check: contents of every split, problems of its files, and scans that are not cleaned."""

import argparse
import logging
import os
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dataset import DATASET_CLASSES, check_sample_files, class_folders, find_classes, pair_split, read_rgb, read_xyz
from runner.settings import detector_configs, extraction_config
from utils.choices import CLEANING_FLAGS
from utils.cleaning.cloud_cleaning import CleaningRule, is_cleaned, shows_table
from utils.cleaning.journal import MANIFEST, Record, Scan, read_manifest, script_of
from utils.errors import InputError
from utils.records import METERS, CloudForm, SampleFiles
from utils.reporting.messages import escape_controls, show
from utils.reporting.progress import progress_bar
from utils.reporting.tables import print_columns
from utils.scans.cloud_check import class_distance, spread
from utils.scans.images import defect_share
from utils.scans.organized_pc import valid_mask

logger = logging.getLogger(__name__)


class SplitReport(NamedTuple):
    """Contents of one split of a class. `samples` and `defective` also count samples with a problem."""

    class_name: str
    split: str
    samples: int = 0
    defective: int = 0
    defect: tuple[float, float] | None = None  # smallest and largest share of defect pixels; None: no defective ones
    sizes: tuple[tuple[int, int], ...] = ()  # (H, W) that occur
    valid: tuple[float, float] | None = None  # smallest and largest fraction of valid pixels; None: no clouds
    depth: tuple[float, float] | None = None  # smallest and largest z, meters
    raw: int = 0  # samples that show a table plane along their border
    problems: tuple[str, ...] = ()

    def row(self) -> tuple[str, ...]:
        """Cells of the printed table."""
        cloud = ("", "", "")
        if self.valid and self.depth:
            cleaned = f"not {self.raw}" if self.raw else "yes"
            cloud = ("{:.0%} to {:.0%}".format(*self.valid), "{:.3f} to {:.3f}".format(*self.depth), cleaned)
        sizes = " ".join(f"{height}x{width}" for height, width in self.sizes)
        defect = "{:.2%} to {:.2%}".format(*self.defect) if self.defect else ""
        cells = (self.class_name, self.split, self.samples, self.defective, defect, sizes, *cloud, len(self.problems))
        return tuple(map(str, cells))


class _SampleReport(NamedTuple):
    size: tuple[int, int]
    defect: float | None = None  # share of defect pixels; None: not defective
    problem: str = ""  # of the ground truth
    valid: float | None = None
    depth: tuple[float, ...] = ()  # smallest and largest z, meters
    raw: bool = False


def _extent(values: Iterable[float | None]) -> tuple[float, float] | None:
    numbers = [each for each in values if each is not None]
    return (min(numbers), max(numbers)) if numbers else None


def lacks_test(class_folder: Path, chosen: bool) -> bool:
    """True if a class has no test folder and needs none. Only a class `chosen` by the user needs none."""
    return chosen and not os.path.lexists(class_folder / "test")


def check_split(
    class_folder: Path | str, split: str, modalities: frozenset[str], num_workers: int, form: CloudForm = METERS
) -> SplitReport:
    """Decode every file of a split, in `num_workers` threads, and collect contents and problems.

    Clouds have the `form`. A missing validation split is not a problem.
    """
    folder = Path(class_folder)
    if split == "validation" and not (folder / split).is_dir():
        return SplitReport(folder.name, split)
    paired, problems = pair_split(folder, split, modalities)
    files = [each._replace(form=form) for each in paired]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checked = pool.map(lambda each: _check_sample(each, modalities), files)
        shown = f"{folder.name} {split}"
        reports = list(progress_bar(checked, total=len(files), desc=escape_controls(shown), unit="sample"))
    sound = [each for each in reports if isinstance(each, _SampleReport)]
    return SplitReport(
        folder.name,
        split,
        samples=len(files),
        defective=sum(bool(each.label) for each in files),
        defect=_extent(each.defect for each in sound),
        sizes=tuple(sorted({each.size for each in sound})),
        valid=_extent(each.valid for each in sound),
        depth=_extent(z for each in sound for z in each.depth),
        raw=sum(each.raw for each in sound),
        problems=(*problems, *(text for each in reports if (text := each if isinstance(each, str) else each.problem))),
    )


def _check_sample(files: SampleFiles, modalities: frozenset[str]) -> _SampleReport | str:
    """Contents of a sample, or the problem with one of its files."""
    try:
        check_sample_files(files, modalities)
        image = read_rgb(files) if "rgb" in modalities else None
        xyz = read_xyz(files) if "xyz" in modalities else None
        share, problem = (0.0, "") if files.label is None else defect_share(files.mask, bool(files.label))
    except InputError as error:
        return str(error)
    defect = share if files.label else None
    if xyz is None:
        assert image is not None, "an indexed sample has the files that the method needs"
        return _SampleReport(image.shape[:2], defect, problem)
    valid = valid_mask(xyz)
    z = xyz[..., 2][valid]
    depth = float(z.min()), float(z.max())
    return _SampleReport(xyz.shape[:2], defect, problem, float(valid.mean()), depth, shows_table(xyz, CleaningRule()))


def print_dataset_check(args: argparse.Namespace, given: Container[str] = ()) -> bool:
    """Print a table of the splits that the flags of main.py name, then each problem; returns True if there is one.

    A dataset without clouds is checked as RGB only, unless --method_name is among the `given` flags.
    """
    modalities = extraction_config(detector_configs(args)).method.modalities
    chosen = args.classes or class_folders(args.dataset_path)
    names = find_classes(args.dataset_path, args.dataset_type, chosen)
    found = {path.name for name in names for path in (args.dataset_path / name).glob("*/*/*")}
    if "method_name" not in given and "rgb" in found and "xyz" not in found:
        show(f"{args.dataset_path} has no xyz folders: checked as RGB only, for --method_name DINO")
        modalities = frozenset({"rgb"})
    stored, _ = dataset_forms(args)
    reports = []
    for folder in (args.dataset_path / name for name in names):
        train = [each._replace(form=stored) for each in pair_split(folder, "train", modalities)[0]]
        form = replace(stored, distance=class_distance(train))
        by_user = bool(args.classes) or folder.name not in DATASET_CLASSES[args.dataset_type]
        for split in ("train", "validation") if lacks_test(folder, by_user) else ("train", "validation", "test"):
            reports.append(check_split(folder, split, modalities, args.num_workers, form))
    head = ("class", "split", "samples", "defective", "defect pixels", "size", "valid pixels", "depth, m", "cleaned")
    print_columns([(*head, "problems"), *(each.row() for each in reports)])
    if any(each.raw for each in reports):
        show("")
        show(f"Samples with a table along their border are not cleaned. Run {_cleaning(args.dataset_path)}")
    problems = [f"  {each.class_name}: {problem}" for each in reports for problem in each.problems]
    for line in ("", "Problems:", *problems) if problems else ():
        show(line, level=logging.ERROR)
    return bool(problems)


def _cleaning(dataset_path: Path) -> str:
    return f"python utils/preprocessing.py {shlex.quote(str(dataset_path))}"


def dataset_forms(args: argparse.Namespace) -> tuple[CloudForm, CloudForm]:
    """Form of a dataset's clouds, given by flags or its manifest, and of raw clouds, such as those of new samples.

    Raises InputError if the manifest of preprocessing, which writes meters, is damaged, or a flag contradicts it.
    """
    given = CloudForm(args.xyz_unit, args.missing_value, args.dataset_type != "eyecandies")
    manifest = read_manifest(args.dataset_path)
    if manifest is None:
        return given, given
    stored = CloudForm(camera_frame=given.camera_frame and script_of(manifest.settings) == "preprocessing")
    if (given.unit, given.missing_value) != (stored.unit, stored.missing_value):
        problem = f"{args.dataset_path} is preprocessed ({MANIFEST} is there), so its clouds are in meters"
        raise InputError(f"{problem}. Leave out --xyz_unit and --missing_value, or preprocess the remaining samples.")
    unit, missing_value = manifest.settings.get("xyz_unit", "m"), manifest.settings.get("missing_value")
    return stored, replace(stored, unit=unit, missing_value=missing_value)


def cleaning_of(dataset_path: Path, class_name: str, samples: Sequence[SampleFiles]) -> dict[str, bool] | None:
    """Cleaning flags of a class's samples, from the manifest of preprocessing; None if they were not cleaned.

    Without a manifest, clouds without measurements along their border count as cleaned with the default flags.
    """
    manifest = read_manifest(dataset_path)
    if manifest is not None and any(f"{class_name}/{each.path}" in manifest.scans for each in samples):
        cleaned = script_of(manifest.settings) == "preprocessing"
        return {flag: bool(manifest.settings.get(flag)) for flag in CLEANING_FLAGS} if cleaned else None
    found = []
    for each in spread(samples):
        with suppress(InputError):  # a method of images alone does not need the clouds
            cloud = read_xyz(each)
            found.append(cloud is not None and is_cleaned(cloud, CleaningRule()))
    return dict.fromkeys(CLEANING_FLAGS, False) if found and all(found) else None


def warn_of_raw_scans(splits: Iterable[Sequence[SampleFiles]]) -> None:
    """Warn if one of a few samples of each split shows the table under the object, which ruins the results."""
    clouds = [(each.xyz, read_xyz(each)) for samples in splits for each in spread(samples)]
    raw = [path for path, cloud in clouds if path and cloud is not None and shows_table(cloud, CleaningRule())]
    if raw:
        folders = list(dict.fromkeys(str(path.parent) for path in raw))
        logger.warning(
            "%d of %d checked clouds show the table under the object, in %s%s. Clean the scans first: %s",
            *(len(raw), len(clouds), ", ".join(folders[:3]), ", ..." if len(folders) > 3 else ""),
            _cleaning(raw[0].parents[4]),
        )


def warn_of_unfinished_scans(dataset_path: Path, files: Mapping[str, Iterable[SampleFiles]]) -> None:
    """Warn of samples that the record of the preprocessing lacks, or whose files are missing or of another size."""
    manifest = read_manifest(dataset_path)
    if manifest is None:
        return
    names = [f"{class_name}/{each.path}" for class_name, of_class in files.items() for each in of_class]
    left = [name for name in names if not _has_results(Scan(name, {}), manifest.scans.get(name, {}), dataset_path)]
    if left:
        logger.warning(
            "%d of %d samples of %s were not preprocessed like the others (%s%s). Run the preprocessing again: "
            "python utils/%s.py",
            *(len(left), len(names), dataset_path, ", ".join(left[:3]), ", ..." if len(left) > 3 else ""),
            script_of(manifest.settings),
        )


def _has_results(scan: Scan, record: Record, root: Path) -> bool:
    """Return True if all files of a record are there with their sizes; False for an empty record."""
    files = {scan.file(root, modality): file.bytes for modality, file in record.items()}
    return bool(files) and all(path.is_file() and path.stat().st_size == size for path, size in files.items())

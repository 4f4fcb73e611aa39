"""A look at a dataset before a long run: what every split holds, what is at fault, and which scans are not cleaned.

python main.py --inspect_dataset --dataset_path datasets/mvtec3d
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from dataset import SampleFiles, check_scan, pair_split, read_rgb
from utils.cleaning.cloud_cleaning import CleaningRule, shows_table
from utils.cleaning.journal import Scan, has_results, read_manifest, script_of
from utils.errors import InputError
from utils.report import print_columns
from utils.scans.images import defect_mask, open_image
from utils.scans.organized_pc import read_organized_pc, valid_mask

Scanned = TypeVar("Scanned")

CLEANING_COMMAND = "python utils/preprocessing.py"
logger = logging.getLogger(__name__)


class SplitReport(NamedTuple):
    """What `check_split` found in the files of one split of a class; of scans at fault only their number."""

    class_name: str
    split: str
    scans: int = 0
    defective: int = 0
    sizes: tuple[tuple[int, int], ...] = ()  # (H, W) that occur, the same for all files of a scan
    valid: tuple[float, float] | None = None  # least and largest share of pixels with a measurement; None: no clouds
    depth: tuple[float, float] | None = None  # least and largest z of a measurement, meters
    raw: int = 0  # scans that still show a table plane along their border
    problems: tuple[str, ...] = ()


class _CloudReport(NamedTuple):
    valid: float
    nearest: float
    farthest: float
    raw: bool


class _ScanReport(NamedTuple):
    size: tuple[int, int]
    cloud: _CloudReport | None


def check_split(class_folder: Path | str, split: str, modalities: frozenset[str], num_workers: int) -> SplitReport:
    """Decode every file of a split and report what is in it; faults are collected, not raised.

    A validation split that is not there is no fault. Files are read by `num_workers` threads, or none for 0.
    """
    folder = Path(class_folder)
    empty = SplitReport(folder.name, split)
    if split == "validation" and not (folder / split).is_dir():
        return empty
    files, faults = pair_split(folder, split, modalities)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = pool.map(lambda scan: _inspect_scan(scan, modalities), files)
        described = list(tqdm(found, total=len(files), desc=f"{folder.name} {split}", leave=False))
    sound = [each for each in described if isinstance(each, _ScanReport)]
    clouds = [each.cloud for each in sound if each.cloud is not None]
    return empty._replace(
        scans=len(files),
        defective=sum(bool(scan.label) for scan in files),
        sizes=tuple(sorted({each.size for each in sound})),
        valid=(min(each.valid for each in clouds), max(each.valid for each in clouds)) if clouds else None,
        depth=(min(each.nearest for each in clouds), max(each.farthest for each in clouds)) if clouds else None,
        raw=sum(each.raw for each in clouds),
        problems=(*faults, *(each for each in described if isinstance(each, str))),
    )


def _inspect_scan(scan: SampleFiles, modalities: frozenset[str]) -> _ScanReport | str:
    """What a scan holds, or what is wrong with one of its files."""
    try:
        check_scan(scan, modalities)
        photo = read_rgb(scan) if "rgb" in modalities else None
        xyz = read_organized_pc(scan.xyz) if "xyz" in modalities and scan.xyz is not None else None
        if scan.label is not None and scan.mask is not None:
            with open_image(scan.mask) as image:
                defect_mask(image)
    except InputError as error:
        return str(error)
    if xyz is None:
        assert photo is not None, "an indexed scan has what the method needs"
        return _ScanReport(photo.shape[:2], None)
    valid = valid_mask(xyz)
    if not valid.any():
        return f"{scan.xyz} has no valid point: restore the scan from its source"
    depth = xyz[..., 2][valid]
    raw = shows_table(xyz, CleaningRule())
    return _ScanReport(xyz.shape[:2], _CloudReport(float(valid.mean()), float(depth.min()), float(depth.max()), raw))


def print_dataset_check(
    dataset_path: Path, classes: Sequence[str], modalities: frozenset[str], num_workers: int
) -> bool:
    """Print a table of what every split holds, then each fault; tells whether there is one."""
    reports = [
        check_split(dataset_path / name, split, modalities, num_workers)
        for name in classes
        for split in ("train", "validation", "test")
    ]
    head = ("class", "split", "scans", "defective", "size", "valid pixels", "depth, m", "cleaned", "faults")
    print_columns([head, *map(_row, reports)])
    if any(each.raw for each in reports):
        print(f"\nScans with a table plane along their border are not cleaned: {CLEANING_COMMAND} {dataset_path}")
    problems = [f"  {each.class_name}: {problem}" for each in reports for problem in each.problems]
    if problems:
        print("\nFaults:", *problems, sep="\n")
    return bool(problems)


def _row(report: SplitReport) -> tuple[str, ...]:
    cloud = ("", "", "")
    if report.valid and report.depth:
        (least, most), (near, far) = report.valid, report.depth
        cleaned = f"not {report.raw}" if report.raw else "yes"
        cloud = (f"{least:.0%} to {most:.0%}", f"{near:.3f} to {far:.3f}", cleaned)
    sizes = " ".join(f"{height}x{width}" for height, width in report.sizes)
    counts = (str(report.scans), str(report.defective))
    return (report.class_name, report.split, *counts, sizes, *cloud, str(len(report.problems)))


def warn_of_raw_scans(scans: Sequence[SampleFiles]) -> None:
    """Warn if one of some scans of a class, spread over the split, shows its table: not cleaned, it ruins results."""
    looked_at = [scan.xyz for scan in spread(scans) if scan.xyz is not None]
    raw = [path for path in looked_at if shows_table(read_organized_pc(path), CleaningRule())]
    if raw:
        logger.warning(
            "%s shows the table that the part lies on, which is learned too (%d of %d scans looked at): clean the "
            "scans first (%s %s)",
            *(raw[0], len(raw), len(looked_at), CLEANING_COMMAND, raw[0].parents[4]),
        )


def spread(scans: Sequence[Scanned], number: int = 5) -> list[Scanned]:
    """At most `number` scans, evenly spaced from the first to the last."""
    count = min(number, len(scans))
    return [scans[round(i * (len(scans) - 1) / max(1, count - 1))] for i in range(count)]


def warn_of_unfinished_scans(dataset_path: Path, indexed: Mapping[str, Iterable[SampleFiles]]) -> None:
    """Warn of scans that a recorded preprocessing of the dataset did not finish; `indexed` by class.

    Told by the record and the sizes of the files, without reading them. Without a record nothing is said.
    """
    try:
        manifest = read_manifest(dataset_path)
    except InputError as error:
        logger.warning("%s", error)
        return
    if manifest is None:
        return
    names = [f"{class_name}/{scan.path}" for class_name, scans in indexed.items() for scan in scans]
    left = [name for name in names if not has_results(Scan(name, {}), manifest.scans.get(name, {}), dataset_path)]
    if left:
        logger.warning(
            "%d of %d scans were not preprocessed as the others of %s (%s%s): run the command again that made it "
            "(python utils/%s.py)",
            *(len(left), len(names), dataset_path, ", ".join(left[:3]), ", ..." if len(left) > 3 else ""),
            script_of(manifest.settings),
        )

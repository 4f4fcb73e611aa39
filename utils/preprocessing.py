"""Clean the scans of a dataset in the layout of MVTec 3D-AD, once, before anything is trained on it.

Every <class>/<split>/<defect>/{rgb,xyz,gt} triple of the same stem loses the plane the part lies on and all but its
largest cluster, and is padded to a square (utils/cloud_cleaning.py).

    python utils/preprocessing.py datasets/mvtec3d/ --dry_run        # check and count, write nothing
    python utils/preprocessing.py datasets/mvtec3d/                  # in place, on all cores
    python utils/preprocessing.py datasets/mvtec3d/ --output_dir datasets/mvtec3d_clean/ --workers 4

It may be killed at any moment; the same command continues where it ended, and does nothing once all is done.
`preprocessing.json` in the root of the output records the parameters and, per file, the checksums of source and result.
Exit code: 0 all done, 1 some scans failed (listed at the end, the others are done), 2 bad arguments or folder.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cloud_cleaning import CleaningRule, clean_scan, pad_to_square
from utils.errors import InputError, exit_on_input_error
from utils.images import defect_mask, to_rgb
from utils.organized_pc import organized_pc_header, read_organized_pc, write_organized_pc
from utils.preprocessing_progress import (
    SUFFIXES,
    TEMPORARY,
    FileRecord,
    Progress,
    Record,
    Scan,
    locked,
    remove_stale,
    sha256,
    sync,
    temporary_path,
)

VERSION = 1  # of the cleaning: raise it when the same scan and rule give another result


class Job(NamedTuple):
    """Where a run reads and writes, and how it cleans."""

    source: Path
    output: Path
    rule: CleaningRule
    keep_rgb: bool
    suffix: str  # of this run's temporary files: the leftover workers of a killed run write to other names


class Summary(NamedTuple):
    """How a run ended: names of scans, and the reason for each that failed."""

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]


def find_scans(root: Path) -> tuple[list[Scan], dict[str, str]]:
    """List the scans under `root`, sorted, and the reason for each stem that lacks one of its files.

    Raises:
        InputError: `root` is no folder or holds no scans in the layout of MVTec 3D-AD.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds the classes of the dataset")
    scans, failed = [], {}
    for folder in sorted(p for p in root.glob("*/*/*") if (p / "xyz").is_dir() or (p / "rgb").is_dir()):
        stems = {
            modality: {p.stem for p in (folder / modality).glob(f"*{suffix}") if not p.name.startswith(".")}
            for modality, suffix in SUFFIXES.items()
            if modality != "gt" or (folder / modality).is_dir()
        }
        for stem in sorted(set().union(*stems.values())):
            scan = Scan(f"{folder.relative_to(root).as_posix()}/{stem}", tuple(stems))
            missing = [str(scan.file(root, modality)) for modality in stems if stem not in stems[modality]]
            if missing:
                failed[scan.name] = f"{' and '.join(missing)} missing: restore from the dataset or remove the scan"
            else:
                scans.append(scan)
    if not scans and not failed:
        raise InputError(f"{root} holds no <class>/<split>/<defect>/xyz/*.tiff: give the folder that holds the classes")
    return scans, failed


def clean_files(scan: Scan, job: Job) -> Record:
    """Clean one scan and leave the results beside their final places under temporary names, read back and on disk.

    Raises:
        InputError: a file cannot be read, or the scan cannot be cleaned (see `clean_scan`).
    """
    xyz = read_organized_pc(scan.file(job.source, "xyz"))
    rgb = _read_photo(scan.file(job.source, "rgb"))
    gt = _read_ground_truth(scan.file(job.source, "gt")) if "gt" in scan.modalities else None
    clean_xyz, clean_rgb, padded_gt = clean_scan(xyz, rgb, gt, job.rule)
    if job.keep_rgb:
        clean_rgb = pad_to_square(rgb, job.rule.side_multiple)
    record = {}
    for modality, array in (("xyz", clean_xyz), ("rgb", clean_rgb), ("gt", padded_gt)):
        if array is not None:
            temporary = temporary_path(scan.file(job.output, modality), job.suffix)
            _write_verified(temporary, array)
            source = sha256(scan.file(job.source, modality))
            record[modality] = FileRecord(source, sha256(temporary), temporary.stat().st_size)
    return record


def preprocess(job: Job, workers: int, dry_run: bool = False) -> Summary:
    """Clean every scan under `job.source` that is not done yet.

    Args:
        job: where to read and write, and how to clean.
        workers: processes; 1 works in this one.
        dry_run: check headers and sizes, write nothing; `done` lists what would be cleaned.

    Raises:
        InputError: no dataset, other parameters than before, another run at work on the same folder, or a scan left
            half written that cannot be mended.
    """
    scans, failed = find_scans(job.source)
    settings = {"version": VERSION, **asdict(job.rule), "keep_rgb": job.keep_rgb}
    results: list[tuple[Scan, Record | str]] = []
    if dry_run:
        pending, skipped = _split(scans, Progress(job.source, job.output, settings), failed)
        results = _check_all(pending, job)
    else:
        _make_folder(job.output)
        with locked(job.output):
            progress = Progress(job.source, job.output, settings)
            progress.recover()
            remove_stale(scans, job.output)
            pending, skipped = _split(scans, progress, failed)
            with closing(_clean_all(pending, job, workers)) as outcomes:
                for scan, result in tqdm(outcomes, total=len(pending), unit="scan", disable=None):
                    if not isinstance(result, str):
                        progress.commit(scan, result, job.suffix)
                    results.append((scan, result))
            progress.save()
            remove_stale(scans, job.output)
    failed |= {scan.name: result for scan, result in results if isinstance(result, str)}
    done = sorted(scan.name for scan, result in results if not isinstance(result, str))
    return Summary(done, skipped, dict(sorted(failed.items())))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): give another --output_dir") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is not writable: give an --output_dir that is")


def _split(scans: list[Scan], progress: Progress, failed: dict[str, str]) -> tuple[list[Scan], list[str]]:
    """Tell the scans still to clean from the names of those done; recorded ones that changed since go to `failed`."""
    pending, skipped = [], []
    for scan in scans:
        if progress.is_done(scan):
            skipped.append(scan.name)
        elif scan.name not in progress.done or progress.is_original(scan):
            pending.append(scan)
        else:
            failed[scan.name] = "its files changed after preprocessing: restore the originals or the results"
    return pending, skipped


def _clean_all(scans: list[Scan], job: Job, workers: int) -> Generator[tuple[Scan, Record | str], None, None]:
    """Yield each scan with its record, or with the reason why it failed, in order of completion."""
    if workers == 1 or len(scans) < 2:
        for scan in scans:
            try:
                yield scan, clean_files(scan, job)
            except (InputError, OSError) as error:
                yield scan, str(error)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: the processes occupy the cores already
    pool = ProcessPoolExecutor(
        min(workers, len(scans)),
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the main process to handle
    )
    try:
        futures = {pool.submit(clean_files, scan, job): scan for scan in scans}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except (InputError, OSError, BrokenProcessPool) as error:
                yield futures[future], str(error)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_all(scans: list[Scan], job: Job) -> list[tuple[Scan, Record | str]]:
    """Check the headers of each scan: an empty record, or the reason why it would fail."""
    results: list[tuple[Scan, Record | str]] = []
    for scan in tqdm(scans, unit="scan", disable=None):
        try:
            height, width = organized_pc_header(scan.file(job.source, "xyz"))
            for modality in scan.modalities[1:]:
                with _open_image(path := scan.file(job.source, modality)) as image:
                    if image.size != (width, height):
                        raise InputError(f"{path} is {image.height} x {image.width}, its xyz file {height} x {width}")
            results.append((scan, {}))
        except InputError as error:
            results.append((scan, str(error)))
    return results


def _write_verified(path: Path, array: np.ndarray) -> None:
    """Write a cloud (H, W, 3) float32 as tiff or an image of uint8 as PNG, read it back and flush it to the disk."""
    if array.dtype == np.float32:
        write_organized_pc(path, array)
        back = read_organized_pc(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, format="PNG")
        with Image.open(path) as image:
            back = np.asarray(image)
    if not np.array_equal(back, array):
        raise InputError(f"{path} reads back different from what was written: check the disk")
    sync(path)


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three on damaged files
        raise InputError(
            f"{path} cannot be read as an image ({error}): it is damaged or of another format, "
            "copy it again from the dataset"
        ) from error


def _read_photo(path: Path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8."""
    with _open_image(path) as image:
        return np.asarray(to_rgb(image))


def _read_ground_truth(path: Path) -> np.ndarray:
    """Ground truth as (H, W) uint8: 8-bit ids as stored, any other form as 0 and 255."""
    with _open_image(path) as image:
        return np.asarray(image) if image.mode == "L" else defect_mask(image).astype(np.uint8) * 255


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Clean the scans of a dataset in the layout of MVTec 3D-AD: plane removed, largest cluster kept, "
        "padded to a square. May be interrupted and continued at any moment."
    )
    parser.add_argument("dataset", type=Path, help="folder that holds the classes")
    parser.add_argument("--output_dir", type=Path, help="write there instead of in place; the dataset stays as it is")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--keep_rgb", action="store_true", help="only pad the photographs, do not black out background")
    parser.add_argument("--dry_run", action="store_true", help="check pairs, headers and sizes; write nothing")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    args = _parse(argv)
    suffix = f".{os.getpid()}{TEMPORARY}"
    job = Job(args.dataset, args.output_dir or args.dataset, CleaningRule(), args.keep_rgb, suffix)
    try:
        summary = preprocess(job, args.workers, args.dry_run)
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this run ended", file=sys.stderr)
        return 130
    done = "to do" if args.dry_run else "done"
    print(f"{done} {len(summary.done)}, skipped {len(summary.skipped)} (done before), failed {len(summary.failed)}")
    for name, reason in summary.failed.items():
        print(f"  {name}: {reason}")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())

"""Preprocessing of many scans: in several processes, recorded in the journal, with a summary at the end."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cleaning.journal import (
    JOURNAL,
    MANIFEST,
    TEMPORARY,
    FileRecord,
    Journal,
    Record,
    Scan,
    locked,
    sha256,
    stamp,
    sync,
)
from utils.cleaning.worker_pool import process_all, reason_of
from utils.errors import InputError
from utils.scans.files import atomic_path, cannot_write, files_by_stem
from utils.scans.organized_pc import read_organized_pc, write_organized_pc


class Summary(NamedTuple):
    """Names of scans by how the run ended for them, and the reason for each that failed."""

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]


def process_scans(
    scans: list[Scan], journal: Journal, process: Callable[[Scan], Record], workers: int, failed: dict[str, str]
) -> Summary:
    """Process every scan that is not done yet.

    Args:
        scans: all scans.
        journal: of the output folder.
        process: writes the results of a scan under temporary names; sent to other processes.
        workers: processes; 1 works in this one.
        failed: reasons of scans that failed before.

    Raises:
        InputError: the output folder cannot be written to, or another run is at work on it.
    """
    output = journal.output
    require_own_folder(scans, journal)
    pending, skipped, faults = split_scans(scans, journal)
    if not pending and not (output / JOURNAL).is_file():  # a finished dataset may lie on a read-only disk
        return Summary([], skipped, dict(sorted((failed | faults).items())))
    _require_writable(scans, output)
    with locked(output):
        journal.read()  # another run may have ended meanwhile
        journal.recover(scans)
        _remove_temporary_files(scans, output)
        pending, skipped, faults = split_scans(scans, journal)
        failed, done = failed | faults, []
        with closing(process_all(pending, process, workers)) as outcomes:
            for scan, outcome in tqdm(outcomes, total=len(pending), unit="scan", disable=None):
                reason = outcome if isinstance(outcome, str) else _commit(scan, outcome, journal)
                if reason:
                    failed[scan.name] = reason
                else:
                    done.append(scan.name)
        _remove_temporary_files(scans, output)  # on a full disk the manifest needs their space
        try:
            journal.save()
        except InputError as error:
            failed[MANIFEST] = f"{error} Until then {JOURNAL} keeps what is done."
    return Summary(sorted(done), skipped, dict(sorted(failed.items())))


def require_own_folder(scans: list[Scan], journal: Journal) -> None:
    """Raise InputError for an output folder with scans that no run of the script wrote."""
    if not journal.is_new or (scans and journal.in_place(scans[0])):
        return
    for modality in ("xyz", "rgb"):
        for folder in journal.output.glob(f"*/*/*/{modality}"):
            if files := files_by_stem(folder, modality):
                raise InputError(
                    f"{journal.output} holds scans of another origin, such as {next(iter(files.values()))[0]}, and no "
                    f"{MANIFEST}. Give an empty output folder."
                )


def split_scans(scans: list[Scan], journal: Journal) -> tuple[list[Scan], list[str], dict[str, str]]:
    """Return the scans to process, the names of those done, and the reason for each that can be neither."""
    pending: list[Scan] = []
    skipped: list[str] = []
    faults: dict[str, str] = {}
    for scan in scans:
        try:
            if journal.is_done(scan):
                skipped.append(scan.name)
            elif scan.name not in journal.done or not journal.in_place(scan) or journal.is_original(scan):
                pending.append(scan)
            else:
                faults[scan.name] = "Its files changed after preprocessing. Restore the originals or the results."
        except (InputError, OSError) as error:
            faults[scan.name] = reason_of(error)
    return pending, skipped, faults


def report(run: Callable[[], Summary], done: str = "done") -> int:
    """Run, print the summary and return the exit code: 0 all done, 1 some scans failed, 130 interrupted."""
    try:
        summary = run()
    except KeyboardInterrupt:
        print("Interrupted. The same command continues where this run ended.", file=sys.stderr)
        return 130
    print(f"{done} {len(summary.done)}, skipped {len(summary.skipped)} (done before), failed {len(summary.failed)}")
    for name, reason in summary.failed.items():
        print(f"  {name}: {reason}")
    return 1 if summary.failed else 0


def write_results(scan: Scan, arrays: Mapping[str, np.ndarray], output: Path) -> Record:
    """Write the results of a scan under temporary names, read them back and flush them to the disk.

    Raises:
        InputError: a file cannot be written, or reads back different; none is left behind.
    """
    record = {}
    try:
        for modality, array in arrays.items():
            sources, temporary = scan.sources[modality], scan.temporary(output, modality)
            before = (sha256(*sources), tuple(map(stamp, sources)))
            try:
                _write_verified(temporary, array)
                record[modality] = FileRecord(before[0], sha256(temporary), *stamp(temporary), before[1])
            except OSError as error:
                raise cannot_write(scan.file(output, modality), error) from error
    except InputError:
        _discard(scan, output)  # its space may do for the next scan
        raise
    return record


def _write_verified(path: Path, array: np.ndarray) -> None:
    """Write a cloud (H, W, 3) float32 as tiff or an image of uint8 as PNG, read it back and flush it to the disk."""
    if array.dtype == np.float32:
        write_organized_pc(path, array)
        back = read_organized_pc(path)
    else:
        with atomic_path(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")
        with Image.open(path) as image:
            back = np.asarray(image)
    if not np.array_equal(back, array):
        raise InputError(f"{path} reads back different from what was written. Check the disk.")
    sync(path)


def _commit(scan: Scan, record: Record, journal: Journal) -> str:
    """Put results in place, or discard them and return the reason."""
    try:
        journal.commit(scan, record)
    except OSError as error:
        _discard(scan, journal.output)
        return str(cannot_write(journal.output / JOURNAL, error))
    return ""


def _discard(scan: Scan, output: Path) -> None:
    for modality in scan.sources:
        with suppress(OSError):  # the next run looks for it again
            scan.temporary(output, modality).unlink(missing_ok=True)


def _remove_temporary_files(scans: list[Scan], output: Path) -> None:
    """Delete what failed scans and killed runs left; only while no scan is half renamed."""
    for folder in {folder for scan in scans for folder in scan.folders(output)}:
        for path in folder.glob(f"*{TEMPORARY}"):
            path.unlink(missing_ok=True)
    for path in output.glob(f".{Path(MANIFEST).stem}.*.tmp.json"):  # of `atomic_path`
        path.unlink(missing_ok=True)


def _require_writable(scans: list[Scan], output: Path) -> None:
    """Make the output folder, and check every folder in it before the first scan is touched."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be made ({error.strerror}). Give another output folder.") from error
    for folder in (output, *sorted({folder for scan in scans for folder in scan.folders(output)})):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{folder} is not writable. Change its permissions or give another output folder.")

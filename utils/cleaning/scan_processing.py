"""Preprocessing of many scans in several processes, with a journal and a summary."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.cleaning.journal import MANIFEST, FileRecord, Journal, Record, Scan, sha256, stamp
from utils.errors import InputError, problem_of
from utils.reporting.messages import LOG_FILE, QUIET, show, start_messages
from utils.reporting.progress import progress_bar
from utils.scans.files import atomic_path, locked, make_folder, writing
from utils.scans.images import open_image
from utils.scans.organized_pc import as_cloud, read_organized_pc, write_organized_pc

Result = tuple[Record, str]  # new files under temporary names, and the reason to doubt them, or an empty string
Process = Callable[[Scan], Result]
Outcome = tuple[Scan, Result | str]  # the result, or the reason why the scan failed


class Summary(NamedTuple):
    """Names of scans by outcome, with the reason for each that failed or is doubtful."""

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]
    doubtful: dict[str, str]


def process_scans(
    scans: list[Scan], journal: Journal, process: Process, workers: int, failed: dict[str, str], dry_run: bool = False
) -> Summary:
    """Process every scan that is not done yet, in `workers` processes; 1 means this one.

    `process` writes the results of a scan under temporary names, but nothing in a dry run. `failed` has the reasons of
    scans that failed before. Raises InputError if the output folder is not writable or another run is using it.
    """
    require_own_folder(scans, journal)
    if not dry_run and not journal.output.is_dir():
        make_folder(journal.output, "output folder")
    elsewhere = [scan for scan in scans if not scan.is_in(journal.output)]  # in place, a bad file fails its own scan
    results = (scan.file(journal.output, modality) for scan in elsewhere for modality in scan.sources)
    with nullcontext() if dry_run else locked(journal.output, "output folder", results):
        if not dry_run:
            journal.read()  # another run may have ended meanwhile
            journal.recover(scans)
        pending, skipped, faults = split_scans(scans, journal)
        done, failed, doubtful = [], failed | faults, {}
        if pending and not dry_run:  # a finished dataset may lie on a read-only disk
            journal.save()  # a journal is only read beside a manifest
        with closing(process_all(pending, process, workers)) as outcomes:
            for scan, outcome in progress_bar(outcomes, disable=not pending, total=len(pending), unit="scan"):
                if isinstance(outcome, str):
                    failed[scan.name] = outcome
                    continue
                record, doubt = outcome
                if not dry_run:
                    journal.commit(scan, record)
                done.append(scan.name)
                if doubt:
                    doubtful[scan.name] = doubt
        if pending and not dry_run:
            journal.save()
    return Summary(sorted(done), skipped, dict(sorted(failed.items())), dict(sorted(doubtful.items())))


def process_all(scans: list[Scan], process: Process, workers: int) -> Generator[Outcome, None, None]:
    """Yield the outcome of each scan, as it completes; BrokenProcessPool if a worker is killed."""
    attempt = partial(_attempt, process=process)
    if workers == 1 or len(scans) < 2:
        yield from map(attempt, scans)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, which occupy the cores already
    context = multiprocessing.get_context("spawn")
    settings = Image.MAX_IMAGE_PIXELS, QUIET.get(), LOG_FILE.get()
    pool = ProcessPoolExecutor(min(workers, len(scans)), context, _start_worker, settings)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # workers inherit it and ignore Ctrl-C
        futures = [pool.submit(attempt, scan) for scan in scans]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(scan: Scan, process: Process) -> Outcome:
    try:
        return scan, process(scan)
    except Exception as error:
        problem = problem_of(error)
        if problem is None:
            raise
        return scan, problem


def _start_worker(max_pixels: int | None, quiet: bool, log_file: str | None) -> None:
    """Take over the settings of the main process, and exit when it ends, even if it is killed."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    QUIET.set(quiet)
    LOG_FILE.set(log_file)
    start_messages("%(message)s")
    main_process = multiprocessing.parent_process()
    assert main_process is not None, "runs in a worker"

    def end_with_main_process() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_main_process, daemon=True).start()


def require_own_folder(scans: list[Scan], journal: Journal) -> None:
    """Raise InputError for an output folder with scans that the script did not write."""
    if not scans or (journal.output / MANIFEST).is_file() or scans[0].is_in(journal.output):
        return
    found = [*journal.output.glob("*/*/*/xyz/[!.]*"), *journal.output.glob("*/*/*/rgb/[!.]*")]
    if found:
        problem = f"{journal.output} holds scans of another origin, such as {found[0]}, and no {MANIFEST}"
        raise InputError(f"{problem}. Give an empty output folder.")


def split_scans(scans: list[Scan], journal: Journal) -> tuple[list[Scan], list[str], dict[str, str]]:
    """Return the scans to process, the names of those done, and the reason for each that cannot be processed."""
    done: dict[str, bool] = {}
    faults: dict[str, str] = {}
    for scan in scans:
        try:
            done[scan.name] = journal.is_done(scan)
        except (InputError, OSError) as error:
            faults[scan.name] = str(problem_of(error))
    pending = [scan for scan in scans if not done.get(scan.name, True)]
    return pending, [name for name in done if done[name]], faults


def report(summary: Summary, done: str = "done") -> int:
    """Print the summary and return the exit code: 0 all done, 1 some scans failed."""
    show(f"{done} {len(summary.done)}, skipped {len(summary.skipped)} (done before), failed {len(summary.failed)}")
    for name, reason in summary.failed.items():
        show(f"  {name}: {reason}", level=logging.ERROR)
    if summary.doubtful:
        problem = f"the table may not have been found in {len(summary.doubtful)} of the scans. Check their results"
        show(f"warning: {problem}", level=logging.WARNING)
    for name, doubt in summary.doubtful.items():
        show(f"  {name}: {doubt}.", level=logging.WARNING)
    return 1 if summary.failed else 0


def write_results(scan: Scan, arrays: Mapping[str, np.ndarray], output: Path) -> Record:
    """Write clouds (float32) as tiff and images (uint8) as PNG under temporary names, and read them back.

    Raises InputError if a file cannot be written or reads back differently, OSError if a source cannot be read.
    """
    record = {}
    for modality, array in arrays.items():
        sources, path = scan.sources[modality], scan.temporary(output, modality)
        source, stamps = sha256(*sources), tuple(map(stamp, sources))
        with writing(scan.file(output, modality)):
            if array.dtype == np.float32:
                write_organized_pc(path, array)
            else:
                with atomic_path(path) as temporary:
                    Image.fromarray(array).save(temporary, format="PNG")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            record[modality] = FileRecord(source, sha256(path), *stamp(path), stamps)
        if not _holds(path, array):
            problem = f"The new {scan.file(output, modality)} reads back differently from what was written"
            raise InputError(f"{problem}. Check the disk and run the same command again.")
    return record


def _holds(path: Path, array: np.ndarray) -> bool:
    """Return True if a file of `write_results` can be read and holds the array."""
    with suppress(InputError):
        if array.dtype == np.float32:
            return np.array_equal(read_organized_pc(path), as_cloud(array))
        with open_image(path) as image:
            return np.array_equal(np.asarray(image), array)
    return False

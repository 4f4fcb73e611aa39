"""How the preprocessing scripts work through the scans of a dataset: several processes, safe to kill, a summary."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cleaning.journal import MANIFEST, FileRecord, Record, Scan, sha256, stamp
from utils.cleaning.progress import Progress, locked, remove_stale, sync, temporary_path
from utils.errors import InputError
from utils.scans.files import cannot_read, cannot_write, files_by_stem
from utils.scans.organized_pc import read_organized_pc, write_organized_pc

KILLED = (
    "the process that worked on it was killed twice, the machine may be out of memory: run again with fewer --workers"
)


class Summary(NamedTuple):
    """How a run ended: names of scans, and the reason for each that failed."""

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]


def process_scans(
    scans: list[Scan],
    progress_of: Callable[[], Progress],
    process: Callable[[Scan], Record],
    suffix: str,
    workers: int,
    failed: dict[str, str],
) -> Summary:
    """Process every scan that is not done yet.

    Args:
        scans: all scans.
        progress_of: reads what is on disk; called while no other run can be at work on the folder.
        process: leaves the results of a scan under temporary names ending in `suffix`; sent to other processes.
        suffix: of this run's temporary files.
        workers: processes; 1 works in this one.
        failed: reasons of scans that failed before.

    Raises:
        InputError: other settings than before, a folder that cannot be written to, another run at work on the same
            folder, or a scan left half written that cannot be mended.
    """
    done = []
    before = progress_of()
    output = before.output
    require_own_folder(scans, before)
    if not before.journal.is_file():
        pending, skipped = split_scans(scans, before, failed)
        if not pending:  # nothing is demanded of the disk, on which a finished dataset may be read-only
            _keep_stamps(before, progress_of)
            return Summary([], skipped, dict(sorted(failed.items())))
    _make_folder(output)
    _require_writable(scans, output)
    with locked(output):
        progress = progress_of()
        progress.take_stamps(before)
        progress.recover()
        remove_stale(scans, output)
        pending, skipped = split_scans(scans, progress, failed)
        with closing(_process_all(pending, process, workers)) as outcomes:
            for scan, result in tqdm(outcomes, total=len(pending), unit="scan", disable=None):
                reason = result if isinstance(result, str) else _commit(scan, result, suffix, progress)
                if reason is None:
                    done.append(scan.name)
                else:
                    failed[scan.name] = reason
        remove_stale(scans, output)  # before the manifest: on a full disk it needs their space
        try:
            progress.save()
        except InputError as error:
            failed[progress.manifest.name] = f"{error}; until then {progress.journal.name} keeps what is done"
    return Summary(sorted(done), skipped, dict(sorted(failed.items())))


def _keep_stamps(found: Progress, progress_of: Callable[[], Progress]) -> None:
    """Write down what was found by reading files, where that can be: it only spares the next run the reading."""
    if found.refreshed:
        with suppress(InputError), locked(found.output):
            progress = progress_of()
            if not progress.journal.is_file():
                progress.take_stamps(found)
                progress.save()


def require_own_folder(scans: list[Scan], progress: Progress) -> None:
    """Refuse to write among scans that no run of the script made; InputError."""
    if not progress.is_new or (scans and progress.in_place(scans[0])):
        return
    for modality in ("xyz", "rgb"):
        for folder in progress.output.glob(f"*/*/*/{modality}"):
            if files := files_by_stem(folder, modality):
                raise InputError(
                    f"{progress.output} holds scans, such as {next(iter(files.values()))[0]}, and no {MANIFEST} that "
                    "tells that this script wrote them: give an empty output folder"
                )


def report(run: Callable[[], Summary], done: str = "done") -> int:
    """Run, print the summary and return the exit code: 0 all done, 1 some scans failed, 130 interrupted."""
    try:
        summary = run()
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this run ended", file=sys.stderr)
        return 130
    print(f"{done} {len(summary.done)}, skipped {len(summary.skipped)} (done before), failed {len(summary.failed)}")
    for name, reason in summary.failed.items():
        print(f"  {name}: {reason}")
    return 1 if summary.failed else 0


def write_results(scan: Scan, arrays: Mapping[str, np.ndarray], output: Path, suffix: str) -> Record:
    """Leave the results of a scan beside their final places under temporary names, read back and on disk.

    Raises:
        InputError: a file cannot be written, or reads back different; none is left behind.
    """
    temporaries = {modality: temporary_path(scan.file(output, modality), suffix) for modality in arrays}
    stamps = {modality: tuple(map(stamp, scan.sources[modality])) for modality in arrays}
    sources = {modality: sha256(*scan.sources[modality]) for modality in arrays}
    record = {}
    try:
        for modality, path in temporaries.items():
            try:
                _write_verified(path, arrays[modality])
                record[modality] = FileRecord(sources[modality], sha256(path), *stamp(path), stamps[modality])
            except OSError as error:
                raise cannot_write(scan.file(output, modality), error) from error
    except InputError:
        _discard(scan, output, suffix)  # its space may do for the next scan
        raise
    return record


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


def _discard(scan: Scan, output: Path, suffix: str) -> None:
    for modality in scan.modalities:
        with suppress(OSError):  # what could not be made, or not be deleted: the next run looks for it again
            temporary_path(scan.file(output, modality), suffix).unlink(missing_ok=True)


def _commit(scan: Scan, record: Record, suffix: str, progress: Progress) -> str | None:
    """Put the results in place, or return the reason why they were discarded."""
    try:
        progress.commit(scan, record, suffix)
    except OSError as error:
        _discard(scan, progress.output, suffix)
        return str(cannot_write(progress.journal, error))
    return None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): give another output folder") from error


def _require_writable(scans: list[Scan], output: Path) -> None:
    """Look at every folder that is there before the first scan is touched."""
    folders = {scan.file(output, modality).parent for scan in scans for modality in scan.modalities}
    for folder in (output, *sorted(folders)):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{folder} is not writable: change its permissions or give another output folder")


def split_scans(scans: list[Scan], progress: Progress, failed: dict[str, str]) -> tuple[list[Scan], list[str]]:
    """Tell the scans still to clean from the names of those done; what cannot be read or told goes to `failed`."""
    pending, skipped = [], []
    for scan in scans:
        try:
            if progress.is_done(scan):
                skipped.append(scan.name)
            elif scan.name not in progress.done or not progress.in_place(scan) or progress.is_original(scan):
                pending.append(scan)
            else:
                failed[scan.name] = "its files changed after preprocessing: restore the originals or the results"
        except (InputError, OSError) as error:
            failed[scan.name] = _reason(error)
    return pending, skipped


def _reason(error: InputError | OSError) -> str:
    if isinstance(error, InputError):
        return str(error)
    return str(cannot_read(Path(error.filename or "a file of the scan"), error))


Outcome = tuple[Scan, Record | str]  # the record, or the reason why the scan failed


def _process_all(scans: list[Scan], process: Callable[[Scan], Record], workers: int) -> Generator[Outcome, None, None]:
    """Yield the outcome of each scan, in order of completion.

    Where a process is killed, by a machine that is out of memory for one, each scan that it may have been at work on
    is tried once more in a process alone, and the rest goes on in new ones.
    """
    if workers == 1 or len(scans) < 2:
        for scan in scans:
            try:
                yield scan, process(scan)
            except (InputError, OSError) as error:
                yield scan, _reason(error)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: the processes occupy the cores already
    rest = scans
    while rest:
        ended = yield from _process_in_pool(rest, process, workers)
        rest = [scan for scan in rest if scan.name not in ended]
        # A pool hands its scans out in order, one more than it has processes.
        for scan in rest[: workers + 1]:
            if not (yield from _process_in_pool([scan], process, 1)):
                yield scan, KILLED
        rest = rest[workers + 1 :]


def _process_in_pool(
    scans: list[Scan], process: Callable[[Scan], Record], workers: int
) -> Generator[Outcome, None, set[str]]:
    """Yield the outcomes of scans until all are done or a process is killed; returns the names of those done."""
    ended: set[str] = set()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(scans)), context, initializer=_start_worker)
    try:
        futures = {pool.submit(process, scan): scan for scan in scans}
        for future in as_completed(futures):
            scan = futures[future]
            try:
                outcome: Record | str = future.result()
            except (InputError, OSError) as error:
                outcome = _reason(error)
            ended.add(scan.name)
            yield scan, outcome
    except BrokenProcessPool:
        pass  # the scans that are not among those done tell
    finally:
        pool.shutdown(cancel_futures=True)
    return ended


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """End this worker when the main process is gone, killed too: it would wait for work for ever."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None, "runs in a worker"
    main_process.join()
    os._exit(1)

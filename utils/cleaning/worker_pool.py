"""Processes that work on scans side by side, one scan a task, and outlast the death of one of them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from utils.cleaning.journal import Record, Scan
from utils.errors import InputError
from utils.scans.files import cannot_read

KILLED = "The process that worked on it was killed twice, perhaps for lack of memory. Run again with fewer --workers."
Outcome = tuple[Scan, Record | str]  # the record, or the reason why the scan failed


def reason_of(error: InputError | OSError) -> str:
    """Return why a scan failed."""
    if isinstance(error, InputError):
        return str(error)
    return str(cannot_read(Path(error.filename or "a file of the scan"), error))


def process_all(scans: list[Scan], process: Callable[[Scan], Record], workers: int) -> Generator[Outcome, None, None]:
    """Yield the outcome of each scan, in order of completion.

    A machine that is out of memory kills processes. The scans that a killed one may have been at work on are tried
    once more, each in a process alone, and the rest goes on in new processes.
    """
    if workers == 1 or len(scans) < 2:
        for scan in scans:
            try:
                yield scan, process(scan)
            except (InputError, OSError) as error:
                yield scan, reason_of(error)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: the processes occupy the cores already
    rest = scans
    while rest:
        rest = yield from _process_in_pool(rest, process, workers)
        # A pool hands its scans out in order, one more than it has processes.
        for scan in rest[: workers + 1]:
            if (yield from _process_in_pool([scan], process, 1)):
                yield scan, KILLED
        rest = rest[workers + 1 :]


def _process_in_pool(
    scans: list[Scan], process: Callable[[Scan], Record], workers: int
) -> Generator[Outcome, None, list[Scan]]:
    """Yield the outcomes of scans until all are done or a process is killed, and return the scans that are left."""
    ended: set[str] = set()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(scans)), context, initializer=_start_worker)
    try:
        futures = {pool.submit(process, scan): scan for scan in scans}
        for future in as_completed(futures):
            try:
                outcome: Record | str = future.result()
            except (InputError, OSError) as error:
                outcome = reason_of(error)
            ended.add(futures[future].name)
            yield futures[future], outcome
    except BrokenProcessPool:
        pass  # the scans that have not ended tell
    finally:
        pool.shutdown(cancel_futures=True)
    return [scan for scan in scans if scan.name not in ended]


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    assert main_process is not None, "runs in a worker"

    def end_with_main_process() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_main_process, daemon=True).start()

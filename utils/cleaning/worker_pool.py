"""Processing of scans in several processes, one scan a task."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from utils.cleaning.journal import Record, Scan
from utils.errors import InputError
from utils.scans.files import cannot_read

Outcome = tuple[Scan, Record | str]  # the record, or the reason why the scan failed


def process_all(scans: list[Scan], process: Callable[[Scan], Record], workers: int) -> Generator[Outcome, None, None]:
    """Yield the outcome of each scan, in order of completion.

    Raises:
        InputError: a worker was killed.
    """
    attempt = partial(_attempt, process=process)
    if workers == 1 or len(scans) < 2:
        yield from map(attempt, scans)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the workers, which occupy the cores already
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(scans)), context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(attempt, scan) for scan in scans]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError("A worker was killed, perhaps for lack of memory. Run again with fewer --workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def reason_of(error: InputError | OSError) -> str:
    """Return why a scan failed."""
    if isinstance(error, InputError):
        return str(error)
    return str(cannot_read(Path(error.filename or "a file of the scan"), error))


def _attempt(scan: Scan, process: Callable[[Scan], Record]) -> Outcome:
    try:
        return scan, process(scan)
    except (InputError, OSError) as error:
        return scan, reason_of(error)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    assert main_process is not None, "runs in a worker"

    def end_with_main_process() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_main_process, daemon=True).start()

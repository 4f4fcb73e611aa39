"""Steps of a long run, each in its own process, with one log file, one progress bar and a record of finished steps."""

import json
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from utils.errors import InputError
from utils.reporting.messages import show
from utils.reporting.progress import INTERVAL, progress_bar
from utils.scans.json_records import encode_record, read_record, write_record

RECORD, LOG = "steps.json", "log.txt"  # files in the folder of the run
SCHEMA = 1  # of RECORD
BAR = "{desc}: {percentage:.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
SHOWN_LINES = 10  # of the output of a step that failed


class Step(NamedTuple):
    """A command to run. Its finished share: files in `folder` that match `pattern`, divided by `total`."""

    name: str
    share: int  # rough share of the time of all steps, percent
    command: list[str]
    folder: Path
    pattern: str
    total: int

    def finished(self) -> float:
        """Finished share, from 0 to 1."""
        return min(1.0, sum(1 for _ in self.folder.glob(self.pattern)) / max(1, self.total))


class Record(msgspec.Struct):
    """Content of steps.json."""

    schema: int
    settings: dict[str, Any]  # flags that the results depend on
    finished: list[str]  # names of steps


def run_steps(steps: Sequence[Step], folder: Path, settings: Mapping[str, Any]) -> None:
    """Run the steps that are not finished, in order; their output is appended to log.txt in `folder`.

    Raises InputError if the folder was begun with other settings, or a step fails.
    """
    record = _read(folder, settings)
    before = [step for step in steps if step.name in record.finished]
    first = sum(step.share for step in before)
    total = sum(step.share for step in steps)
    with progress_bar(total=total, initial=first, unit="%", bar_format=BAR) as bar:
        for number, step in enumerate(steps, 1):
            if step in before:
                continue
            bar.set_description_str(f"step {number} of {len(steps)}, {step.name}")
            _run(step, folder / LOG, bar)
            record.finished.append(step.name)
            write_record(folder / RECORD, record, indent=1)


def _read(folder: Path, settings: Mapping[str, Any]) -> Record:
    """Record of the folder, or a new one with these settings."""
    path, now = folder / RECORD, json.loads(encode_record(settings))
    if not path.exists():
        write_record(path, Record(SCHEMA, now, []), indent=1)
    record = read_record(path, Record, SCHEMA, "Choose another --output_dir")
    then = record.settings
    if differing := [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]:
        pairs = (f"{name} {then.get(name)}, now {now.get(name)}" for name in differing[:5])
        problem = f"{folder} was begun with {'; '.join(pairs)}"
        raise InputError(f"{problem}. Use the same flags, or choose another --output_dir.")
    return record


def _run(step: Step, path: Path, bar: "tqdm[Any]") -> None:
    """Run a step in a process group of its own, so that Ctrl-C reaches it once, from here."""
    with path.open("ab") as log:
        log.write(f"$ {shlex.join(step.command)}\n".encode(errors="backslashreplace"))
        log.flush()
        start = log.tell()
        process = subprocess.Popen(  # noqa: S603
            step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = _wait(process, step, bar)
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if code:
        text = path.read_bytes()[start:].decode(errors="replace")
        for line in text.splitlines()[-SHOWN_LINES:]:
            show(f"  {line}", sys.stderr, logging.ERROR)
        problem = f"The step {step.name} ended with exit code {code}; {path} has its whole output"
        raise InputError(f"{problem}. Solve the problem above and run the same command again.")


def _wait(process: "subprocess.Popen[bytes]", step: Step, bar: "tqdm[Any]") -> int:
    """Keep the bar up to date until the process ends; returns its exit code."""
    start, interval = bar.n, 1.0 if sys.stderr.isatty() else INTERVAL
    while True:
        try:
            code = process.wait(interval)
        except subprocess.TimeoutExpired:
            bar.n = start + round(step.share * step.finished())
            bar.refresh()
        else:
            bar.n = start + step.share
            return code

"""Prediction of new samples as they arrive: in watched folders, or as lines of a stream."""

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import msgspec

from runner.prediction import SCHEMA, LoadedSample, Outcome, PredictionWriter, Predictor, read_predictions
from utils.errors import InputError
from utils.records import SampleFiles
from utils.reporting.messages import warn_once
from utils.scans.files import LONGEST_NAME
from utils.scans.json_records import encode_record
from utils.scans.sample_files import FoundSamples, stamp_of

LOOK_AGAIN = 0.2  # least seconds between two listings of the folders
LOOK_SHARE = 0.1  # largest share of the time spent on listing them
Record = dict[str, Any]
T = TypeVar("T")


class StopSignals:
    """Context in which Ctrl-C and SIGTERM end a loop between two samples; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = self._waiting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def wait_for(self, function: Callable[[], T]) -> T | None:
        """Call a blocking function. A signal ends it, and the result is None."""
        try:
            self._waiting = True
            return None if self.requested else function()
        except KeyboardInterrupt:
            return None
        finally:
            self._waiting = False

    def _stop(self, *_: object) -> None:
        again, self.requested = self.requested, True
        if self._waiting or again:
            raise KeyboardInterrupt


class WatchedFiles:
    """New samples in folders, recognized by their stamps (see `stamp_of`).

    `look` lists the files, and `done` has the stamps of predicted samples. Memory grows with the files in the folders,
    not with all files so far.
    """

    def __init__(self, look: Callable[[], FoundSamples], settle: float, partner_timeout: float) -> None:
        self.look, self.settle, self.partner_timeout = look, settle, partner_timeout
        self.done: set[str] = set()
        self._since: dict[str, float] = {}  # by stamp of a sample that is not done: time when it was first seen

    def due(self, now: float) -> FoundSamples:
        """List the samples unchanged for `settle` seconds, and incomplete ones unchanged for `partner_timeout`.

        `now` is a monotonic time in seconds. Samples are listed again until their stamps are in `done`.
        """
        try:
            found = self.look()
        except OSError as error:  # such as an unavailable network share
            warn_once("unreadable", str(error), f"the watched files cannot be listed ({error}). Trying again")
            return FoundSamples([], [])
        since: dict[str, float] = {}
        there: set[str] = set()
        due = FoundSamples([], [])
        for files, problem in [*((files, "") for files in found.samples), *found.incomplete]:
            stamp = stamp_of(files)
            there.add(stamp)
            if stamp in self.done:
                continue
            since[stamp] = self._since.get(stamp, now)
            if problem and now - since[stamp] >= self.partner_timeout:
                due.incomplete.append((files, problem))
            elif not problem and now - since[stamp] >= self.settle:
                due.samples.append(files)
        self._since = since
        if found.samples:  # if there are none, a folder may be on an unavailable network share
            self.done &= there
        return due


def recorded_stamps(path: Path) -> set[str]:
    """Stamps of the samples in predictions.jsonl."""
    return {str(record["stamp"]) for record in read_predictions(path) if "stamp" in record}


def watch(
    watched: WatchedFiles,
    predictor: Predictor,
    writer: PredictionWriter,
    check: Callable[[Sequence[SampleFiles]], None],
    report: Callable[[Record], None],
    stop: StopSignals,
) -> None:
    """Predict new samples and report their records until `stop`. `check` raises InputError for refused files."""
    while not stop.requested:
        begin = time.monotonic()
        due = watched.due(begin)
        check(due.files)
        stamps = set(map(stamp_of, due.files))
        pause = max(LOOK_AGAIN, (time.monotonic() - begin) / LOOK_SHARE)
        for outcome in predictor.outcomes(due):
            if outcome.loaded.stamp not in stamps:  # changed since it was listed: it must settle again
                continue
            record = writer.add(outcome)
            watched.done.add(record["stamp"])
            report(record)
            if stop.requested:
                return
        if not stamps:
            stop.wait_for(partial(time.sleep, pause))


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """A line of --stdin."""

    name: str | None = None  # by default the stem of the image, else of the cloud
    rgb: str | None = None
    xyz: str | None = None

    def files(self) -> SampleFiles:
        """Files of the sample; `problem` may still refuse its name."""
        rgb, xyz = (None if path is None else Path(path) for path in (self.rgb, self.xyz))
        return SampleFiles(self.name or next((path.stem for path in (rgb, xyz) if path is not None), ""), rgb, xyz)

    def problem(self) -> str:
        """Problem and fix of the request, or ""."""
        name = self.files().path
        if self.rgb is None and self.xyz is None:
            return 'The request has neither "rgb" nor "xyz". Send the path of a file.'
        if any("\0" in text for text in (name, self.rgb or "", self.xyz or "")):
            return "The request holds a NUL character. Remove it."
        if "/" in name or name in ("", ".", "..") or len(name.encode()) > LONGEST_NAME:
            return f"The name is not a file name of at most {LONGEST_NAME} bytes. Send another one."
        return ""


def answer_requests(
    requests: BinaryIO,
    answers: TextIO,
    predictor: Predictor,
    writer: PredictionWriter,
    check: Callable[[Sequence[SampleFiles]], None],
    report: Callable[[Record], None],
    stop: StopSignals,
) -> None:
    """Answer each line of `requests` with one line of `answers`, in order, until the end or `stop`."""
    while line := stop.wait_for(requests.readline):
        record = _answer(line, predictor, writer, check)
        report(record)
        answers.write(encode_record(record))
        answers.flush()


def _answer(
    line: bytes, predictor: Predictor, writer: PredictionWriter, check: Callable[[Sequence[SampleFiles]], None]
) -> Record:
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        example = '{"name": "part", "rgb": "part.png", "xyz": "part.tiff"}'
        return {"schema": SCHEMA, "name": None, "error": f"The line is not a request ({error}). Send {example}."}
    files, problem = request.files(), request.problem()
    if not problem:
        try:
            check([files])
        except InputError as error:
            problem = str(error)
    if problem:
        return writer.add(Outcome(LoadedSample(files), problem=problem))
    (outcome,) = predictor.outcomes(FoundSamples([files], []))
    return writer.add(outcome)

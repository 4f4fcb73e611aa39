"""Messages of a script: printed and logged lines, the log file, and the exit with an error."""

import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from utils.errors import InputError, problem_of, system_problem

TRACEBACK = ContextVar("traceback", default=False)  # set by --debug: print the traceback of an error, too
QUIET = ContextVar("quiet", default=False)  # set by --quiet: print only warnings and errors
LOG_FILE: ContextVar[str | None] = ContextVar("log_file", default=None)  # set by --log_file

SHOWN = "shown"  # name of the records of `show` in log files
KEPT_TEXTS = 1000
_warned: set[tuple[str, object]] = set()  # kinds and subjects of the warnings of this run, see `warn_once`
_handlers: list[logging.Handler] = []  # of this run


def escape_controls(text: str) -> str:
    """Escape what cannot be printed: control characters, which a terminal would execute, and undecodable bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def show(text: str, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Print one line on stdout or another stream, with escaped control characters; the log file gets it, too.

    --quiet leaves out lines below the `level` of warnings.
    """
    text = escape_controls(text)
    if level >= logging.WARNING or not QUIET.get():
        print(text, file=stream, flush=True)
    _write_log(text, level)


def _write_log(text: str, level: int) -> None:
    """Write a line, if it is not empty, to the log file, if there is one."""
    for handler in [each for each in _handlers if isinstance(each, _LogFile) and text]:
        handler.handle(logging.LogRecord(SHOWN, level, "", 0, text, None, None))


def warn_once(kind: str, subject: object, problem: str) -> None:
    """Log a problem of a subject, such as a folder, unless it is "" or one of this kind was logged in this run."""
    if problem and (kind, subject) not in _warned:
        _warned.add((kind, subject))
        logging.getLogger("files").warning(problem)


def start_messages(form: str = "%(name)s: %(message)s") -> None:
    """Log to stderr in this `form`, and everything that is logged or shown to --log_file, with date and time.

    The main of each script calls it after the flags are parsed; `exit_on_error` ends it. Raises InputError if the log
    file cannot be written.
    """
    _stop_messages()
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter(form))
    console.setLevel(logging.WARNING if QUIET.get() else logging.INFO)
    _handlers.append(console)
    if path := LOG_FILE.get():
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"--log_file {path} cannot be written ({error.strerror}). Name another file.") from None
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        _handlers.append(file)
    for handler in _handlers:
        handler.addFilter(_NoRepeats())
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


def _stop_messages() -> None:
    _warned.clear()
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # a full disk
            handler.close()


class _NoRepeats(logging.Filter):
    """Filter that drops a repeated text, such as a warning of each method, if it is among the last KEPT_TEXTS."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: deque[str] = deque(maxlen=KEPT_TEXTS)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.name == SHOWN or record.levelno >= logging.ERROR:
            return True
        if text in self.seen:
            return False
        self.seen.append(text)
        return True


class _LogFile(logging.FileHandler):
    """Log file that closes, with a warning, when it can no longer be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        _handlers.remove(self)
        with suppress(OSError):
            self.close()
        problem = system_problem(self.baseFilename, "written", error) if isinstance(error, OSError) else str(error)
        show(f"warning: {problem} The run continues without it.", sys.stderr, logging.WARNING)


class _EscapedRecord(logging.LogRecord):
    """Log record whose message has escaped control characters in every handler."""

    def getMessage(self) -> str:
        return escape_controls(super().getMessage())


@contextmanager
def exit_on_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Decorator of each main. Exit with 2 on errors that `problem_of` knows, 130 on Ctrl-C, 141 on a closed stdout.

    The problem, or the message `interrupted` after Ctrl-C, is printed on stderr. Both streams accept every character,
    and control characters in logs are escaped.
    """
    TRACEBACK.set(False)
    logging.setLogRecordFactory(_EscapedRecord)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    script = Path(sys.argv[0]).name
    try:
        try:
            yield
        finally:
            _flush_stdout()
    except (KeyboardInterrupt, ImportError) as error:
        if isinstance(error, ImportError) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        show(f"{script}: {interrupted}", sys.stderr, logging.ERROR)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        if LOG_FILE.get() and not _handlers:  # an error of the flags
            with suppress(InputError):
                start_messages()
        problem, lines = problem_of(error), "".join(traceback.format_exception(error)).splitlines()
        if problem is None:
            for line in lines:
                _write_log(escape_controls(line), logging.ERROR)
            raise
        for line in lines if TRACEBACK.get() else ():
            show(line, sys.stderr, logging.ERROR)
        show(f"{script}: error: {problem}", sys.stderr, logging.ERROR)
        raise SystemExit(2) from None
    finally:
        QUIET.set(False)
        LOG_FILE.set(None)
        _stop_messages()


def _flush_stdout() -> None:
    try:
        if sys.stdout is not None:  # it is None if the program was started without one
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of its buffer
        error.filename = "stdout"
        raise

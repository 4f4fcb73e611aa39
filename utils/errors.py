"""Errors that the user can fix, the exit of a script that reports them, and text that is safe for terminals."""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import TextIOWrapper
from pathlib import Path
from reprlib import repr as shortened
from typing import TextIO

Bounds = dict[str, tuple[float, float]]  # lowest and highest value of numeric flags by name

TRACEBACK = ContextVar("traceback", default=False)  # set by --debug: print the traceback of an error, too

_MEMORY = "There is not enough memory. Close other programs, or use smaller input, smaller batches or fewer workers."
_KILLED = "A worker process was killed, perhaps for lack of memory. Run again with fewer workers."
_SENTENCES = {  # by words in the types and messages of errors of Python, torch and the system
    **dict.fromkeys(("MemoryError", "out of memory", "not enough memory", "allocate memory"), _MEMORY),
    "Unicode": "A file or its name holds characters that are not UTF-8. Rename it, or save the file as UTF-8.",
    **dict.fromkeys(("DataLoader worker (pid", "process pool"), _KILLED),
    "recursion depth": "A file holds data that is nested too deeply. Restore it from its source.",
    "Symlink loop": "A link leads back to itself ({}). Remove it.",
}
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free disk space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Allow access to it and its folder"),
    errno.ENAMETOOLONG: "Shorten the names in it",
    **{errno.EISDIR: "Move this folder away", errno.ENOTDIR: "Move this file away"},
    errno.ELOOP: "Remove the link that leads back to itself",
}


class InputError(ValueError):
    """Bad input. The message states the problem and the fix: "<problem>. <fix>."."""


def escape_controls(text: str) -> str:
    """Escape what cannot be printed: control characters, which a terminal would execute, and undecodable bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print one line on stdout or another stream, with escaped control characters."""
    print(escape_controls(text), file=stream, flush=True)


class _EscapedRecord(logging.LogRecord):
    """Log record whose message has escaped control characters in every handler."""

    def getMessage(self) -> str:
        return escape_controls(super().getMessage())


def range_problem(value: float, low: float, high: float) -> str:
    """Problem and fix of a number that is NaN or not in low ... high, to follow its name; "" for one in the range."""
    return "" if low <= value <= high else f"is {shortened(value)}. Give a number from {low} to {high}."


def system_problem(path: object, action: str, error: OSError) -> str:
    """Problem and fix of a system error at a path. `action` is "read" or "written"."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing. Restore it from its source, or check the path."
    text = str(error).strip().rpartition("\n")[2]  # an error of a DataLoader's worker ends in the original message
    fix = _FIXES.get(error.errno or 0, "Check the path and the disk")
    return f"{path} cannot be {action} ({error.strerror or text}). {fix} and run the same command again."


def problem_of(error: BaseException) -> str | None:
    """Problem and fix of an error that the user can fix: input, system, memory or encoding; None for any other."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, MemoryError | UnicodeError | RuntimeError | OSError):
        return None
    text = f"{type(error).__name__}: {error}"
    known = next((each.format(error) for words, each in _SENTENCES.items() if words in text), None)
    if known or not isinstance(error, OSError):
        return known
    return system_problem(error.filename or "A file", "read or written", error)


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
        show(f"{script}: {interrupted}", sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        problem = problem_of(error)
        if problem is None:
            raise
        if TRACEBACK.get():
            for line in "".join(traceback.format_exception(error)).splitlines():
                show(line, sys.stderr)
        show(f"{script}: error: {problem}", sys.stderr)
        raise SystemExit(2) from None


def _flush_stdout() -> None:
    try:
        if sys.stdout is not None:  # it is None if the program was started without one
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of its buffer
        error.filename = "stdout"
        raise

"""Errors that the user can fix, and their messages."""

import errno
from reprlib import repr as shortened

Bounds = dict[str, tuple[float, float]]  # lowest and highest value of numeric flags by name

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

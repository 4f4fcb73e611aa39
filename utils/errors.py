"""Errors that the user can fix, and the exit of a script that reports them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input. The message states the problem and the fix: "<problem>. <fix>."."""


def escape_controls(text: str) -> str:
    """Escape what cannot be printed: control characters, which a terminal would execute, and undecodable bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


@contextmanager
def exit_on_input_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Exit on an InputError with code 2, on Ctrl-C with 130, on a closed stdout with 141.

    The error, or the message `interrupted` after Ctrl-C, is printed on stderr.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # it is None if the program was started without one
                sys.stdout.flush()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of its buffer
        raise SystemExit(141) from None

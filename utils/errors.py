"""Errors that are the user's to mend, and how a script ends on one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: one sentence that says what was found, what was expected and how to mend it."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End on an InputError with one line on stderr and exit code 2, on Ctrl-C with 130; other exceptions pass.

    Where the reader of stdout is gone (`| head`), end without a word and with 141, as other programs do.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as it is where a program is started without one
                sys.stdout.flush()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer goes there
        raise SystemExit(141) from None

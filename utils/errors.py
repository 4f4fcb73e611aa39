"""Errors that are the user's to mend, and how a script ends on one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: one sentence that says what was found, what was expected and how to mend it."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End on an InputError with one line on stderr and exit code 2, on Ctrl-C with 130; other exceptions pass."""
    try:
        yield
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None

"""Figures and tables as text: how a number is written, and columns that line up."""

from collections.abc import Callable, Sequence

UNDEFINED = "n/a"


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def printable(text: str) -> str:
    r"""Text that every output takes: bytes of a name that are no text are written as \udc80 to \udcff."""
    return text.encode(errors="backslashreplace").decode()


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.rjust) -> list[str]:
    """Rows of cells as lines: first column to the left, others as given, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(justify, row[1:], widths[1:])]).rstrip() for row in rows]

"""Figures and tables as text: how a number is written, and columns that line up."""

from collections.abc import Sequence

UNDEFINED = "n/a"


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: first column to the left, others to the right, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]

"""Progress of a loop: a bar in a terminal, and plain lines in the log elsewhere."""

import io
import logging
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from utils.reporting.messages import QUIET

Item = TypeVar("Item")

INTERVAL = 30.0  # seconds between two plain lines
logger = logging.getLogger("progress")


class _Lines(tqdm):
    """tqdm that logs a line instead of drawing a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg == "":  # tqdm clears the bar
            return True
        values = self.format_dict
        count, total, elapsed = values["n"], values["total"], values["elapsed"]
        units = self.unit if self.unit == "%" else f"{self.unit}s"
        text = f"{count} of {total} {units}" if total else f"{count} {units}"
        text += f", {self.format_interval(elapsed)} elapsed"
        if total and count > self.initial:
            text += f", {self.format_interval((total - count) * elapsed / (count - self.initial))} left"
        logger.info(": ".join(part for part in (self.desc, text, self.postfix) if part))
        return True


def progress_bar(items: Iterable[Item] | None = None, disable: bool = False, **options: Any) -> "tqdm[Item]":
    """tqdm with its `options`, cleared at the end, and without a terminal a line in the log every INTERVAL seconds.

    Without items, the caller calls `update`. The bar is not drawn with --quiet.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, leave=False, disable=disable or QUIET.get(), **options)
    slow = {"mininterval": INTERVAL, "maxinterval": INTERVAL, "miniters": 1, "delay": INTERVAL}
    return _Lines(items, leave=False, disable=disable, file=io.StringIO(), **options | slow)

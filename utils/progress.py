"""Progress bars, which one process of a run draws."""

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from utils.distributed import is_main

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item] | None = None, **options: Any) -> "tqdm[Item]":
    """A tqdm bar that is gone when its work is done; where several processes run, the first alone draws.

    Args:
        items: what is gone through; None: the caller counts.
        options: of tqdm.
    """
    return tqdm(items, leave=False, disable=not is_main(), **options)

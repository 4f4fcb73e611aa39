"""What a process receives from the others while a block runs, by patching torch.distributed's collectives."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    received: float = 0.0  # bytes, by this process


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the collectives of the block bring to this process.

    An all-gather brings the parts of the others, an all-reduce around a ring twice the tensor but for one part of it,
    an object its pickled bytes.
    """
    traffic = Traffic()
    others = dist.get_world_size() - 1 if dist.is_initialized() else 0

    def gather(parts: list[Tensor], own: Tensor) -> float:
        return sum(part.nbytes for part in parts) - own.nbytes

    def reduce(tensor: Tensor) -> float:
        return 2 * tensor.nbytes * others / (others + 1)

    def broadcast(objects: list[Any]) -> float:
        return len(pickle.dumps(objects)) if dist.get_rank() else 0

    def gather_object(item: Any, found: list[Any] | None) -> float:
        return len(pickle.dumps(found)) if found is not None else 0

    def wrapped(name: str, size: Callable[..., float], arguments: int) -> Any:
        original = getattr(dist, name)

        def wrapper(*given: Any, **options: Any) -> Any:
            result = original(*given, **options)
            traffic.received += size(*given[:arguments])
            return result

        return patch.object(dist, name, wrapper)

    with ExitStack() as stack:
        stack.enter_context(wrapped("all_gather", gather, 2))
        stack.enter_context(wrapped("all_reduce", reduce, 1))
        stack.enter_context(wrapped("broadcast_object_list", broadcast, 1))
        stack.enter_context(wrapped("gather_object", gather_object, 2))
        yield traffic

"""Bytes that a process receives from the others, counted in torch.distributed's collectives."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

# Bytes by the arguments of a call. An all-gather receives the shards of the others. An all-reduce over a ring of N
# processes receives 2 (N - 1) / N times the tensor.
RECEIVED: dict[str, Callable[..., float]] = {
    "all_gather": lambda shards, own, *_: sum(shard.nbytes for shard in shards) - own.nbytes,
    "all_reduce": lambda tensor, *_: 2 * tensor.nbytes * (1 - 1 / dist.get_world_size()),
    "broadcast_object_list": lambda objects, *_: len(pickle.dumps(objects)) if dist.get_rank() else 0,
    "gather_object": lambda _, gathered, *__: len(pickle.dumps(gathered)) if gathered is not None else 0,
}


@contextmanager
def counted_traffic() -> Iterator[list[float]]:
    """Bytes received by this process, one entry for each collective of the block."""
    received: list[float] = []

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def collective(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            received.append(RECEIVED[name](*arguments))
            return result

        return patch.object(dist, name, collective)

    with ExitStack() as stack:
        for name in RECEIVED:
            stack.enter_context(counting(name))
        yield received

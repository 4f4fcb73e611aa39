"""Processes of one run on the CPU, and what they do in groups of each size."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from utils import distributed
from utils.distributed import Group, Ranks, make_groups, process_group, rank, world_size

CPU = torch.device("cpu")
PROCESSES = 4
# Groups of each size that work as one: each process is one by itself as well, and so is the other half.
MEMBERS = [(3,), (2, 3), (0, 1, 2), (0, 1, 2, 3)]
# How unevenly rows or samples are cut, by number of processes; often one goes without.
CUTS = {
    1: [(1,), (1,), (1,)],
    2: [(3, 1), (0, 1), (2, 3)],
    3: [(1, 0, 3), (3, 0, 1), (1, 1, 2)],
    4: [(0, 4, 3, 3), (3, 0, 0, 1), (1, 2, 0, 1)],
}

Call = tuple[Callable[..., None], Sequence[Any]]  # a function of a module, and its arguments


def run_processes(calls: Sequence[Call]) -> list[int | None]:
    """Each call in a process of its own, all at once; their exit codes, None for one that does not end.

    They are forked off a process that has imported everything and does nothing else: else each would import it anew.
    """
    context = multiprocessing.get_context("spawn")
    codes = context.SimpleQueue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a process of several threads cannot be forked
        first = context.Process(target=_fork, args=(calls, codes))
        first.start()
    first.join()
    assert first.exitcode == 0
    return codes.get()


def _fork(calls: Sequence[Call], codes: Any) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=arguments) for function, arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes.put([process.exitcode for process in processes])
    for process in processes:
        process.kill()


def saved(folder: Path, rank: int) -> Any:
    return torch.load(folder / f"{rank}.pth", weights_only=True)


@contextmanager
def in_groups(rank: int, folder: Path) -> Iterator[dict[int, Group | None]]:
    """The groups of a process by their size, while the block runs."""
    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=120)  # a process that waits in vain is to fail
    with process_group(Ranks(rank, PROCESSES, rank), CPU, f"file://{folder}/meet"):
        groups: dict[int, Group | None] = {size: make_groups(PROCESSES // size)[0] for size in (1, 2)}
        first_three = dist.new_group([0, 1, 2], timeout=distributed.COLLECTIVE_TIMEOUT)
        if rank < 3:
            groups[3] = first_three
        yield groups | {4: None}


def shard_of(count: int, group: Group | None, cut: int = 0) -> slice:
    """The items of 0 ... count - 1 that this process of the group has, contiguous and in the order of the ranks."""
    shares = CUTS[world_size(group)][cut]
    return slice(*(count * sum(shares[: rank(group) + more]) // sum(shares) for more in (0, 1)))

"""Distributed runs of several processes on the CPU, in groups of each size."""

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
# One group of ranks of each size. The remaining ranks form further groups of one or two.
MEMBERS = [(3,), (2, 3), (0, 1, 2), (0, 1, 2, 3)]
# Uneven shares of rows or samples, by number of processes. Some ranks get none.
CUTS = {
    1: [(1,), (1,), (1,)],
    2: [(3, 1), (0, 1), (2, 3)],
    3: [(1, 0, 3), (3, 0, 1), (1, 1, 2)],
    4: [(0, 4, 3, 3), (3, 0, 0, 1), (1, 2, 0, 1)],
}

Call = tuple[Callable[..., None], Sequence[Any]]  # a module-level function and its arguments


def run_processes(calls: Sequence[Call]) -> list[int | None]:
    """Run each call in a new process, all at once; return the exit codes, None for a process that does not end.

    The processes are forked from one that has already imported everything, so that they need not import it again.
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
    """Open the process group for the block and give this rank's groups by their size."""
    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=120)  # a rank that waits for nothing fails
    with process_group(Ranks(rank, PROCESSES, rank), CPU, f"file://{folder}/meet"):
        groups: dict[int, Group | None] = {size: make_groups(PROCESSES // size)[0] for size in (1, 2)}
        first_three = dist.new_group([0, 1, 2], timeout=distributed.COLLECTIVE_TIMEOUT)
        if rank < 3:
            groups[3] = first_three
        yield groups | {4: None}


def shard_of(count: int, group: Group | None, cut: int = 0) -> slice:
    """Items of 0 ... count - 1 that belong to this rank of the group, contiguous and in the order of the ranks."""
    shares = CUTS[world_size(group)][cut]
    return slice(*(count * sum(shares[: rank(group) + more]) // sum(shares) for more in (0, 1)))

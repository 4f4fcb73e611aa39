"""Ranks of a run: the environment that launchers set, and collectives that do nothing in a single process.

Every rank of the `group` calls a collective together; None is the group of all ranks.
"""

import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError

Item = TypeVar("Item")
Group = dist.ProcessGroup

# Longest wait in a collective. Ranks wait while one of them fits the SVMs of a class or writes its report, and at
# the end for the group that finishes last. The backend notices a dead rank sooner, by its closed connection.
COLLECTIVE_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, and number of processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine: the index of its GPU
    local_world_size: int = 1  # processes on this machine


def find_ranks(
    local_rank: int | None = None, world_size: int | None = None, dist_url: str = "env://", mpirun: bool = False
) -> Ranks:
    """Ranks from the environment that torchrun sets, with `mpirun` that of Open MPI, else from the flags.

    Without torchrun, `world_size` > 1 means processes started by hand on one machine. Then `local_rank` is the rank and
    `dist_url` the meeting point (tcp://localhost:29500, file:///tmp/meet). A negative `local_rank` counts as None.

    Raises:
        InputError: the environment is incomplete, flags contradict it, or a rank is outside of 0 ... world_size - 1.
    """
    if mpirun:
        return _mpirun_ranks(dist_url)
    local_rank = None if local_rank is None or local_rank < 0 else local_rank
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(found) == 1:
        raise InputError(f"the environment has {found[0]} but not both RANK and WORLD_SIZE. Start with torchrun.")
    if found:
        ranks = Ranks(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", local_rank or 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        if world_size not in (None, ranks.world_size):
            raise InputError(
                f"--world_size is {world_size}, but the launcher started {ranks.world_size} processes. Remove it."
            )
        return ranks
    if world_size in (None, 1):
        return Ranks(local_rank=local_rank or 0)
    assert world_size is not None
    if local_rank is None or local_rank >= world_size:
        raise InputError(
            f"--world_size {world_size} without torchrun needs a rank. Give --local_rank 0 ... {world_size - 1}."
        )
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise InputError(
            "several processes without torchrun need a meeting point. Give --dist_url, such as tcp://localhost:29500."
        )
    return Ranks(local_rank, world_size, local_rank, world_size)


def _mpirun_ranks(dist_url: str) -> Ranks:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    found = {name: os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in names}
    missing = [f"OMPI_COMM_WORLD_{name}" for name in names[:3] if found[name] is None]
    if missing:
        raise InputError(f"--dist_on_itp reads {', '.join(missing)}, not set here. Start with mpirun.")
    ranks = Ranks(*(int(value) for value in found.values() if value is not None))
    if ranks.world_size > 1 and dist_url == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("--dist_on_itp needs a meeting point. Set MASTER_ADDR and MASTER_PORT, or give --dist_url.")
    return ranks


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process. "auto" is the GPU of number `local_rank` on a machine with GPUs, else the CPU.

    Raises:
        InputError: the name is unknown, or the GPU does not exist.
    """
    device = named_device(name)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= (count := torch.cuda.device_count()):
        raise InputError(
            f"there is no {device}, only {count} GPU{'s' if count != 1 else ''}. Give --device cpu, or start no more "
            "processes on a machine than it has GPUs."
        )
    return device


def named_device(name: str) -> torch.device:
    """The device of this name, even if it does not exist; "auto" as in `choose_device`.

    Raises:
        InputError: the name is unknown.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}. Give auto, cpu, cuda or cuda:<number>.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported. Give auto, cpu, cuda or cuda:<number>.")
    return device


@contextmanager
def process_group(ranks: Ranks, device: torch.device, dist_url: str = "env://") -> Iterator[None]:
    """Connect the ranks while the block runs; nothing to do for a single one.

    NCCL carries tensors on GPUs, Gloo those on CPUs. If a rank fails, torchrun ends the others of its node, and those
    of other nodes fail at their next collective.

    Raises:
        InputError: the ranks cannot connect.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, dist_url, timeout=COLLECTIVE_TIMEOUT, rank=ranks.rank, world_size=ranks.world_size
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"rank {ranks.rank} cannot connect to the other {ranks.world_size - 1} by {dist_url} ({reason}). Start all "
            "ranks, and give them an address that each can reach."
        ) from None
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


@contextmanager
def print_only_if(chosen: bool) -> Iterator[None]:
    """For checks of all ranks before they connect: only the chosen one prints; the others exit quietly."""
    if chosen:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except InputError:
            raise SystemExit(2) from None


def make_groups(count: int) -> tuple[Group | None, int]:
    """Divide the ranks into `count` groups of neighbors, as even as possible.

    Returns:
        the group of this rank, None for the group of all, and its number.
    """
    if count == 1:
        return None, 0
    members = [list(share(world_size(), count, number)) for number in range(count)]
    groups = [dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT) for ranks in members]  # on every rank, by torch's rules
    number = next(number for number, ranks in enumerate(members) if rank() in ranks)
    group = groups[number]
    assert isinstance(group, Group)  # ranks outside of a group get a number in its place
    return group, number


def share(count: int, shares: int, number: int, step: int = 1) -> range:
    """Share `number` of `shares` of the items 0 ... count - 1, contiguous and as even as possible.

    Every share begins at a multiple of `step`.
    """
    steps = -(-count // step)
    begin, end = (steps * each // shares * step for each in (number, number + 1))
    return range(min(begin, count), min(end, count))


def shard_range(count: int, group: Group | None = None, step: int = 1) -> range:
    """The `share` of this rank in its group."""
    return share(count, world_size(group), rank(group), step)


def is_main(group: Group | None = None) -> bool:
    """True on the first rank of the group; the first of all ranks reports and writes."""
    return rank(group) == 0


def rank(group: Group | None = None) -> int:
    """Rank of this process in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: Group | None = None) -> int:
    """Number of ranks in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def all_gather_objects(items: Sequence[Item], group: Group | None = None) -> list[Item]:
    """The items of all ranks, in their order. They are pickled, between the processes of one run."""
    if world_size(group) == 1:
        return list(items)
    gathered: list[list[Item]] = [[] for _ in range(world_size(group))]
    dist.all_gather_object(gathered, list(items), group=group)
    return [item for part in gathered for item in part]


def gather_objects(items: Sequence[Item], group: Group | None = None) -> list[Item]:
    """`all_gather_objects` on the first rank of the group; [] on the others."""
    if world_size(group) == 1:
        return list(items)
    gathered: list[Any] | None = [None] * world_size(group) if is_main(group) else None
    dist.gather_object(list(items), gathered, group=group, group_dst=0)
    return [item for part in gathered or () for item in part]


def broadcast_object(value: Item | None, group: Group | None = None) -> Item:
    """The value of the first rank of the group; that of the others is ignored."""
    carrier: list[Any] = [value]
    if world_size(group) > 1:
        dist.broadcast_object_list(carrier, group=group, group_src=0)
    return carrier[0]


def all_gather_counts(count: int, group: Group | None = None) -> list[int]:
    """The counts of all ranks, in their order."""
    if world_size(group) == 1:
        return [count]
    own = torch.tensor([count], dtype=torch.int64)
    counts = [torch.zeros_like(own) for _ in range(world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(each) for each in counts]


def all_gather_rows(rows: Tensor, group: Group | None = None) -> tuple[Tensor, int]:
    """The rows of all ranks, in their order. Gradients flow back to the rank that a row came from.

    Args:
        rows: (n, D); n may differ between ranks and be 0.
        group: the ranks that take part.

    Returns:
        (sum of all n, D), the same on every rank, and the index of this rank's first row.
    """
    if world_size(group) == 1:
        return rows, 0
    sizes = all_gather_counts(len(rows), group)
    gathered: Tensor = _GatherRows.apply(rows, sizes, group)
    return gathered, sum(sizes[: rank(group)])


class _GatherRows(torch.autograd.Function):
    """all_gather of rows (n, D), n as in `sizes`. The gradient of a row is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Group | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = all_reduce_sum(grad, ctx.group)
        return grad.split(ctx.sizes)[rank(ctx.group)], None, None


def all_reduce_sum(values: Tensor, group: Group | None = None) -> Tensor:
    """Sum over the ranks, entry by entry, the same on every rank."""
    if world_size(group) == 1:
        return values
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values


def all_reduce_floats(values: Sequence[float], device: torch.device, group: Group | None = None) -> list[float]:
    """Sums of numbers over the ranks, in float64, the same on every rank."""
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64, device=device), group).tolist()


def all_reduce_any(flag: bool, device: torch.device, group: Group | None = None) -> bool:
    """True on every rank if the flag is set on any of them."""
    return all_reduce_floats([flag], device, group)[0] > 0


def log_in_first_process(group: Group | None = None) -> None:
    """Let the first process of the group log, and the others of it log errors only."""
    logging.disable(logging.NOTSET if is_main(group) else logging.WARNING)


def progress_bar(items: Iterable[Item] | None = None, **options: Any) -> "tqdm[Item]":
    """A tqdm bar that vanishes when its work is done. Of several ranks only the first draws it.

    Without items, the caller counts by `update`. `options` are those of tqdm.
    """
    return tqdm(items, leave=False, disable=not is_main(), **options)

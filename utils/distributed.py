"""Ranks, devices and collectives of a distributed run. In a single process, collectives return their input.

All ranks of a `group` must call a collective together; None is the group of all ranks.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if first imported while ranks are connected, it keeps their group alive
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError
from utils.reporting import progress

Item = TypeVar("Item")
Group = dist.ProcessGroup

# Longest wait in a collective, such as for a rank that fits SVMs or writes a report, or for the slowest group. The
# backend notices a dead rank sooner, because its connection closes.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
CONNECT_TIMEOUT = timedelta(minutes=2)  # longest wait for the other ranks at the start


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes, of the whole run and on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # also the index of its GPU
    local_world_size: int = 1


def find_ranks(
    local_rank: int | None = None, world_size: int | None = None, dist_url: str = "env://", mpirun: bool = False
) -> Ranks:
    """Ranks from the environment of torchrun, or of Open MPI if `mpirun` is set, else from the flags.

    Processes started by hand on one machine give `world_size`, their rank as `local_rank`, and a common address as
    `dist_url` (tcp://localhost:29500, file:///tmp/meet). A negative `local_rank` counts as None.

    Raises InputError if the environment is incomplete, flags contradict it, or a rank is not below `world_size`.
    """
    if mpirun:
        return _mpirun_ranks(dist_url)
    local_rank = None if local_rank is None or local_rank < 0 else local_rank
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(found) == 1:
        raise InputError("The environment sets only one of RANK and WORLD_SIZE. Start with torchrun.")
    if found:
        own, local_world_size = _number_in("LOCAL_RANK", local_rank or 0), _number_in("LOCAL_WORLD_SIZE", 1)
        ranks = Ranks(_number_in("RANK"), _number_in("WORLD_SIZE"), own, local_world_size)
        if world_size not in (None, ranks.world_size):
            problem = f"--world_size is {world_size}, but the launcher started {ranks.world_size} processes"
            raise InputError(f"{problem}. Remove it.")
        return ranks
    if world_size in (None, 1):
        return Ranks(local_rank=local_rank or 0)
    assert world_size is not None
    if local_rank is None or local_rank >= world_size:
        problem = f"--world_size {world_size} without torchrun needs a rank"
        raise InputError(f"{problem}. Give --local_rank 0 ... {world_size - 1}.")
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        problem = "Several processes without torchrun need a common address"
        raise InputError(f"{problem}. Give --dist_url, such as tcp://localhost:29500.")
    return Ranks(local_rank, world_size, local_rank, world_size)


def _mpirun_ranks(dist_url: str) -> Ranks:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    missing = [name for name in names[:3] if name not in os.environ]
    if missing:
        raise InputError(f"--dist_on_itp needs {', '.join(missing)} in the environment. Start with mpirun.")
    ranks = Ranks(*(_number_in(name) for name in names if name in os.environ))
    if ranks.world_size > 1 and dist_url == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("--dist_on_itp needs a common address. Set MASTER_ADDR and MASTER_PORT, or give --dist_url.")
    return ranks


def _number_in(variable: str, default: int = 0) -> int:
    """Number in an environment variable; raises InputError if it is not a whole number."""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise InputError(f"The environment sets {variable} to {value!r}, not a number. Start with torchrun or mpirun.")
    return int(value)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Device of this process. "auto" is "cuda" if there is a GPU, else "cpu"; "cuda" is GPU number `local_rank`.

    Raises InputError if the name is unknown, or the GPU does not exist.
    """
    device = named_device(name)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= (count := torch.cuda.device_count()):
        gpus = f"{count} GPU{'s' if count != 1 else ''}"
        raise InputError(f"There is no {device}, only {gpus}. Give --device cpu, or start no more processes than GPUs.")
    return device


def named_device(name: str) -> torch.device:
    """Device of this name, even if it does not exist; "auto" as in `choose_device`. Raises InputError if unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown. Give auto, cpu, cuda or cuda:<number>.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported. Give auto, cpu, cuda or cuda:<number>.")
    return device


@contextmanager
def process_group(ranks: Ranks, device: torch.device, dist_url: str = "env://") -> Iterator[None]:
    """Connect the ranks while the block runs: NCCL for tensors on GPUs, Gloo for those on CPUs.

    If a rank fails, torchrun ends the others of its node, and ranks of other nodes fail at their next collective. If
    the ranks cannot connect, an InputError is raised.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    size = ranks.world_size
    try:
        store, _, _ = next(dist.rendezvous(dist_url, ranks.rank, size, timeout=CONNECT_TIMEOUT))
        store.set(f"rank {ranks.rank}", "")
        store.wait([f"rank {each}" for each in range(size)], CONNECT_TIMEOUT)
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, world_size=size, rank=ranks.rank, store=store)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        problem = f"rank {ranks.rank} cannot connect to the other {size - 1} by {dist_url} ({reason})"
        raise InputError(f"{problem}. Start all ranks, and give them an address that each can reach.") from None
    try:
        yield
    except (Exception, SystemExit):
        if device.type == "cpu":  # NCCL would wait for the other ranks
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # Gloo's threads must end before Python does, or they can abort the process


@contextmanager
def print_only_if(chosen: bool) -> Iterator[None]:
    """Let only the chosen process print an error, before the ranks connect; the others exit quietly."""
    try:
        yield
    except InputError:
        if chosen:
            raise
        raise SystemExit(2) from None


def make_groups(count: int) -> tuple[Group | None, int]:
    """Divide the ranks evenly into `count` groups of neighbors; returns the group of this rank and its number."""
    if count == 1:
        return None, 0
    members = [share(world_size(), count, number) for number in range(count)]
    groups = [dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT) for ranks in members]  # each rank creates all
    number = next(number for number, ranks in enumerate(members) if rank() in ranks)
    group = groups[number]
    assert isinstance(group, Group)  # for mypy: torch returns a number for a group without this rank
    return group, number


def share(count: int, shares: int, number: int, step: int = 1) -> range:
    """Indices of share `number`, if 0 ... count - 1 is divided evenly into `shares`, at multiples of `step`."""
    steps = -(-count // step)
    begin, end = (steps * each // shares * step for each in (number, number + 1))
    return range(min(begin, count), min(end, count))


def shard_range(count: int, group: Group | None = None, step: int = 1) -> range:
    """The `share` of this rank in its group."""
    return share(count, world_size(group), rank(group), step)


def is_main(group: Group | None = None) -> bool:
    """True on the first rank of the group."""
    return rank(group) == 0


def rank(group: Group | None = None) -> int:
    """Rank of this process in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: Group | None = None) -> int:
    """Number of ranks in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather_objects(items: Sequence[Item], group: Group | None = None) -> list[Item]:
    """Items of all ranks in the order of the ranks, pickled on the way; on the first rank only, [] on the others."""
    if world_size(group) == 1:
        return list(items)
    gathered: list[Any] | None = [None] * world_size(group) if is_main(group) else None
    dist.gather_object(list(items), gathered, group=group, group_dst=0)
    return [item for part in gathered or () for item in part]


def broadcast_object(value: Item | None, group: Group | None = None) -> Item:
    """Value of the first rank of the group, on every rank."""
    carrier: list[Any] = [value]
    if world_size(group) > 1:
        dist.broadcast_object_list(carrier, group=group, group_src=0)
    return carrier[0]


def all_gather_counts(count: int, group: Group | None = None) -> list[int]:
    """Counts of all ranks in the order of the ranks."""
    counts = torch.zeros(world_size(group), dtype=torch.int64)
    counts[rank(group)] = count
    return all_reduce_sum(counts, group).tolist()


def all_gather_rows(rows: Tensor, group: Group | None = None) -> tuple[Tensor, int]:
    """Rows (sum of all n, D) of all ranks, in their order, and the index of this rank's first row.

    `rows` are (n, D); n may differ between ranks and be 0. Gradients flow back to the rank that a row came from.
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


def all_reduce_any(flag: bool, device: torch.device, group: Group | None = None) -> bool:
    """True on every rank if the flag is set on any of them."""
    return all_reduce_sum(torch.tensor(int(flag), device=device), group).item() > 0


def log_on_first_rank(group: Group | None = None) -> None:
    """Log only errors on all ranks of the group but the first."""
    logging.disable(logging.NOTSET if is_main(group) else logging.WARNING)


def progress_bar(items: Iterable[Item] | None = None, **options: Any) -> "tqdm[Item]":
    """`utils.reporting.progress.progress_bar`, on rank 0 only."""
    return progress.progress_bar(items, disable=not is_main(), **options)

"""One process or several: the torchrun environment, and collectives that are no-ops in a single process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine: the index of its GPU


def find_ranks(local_rank: int | None = None, world_size: int | None = None, dist_url: str = "env://") -> Ranks:
    """The place of this process: from the environment that torchrun sets, else from the flags, else alone.

    Without that environment, `world_size` > 1 means processes started by hand on one machine: `local_rank` is then
    the rank and `dist_url` where they meet (tcp://localhost:29500, file:///tmp/meet). A negative `local_rank` counts
    as not given.

    Raises:
        InputError: half an environment, flags that contradict it, or a rank outside of 0 ... world_size - 1.
    """
    local_rank = None if local_rank is None or local_rank < 0 else local_rank
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(found) == 1:
        raise InputError(f"the environment has {found[0]} but not both RANK and WORLD_SIZE: start with torchrun")
    if found:
        ranks = Ranks(
            int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", local_rank or 0))
        )
        if world_size not in (None, ranks.world_size):
            raise InputError(f"--world_size {world_size}, but the launcher started {ranks.world_size} processes")
        return ranks
    if world_size in (None, 1):
        return Ranks(local_rank=local_rank or 0)
    assert world_size is not None
    if local_rank is None or local_rank >= world_size:
        raise InputError(f"--world_size {world_size} without torchrun needs --local_rank 0 ... {world_size - 1}")
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise InputError("several processes without torchrun need --dist_url, for example tcp://localhost:29500")
    return Ranks(local_rank, world_size, local_rank)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process: "auto" is the GPU numbered `local_rank` where there is one, else the CPU.

    Raises:
        InputError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: give auto, cpu, cuda or cuda:<number>")
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"{device} was asked for, but {torch.cuda.device_count()} GPUs are there: give --device cpu")
    return device


@contextmanager
def process_group(ranks: Ranks, device: torch.device, dist_url: str = "env://") -> Iterator[None]:
    """Connect the processes while the block runs (NCCL on GPUs, Gloo on CPUs); nothing to do for a single one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=dist_url, rank=ranks.rank, world_size=ranks.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that reports and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, in the order of the ranks; gradients flow back to where each row came from.

    Args:
        rows: (n, D), n may differ between the processes and be 0.

    Returns:
        (sum of all n, D), the same everywhere, and the position of this process's first row in it.
    """
    if world_size() == 1:
        return rows, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    gathered: Tensor = _GatherRows.apply(rows, sizes)
    return gathered, sum(sizes[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    """all_gather of (n, D) rows, n as in `sizes`; the gradient of a row is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any of the processes; the same answer in all of them."""
    if world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums of numbers over the processes, in float64, the same in all of them."""
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return [float(value) for value in summed]


def gather_names(names: Sequence[str]) -> list[str]:
    """The names of all processes, in the order of the ranks."""
    if world_size() == 1:
        return list(names)
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, list(names))
    return [name for part in gathered for name in part]


def all_reduce_mean(value: Tensor) -> float:
    """Mean of a scalar tensor over the processes, the same number on each of them."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()

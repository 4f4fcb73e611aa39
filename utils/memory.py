"""Memory budget, peak usage, and copies to and from a GPU."""

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # limit of a container: bytes, or "max"
PROCESS_STATUS = Path("/proc/self/status")  # of Linux


def default_memory_budget(device: torch.device) -> float:
    """Half of the memory of the GPU, or of the machine or container, GB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2 / 1e9
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return (min(total, int(limit)) if limit.isdigit() else total) / 2 / 1e9


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Peak usage so far, MiB: allocated on a GPU, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if PROCESS_STATUS.is_file():  # unlike ru_maxrss, not inherited from the parent process
        line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to a device without waiting for a GPU. For a CPU, return the tensor itself."""
    # A copy from memory that is not pinned would wait.
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def read_back(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to the CPU. The host waits for a GPU once, not once per tensor."""
    copies = [each.to("cpu", non_blocking=True) for each in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Context that queues the work of this thread on a stream of a GPU; None changes nothing."""
    if stream is None:  # torch.cuda.stream would start CUDA
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):  # a new thread begins on the first GPU
        yield

"""Helpers of the benchmarks: timing in turns, the matrix product for comparison, memory, and JSON files."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.command_line import Parser
from utils.precision import DTYPES
from utils.scans.files import atomic_path

Result = TypeVar("Result")

PRODUCT_SIDE = 2048  # large enough for the full rate, a tenth of a second on two cores


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; on a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median time of one piece of work, without a warm-up."""
    return statistics.median(seconds_of(work) for _ in range(repeats))


def median_seconds(works: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Median time of several pieces of work by name, in turns, so that a slow phase of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1 if warm_up else 0, repeats):
        for name, work in works.items():
            taken = seconds_of(work)
            if turn >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@contextmanager
def timed_calls(module: Any, function: str) -> Iterator[list[float]]:
    """Seconds of each call of a module's function in the block."""
    original, seconds = getattr(module, function), []

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = original(*arguments)
        seconds.append(time.perf_counter() - begin)
        return result

    with patch.object(module, function, timed):
        yield seconds


def matrix_product(
    precision: str, side: int = PRODUCT_SIDE, device: torch.device | str = "cpu"
) -> Callable[[], object]:
    """A product of two square matrices, 2 * side**3 operations."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(DTYPES[precision]) for _ in range(2))
    return lambda: left @ right


@torch.inference_mode()
def count_flops(work: Callable[[], object]) -> float:
    """Count the operations in matrix products of the calling thread; a multiplication and an addition are two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def in_fresh_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function of a module in its own process, so that no other measurement adds to its peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory_slope(resident_mb: Sequence[tuple[int, float]]) -> float:
    """MB per 1000 pieces of work: least squares over the second half of (pieces done, resident MB)."""
    settled = np.array(resident_mb[len(resident_mb) // 2 :], dtype=float)
    return float(np.polyfit(settled[:, 0] / 1000, settled[:, 1], 1)[0])


def describe_machine() -> dict[str, str | int]:
    """Processor, threads and versions, and the name of a GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    cpu = models[0] if models else platform.machine()
    threads = {"cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    return {**gpu, "cpu": cpu, **threads, "torch": torch.__version__, "python": platform.python_version()}


def make_parser(docstring: str | None, name: str) -> Parser:
    """Parser of a script, with the flag of its JSON file."""
    parser = Parser(docstring)
    parser.add_argument("--output", type=Path, default=Path(f"results/benchmark_{name}.json"))
    return parser


def write_record(args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write the results `found` as JSON to `args.output`, with the machine and the flags of the script."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"schema": 1, "machine": describe_machine(), "arguments": flags, **found}
    with atomic_path(args.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")

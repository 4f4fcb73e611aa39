"""What the benchmarks share: alternating timings, the matrix product they are held against, memory, and files."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from utils.precision import DTYPES
from utils.scans.files import atomic_path

Result = TypeVar("Result")

PRODUCT_SIDE = 2048  # large enough for the full rate, a tenth of a second on two cores


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def median_seconds(
    works: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True, label: str = ""
) -> dict[str, float]:
    """Time several pieces of work in turns, so that what slows the machine for a while slows all of them.

    Args:
        works: by name.
        repeats: turns; the median of each piece counts.
        warm_up: run each once before, untimed.
        label: of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    turns = range(-1 if warm_up else 0, repeats)
    with tqdm(total=len(turns) * len(works), desc=label, leave=False, delay=2) as progress:
        for turn in turns:
            for name, work in works.items():
                taken = seconds_of(work)
                if turn >= 0:
                    seconds[name].append(taken)
                progress.update()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def median_seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Of a single piece of work, without a warm-up."""
    return statistics.median(seconds_of(work) for _ in range(repeats))


def matrix_product(
    precision: str, side: int = PRODUCT_SIDE, device: torch.device | str = "cpu"
) -> Callable[[], object]:
    """A product of two square matrices, 2 * side**3 floating-point operations."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(DTYPES[precision]) for _ in range(2))
    return lambda: left @ right


def in_fresh_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """Run `work`, a function of a module, in a process of its own, whose memory no other measurement has raised."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory_slope(resident_mb: Sequence[tuple[int, float]]) -> float:
    """MB per 1000 pieces of work, of what was resident after so many: a line through the second half, least squares."""
    settled = np.array(resident_mb[len(resident_mb) // 2 :], dtype=float)
    return float(np.polyfit(settled[:, 0] / 1000, settled[:, 1], 1)[0])


def describe_machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What the figures were taken on; `device` adds the name of a GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    return {
        **gpu,
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a script as JSON holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")

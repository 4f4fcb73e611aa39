"""The cost model of docs/SCALING.md: seconds of the distributed coreset from what a pass computes and sends."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing

from benchmarks.figures import new_axes, save_figure
from benchmarks.measuring import median_seconds_of
from utils.distributed import Ranks, gather_rows, process_group, sum_of_all

PROCESSES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
ETHERNET = 10e9 / 8  # bytes a second of a link of 10 Gbit/s
LATENCY = 5e-5  # seconds of a collective over it
GROWN = (1, 12)  # times the rows of the recorded passes
PROBE = (8192, 1024)  # rows of an all-gather, 32 MB
SIDE = 1536
REPEATS = 9


class Pass(NamedTuple):
    """What one pass of the greedy rule did, in one process; the picks do not depend on how many hold the rows."""

    candidates: int  # m
    picks: int  # p
    touched: int  # rows that the picks could come close to


class Machine(NamedTuple):
    """Rates of one process."""

    single: float  # fp32 operations a second of a matrix product
    double: float  # fp64
    stream: float  # bytes a second through fp64 minima, as the selection reads them
    link: float  # bytes a second received in an all-gather between processes
    latency: float  # seconds of the smallest collective


def pass_seconds(each: Pass, width: int, processes: int, machine: Machine) -> dict[str, float]:
    """Seconds of a pass by what it does; rows and touched ones are taken to be spread evenly."""
    m, p = each.candidates, each.picks
    sent = m * width * 8 * (processes - 1) / processes + 16 * (m + 1) * (processes - 1)
    return {
        "update": 2 * each.touched / processes * p * width / machine.single,
        "select": 2 * m * m * width / machine.double + 4 * 8 * p * m / machine.stream,
        "send": (sent / machine.link + 6 * machine.latency) if processes > 1 else 0.0,
    }


def coreset_seconds(passes: Sequence[Pass], width: int, processes: int, machine: Machine) -> float:
    return sum(sum(pass_seconds(each, width, processes, machine).values()) for each in passes)


def grown_passes(passes: Sequence[Pass], factor: int) -> list[Pass]:
    """The passes of `factor` times as many rows and picks: as many more, each touching as many more rows."""
    return [each._replace(touched=each.touched * factor) for each in passes for _ in range(factor)]


def measure_machine(processes: int) -> Machine:
    """Rates of one thread, while as many processes as there are cores compute; of the link by `processes` processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(2, SIDE, SIDE).unbind()
    single = 2 * SIDE**3 / median_seconds_of(lambda: left @ right, REPEATS)
    wide, other = left.double(), right.double()
    double = 2 * SIDE**3 / median_seconds_of(lambda: wide @ other, REPEATS)
    minima = torch.rand(1 << 22, dtype=torch.float64)
    stream = 3 * minima.nbytes / median_seconds_of(lambda: torch.minimum(minima, minima, out=minima), REPEATS)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_probe, (processes, folder), nprocs=processes)
        link, latency = torch.load(Path(folder, "0.pth"), weights_only=True)
    return Machine(single, double, stream, link, latency)


def _probe(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    rows, flag = torch.zeros(PROBE[0] // count, PROBE[1]), torch.zeros(1)
    with process_group(Ranks(rank, count, rank, count), torch.device("cpu"), f"file://{folder}/meet"):
        link = rows.nbytes * (count - 1) / median_seconds_of(lambda: gather_rows(rows), REPEATS)
        latency = median_seconds_of(lambda: sum_of_all(flag), REPEATS)
    if rank == 0:
        torch.save([link, latency], Path(folder, "0.pth"))


def draw_scaling(path: Path, machine: Machine, costs: Sequence[Any], details: Mapping[str, Any], width: int) -> None:
    """Memory and traffic of a process as measured; modelled seconds against processes, with the measured ones."""
    memory, traffic, time_axes = new_axes(12.8, 4.0, columns=3)
    sizes = sorted({cost.rows for cost in costs})
    for rows in sizes:
        of_size = [cost for cost in costs if cost.rows == rows]
        counts = [cost.processes for cost in of_size]
        memory.plot(counts, [cost.memory_mb for cost in of_size], "o-", label=f"{rows:,} rows")
    largest = [cost for cost in costs if cost.rows == sizes[-1]]
    for count in sorted({cost.processes for cost in costs} - {1}):
        of_count = [cost for cost in costs if cost.processes == count]
        traffic.plot([c.rows for c in of_count], [c.received_mb for c in of_count], "o-", label=f"{count} processes")
    passes = [Pass(*each) for each in details[f"coreset {sizes[-1]} {largest[0].processes}"]["recorded"]]
    slow = machine._replace(link=ETHERNET, latency=LATENCY)
    for colour, factor in zip(("tab:blue", "tab:orange"), GROWN, strict=True):
        grown = grown_passes(passes, factor)
        for line, link in (("-", machine), ("--", slow)):
            seconds = [coreset_seconds(grown, width, int(count), link) for count in PROCESSES]
            label = f"{factor * sizes[-1] / 1e6:.2g} million rows, {'10 Gbit/s' if link is slow else 'this machine'}"
            time_axes.plot(PROCESSES, seconds, line, color=colour, label=label)
    time_axes.plot(
        [c.processes for c in largest],
        [c.seconds for c in largest],
        "ko",
        label=f"measured, {sizes[-1] / 1e6:.2g} million rows",
    )
    memory.set(title="Memory of a process", xlabel="processes", ylabel="MB", ylim=(0, None))
    memory.set_xticks([1, 2, 3, 4], labels=["1", "2", "3", "4"], minor=False)
    traffic.set(title="Received by a process", xlabel="rows", ylabel="MB", ylim=(0, None), xlim=(0, None))
    time_axes.set(title="Coreset, model", xlabel="processes", ylabel="seconds", xscale="log", yscale="log")
    time_axes.set_xticks(PROCESSES, labels=[str(count) for count in PROCESSES], minor=False)
    time_axes.xaxis.minorticks_off()
    for axes in (memory, traffic, time_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(which="major", color="0.92")
    save_figure(memory, path)

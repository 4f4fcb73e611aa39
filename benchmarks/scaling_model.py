"""The cost model of docs/DISTRIBUTED.md: seconds of the distributed coreset from what a pass computes and sends."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing

from benchmarks.figures import new_axes, save_figure
from benchmarks.measuring import median_seconds_of
from feature_extractors.coreset import MOST_CANDIDATES, Selection, greedy_among
from feature_extractors.patch_rows import ShardedRows
from utils.distributed import Ranks, all_gather_rows, all_reduce_sum, process_group

PROCESSES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
ETHERNET = 10e9 / 8  # bytes a second of a link of 10 Gbit/s
LATENCY = 5e-5  # seconds of a collective over it
COLLECTIVES = 5  # of a pass: two of the offers, the rows, two of the picks
GROWN = (1, 12)  # times the rows of the recorded passes
PROBED_BYTES = 1 << 25  # of an all-gather
PROBED_ROWS, PROBED_PICKS, PROBED_SCAN = 1 << 14, (64, 1024), 1 << 20
REPEATS = 9


class Pass(NamedTuple):
    """What one pass of the greedy rule did, in one process; the picks do not depend on how many hold the rows."""

    rows: int  # R
    candidates: int  # m
    picks: int  # p
    touched: int  # rows that the picks could come close to, t


class Machine(NamedTuple):
    """Seconds that one process takes for the parts of a pass, each measured by itself at one width of rows."""

    touched: float  # a touched row: read, and held against its nearest pick by direct difference
    pair: float  # a touched row and a pick: their product, and the least of these
    scanned: float  # a row: told whether it is touched, and whether it is among the farthest
    mutual: float  # two candidates: their distance
    choice: float  # a pick and a candidate: the candidate's distance brought up to date
    byte: float  # received in an all-gather
    latency: float  # of the smallest collective


def pass_seconds(each: Pass, width: int, processes: int, machine: Machine) -> dict[str, float]:
    """Seconds of a pass by what it does; rows and touched ones are taken to be spread evenly."""
    m, p = each.candidates, each.picks
    received = m * width * 8 * (processes - 1) / processes + 16 * (m + 1) * (processes - 1)
    return {
        "update": each.touched / processes * (machine.touched + p * machine.pair),
        "scan": each.rows / processes * machine.scanned,
        "select": m * m * machine.mutual + p * m * machine.choice,
        "send": (received * machine.byte + COLLECTIVES * machine.latency) if processes > 1 else 0.0,
    }


def coreset_seconds(passes: Sequence[Pass], width: int, processes: int, machine: Machine) -> float:
    return sum(sum(pass_seconds(each, width, processes, machine).values()) for each in passes)


def grown_passes(passes: Sequence[Pass], factor: int) -> list[Pass]:
    """The passes of `factor` times as many rows and picks: as many more, each touching as many more rows."""
    return [
        each._replace(rows=each.rows * factor, touched=each.touched * factor) for each in passes for _ in range(factor)
    ]


def measure_machine(width: int, processes: int) -> Machine:
    """Seconds of one thread; of the link by `processes` processes of this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = torch.randn(PROBED_ROWS, width)
    shard = Selection(ShardedRows(rows))

    def update(picks: int) -> None:
        shard.nearest.fill_(torch.inf)
        shard.update(torch.arange(picks), rows[:picks], 0.0)

    few, many = (median_seconds_of(partial(update, picks), REPEATS) / len(rows) for picks in PROBED_PICKS)
    pair = (many - few) / (PROBED_PICKS[1] - PROBED_PICKS[0])
    scan = Selection(ShardedRows(torch.rand(PROBED_SCAN, 1)))
    scan.nearest = scan.shard[:, 0]

    def look() -> None:
        (scan.nearest > 2).nonzero()
        scan._farthest(MOST_CANDIDATES)

    among, nearest = rows[:MOST_CANDIDATES], torch.full((MOST_CANDIDATES,), torch.inf, dtype=torch.float64)
    choose = partial(greedy_among, among, nearest, torch.tensor(0.0))
    one, more = (median_seconds_of(partial(choose, picks), REPEATS) for picks in (1, PROBED_PICKS[1]))
    scanned = median_seconds_of(look, REPEATS) / PROBED_SCAN
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_probe, (processes, width, folder), nprocs=processes)
        byte, latency = torch.load(Path(folder, "0.pth"), weights_only=True)
    return Machine(
        touched=few - PROBED_PICKS[0] * pair,
        pair=pair,
        scanned=scanned,
        mutual=one / len(among) ** 2,
        choice=(more - one) / (PROBED_PICKS[1] - 1) / len(among),
        byte=byte,
        latency=latency,
    )


def _probe(rank: int, count: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    rows, flag = torch.zeros(PROBED_BYTES // (4 * width * count), width), torch.zeros(1)
    with process_group(Ranks(rank, count, rank, count), torch.device("cpu"), f"file://{folder}/meet"):
        byte = median_seconds_of(lambda: all_gather_rows(rows), REPEATS) / (rows.nbytes * (count - 1))
        latency = median_seconds_of(lambda: all_reduce_sum(flag), REPEATS)
    if rank == 0:
        torch.save([byte, latency], Path(folder, "0.pth"))


def draw_scaling(path: Path, machine: Machine, costs: Sequence[Any], details: Mapping[str, Any], width: int) -> None:
    """Memory and traffic of a process as measured; modeled seconds against processes, with the measured ones."""
    memory, traffic, time_axes = new_axes(12.8, 4.0, columns=3)
    sizes = sorted({cost.rows for cost in costs})
    for rows in sizes:
        of_size = [cost for cost in costs if cost.rows == rows]
        counts = [cost.processes for cost in of_size]
        memory.plot(counts, [cost.memory_mb for cost in of_size], "o-", label=f"{rows:,} rows")
    largest = [cost for cost in costs if cost.rows == sizes[-1]]
    for count in sorted({cost.processes for cost in costs} - {1}):
        of_count = [cost for cost in costs if cost.processes == count]
        thousands = [cost.rows / 1000 for cost in of_count]
        traffic.plot(thousands, [cost.received_mb for cost in of_count], "o-", label=f"{count} processes")
    passes = [Pass(*each) for each in details[f"coreset {sizes[-1]} {largest[0].processes}"]["recorded"]]
    slow = machine._replace(byte=1 / ETHERNET, latency=LATENCY)
    for color, factor in zip(("tab:blue", "tab:orange"), GROWN, strict=True):
        grown = grown_passes(passes, factor)
        for line, link in (("-", machine), ("--", slow)):
            seconds = [coreset_seconds(grown, width, int(count), link) for count in PROCESSES]
            label = f"{factor * sizes[-1] / 1e6:.2g} million rows, {'10 Gbit/s' if link is slow else 'this machine'}"
            time_axes.plot(PROCESSES, seconds, line, color=color, label=label)
    time_axes.plot(
        [c.processes for c in largest],
        [c.seconds for c in largest],
        "ko",
        label=f"measured, {sizes[-1] / 1e6:.2g} million rows",
    )
    memory.set(title="Memory of a process", xlabel="processes", ylabel="MB", ylim=(0, None))
    memory.set_xticks([1, 2, 3, 4], labels=["1", "2", "3", "4"], minor=False)
    traffic.set(title="Received by a process", xlabel="thousand rows", ylabel="MB", ylim=(0, None), xlim=(0, None))
    time_axes.set(title="Coreset, model", xlabel="processes", ylabel="seconds", xscale="log", yscale="log")
    time_axes.set_xticks(PROCESSES, labels=[str(count) for count in PROCESSES], minor=False)
    time_axes.xaxis.minorticks_off()
    for axes in (memory, traffic, time_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(which="major", color="0.92")
    save_figure(memory, path)

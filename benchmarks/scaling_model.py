"""Cost model of docs/DISTRIBUTED.md: time of the distributed coreset, from the work and the traffic of its passes."""

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
ETHERNET = 10e9 / 8  # bytes per second of a link of 10 Gbit/s
LATENCY = 5e-5  # seconds of a collective over that link
COLLECTIVES = 5  # per pass: two for the farthest rows of each process, one for their values, two for the picks
GROWN = (1, 12)  # times the rows of the recorded passes
PROBED_BYTES = 1 << 25  # of an all-gather
PROBED_ROWS, PROBED_PICKS, PROBED_SCAN = 1 << 14, (64, 1024), 1 << 20
REPEATS = 9


class Pass(NamedTuple):
    """One pass of the greedy rule in one process; passes are the same for every number of processes."""

    rows: int  # R
    candidates: int  # m
    picks: int  # p
    touched: int  # t, rows whose distance to the selection may change


class Machine(NamedTuple):
    """Seconds of each part of a pass in one process, measured separately at one width of rows."""

    touched: float  # per touched row: reading it, and its difference to the nearest pick
    pair: float  # per touched row and pick: their product, and the minimum
    scanned: float  # per row: finding touched rows and the farthest rows
    mutual: float  # per pair of candidates: their distance
    choice: float  # per pick and candidate: update of the candidate's distance
    byte: float  # per byte received in an all-gather
    latency: float  # of the smallest collective


def pass_seconds(each: Pass, width: int, processes: int, machine: Machine) -> dict[str, float]:
    """Seconds of the parts of a pass, with rows and touched rows spread evenly."""
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
    """Passes of `factor` times as many rows and picks: `factor` times as many, each with as many times the rows."""
    larger = [each._replace(rows=each.rows * factor, touched=each.touched * factor) for each in passes]
    return larger * factor


def measure_machine(width: int, processes: int) -> Machine:
    """Measure the parts of a pass on one thread, and the link between `processes` processes of this machine."""
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
    touched, mutual = few - PROBED_PICKS[0] * pair, one / len(among) ** 2
    choice = (more - one) / (PROBED_PICKS[1] - 1) / len(among)
    return Machine(touched, pair, scanned, mutual, choice, byte, latency)


def _probe(rank: int, count: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    rows, flag = torch.zeros(PROBED_BYTES // (4 * width * count), width), torch.zeros(1)
    with process_group(Ranks(rank, count, rank, count), torch.device("cpu"), f"file://{folder}/meet"):
        byte = median_seconds_of(lambda: all_gather_rows(rows), REPEATS) / (rows.nbytes * (count - 1))
        latency = median_seconds_of(lambda: all_reduce_sum(flag), REPEATS)
    if rank == 0:
        torch.save([byte, latency], Path(folder, "0.pth"))


def draw_scaling(
    path: Path, machine: Machine, costs: Sequence[Any], recorded: Mapping[int, Sequence[Pass]], width: int
) -> None:
    """Draw measured memory and traffic of a process, and modeled and measured seconds by number of processes."""
    memory, traffic, time_axes = new_axes(12.8, 4.0, columns=3)
    for rows in recorded:
        of_size = [cost for cost in costs if cost.rows == rows]
        counts, megabytes = [cost.processes for cost in of_size], [cost.memory_mb for cost in of_size]
        memory.plot(counts, megabytes, "o-", label=f"{rows:,} rows")
    for count in sorted({cost.processes for cost in costs} - {1}):
        of_count = [cost for cost in costs if cost.processes == count]
        thousands = [cost.rows / 1000 for cost in of_count]
        traffic.plot(thousands, [cost.received_mb for cost in of_count], "o-", label=f"{count} processes")
    largest = max(recorded)
    links = {"this machine": ("-", machine), "10 Gbit/s": ("--", machine._replace(byte=1 / ETHERNET, latency=LATENCY))}
    for color, factor in zip(("tab:blue", "tab:orange"), GROWN, strict=True):
        grown = grown_passes(recorded[largest], factor)
        for name, (line, link) in links.items():
            seconds = [coreset_seconds(grown, width, int(count), link) for count in PROCESSES]
            label = f"{factor * largest / 1e6:.2g} million rows, {name}"
            time_axes.plot(PROCESSES, seconds, line, color=color, label=label)
    measured = [(cost.processes, cost.seconds) for cost in costs if cost.rows == largest]
    time_axes.plot(*zip(*measured, strict=True), "ko", label=f"measured, {largest / 1e6:.2g} million rows")
    memory.set(title="Memory of a process", xlabel="processes", ylabel="MB", ylim=(0, None), xticks=[1, 2, 3, 4])
    traffic.set(title="Received by a process", xlabel="thousand rows", ylabel="MB", ylim=(0, None), xlim=(0, None))
    time_axes.set(title="Coreset, model", xlabel="processes", ylabel="seconds", xscale="log", yscale="log")
    time_axes.set_xticks(PROCESSES, labels=[str(count) for count in PROCESSES])
    time_axes.xaxis.minorticks_off()
    for axes in (memory, traffic, time_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(which="major", color="0.92")
    save_figure(memory, path)

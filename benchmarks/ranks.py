"""Cost of the coreset and of a whole class on 1 to 4 processes of one machine.

    python benchmarks/ranks.py                                 # some twenty minutes on two cores
    python benchmarks/ranks.py --stages coreset                # minutes
    python benchmarks/ranks.py --stages class --networks tiny --train 8 --test 4   # for a trial

The processes use Gloo and one thread each, so times only fall while there are idle cores. Rows are synthetic: a third
are equal, like background; the others lie near a plane of 16 dimensions. Each process makes the rows of its own
samples. The script prints the MB that a process receives, its memory beyond that at the start, the passes and the
seconds. It writes JSON, and a figure with the cost model of docs/DISTRIBUTED.md beyond the measured processes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.multiprocessing
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import make_parser, timed_calls, write_record
from benchmarks.scaling_model import Pass, coreset_seconds, draw_scaling, measure_machine
from benchmarks.traffic import counted_traffic
from benchmarks.workload import SEED, SIZES, TRIPLE, build_networks, detector_config, made_up_samples
from feature_extractors import pipeline
from feature_extractors.coreset import SAFE_HALF, Selection, greedy_coreset
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, collect_features, evaluate, fit_detector
from utils.distributed import Ranks, process_group, shard_range
from utils.memory import peak_memory_mb

SAMPLE = 3136  # rows of a sample
WIDTH = 289  # of the projected rows of 40 samples
DIMENSIONS, NOISE = 16, 0.05
SHARE = 0.1  # of the rows that the coreset keeps


class Cost(NamedTuple):
    """Cost of a stage, the largest over the processes."""

    stage: str
    processes: int
    rows: int  # of all processes; samples of a class
    passes: int
    received_mb: float
    memory_mb: float  # beyond what the process had before
    seconds: float


def rows_of(sample: int) -> Tensor:
    """(SAMPLE, WIDTH) float32, the same in every process."""
    basis = torch.randn(DIMENSIONS, WIDTH, generator=torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(1000 + sample)
    rows = torch.randn(SAMPLE, DIMENSIONS, generator=generator) @ basis
    rows += NOISE * torch.randn(SAMPLE, WIDTH, generator=generator)
    rows[: SAMPLE // 3] = 0.0
    return rows


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Time, received MB, and peak memory beyond that at the start, MB, of the block."""
    found: dict[str, Any] = {}
    status = Path("/proc/self/status").read_text()
    before = int(status.partition("VmRSS:")[2].split()[0]) / 2**10
    begin = time.perf_counter()
    with counted_traffic() as received:
        yield found
    found["seconds"] = time.perf_counter() - begin
    found |= {"received_mb": sum(received) / 1e6, "memory_mb": peak_memory_mb() - before}


def run_coreset(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    passes: list[Pass] = []
    pick = Selection.pick_among_farthest

    def recording(selection: Selection, wanted: int, candidates: int) -> tuple[Tensor, Tensor, float]:
        found = pick(selection, wanted, candidates)
        touched = int((selection.nearest > SAFE_HALF * found[2] / 4).sum())
        passes.append(Pass(len(selection.nearest), candidates, len(found[0]), touched))
        return found

    with patch.object(Selection, "pick_among_farthest", recording), measured() as found:
        own = shard_range(samples)
        rows = torch.empty(len(own) * SAMPLE, WIDTH)
        for place, sample in enumerate(own):
            rows[place * SAMPLE : (place + 1) * SAMPLE] = rows_of(sample)
        begin = time.perf_counter()
        greedy_coreset(rows, int(SHARE * samples * SAMPLE))
        seconds = time.perf_counter() - begin
    return found | {"seconds": seconds, "passes": len(passes), "recorded": passes}


def run_class(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Fit and evaluate a class. The first process also reports the time of the work that it does alone."""
    size = SIZES[args.networks]
    config = detector_config(size, "fp32", method_name=TRIPLE)
    extractor = PatchExtractor(config, *build_networks(size))
    train, test = (
        [made_up_samples(count, split, size.img_size)[i] for i in shard_range(count, step=4)]
        for count, split in ((args.train, "train"), (args.test, "test"))
    )
    stopwatch = Stopwatch()
    with (
        timed_calls(pipeline, "fit_decision_fusion") as fusion,
        timed_calls(pipeline, "compute_metrics") as metrics,
        measured() as found,
    ):
        features = collect_features(extractor, train, len(train), stopwatch)
        detector = fit_detector(config, extractor, features, stopwatch)
        evaluate({TRIPLE: detector}, test, len(test), {TRIPLE: stopwatch})
    return found | {"passes": 1, "stages": stopwatch.seconds, "alone": sum(fusion) + sum(metrics)}


RUNS = {"coreset": run_coreset, "class": run_class}


def work(rank: int, count: int, args: argparse.Namespace, stage: str, samples: int, folder: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank, count, rank, count)
    with process_group(ranks, torch.device("cpu"), f"file://{folder}/meet"), torch.inference_mode():
        found = RUNS[stage](args, samples)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def measure(args: argparse.Namespace, stage: str, count: int, samples: int) -> tuple[Cost, dict[str, Any]]:
    """Run a stage in `count` processes; return its cost and the record of the first process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (count, args, stage, samples, folder), nprocs=count)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
    worst = {name: max(each[name] for each in found) for name in ("passes", "received_mb", "memory_mb", "seconds")}
    rows = args.train + args.test if stage == "class" else samples * SAMPLE
    cost = Cost(stage, count, rows, **worst)
    numbers = f"{cost.passes:8}{cost.received_mb:13.1f}{cost.memory_mb:11.0f}{cost.seconds:10.2f}"
    print(f"{cost.stage:8}{cost.rows:10,}{cost.processes:11}{numbers}", flush=True)
    return cost, found[0]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "ranks")
    parser.add_argument("--stages", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[20, 40, 80], help="samples whose rows form a coreset"
    )
    parser.add_argument("--networks", choices=SIZES, default="published", help="of the whole class; tiny: for a trial")
    parser.add_argument("--train", type=int, default=16, help="training samples of the whole class")
    parser.add_argument("--test", type=int, default=8, help="its test samples")
    parser.add_argument("--figure", type=Path, default=Path("results/scaling.png"))
    args = parser.parse_args(argv)
    print(f"{'':8}{'rows':>10}{'processes':>11}{'passes':>8}{'received MB':>13}{'memory MB':>11}{'seconds':>10}")
    costs: list[Cost] = []
    recorded: dict[int, list[Pass]] = {}  # by rows, of the first number of processes
    found: dict[str, Any] = {"passes": recorded}
    sizes = {"coreset": args.samples, "class": [0]}
    runs = [(stage, samples, count) for stage in args.stages for samples in sizes[stage] for count in args.processes]
    for stage, samples, count in runs:
        cost, detail = measure(args, stage, count, samples)
        costs.append(cost)
        if stage == "coreset":
            recorded.setdefault(cost.rows, [Pass(*each) for each in detail["recorded"]])
        elif count == args.processes[0]:
            found["alone"] = detail["alone"] / sum(detail["stages"].values())
            print(f"one process does {found['alone']:.1%} of the work of a class alone")
    if recorded:
        machine = measure_machine(WIDTH, args.processes[-1])
        of_coreset = [cost for cost in costs if cost.stage == "coreset"]
        found |= {"rates": machine._asdict(), "model": {}}
        for cost in of_coreset:
            seconds = coreset_seconds(recorded[cost.rows], WIDTH, cost.processes, machine)
            found["model"][f"{cost.rows} {cost.processes}"] = share = seconds / cost.seconds
            print(f"model    {cost.rows:10,}{cost.processes:11}{seconds:10.2f} s, {share:.0%} of measured")
        draw_scaling(args.figure, machine, of_coreset, recorded, WIDTH)
    write_record(args, found | {"costs": [cost._asdict() for cost in costs]})


if __name__ == "__main__":
    main()

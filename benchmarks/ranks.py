"""What several processes share of a class, and what that costs: coreset and a whole class on 1 to 4 processes.

    python benchmarks/ranks.py                                 # some twenty minutes on two cores
    python benchmarks/ranks.py --stages coreset                # minutes
    python benchmarks/ranks.py --stages class --networks tiny --train 8 --test 4   # to try it

Gloo processes of one machine, of one thread each, so that seconds can only fall as long as there are cores. Made-up
rows: a third are background, all alike; the others lie on a plane of 16 dimensions, with noise. Each process makes
those of its own samples and never has another's. Prints what a process receives, its memory beyond what it started
with, the passes and the seconds; writes JSON, and a figure with the cost model of docs/DISTRIBUTED.md beyond them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.multiprocessing
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import describe_machine, plain_arguments, write_json
from benchmarks.scaling_model import Machine, Pass, coreset_seconds, draw_scaling, measure_machine
from benchmarks.traffic import counted
from benchmarks.workload import SEED, SIZES, build_networks, detector_config, made_up_samples
from feature_extractors import coreset, pipeline
from feature_extractors.coreset import greedy_coreset
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, collect_features, evaluate, fit_detector
from utils.distributed import Ranks, process_group, shard_range
from utils.memory import peak_memory_mb, resident_memory_mb

STAGES = ("coreset", "class")
SAMPLE = 3136  # rows of a sample
WIDTH = 289  # of the projected rows of 40 samples
DIMENSIONS, NOISE = 16, 0.05
SHARE = 0.1  # of the rows that the coreset keeps
METHOD = "DINO+Point_MAE+Fusion"


class Cost(NamedTuple):
    """Of a stage, the largest over the processes."""

    stage: str
    processes: int
    rows: int  # of all processes; samples of a class
    passes: int
    received_mb: float
    memory_mb: float  # beyond what the process had before
    seconds: float


def rows_of(sample: int, width: int) -> Tensor:
    """(SAMPLE, width) float32, the same in whichever process makes them."""
    basis = torch.randn(DIMENSIONS, width, generator=torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(1000 + sample)
    rows = torch.randn(SAMPLE, DIMENSIONS, generator=generator) @ basis
    rows += NOISE * torch.randn(SAMPLE, width, generator=generator)
    rows[: SAMPLE // 3] = 0.0
    return rows


def own_rows(samples: int, width: int) -> Tensor:
    """Those of this process, filled in place."""
    own = shard_range(samples)
    rows = torch.empty(len(own) * SAMPLE, width)
    for place, sample in enumerate(own):
        rows[place * SAMPLE : (place + 1) * SAMPLE] = rows_of(sample, width)
    return rows


@contextmanager
def measured(before: float) -> Iterator[dict[str, Any]]:
    """What the block receives, the peak of memory beyond `before`, MB, and its seconds."""
    found: dict[str, Any] = {"passes": 1}
    with counted() as traffic:
        begin = time.perf_counter()
        yield found
        found["seconds"] = time.perf_counter() - begin
    found |= {"received_mb": traffic.received / 1e6, "memory_mb": peak_memory_mb() - before}


def run_coreset(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    passes: list[Pass] = []
    pick = coreset.Selection.pick_among_farthest

    def recording(shard: Any, wanted: int, candidates: int) -> tuple[Tensor, Tensor, float]:
        found = pick(shard, wanted, candidates)
        touched = int((shard.nearest > coreset.SAFE_HALF * found[2] / 4).sum())
        passes.append(Pass(len(shard.shard), candidates, len(found[0]), touched))
        return found

    before = resident_memory_mb()
    rows = own_rows(samples, WIDTH)
    with patch.object(coreset.Selection, "pick_among_farthest", recording), measured(before) as found:
        greedy_coreset(rows, int(SHARE * samples * SAMPLE))
    return found | {"passes": len(passes), "recorded": passes}


def run_class(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Fit and evaluate a class; the first process also reports what it does alone."""
    size = SIZES[args.networks]
    config = detector_config(size, "fp32", method_name=METHOD)
    extractor = PatchExtractor(config, *build_networks(size))
    own_train, own_test = shard_range(args.train, step=4), shard_range(args.test, step=4)
    train = made_up_samples(args.train, "train", size.img_size)[own_train.start : own_train.stop]
    test = made_up_samples(args.test, "test", size.img_size)[own_test.start : own_test.stop]
    alone, before = Stopwatch(), resident_memory_mb()

    def timed(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            with alone.measure(stage):
                return work(*arguments)

        return wrapper

    stopwatch = Stopwatch()
    with (
        patch.object(pipeline, "fit_decision_fusion", timed("fuse", pipeline.fit_decision_fusion)),
        patch.object(pipeline, "compute_metrics", timed("metrics", pipeline.compute_metrics)),
        measured(before) as found,
    ):
        features = collect_features(extractor, train, len(train), stopwatch)
        detector = fit_detector(config, extractor, features, stopwatch)
        evaluate({METHOD: detector}, test, len(test), {METHOD: stopwatch})
    return found | {"stages": stopwatch.seconds, "alone": alone.seconds}


RUNS = {"coreset": run_coreset, "class": run_class}


def work(rank: int, count: int, args: argparse.Namespace, stage: str, samples: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    with process_group(Ranks(rank, count, rank, count), torch.device("cpu"), meet), torch.inference_mode():
        found = RUNS[stage](args, samples)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def measure(args: argparse.Namespace, stage: str, count: int, samples: int) -> tuple[Cost, dict[str, Any]]:
    """Run a stage in `count` processes; also what the first one recorded."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (count, args, stage, samples, folder), nprocs=count)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
    worst = {name: max(each[name] for each in found) for name in ("passes", "received_mb", "memory_mb", "seconds")}
    rows = args.train + args.test if stage == "class" else samples * SAMPLE
    return Cost(stage, count, rows, **worst), found[0]


def print_cost(cost: Cost) -> None:
    print(
        f"{cost.stage:8}{cost.rows:10,}{cost.processes:11}{cost.passes:8}{cost.received_mb:13.1f}"
        f"{cost.memory_mb:11.0f}{cost.seconds:10.2f}",
        flush=True,
    )


def compare_model(costs: list[Cost], details: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Modeled over measured seconds of each coreset, from the passes that the fewest processes recorded."""
    ratios = {}
    for cost in costs:
        fewest = min(each.processes for each in costs)
        passes = [Pass(*each) for each in details[f"coreset {cost.rows} {fewest}"]["recorded"]]
        seconds = coreset_seconds(passes, WIDTH, cost.processes, machine)
        ratios[f"{cost.rows} {cost.processes}"] = seconds / cost.seconds
        print(f"model    {cost.rows:10,}{cost.processes:11}{seconds:10.2f} s, {seconds / cost.seconds:.0%} of measured")
    return ratios


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[20, 40, 80],
        help="whose rows a coreset is of",
    )
    parser.add_argument("--networks", choices=SIZES, default="published", help="of the whole class; tiny: to try it")
    parser.add_argument("--train", type=int, default=16, help="training samples of the whole class")
    parser.add_argument("--test", type=int, default=8, help="its test samples")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_ranks.json"))
    parser.add_argument("--figure", type=Path, default=Path("results/scaling.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    description = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in description.items()))
    print(f"{'':8}{'rows':>10}{'processes':>11}{'passes':>8}{'received MB':>13}{'memory MB':>11}{'seconds':>10}")
    costs: list[Cost] = []
    details: dict[str, Any] = {}
    for stage in args.stages:
        for samples in args.samples if stage == "coreset" else [0]:
            for count in args.processes:
                cost, detail = measure(args, stage, count, samples)
                print_cost(cost)
                costs.append(cost)
                details[f"{stage} {cost.rows} {count}"] = detail
    record: dict[str, Any] = {
        "schema": 1,
        "machine": description,
        "arguments": plain_arguments(args),
        "costs": [cost._asdict() for cost in costs],
        "details": details,
    }
    if "class" in args.stages:
        of_one = details[f"class {args.train + args.test} {args.processes[0]}"]
        share = sum(of_one["alone"].values()) / sum(of_one["stages"].values())
        record["alone"] = share
        print(f"of a class of {args.train} + {args.test}, one process does {share:.1%} of the work alone")
    if "coreset" in args.stages:
        machine = measure_machine(WIDTH, args.processes[-1])
        record["rates"] = machine._asdict()
        of_coreset = [cost for cost in costs if cost.stage == "coreset"]
        record["model"] = compare_model(of_coreset, details, machine)
        draw_scaling(args.figure, machine, of_coreset, details, WIDTH)
    write_json(args.output, record)


if __name__ == "__main__":
    main()

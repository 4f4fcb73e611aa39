"""Every stage of fitting and evaluating a class, timed beside an obvious, plain twin, and the memory of both.

    python benchmarks/stages.py                            # all of it, see the README for how long
    python benchmarks/stages.py --stages features scoring  # some of it
    python benchmarks/stages.py --whole                    # the plain greedy loop to its end, which takes long

Random weights and made-up scans, so no file is needed. Pieces of work take turns, the median counts, and a matrix
product that takes its turn with them tells what the machine could do. The plain twin (benchmarks/plain.py) computes in
fp32. Its greedy loop ends after --picks picks unless --whole is given; every pick costs the same, so its seconds are
multiplied up. A whole class runs in a process of its own, for its peak of resident memory. Prints tables; writes JSON
and a figure of the cost against the number of training samples.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.class_run import ClassRun, run_class
from benchmarks.curve import draw_curve
from benchmarks.measuring import describe_machine, in_fresh_process, plain_arguments, write_json
from benchmarks.rows import Row, coreset_row, feature_rows, metrics_row, scoring_row
from benchmarks.workload import SIZES, build_networks, detector_config, grown, made_up_samples
from feature_extractors.extractor import PatchExtractor
from utils.precision import DTYPES

STAGES = ("features", "coreset", "scoring", "metrics", "class")
PRECISIONS = tuple(DTYPES)
COLUMNS = f"{'':32}{'plain':>10}" + "".join(f"{name:>10}{'ratio':>8}{'of matmul':>11}" for name in PRECISIONS)


def print_row(row: Row) -> None:
    line = f"{row.name:32}{row.seconds['plain']:8.3f} s"
    for form in PRECISIONS:
        if form in row.seconds:
            share = f"{row.share(form):11.0%}" if form in row.flops else " " * 11
            line += f"{row.seconds[form]:8.3f} s{row.ratio(form):7.1f}x{share}"
    print(line)
    for form in row.seconds.keys() - {"plain", *PRECISIONS}:
        print(f"{'  ' + form:32}{row.seconds[form]:8.3f} s")


def stage_rows(args: argparse.Namespace) -> list[Row]:
    """Measure the stages asked for, each printed as soon as it is known."""
    size = SIZES[args.networks]
    rows: list[Row] = []

    def report(*measured: Row) -> None:
        for row in measured:
            print_row(row)
        rows.extend(measured)

    samples = made_up_samples(args.distinct, "train", size.img_size)
    if "features" in args.stages:
        report(*feature_rows(size, samples[: args.batch], args.precisions, args.repeats))
    if {"coreset", "scoring"} & set(args.stages):
        extractor = PatchExtractor(detector_config(size, "fp32"), *build_networks(size))
        unseen = made_up_samples(1, "test", size.img_size)
        *patches, queries = (xyz for each in [*samples, *unseen] if (xyz := extractor(each).xyz) is not None)
        bank = grown(torch.cat(patches), args.rows)
        measured, picks = coreset_row(bank, None if args.whole else args.picks, args.repeats)
        report(measured)
        if "scoring" in args.stages:
            report(scoring_row(size, queries, bank[picks], args.repeats))
    if "metrics" in args.stages:
        report(metrics_row(args.maps, size.img_size, args.repeats))
    return rows


def class_runs(args: argparse.Namespace) -> dict[str, list[ClassRun]]:
    """Whole classes by form, in order of their number of training samples."""
    stop = None if args.whole else args.picks
    runs: dict[str, list[ClassRun]] = {form: [] for form in ("plain", *args.precisions)}
    for train in sorted({*args.curve, *args.curve_fast, args.train}):
        test = args.test if train == args.train else 2  # few, where only fitting is of interest
        for form, found in runs.items():
            if form == "plain" and train not in (*args.curve, args.train):
                continue
            run = in_fresh_process(run_class, form, args.networks, train, test, stop, args.memory_budget)
            found.append(run)
            print(
                f"{f'{train} + {test} samples, {form}':32}{run.seconds['total']:8.1f} s ({run.seconds['fit']:.1f} s to "
                f"fit), {run.share_of_product:.0%} of matmul, peak {run.peak_mb:.0f} MB ({run.start_mb:.0f} MB before)"
            )
    return runs


def compare_class(runs: dict[str, list[ClassRun]], train: int) -> dict[str, Any]:
    """The ratios of the plain form to each precision at the number of samples asked for."""
    whole = {form: next(run for run in found if run.train == train) for form, found in runs.items()}
    slow = whole.pop("plain")
    ratios = {
        form: {"time": slow.seconds["total"] / run.seconds["total"], "memory": slow.peak_mb / run.peak_mb}
        for form, run in whole.items()
    }
    for form, ratio in ratios.items():
        print(
            f"{f'a class of {train} + {slow.test}, {form}':32}time {ratio['time']:.1f}x, memory {ratio['memory']:.1f}x"
        )
    return ratios


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the fast form"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts")
    parser.add_argument("--batch", type=int, default=4, help="samples whose features are collected together")
    parser.add_argument(
        "--distinct", type=int, default=8, help="samples whose patches, with noise, fill the coreset's rows"
    )
    parser.add_argument("--rows", type=int, default=40 * 3136, help="that a tenth is selected of, and scored against")
    parser.add_argument("--picks", type=int, default=300, help="that the plain greedy loop is timed over")
    parser.add_argument("--whole", action="store_true", help="time all of its picks")
    parser.add_argument("--maps", type=int, default=100, help="for the metrics")
    parser.add_argument("--train", type=int, default=40, help="training samples of the whole class")
    parser.add_argument("--test", type=int, default=20, help="its test samples, half of them defective; at least 2")
    parser.add_argument("--memory_budget", type=float, default=1.0, help="of the fast form of a whole class, GB")
    parser.add_argument("--curve", type=int, nargs="*", default=[10, 20], help="further points of the figure")
    parser.add_argument("--curve_fast", type=int, nargs="*", default=[100], help="points of the fast form alone")
    parser.add_argument("--networks", choices=SIZES, default="published", help="tiny: to try the script")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_stages.json"))
    parser.add_argument("--figure", type=Path, default=Path("results/speed.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{args.networks} networks, median of {args.repeats}; of matmul: of a product of large matrices\n\n{COLUMNS}")
    rows = stage_rows(args)
    products = {form: [row.product[form] / 1e9 for row in rows if form in row.product] for form in PRECISIONS}
    record: dict[str, Any] = {
        "schema": 1,
        "machine": machine,
        "arguments": plain_arguments(args),
        "stages": {row.name: row.record() for row in rows},
        "product_gflop_per_second": products,
    }
    for form, rates in products.items():
        if rates:
            print(f"{f'matrix product, {form}':32}{min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    if "class" in args.stages:
        print()
        runs = class_runs(args)
        record["class_ratios"] = compare_class(runs, args.train)
        record["classes"] = {form: [run._asdict() for run in found] for form, found in runs.items()}
        draw_curve(args.figure, runs)
    write_json(args.output, record)


if __name__ == "__main__":
    main()

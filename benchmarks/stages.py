"""Time of every stage of fitting and evaluating a class beside its plain form, and memory of both.

    python benchmarks/stages.py                            # all stages, about 45 minutes on two cores
    python benchmarks/stages.py --stages features scoring  # some stages
    python benchmarks/stages.py --whole                    # run the plain greedy loop to its end, which takes long

Weights are random and samples synthetic, so no file is needed. The plain form is feature_extractors/reference.py in
fp32. Forms take turns with a matrix product, and the median counts. The plain greedy loop ends after --picks picks, and
its time is extrapolated. A whole class runs in its own process. The script prints tables, and writes JSON and a figure
of the cost against the number of training samples.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.class_run import ClassRun, run_class
from benchmarks.curve import draw_curve
from benchmarks.measuring import describe_machine, in_fresh_process, make_parser, write_record
from benchmarks.rows import Row, coreset_row, feature_rows, scoring_row
from benchmarks.workload import SIZES, build_networks, detector_config, grown, made_up_samples
from feature_extractors.extractor import PatchExtractor
from utils.precision import DTYPES

STAGES = ("features", "coreset", "scoring", "class")
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
    """Rows of the chosen stages."""
    size = SIZES[args.networks]
    samples = made_up_samples(args.distinct, "train", size.img_size)
    rows: list[Row] = []

    def report(*measured: Row) -> None:
        for row in measured:
            print_row(row)
        rows.extend(measured)

    if "features" in args.stages:
        report(*feature_rows(size, samples[: args.batch], args.precisions, args.repeats))
    if {"coreset", "scoring"} & set(args.stages):
        extractor = PatchExtractor(detector_config(size, "fp32"), *build_networks(size))
        unseen = made_up_samples(1, "test", size.img_size)
        *patches, queries = (xyz for each in [*samples, *unseen] if (xyz := extractor(each).xyz) is not None)
        bank = grown(torch.cat(patches), args.rows)
        row, picks = coreset_row(bank, None if args.whole else args.picks, args.repeats)
        report(row)
        if "scoring" in args.stages:
            report(scoring_row(size, queries, bank[picks], args.repeats))
    return rows


def class_runs(args: argparse.Namespace) -> dict[str, list[ClassRun]]:
    """Whole classes by form, in order of their number of training samples."""
    stop = None if args.whole else args.picks
    runs: dict[str, list[ClassRun]] = {form: [] for form in ("plain", *args.precisions)}
    for train in sorted({*args.curve, *args.curve_fast, args.train}):
        test = args.test if train == args.train else 2  # few where only fitting is of interest
        for form, found in runs.items():
            if form == "plain" and train not in (*args.curve, args.train):
                continue
            run = in_fresh_process(run_class, form, args.networks, train, test, stop, args.memory_budget)
            found.append(run)
            cost = f"{run.seconds['total']:8.1f} s (fit {run.seconds['fit']:.1f} s), peak {run.peak_mb:.0f} MB"
            print(f"{f'{train} + {test} samples, {form}':32}{cost}")
    return runs


def compare_class(runs: dict[str, list[ClassRun]], train: int) -> dict[str, Any]:
    """Time and memory of the plain form over those of each precision, for a class of `train` training samples."""
    whole = {form: next(run for run in found if run.train == train) for form, found in runs.items()}
    plain = whole.pop("plain")
    ratios = {}
    for form, run in whole.items():
        time, memory = plain.seconds["total"] / run.seconds["total"], plain.peak_mb / run.peak_mb
        ratios[form] = {"time": time, "memory": memory}
        print(f"{f'a class of {train} + {run.test}, {form}':32}time {time:.1f}x, memory {memory:.1f}x")
    return ratios


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "stages")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the fast form"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--batch", type=int, default=4, help="samples whose features are collected together")
    parser.add_argument("--distinct", type=int, default=8, help="samples whose patches, with noise, fill --rows")
    parser.add_argument("--rows", type=int, default=40 * 3136, help="rows from which a tenth is selected")
    parser.add_argument("--picks", type=int, default=300, help="picks for which the plain greedy loop is timed")
    parser.add_argument("--whole", action="store_true", help="time all picks of the plain greedy loop")
    parser.add_argument("--train", type=int, default=40, help="training samples of the whole class")
    parser.add_argument("--test", type=int, default=20, help="its test samples, half of them defective; at least 2")
    parser.add_argument("--memory_budget", type=float, default=1.0, help="of the fast form of a whole class, GB")
    parser.add_argument("--curve", type=int, nargs="*", default=[10, 20], help="further points of the figure")
    parser.add_argument("--curve_fast", type=int, nargs="*", default=[100], help="points of the fast form alone")
    parser.add_argument("--networks", choices=SIZES, default="published", help="tiny: for a trial")
    parser.add_argument("--figure", type=Path, default=Path("results/speed.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    print(f"{args.networks} networks, median of {args.repeats}; of matmul: of a product of large matrices\n\n{COLUMNS}")
    rows = stage_rows(args)
    products = {form: [row.product[form] / 1e9 for row in rows if form in row.product] for form in PRECISIONS}
    found: dict[str, Any] = {"stages": {row.name: row.record() for row in rows}, "product_gflop_per_second": products}
    if "class" in args.stages:
        runs = class_runs(args)
        found["class_ratios"] = compare_class(runs, args.train)
        found["classes"] = {form: [run._asdict() for run in of_form] for form, of_form in runs.items()}
        draw_curve(args.figure, runs)
    write_record(args, found)


if __name__ == "__main__":
    main()

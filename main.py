"""Fit Multi-3D-Memory on the good samples of each class and evaluate it on the test split.

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \\
        --fusion_module_path checkpoints/checkpoint-2.pth
    python main.py --method_name DINO --dataset_path my_dataset --classes bracket --output_dir results/bracket
    python main.py --method_name DINO Point_MAE DINO+Point_MAE --output_dir results/compared
    python main.py --method_name DINO --few_shot 5 --seeds 0 1 2 --output_dir results/few_shot_5
    python main.py --method_name DINO --save_detector detectors
    python main.py --load_detector detectors
    python main.py --load_detector detectors --target_fpr 0.02 --save_detector tolerant_detectors
    python main.py --inspect_dataset
    python main.py --list_backbones

It writes image_rocauc_results.md, pixel_rocauc_results.md, aupro_results.md, tables.tex, results.csv, results.json and
report.html to --output_dir, and with --save_preds also anomaly_maps/ and pred_maps/. Several methods and seeds share
the features, which are extracted once. Each method has a row in the tables and its other files in its own folder,
<output_dir>/<method>. Each of several seeds has a folder, <output_dir>/seed_<seed>, and the tables show mean and
standard deviation.
"""

import argparse
import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from runner.settings import make_parser
from utils.command_line import is_first_process
from utils.reporting.messages import exit_on_error, start_messages
from utils.scans.images import set_max_megapixels

if TYPE_CHECKING:
    from feature_extractors.extractor import PatchExtractor
    from runner.preparation import Run

logger = logging.getLogger("main")


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, and only then import torch and the modules that need it."""
    parser = make_parser()
    args, given = parser.parse_args(argv), parser.given_flags(argv)
    start_messages()
    set_max_megapixels(args.max_megapixels)
    if args.list_backbones or args.inspect_dataset:
        if is_first_process():
            print_information(args, given)
    elif args.load_detector is not None and given & {"save_detector", "target_fpr"}:
        from runner.saved_detectors import change_thresholds

        if is_first_process():
            change_thresholds(args, given)
    else:
        run_method(args, given)


def print_information(args: argparse.Namespace, given: Collection[str]) -> None:
    """Print the tables of --list_backbones or --inspect_dataset; exit code 1 if the dataset has problems."""
    if args.list_backbones:
        from models.listing import print_backbones

        return print_backbones(args.checkpoint_dir, args.img_size, args.rgb_backbone_name, args.rgb_layers)
    from runner.dataset_check import print_dataset_check

    if print_dataset_check(args, given):
        raise SystemExit(1)


def run_method(args: argparse.Namespace, given: Collection[str]) -> None:
    """Run the methods in this process, which may be one of several; `given` are the flags on the command line."""
    from runner.preparation import own_device, set_up
    from utils.distributed import find_ranks, log_on_first_rank, process_group

    ranks = find_ranks()
    device = own_device(args.device, ranks)
    with process_group(ranks, device), ExitStack() as locks:
        log_on_first_rank()
        evaluate_classes(*set_up(args, given, device, locks))


def evaluate_classes(run: "Run", extractor: "PatchExtractor") -> None:
    """Fit and evaluate every class; update the results after each, and write the tables at the end.

    Several processes form groups. Each group works on its own classes, and its processes share the samples.
    """
    from runner.class_run import run_class
    from runner.preparation import input_checksums
    from runner.results import Results
    from runner.scheduling import divide_classes
    from utils.distributed import broadcast_object, gather_objects, is_main, log_on_first_rank, make_groups, world_size

    results = Results(run, input_checksums(run, extractor), extractor.device)
    unfinished = broadcast_object(results.begin() if is_main() else None)
    costs = {name: float(sum(map(len, run.files[name]))) for name in unfinished}
    divided = divide_classes(run.settings.parallel, costs, world_size())
    group, number = make_groups(len(divided))
    log_on_first_rank(group)
    finished = {}
    for name in divided[number]:
        logger.info("%s: %d training, %d validation and %d test samples", name, *map(len, run.files[name]))
        reports = run_class(name, run, extractor, group)
        if is_main(group):
            results.keep(name, reports)
            finished[name] = reports
        if is_main():
            results.publish({name: reports})
    of_all_groups = gather_objects([finished])
    if is_main():
        results.finish({name: reports for each in of_all_groups for name, reports in each.items()})


if __name__ == "__main__":
    main()

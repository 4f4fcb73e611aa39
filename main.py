"""Fit Multi-3D-Memory on the good parts of each class and evaluate it on the test split.

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \\
        --fusion_module_path checkpoints/checkpoint-2.pth
    python main.py --method_name DINO --dataset_path my_parts --classes bracket --output_dir results/bracket
    python main.py --method_name DINO Point_MAE DINO+Point_MAE --output_dir results/compared
    python main.py --method_name DINO --save_detector detectors
    python main.py --load_detector detectors
    python main.py --list_backbones

Writes image_rocauc_results.md, pixel_rocauc_results.md, aupro_results.md, results.json and report.html to --output_dir,
with --save_preds also anomaly_maps/ and pred_maps/. Several methods share the features, which are extracted once; each
then has a row in the tables and a folder of its own, <output_dir>/<method>, for the rest. --save_detector keeps the
fitted detectors; --load_detector evaluates them again.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from dataset import (
    check_files,
    class_folders,
    find_classes,
    index_split,
)
from feature_extractors.config import DetectorConfig
from feature_extractors.detector_record import SavedDetector
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.persistence import check_target
from models import BackboneRow, list_backbones
from runner.class_run import SplitFiles, run_class, shown_modalities
from runner.dataset_check import print_dataset_check, warn_of_raw_scans, warn_of_unfinished_scans
from runner.finished_classes import FOLDER
from runner.results import Results, table_note
from runner.saved_detectors import FITTING_FLAGS, Saved, check_layout, read_detectors
from runner.scheduling import divide_classes
from runner.settings import (
    RunSettings,
    detector_configs,
    extraction_config,
    given_flags,
    method_folder,
    parse_args,
    run_settings,
)
from utils.distributed import (
    Ranks,
    broadcast_object,
    choose_device,
    find_ranks,
    gather_objects,
    is_main,
    make_groups,
    named_device,
    print_only_if,
    process_group,
)
from utils.errors import InputError, exit_on_input_error
from utils.precision import choose_precision
from utils.report import print_columns
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import FILE_NAME
from utils.scans.files import make_folder

logger = logging.getLogger("main")


def index_classes(settings: RunSettings, config: DetectorConfig, fits: bool) -> dict[str, SplitFiles]:
    """The files of each class that are needed, checked as far as headers tell, before any work starts."""
    modalities = config.method.modalities
    indexed = {}
    for name in find_classes(settings.dataset_path, settings.dataset_type, settings.classes):
        folder = settings.dataset_path / name
        train = index_split(folder, "train", modalities)[: settings.max_sample] if fits else []
        validates = fits and (folder / "validation" / "good").is_dir()
        validation = index_split(folder, "validation", modalities) if validates else []
        indexed[name] = SplitFiles(train, validation, index_split(folder, "test", modalities))
    for train, validation, test in indexed.values():
        check_files(train + validation, modalities)
        check_files(test, shown_modalities(settings, config))
    return indexed


def print_backbones(rows: Sequence[BackboneRow]) -> None:
    print_columns([("name", "branch", "width", "grid", "weights"), *[tuple(map(str, row[:5])) for row in rows]])
    print("\nPublished as:")
    for row in rows:
        if row.published:
            print(f"  {row.name}: {row.published}")
    print("\nAny other vision transformer of timm works by its name there, such as vit_small_patch14_dinov2.lvd142m.")


def make_folders(settings: RunSettings, configs: Mapping[str, DetectorConfig], classes: Sequence[str]) -> None:
    """Before the work starts, all folders that its results go to; those of detectors are checked."""
    if settings.save_detector is not None:
        check_layout(settings.save_detector, configs, classes)
        for method in configs:
            for name in classes:
                check_target(method_folder(settings.save_detector, configs, method) / name)
        make_folder(settings.save_detector, "--save_detector")
    for method in configs:
        folder = make_folder(method_folder(settings.output_dir, configs, method), "--output_dir")
        if (folder / FILE_NAME).is_dir():
            raise InputError(f"{folder / FILE_NAME} is a folder, where the report goes: choose another --output_dir")
        make_folder(folder / FOLDER, "--output_dir")
    if settings.save_feature_path is not None:
        make_folder(settings.save_feature_path, "--save_feature_path")


def inspect(args: argparse.Namespace) -> None:
    modalities = extraction_config(detector_configs(args)).method.modalities
    chosen = args.classes or class_folders(args.dataset_path)
    classes = find_classes(args.dataset_path, args.dataset_type, chosen)
    if print_dataset_check(args.dataset_path, classes, modalities, args.num_workers):
        raise SystemExit(1)


class Prepared(NamedTuple):
    """A run before its networks are built: everything that the command line and the file headers tell is checked."""

    settings: RunSettings
    configs: dict[str, DetectorConfig]  # by method
    indexed: dict[str, SplitFiles]  # by class
    saved: Saved  # the detectors of --load_detector

    @property
    def config(self) -> DetectorConfig:
        """That of the extraction."""
        return extraction_config(self.configs)


def prepare(
    args: argparse.Namespace,
    given: frozenset[str],
    ranks: Ranks,
    indexed: dict[str, SplitFiles] | None = None,
) -> Prepared:
    """Check everything; `indexed` is what the first process has found of the files, None where this one is to look."""
    saved: Saved = {} if args.load_detector is None else read_detectors(args, given)
    if saved:
        configs = {method: each.record.config for method, each in next(iter(saved.values())).items()}
    else:
        configs = detector_configs(args)
    config = extraction_config(configs)
    settings = run_settings(args, config, list(configs), ranks)
    if indexed is None:
        indexed = index_classes(settings, config, fits=not saved)
        if "xyz" in config.method.modalities:
            for split in (split for files in indexed.values() for split in files):
                warn_of_raw_scans(split)
        all_files = {name: files.train + files.validation + files.test for name, files in indexed.items()}
        warn_of_unfinished_scans(settings.dataset_path, all_files)
    return Prepared(settings, configs, indexed, saved)


def build(prepared: Prepared, precision: str) -> PatchExtractor:
    settings = prepared.settings
    return build_extractor(
        replace(prepared.config, precision=precision),
        settings.checkpoint_dir,
        settings.fusion_module_path,
        settings.device,
        rgb_checkpoint=settings.rgb_checkpoint,
        xyz_checkpoint=settings.xyz_checkpoint,
    )


class KeptWarnings(logging.Handler):
    """What a process warns of, for the first one to say where it has not said the same."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        """What came since the last call."""
        messages, self.messages = self.messages, []
        return messages


def run(args: argparse.Namespace, given: frozenset[str], ranks: Ranks, kept: KeptWarnings) -> None:
    """Run in one of `ranks`.

    The first process checks everything before the others do, so that its error is the only one. What it finds of the
    files counts for all, as a shared disk may show others something else, and which precision is faster there.
    """
    if is_main():
        prepared = prepare(args, given, ranks)
        make_folders(prepared.settings, prepared.configs, list(prepared.indexed))
        precision = choose_precision(prepared.config.precision, prepared.settings.device)
        extractor = build(prepared, precision)
        broadcast_object((prepared.indexed, precision))
    else:
        found: tuple[dict[str, SplitFiles], str] = broadcast_object(None)
        indexed, precision = found
        prepared = prepare(args, given, ranks, indexed)
        extractor = build(prepared, precision)
    evaluate_classes(args, prepared, extractor, kept)


class Finished(NamedTuple):
    """A class, in the first process of the group that had it."""

    name: str
    reports: dict[str, ClassReport]  # by method
    warnings: list[str]  # of all of the group, that were not shown


def evaluate_classes(
    args: argparse.Namespace, prepared: Prepared, extractor: PatchExtractor, kept: KeptWarnings
) -> None:
    """Run the classes, writing the results so far after each, and all tables at the end."""
    settings, configs, indexed, saved = prepared
    note = table_note(extractor.config)
    logger.info(note)
    flags = vars(args) | (dict.fromkeys(FITTING_FLAGS) if saved else {})
    inputs = {name: inputs_checksum(files, extractor, saved.get(name, {})) for name, files in indexed.items()}
    results = Results(settings.output_dir, configs, inputs, flags, extractor.precision)
    left = list(indexed)
    if is_main():
        finished = {}
        if settings.resume:
            finished = {name: reports for name in indexed if (reports := results.kept(name))}
            for name in finished:
                logger.info("%s: finished before", name)
            if not finished:
                logger.info("--resume: no class was finished before, with a file in %s", settings.output_dir / FOLDER)
        left = [name for name in indexed if name not in finished]
        results.forget(left)
        if finished:
            results.publish(finished)
    left = broadcast_object(left)
    costs = {name: float(sum(map(len, indexed[name]))) for name in left}
    divided = divide_classes(settings.parallel, costs)
    group, number = make_groups(len(divided))
    own: list[Finished] = []
    for name in divided[number]:
        kept.take()  # what was said of no class, the first process has said as well
        logger.info("%s: %d training, %d validation and %d test samples", name, *map(len, indexed[name]))
        try:
            of_class = run_class(name, indexed[name], settings, configs, extractor, saved.get(name), group)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None  # a sample's path begins below its class
        warnings = kept.take()
        told, said = gather_objects(warnings, group), warnings if is_main() else []
        if is_main(group):
            results.keep(name, of_class)
            own.append(Finished(name, of_class, [each for each in dict.fromkeys(told) if each not in said]))
        if is_main():
            of_others = [each for each in results.missing() if each not in divided[number]]
            others = {each: results.kept(each) for each in of_others}
            results.publish({name: of_class} | {each: reports for each, reports in others.items() if reports})
    gathered = {each.name: each for each in gather_objects(own)}  # of all groups: files may be late on a shared disk
    if is_main():
        for each in gathered.values():
            for message in each.warnings:
                logger.warning("%s: %s", each.name, message)
        if missing := results.missing():
            results.publish({name: gathered[name].reports for name in missing})
        results.finish(note)


def inputs_checksum(files: SplitFiles, extractor: PatchExtractor, saved: Mapping[str, SavedDetector]) -> str:
    """Of a class's file names, of the networks' weights and of loaded detectors, for --resume to notice others."""
    names = [[each.path for each in split] for split in files]
    detectors = sorted((method, each.record.config_sha256, each.record.state_sha256) for method, each in saved.items())
    known = [names, sorted(extractor.checksums.items()), detectors]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def main() -> None:
    with exit_on_input_error():
        ranks = find_ranks()
        with print_only_if(ranks.rank == 0):
            args = parse_args()
            if args.list_backbones or args.inspect_dataset:
                if ranks.rank == 0:
                    look_up(args)
                return
            named_device(args.device)
            if ranks.local_world_size > 1 and args.device.startswith("cuda:"):
                raise InputError(
                    f"--device {args.device} would put the {ranks.local_world_size} processes of this machine on one "
                    "GPU: give cuda, and each takes its own"
                )
        # On each machine the first process that lacks its GPU speaks for the next ones.
        with print_only_if(ranks.local_rank <= torch.cuda.device_count()):
            device = choose_device(args.device, ranks.local_rank)
        # What concerns all processes, the first one says; what another one warns of, it says at the end.
        kept, spoken = KeptWarnings(), logging.StreamHandler()
        spoken.setLevel(logging.INFO if ranks.rank == 0 else logging.ERROR)
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[spoken, kept])
        with process_group(ranks, device):
            run(args, given_flags(), ranks, kept)


def look_up(args: argparse.Namespace) -> None:
    """--list_backbones and --inspect_dataset, which compute nothing."""
    if args.list_backbones:
        print_backbones(list_backbones(args.checkpoint_dir, args.img_size))
    else:
        inspect(args)


if __name__ == "__main__":
    main()

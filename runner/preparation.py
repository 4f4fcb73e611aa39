"""Set-up of a run: check everything before any work starts, then build the networks."""

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_extractors.config import DetectorConfig
from feature_extractors.detector_record import CONFIG_FILE, check_target
from feature_extractors.extractor import PatchExtractor, build_extractor
from models.point_ops import check_backend
from runner.class_files import ClassFiles, Draws, index_classes, warn_of_missing_samples
from runner.dataset_check import dataset_forms, warn_of_raw_scans, warn_of_unfinished_scans
from runner.finished_classes import class_file
from runner.saved_detectors import FITTING_FLAGS, FLAT, Saved, check_layout, read_detectors
from runner.settings import RunSettings, detector_configs, extraction_config
from utils.checkpoint_files import check_checkpoint
from utils.command_line import from_flags
from utils.distributed import Ranks, broadcast_object, choose_device, is_main, named_device, print_only_if
from utils.errors import InputError
from utils.feature_store import SUFFIX
from utils.precision import choose_precision
from utils.records import CloudForm, SampleFiles
from utils.reporting.html_report.report_page import FILE_NAME as REPORT
from utils.reporting.latex import LATEX_NAME
from utils.reporting.results_json import FILE_NAME as RESULTS
from utils.reporting.tables import CSV_NAME, FILE_NAMES
from utils.scans.files import locked, make_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run whose command line and file headers are checked."""

    settings: RunSettings
    configs: Mapping[str, DetectorConfig]  # by fit, as in `detector_configs`
    files: Mapping[str, ClassFiles]  # by class; with --few_shot, the training samples of all seeds
    draws: Mapping[str, Draws]  # by class; empty without --few_shot
    saved: Saved  # detectors of --load_detector, by class and method; empty where they are fitted
    flags: Mapping[str, Any]  # for results.json
    raw_form: CloudForm  # of the clouds before preprocessing

    @property
    def config(self) -> DetectorConfig:
        """Configuration of the feature extraction that all fits share."""
        return extraction_config(self.configs)

    @property
    def seeds(self) -> dict[int | None, dict[str, DetectorConfig]]:
        """Configurations by seed, then by fit. None is the seed of a run without --seeds."""
        grouped: dict[int | None, dict[str, DetectorConfig]] = {}
        for fit, config in self.configs.items():
            grouped.setdefault(config.random_state, {})[fit] = config
        return grouped

    def folders(self, root: Path) -> dict[str, Path]:
        """Folder of each fit's files: `root`; of several methods or seeds, <method>, seed_<seed> or both below it."""
        folders = {}
        for seed, configs in self.seeds.items():
            of_seed = root / f"seed_{seed}" if len(self.seeds) > 1 else root
            for fit, config in configs.items():
                folders[fit] = of_seed / config.method_name if len(configs) > 1 else of_seed
        return folders


def own_device(name: str, ranks: Ranks) -> torch.device:
    """Device of this process. If several processes have the same problem, only one prints it.

    Raises InputError if the device is unknown or does not exist, or several processes would share one GPU.
    """
    with print_only_if(ranks.rank == 0):
        named_device(name)
        if ranks.local_world_size > 1 and name.startswith("cuda:"):
            raise InputError(f"--device {name} puts all processes of this machine on one GPU. Give --device cuda.")
    with print_only_if(ranks.local_rank <= torch.cuda.device_count()):
        return choose_device(name, ranks.local_rank)


def set_up(
    args: argparse.Namespace, given: Collection[str], device: torch.device, locks: ExitStack
) -> tuple[Run, PatchExtractor]:
    """Check a run and build its networks, first in rank 0, so that a problem is reported once.

    The other ranks receive the run that rank 0 checked. `locks` gets the locks of the result folders. Raises
    InputError if a flag or an input file is wrong, or another run writes to one of the folders.
    """
    if not is_main():
        run: Run | None = broadcast_object(None)
        if run is None:  # rank 0 prints the problem
            raise SystemExit(2)
        return run, _build(run, device)
    try:
        run = prepare(args, given, device)
        _make_folders(run, locks)
        extractor = _build(run, device)
    except Exception:
        broadcast_object(None)
        raise
    broadcast_object(run)
    return run, extractor


def _build(run: Run, device: torch.device) -> PatchExtractor:
    settings = run.settings
    uff = None if run.saved else settings.fusion_module_path  # a saved detector holds its own UFF
    if run.config.use_uff and uff is not None:
        check_checkpoint(uff)  # before the networks are built, which may take a minute
    weights = {"rgb_checkpoint": settings.rgb_checkpoint, "xyz_checkpoint": settings.xyz_checkpoint}
    return build_extractor(run.config, settings.checkpoint_dir, uff, device, **weights)


def prepare(args: argparse.Namespace, given: Collection[str], device: torch.device) -> Run:
    """Check everything that needs no network."""
    saved = {} if args.load_detector is None else read_detectors(args, given)
    if args.few_shot is not None and args.seeds is None:
        if args.resume:
            problem = "--resume needs the seed of the --few_shot draw"
            raise InputError(f"{problem}. Give it as --seeds; it is the random_state in results.json.")
        args.seeds = [int(np.random.default_rng().integers(2**32))]
        logger.info("--few_shot draws training samples with the seed %d", *args.seeds)
    first_class = next(iter(saved.values()), {})
    configs = {method: each.record.config for method, each in first_class.items()} or detector_configs(args)
    precision = choose_precision(extraction_config(configs).precision, device)
    configs = {method: replace(config, precision=precision) for method, config in configs.items()}
    settings, config = from_flags(RunSettings, args), extraction_config(configs)
    settings.check_use(config, [each.method_name for each in configs.values()])
    check_backend(config.point_ops, device)
    stored, raw = dataset_forms(args)
    files, draws = index_classes(settings, config.method.modalities, stored, saved)
    flags = vars(args) | (dict.fromkeys(FITTING_FLAGS) if saved else {})
    del flags["seeds"]  # each fit records its own seed as random_state
    run = Run(settings, configs, files, draws, saved, flags, raw)
    warn_of_missing_samples(files, None if saved else settings.target_fpr, settings.few_shot)
    warn_of_unfinished_scans(settings.dataset_path, {name: chain(*splits) for name, splits in files.items()})
    if "xyz" in config.method.modalities:
        warn_of_raw_scans(chain(*files.values()))
    return run


def _make_folders(run: Run, locks: ExitStack) -> None:
    """Make and lock all folders of results, and check that nothing is in the way of a result file."""
    settings, names = run.settings, list(run.files)
    written: list[tuple[Path, str, list[Path]]] = [(settings.output_dir, "--output_dir", _result_files(run))]
    written += [(folder, "--output_dir", []) for folder in run.folders(settings.output_dir).values()]
    if settings.save_detector is not None:
        places = list(run.configs) if len(run.configs) > 1 else [FLAT]
        check_layout(settings.save_detector, dict.fromkeys(names, places))
        detectors = [folder / name for folder in run.folders(settings.save_detector).values() for name in names]
        for folder in detectors:
            check_target(folder)
        written.append((settings.save_detector, "--save_detector", [folder / CONFIG_FILE for folder in detectors]))
    if settings.save_feature:
        samples = [(name, file.path) for name in names for file in run.files[name].train]
        patches = [settings.save_feature_path / name / f"{Path(path).name}{SUFFIX}" for name, path in samples]
        written.append((settings.save_feature_path, "--save_feature_path", patches))
    merged: dict[str, tuple[Path, str, list[Path]]] = {}  # by real path, so that no folder is locked twice
    for folder, flag, files in written:
        merged.setdefault(os.path.realpath(folder), (folder, flag, []))[2].extend(files)
    for folder, flag, files in merged.values():
        locks.enter_context(locked(make_folder(folder, flag), flag, files))


def _result_files(run: Run) -> list[Path]:
    """Paths of all files that a run writes to --output_dir."""
    paths = [run.settings.output_dir / name for name in (*FILE_NAMES.values(), CSV_NAME, LATEX_NAME)]
    for fit, folder in run.folders(run.settings.output_dir).items():
        paths += [folder / RESULTS, folder / REPORT, *(class_file(folder, name) for name in run.files)]
        if run.settings.saves_predictions(run.configs[fit].method_name):
            shown = [(name, file) for name, files in run.files.items() for file in files.evaluated[1]]
            paths += chain.from_iterable(image_files(folder, name, file) for name, file in shown)
    return paths


def image_files(folder: Path, class_name: str, file: SampleFiles) -> tuple[Path, Path]:
    """Paths of the anomaly map and the figure of a test sample."""
    figure = folder / "pred_maps" / class_name / f"{file.path.removeprefix('test/')}.png"
    return folder / "anomaly_maps" / class_name / f"{file.path}.tiff", figure


def input_checksums(run: Run, extractor: PatchExtractor) -> dict[str, dict[str, str]]:
    """Checksums, by class and fit, of file names, networks and loaded detectors; --resume refuses other ones."""
    return {
        name: {fit: _input_checksum(name, config.random_state, run, extractor) for fit, config in run.configs.items()}
        for name in run.files
    }


def _input_checksum(name: str, seed: int | None, run: Run, extractor: PatchExtractor) -> str:
    paths = [[each.path for each in split] for split in run.files[name]]
    if run.draws:
        paths[0] = run.draws[name][seed]
    saved = sorted(run.saved.get(name, {}).items())
    detectors = [(method, each.record.config_sha256, each.record.state_sha256) for method, each in saved]
    inputs = [paths, sorted(extractor.checksums.items()), detectors]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

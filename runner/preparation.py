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
from typing import Any, NamedTuple

import torch

from dataset import check_files, find_classes, good_folders, index_split
from feature_extractors.config import DetectorConfig
from feature_extractors.detector_record import CONFIG_FILE, check_target
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.thresholds import warn_of_few_samples
from models.point_ops import check_backend
from runner.dataset_check import dataset_forms, lacks_test, warn_of_raw_scans, warn_of_unfinished_scans
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
from utils.reporting.results_json import FILE_NAME as RESULTS
from utils.reporting.tables import CSV_NAME, FILE_NAMES
from utils.scans.cloud_check import class_distance
from utils.scans.files import locked, make_folder

logger = logging.getLogger(__name__)


class ClassFiles(NamedTuple):
    """Files of one class by split; empty for a split that the dataset lacks or the run does not read."""

    train: list[SampleFiles]
    validation: list[SampleFiles]
    test: list[SampleFiles]

    @property
    def evaluated(self) -> tuple[str, list[SampleFiles]]:
        """The test split. Without one, the good samples of the validation split, or else of the training split."""
        if self.test:
            return "test", self.test
        split = "validation" if self.validation else "train"
        return split, [each._replace(label=0) for each in getattr(self, split)]


@dataclass(frozen=True)
class Run:
    """A run whose command line and file headers are checked."""

    settings: RunSettings
    configs: Mapping[str, DetectorConfig]  # by method
    files: Mapping[str, ClassFiles]  # by class
    saved: Saved  # detectors of --load_detector, by class and method; empty where they are fitted
    flags: Mapping[str, Any]  # for results.json
    raw_form: CloudForm  # of the clouds before preprocessing

    @property
    def config(self) -> DetectorConfig:
        """Configuration of the feature extraction that all methods share."""
        return extraction_config(self.configs)

    def folders(self, root: Path) -> dict[str, Path]:
        """Folder of each method's own files: `root`, or a folder in it where several methods run."""
        return {method: root / method if len(self.configs) > 1 else root for method in self.configs}


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
    first_class = next(iter(saved.values()), {})
    configs = {method: each.record.config for method, each in first_class.items()} or detector_configs(args)
    precision = choose_precision(extraction_config(configs).precision, device)
    configs = {method: replace(config, precision=precision) for method, config in configs.items()}
    settings, config = from_flags(RunSettings, args), extraction_config(configs)
    settings.check_use(config, configs)
    check_backend(config.point_ops, device)
    stored, raw = dataset_forms(args)
    files = _index_classes(settings, config.method.modalities, stored, saved)
    flags = vars(args) | (dict.fromkeys(FITTING_FLAGS) if saved else {})
    run = Run(settings, configs, files, saved, flags, raw)
    warn_of_missing_samples(files, None if saved else settings.target_fpr)
    warn_of_unfinished_scans(settings.dataset_path, {name: chain(*splits) for name, splits in files.items()})
    if "xyz" in config.method.modalities:
        warn_of_raw_scans(chain(*files.values()))
    return run


def _index_classes(
    settings: RunSettings, modalities: frozenset[str], form: CloudForm, saved: Saved
) -> dict[str, ClassFiles]:
    """Files of each class, with checked headers. Clouds have this `form`, and the distance of any `saved` detector."""
    indexed = {}
    for name in find_classes(settings.dataset_path, settings.dataset_type, settings.classes):
        splits = _index_class(settings, name, modalities)
        stored = [each._replace(form=form) for each in splits.train or splits.evaluated[1]]
        distance = class_distance(stored) if "xyz" in modalities else None
        for detector in saved.get(name, {}).values():
            distance = detector.record.clouds.distance or distance
        of_class = replace(form, distance=distance)
        indexed[name] = ClassFiles(*([each._replace(form=of_class) for each in split] for split in splits))
    for files in indexed.values():
        check_files(files.train + files.validation, modalities)
        check_files(files.evaluated[1], shown_modalities(settings, modalities))
    return indexed


def _index_class(settings: RunSettings, name: str, modalities: frozenset[str]) -> ClassFiles:
    """Files of a class that the run reads. With loaded detectors, good samples are read only without a test split."""
    folder, fits = settings.dataset_path / name, settings.load_detector is None
    tested = not lacks_test(folder, chosen=settings.classes is not None)
    validated = bool(good_folders(folder / "validation"))
    train: list[SampleFiles] = []
    validation: list[SampleFiles] = []
    if fits or not (tested or validated):
        train = index_split(folder, "train", modalities)[: settings.max_sample]
    if validated and (fits or not tested):
        validation = index_split(folder, "validation", modalities)
    return ClassFiles(train, validation, index_split(folder, "test", modalities) if tested else [])


def warn_of_missing_samples(files: Mapping[str, ClassFiles], target_fpr: float | None) -> None:
    """Warn of classes without a test split and, unless `target_fpr` is None, with too few samples for calibration."""
    if untested := [name for name, splits in files.items() if not splits.test]:
        logger.warning(
            "%s %s no test split, so I-AUROC, P-AUROC, AU-PRO, precision, recall and false-alarm rate cannot be "
            "measured. The report shows good samples instead",
            *(", ".join(untested), "has" if len(untested) == 1 else "have"),
        )
    if target_fpr is None:
        return
    if uncalibrated := [name for name, splits in files.items() if not splits.validation]:
        logger.warning(
            "%s %s no validation/good, so thresholds are calibrated on the training samples. These score low; expect "
            "more false alarms than --target_fpr",
            *(", ".join(uncalibrated), "has" if len(uncalibrated) == 1 else "have"),
        )
    warn_of_few_samples({name: len(splits.validation or splits.train) for name, splits in files.items()}, target_fpr)


def shown_modalities(settings: RunSettings, modalities: frozenset[str]) -> frozenset[str]:
    """Modalities of the test files that are read: the method's, and images if predictions are saved as figures."""
    return modalities if settings.save_preds is None else modalities | {"rgb"}


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
    paths = [run.settings.output_dir / name for name in (*FILE_NAMES.values(), CSV_NAME)]
    for method, folder in run.folders(run.settings.output_dir).items():
        paths += [folder / RESULTS, folder / REPORT, *(class_file(folder, name) for name in run.files)]
        if run.settings.saves_predictions(method):
            shown = [(name, file) for name, files in run.files.items() for file in files.evaluated[1]]
            paths += chain.from_iterable(image_files(folder, name, file) for name, file in shown)
    return paths


def image_files(folder: Path, class_name: str, file: SampleFiles) -> tuple[Path, Path]:
    """Paths of the anomaly map and the figure of a test sample."""
    figure = folder / "pred_maps" / class_name / f"{file.path.removeprefix('test/')}.png"
    return folder / "anomaly_maps" / class_name / f"{file.path}.tiff", figure


def input_checksums(run: Run, extractor: PatchExtractor) -> dict[str, str]:
    """Checksum of each class's file names, networks and loaded detectors; --resume refuses a class with another one."""
    checksums = {}
    for name, files in run.files.items():
        paths = [[each.path for each in split] for split in files]
        saved = sorted(run.saved.get(name, {}).items())
        detectors = [(method, each.record.config_sha256, each.record.state_sha256) for method, each in saved]
        inputs = [paths, sorted(extractor.checksums.items()), detectors]
        checksums[name] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return checksums

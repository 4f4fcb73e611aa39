"""One class of a run of main.py: fit its detectors, or load them, and evaluate them on its test split."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from dataset import AnomalyDataset, SampleFiles, load_samples, read_rgb
from feature_extractors.config import DetectorConfig
from feature_extractors.detector import Detector
from feature_extractors.detector_record import SavedDetector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.persistence import restore_detectors, round_banks, save_detector
from feature_extractors.pipeline import (
    STAGES,
    Stopwatch,
    calibrate_detectors,
    class_entry,
    collect_features,
    evaluate,
    fit_detector,
)
from feature_extractors.thresholds import Source
from feature_extractors.training_features import TrainingFeatures
from runner.results import save_predictions
from runner.settings import RunSettings, method_folder
from utils.distributed import Group, gather_objects, is_main, shard_range
from utils.feature_store import write_features
from utils.memory import peak_memory_mb
from utils.records import PatchFeatures, Sample
from utils.reporting.html_report.class_report import ClassReport, report_class
from utils.reporting.html_report.gallery import ReadArray
from utils.scans.organized_pc import read_organized_pc

logger = logging.getLogger(__name__)


class SplitFiles(NamedTuple):
    """The files of one class; no training and validation files where its detectors are loaded."""

    train: list[SampleFiles]
    validation: list[SampleFiles]  # none where the dataset has no such split
    test: list[SampleFiles]


def run_class(
    name: str,
    files: SplitFiles,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    extractor: PatchExtractor,
    saved: Mapping[str, SavedDetector] | None = None,
    group: Group | None = None,
) -> dict[str, ClassReport]:
    """Fit one class, or load its `saved` detectors, and evaluate it, shared by the processes of `group`.

    Returns:
        per method what its report keeps of the class, in the first of these processes; nothing in the others.
    """
    if saved:
        detectors = restore_detectors(saved, extractor)
        stopwatches = {method: Stopwatch() for method in detectors}
    else:
        detectors, stopwatches = fit_class(name, files, settings, configs, extractor, group)
    test = own_files(files.test, extractor.batch_size, group)
    samples = load_samples(
        AnomalyDataset(test, extractor.config.method.modalities, extractor.config.img_size), settings.num_workers
    )
    evaluations = evaluate(detectors, samples, len(test), stopwatches, group)
    peaks = gather_objects([peak_memory_mb(settings.device)], group)
    clocks = gather_objects([{method: each.seconds for method, each in stopwatches.items()}], group)
    reports = {}
    for method, evaluation in evaluations.items():
        if method in settings.save_preds:
            save_predictions(name, files.test, evaluation.results, method_folder(settings.output_dir, configs, method))
        entry = class_entry(detectors[method], evaluation) | {
            "seconds": {stage: max(clock[method][stage] for clock in clocks) for stage in STAGES},
            "peak_memory_mb": max(peaks),
        }
        readers = part_readers(files.test, settings, extractor.config)
        reports[method] = report_class(name, entry, evaluation.results, *readers, limit=settings.report_parts)
    return reports


def own_files(files: list[SampleFiles], batch_size: int, group: Group | None) -> list[SampleFiles]:
    """Those of a split that this process reads.

    Batches of pictures begin where they begin in a single process: their products round a little differently when they
    are composed otherwise, and how many epochs the one-class SVMs take may hang on that.
    """
    own = shard_range(len(files), group, batch_size)
    return files[own.start : own.stop]


def part_readers(
    files: list[SampleFiles], settings: RunSettings, config: DetectorConfig
) -> tuple[ReadArray, ReadArray]:
    """What reads photo and scan of a test part by its number, of those kinds of files that the run has checked."""

    def photo(number: int) -> NDArray | None:
        return read_rgb(files[number]) if "rgb" in shown_modalities(settings, config) else None

    def cloud(number: int) -> NDArray | None:
        path = files[number].xyz
        return read_organized_pc(path) if path is not None and "xyz" in config.method.modalities else None

    return photo, cloud


def shown_modalities(settings: RunSettings, config: DetectorConfig) -> frozenset[str]:
    """The kinds of test files that are read: those of the method, and photos to put under its predictions."""
    return config.method.modalities | ({"rgb"} if settings.save_preds else frozenset())


def fit_class(
    name: str,
    files: SplitFiles,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    extractor: PatchExtractor,
    group: Group | None = None,
) -> tuple[dict[str, Detector], dict[str, Stopwatch]]:
    """The detectors of one class by method, calibrated and kept where that was asked for, and what they took.

    The processes of `group` share the work, and all get the detectors.
    """
    extraction, config = Stopwatch(), extractor.config

    def collect(split: list[SampleFiles], **options: Any) -> TrainingFeatures:
        dataset = AnomalyDataset(
            own_files(split, extractor.batch_size, group), config.method.modalities, config.img_size
        )
        samples = load_samples(dataset, settings.num_workers)
        options |= {"memory_budget": settings.memory_budget, "group": group}
        return collect_features(extractor, samples, len(dataset), extraction, **options)

    # Before the fit, which a scan at fault would waste; each split takes half of the memory budget at most.
    validation = collect(files.validation) if files.validation else None
    saver = feature_saver(name, settings, config)
    features = collect(files.train, on_features=saver, dtype=settings.train_feature_dtype)
    stopwatches, detectors = {}, {}
    for method, each in configs.items():
        stopwatches[method] = Stopwatch(extraction.seconds)
        detectors[method] = fit_detector(each, extractor, features, stopwatches[method])
        if settings.save_detector is not None:
            round_banks(detectors[method], settings.detector_dtype)
    if validation is None:
        logger.warning(
            "no validation/good: the thresholds are calibrated on the training samples, whose scores are lower than "
            "those of other good parts, since the banks hold them; expect more false alarms than --target_fpr"
        )
    source: Source = "training" if validation is None else "validation"
    good = features if validation is None else validation
    good_parts = (good.sample(i) for i in range(len(good)))
    calibrate_detectors(detectors, good_parts, settings.target_fpr, source, stopwatches, group)
    for method, detector in detectors.items():
        if settings.save_detector is not None:
            folder = method_folder(settings.save_detector, configs, method) / name
            if is_main(group):
                save_detector(detector, folder, class_name=name, dtype=settings.detector_dtype)
    return detectors, stopwatches


def feature_saver(
    class_name: str, settings: RunSettings, config: DetectorConfig
) -> Callable[[Sample, PatchFeatures], None] | None:
    """What writes a training sample's patch file, or None where --save_feature is not given."""
    if settings.save_feature_path is None:
        return None
    folder = settings.save_feature_path

    def save(sample: Sample, features: PatchFeatures) -> None:
        write_features(
            folder,
            class_name,
            Path(sample.path).name,
            features,
            xyz_backbone=config.xyz_backbone_name,
            rgb_backbone=config.rgb_backbone_name,
            pairing=settings.uff_pairing,
            dtype=settings.feature_dtype,
        )

    return save

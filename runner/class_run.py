"""Fit or load the detectors of one class in a run of main.py, and evaluate them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from numpy.typing import NDArray

from dataset import AnomalyDataset, load_samples, read_rgb, read_xyz
from feature_extractors.detector import Detector
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
from runner.class_files import shown_modalities
from runner.dataset_check import cleaning_of
from runner.preparation import Run
from runner.results import save_predictions
from utils.distributed import Group, find_ranks, gather_objects, is_main, shard_range
from utils.errors import InputError
from utils.feature_store import STORAGE_DTYPES, write_features
from utils.memory import default_memory_budget, peak_memory_mb
from utils.records import PatchFeatures, Sample, SampleFiles
from utils.reporting.html_report.class_report import ClassReport, report_class
from utils.reporting.html_report.gallery import ReadArray

Detectors = dict[str, Detector]  # by fit: a method or, of several seeds, a method and a seed
Stopwatches = dict[str, Stopwatch]


def run_class(name: str, run: Run, extractor: PatchExtractor, group: Group | None = None) -> dict[str, ClassReport]:
    """Fit the detectors of a class, or load them, and evaluate them. The processes of `group` share the samples.

    Returns the report by fit; {} in all processes of the group except the first. Raises InputError, with the class
    in front, for a file that cannot be used.
    """
    try:
        if run.saved:
            detectors = restore_detectors(run.saved[name], extractor)
            stopwatches = {fit: Stopwatch() for fit in detectors}
        else:
            detectors, stopwatches = fit_class(name, run, extractor, group)
        return evaluate_class(name, run, detectors, stopwatches, group)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def fit_class(
    name: str, run: Run, extractor: PatchExtractor, group: Group | None = None
) -> tuple[Detectors, Stopwatches]:
    """Fit, calibrate and, with --save_detector, save the detectors of a class."""
    settings, files, extraction = run.settings, run.files[name], Stopwatch()
    # 1. Features of the good samples, once for all methods and seeds
    budget = memory_budget(run, extractor.device)
    collect = partial(collect_features, extractor, stopwatch=extraction, memory_budget=budget, group=group)
    validation = None
    if files.validation:  # before the training samples, so that a broken file does not waste their time
        validation = collect(*own_samples(files.validation, run, extractor, group))
    features = collect(
        *own_samples(files.train, run, extractor, group),
        on_features=partial(save_patches, name, run) if settings.save_feature else None,
        dtype=STORAGE_DTYPES[settings.train_feature_dtype],
    )
    # 2. Memory banks, decision fusion and thresholds
    source: Source = "training" if validation is None else "validation"
    stopwatches = {fit: Stopwatch(extraction.seconds) for fit in run.configs}
    detectors: Detectors = {}
    for seed, configs in run.seeds.items():
        own = features.subset(run.draws[name][seed]) if run.draws and len(run.seeds) > 1 else features
        fitted = {fit: fit_detector(config, extractor, own, stopwatches[fit]) for fit, config in configs.items()}
        if settings.save_detector is not None:
            prepare_saving(name, run, fitted)
        good = own if validation is None else validation
        calibrate_detectors(fitted, good, settings.target_fpr, source, stopwatches)
        detectors |= fitted
    # 3. Files
    if settings.save_detector is not None and is_main(group):
        dtype = STORAGE_DTYPES[settings.detector_dtype]
        for fit, folder in run.folders(settings.save_detector).items():
            save_detector(detectors[fit], folder / name, class_name=name, dtype=dtype)
    return detectors, stopwatches


def prepare_saving(name: str, run: Run, detectors: Detectors) -> None:
    """Note the cleaning and form of the clouds for prediction, and round the banks to the dtype of their files."""
    train = run.files[name].train
    cleaned = cleaning_of(run.settings.dataset_path, name, train)
    for detector in detectors.values():
        detector.cleaned = cleaned
        detector.clouds = replace(run.raw_form, distance=train[0].form.distance)
        round_banks(detector, STORAGE_DTYPES[run.settings.detector_dtype])


def evaluate_class(
    name: str, run: Run, detectors: Detectors, stopwatches: Stopwatches, group: Group | None = None
) -> dict[str, ClassReport]:
    """Evaluate each detector on the test split or, without one, on good samples; reports on the first rank only."""
    extractor = next(iter(detectors.values())).extractor
    split, files = run.files[name].evaluated
    samples, count = own_samples(files, run, extractor, group)
    evaluations = evaluate(detectors, samples, count, stopwatches, group, split)
    peaks = gather_objects([peak_memory_mb(extractor.device)], group)
    clocks = gather_objects([{fit: each.seconds for fit, each in stopwatches.items()}], group)
    folders = run.folders(run.settings.output_dir)
    reports = {}
    for fit, evaluation in evaluations.items():
        config = run.configs[fit]
        if run.settings.saves_predictions(config.method_name):
            save_predictions(name, files, evaluation.results, folders[fit], detectors[fit].thresholds)
        entry = class_entry(detectors[fit], evaluation) | {
            "seconds": {stage: max(clock[fit][stage] for clock in clocks) for stage in STAGES},
            "peak_memory_mb": max(peaks),
        }
        if run.draws:
            entry["train_samples"] = run.draws[name][config.random_state]
        readers, limit = sample_readers(files, run), run.settings.report_parts
        reports[fit] = report_class(name, entry, evaluation.results, evaluation.pro_curve, *readers, limit)
    return reports


def own_samples(
    files: list[SampleFiles], run: Run, extractor: PatchExtractor, group: Group | None
) -> tuple[Iterator[Sample], int]:
    """Samples of a split that this process reads, and their number.

    Shards start at batch boundaries, so that batches match those of a single process. Other batches would change the
    last digits of the features, to which the SVMs are sensitive.
    """
    own = shard_range(len(files), group, extractor.batch_size)
    dataset = AnomalyDataset(files[own.start : own.stop], run.config.method.modalities, run.config.img_size)
    return load_samples(dataset, run.settings.num_workers), len(dataset)


def memory_budget(run: Run, device: torch.device) -> float:
    """--memory_budget, or this process's share of half of the machine's memory, GB."""
    if run.settings.memory_budget is not None:
        return run.settings.memory_budget
    sharing = find_ranks().local_world_size if device.type == "cpu" else 1
    return default_memory_budget(device) / sharing


def sample_readers(files: list[SampleFiles], run: Run) -> tuple[ReadArray, ReadArray]:
    """Readers of the image and the cloud of a sample by its number; None for a modality that is not read."""
    used = run.config.method.modalities
    shown = shown_modalities(run.settings, used)

    def read_image(number: int) -> NDArray | None:
        return read_rgb(files[number]) if "rgb" in shown else None

    def read_cloud(number: int) -> NDArray | None:
        return read_xyz(files[number]) if "xyz" in used else None

    return read_image, read_cloud


def save_patches(class_name: str, run: Run, sample: Sample, features: PatchFeatures) -> None:
    """Write the patch file of a training sample."""
    settings, config = run.settings, run.config
    backbones = {"xyz_backbone": config.xyz_backbone_name, "rgb_backbone": config.rgb_backbone_name}
    place = settings.save_feature_path, class_name, Path(sample.path).name
    dtype = STORAGE_DTYPES[settings.feature_dtype]
    write_features(*place, features, **backbones, pairing=settings.uff_pairing, dtype=dtype)

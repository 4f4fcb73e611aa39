"""Fit detectors on good samples, calibrate their thresholds, and evaluate them on the test split.

Ranks that share a class call these functions together, each with its own samples.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dataset import read_ahead
from feature_extractors.banks import build_banks
from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion, fit_decision_fusion, fit_noise_units
from feature_extractors.detector import Detector
from feature_extractors.extractor import Inputs, PatchExtractor
from feature_extractors.thresholds import Source, calibrate
from feature_extractors.training_features import TrainingFeatures
from utils.au_pro import ThinCurve
from utils.distributed import Group, broadcast_object, gather_objects, is_main, progress_bar
from utils.errors import InputError
from utils.metrics import decision_metrics, latency_percentiles, undefined_metrics
from utils.metrics import evaluate as compute_metrics
from utils.records import PatchFeatures, Sample, SampleResult

Item = TypeVar("Item")

STAGES = ("extract", "coreset", "fuse", "calibrate", "score", "metrics")


class Stopwatch:
    """Seconds spent in each stage, added to `seconds`."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin


class Evaluation(NamedTuple):
    """Results and metrics of one detector on a split of a class."""

    results: list[SampleResult]
    metrics: dict[str, Any]  # this and the curve as in utils.metrics.evaluate
    pro_curve: ThinCurve | None
    split: str = "test"  # split of the samples; without a test split, all metrics are None


def collect_features(
    extractor: PatchExtractor,
    samples: Iterable[Sample],
    count: int,
    stopwatch: Stopwatch | None = None,
    on_features: Callable[[Sample, PatchFeatures], None] | None = None,
    *,
    memory_budget: float = math.inf,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
) -> TrainingFeatures:
    """Features of the `count` good samples of this rank, to fit or calibrate detectors.

    `on_features` is called with each sample and its features. The keyword-only arguments are those of TrainingFeatures.
    """
    collected = TrainingFeatures(count, memory_budget, dtype, empty=extractor.no_patches, group=group)
    progress = progress_bar(total=count, desc="features", unit="sample")
    with (stopwatch or Stopwatch()).measure("extract"), progress:
        for batch, inputs in _read_batches(extractor, samples):
            for sample, features in zip(batch, extractor.extract_prepared(inputs), strict=True):
                if on_features is not None:
                    on_features(sample, features)
                collected.append(features, sample.path)
            progress.update(len(batch))
    return collected


@torch.inference_mode()
def fit_detector(
    config: DetectorConfig, extractor: PatchExtractor, features: TrainingFeatures, stopwatch: Stopwatch | None = None
) -> Detector:
    """Fit a detector to the features of the good samples. Fast form of the fit in `reference.fit_and_score`."""
    stopwatch = stopwatch or Stopwatch()
    # 1. Memory banks M: statistics, coreset, normalized rows
    with stopwatch.measure("coreset"):
        detector = Detector(config, extractor, build_banks(config, features))
    # 2. Decision fusion D_a and D_s, from the scores phi and maps psi of the same samples
    if config.decision_fusion in ("svm", "noise"):
        with stopwatch.measure("fuse"):
            detector.decision_fusion = _fit_decision_fusion(detector, features)
    return detector


def _fit_decision_fusion(detector: Detector, features: TrainingFeatures) -> DecisionFusion:
    """Fit decision fusion to the training samples of all ranks, on the first rank.

    One-class SVMs use the scores of each sample against the whole banks; units of noise, against banks without its own
    patches. Raises InputError for units of noise if there is only one sample.
    """
    config, group = detector.config, features.group
    noise, total = config.decision_fusion == "noise", features.total()
    if noise and total < 2:
        raise InputError(
            "--protocol extended compares the training samples with each other, but there is only one. Give at least "
            "two, or use --protocol corrected."
        )
    numbers = iter(range(features.first, total))
    results = []
    with progress_bar(total=len(features), desc="decision fusion", unit="sample") as progress:
        for batch in batches(features, detector.extractor.batch_size):
            own = list(islice(numbers, len(batch)))
            results += detector.bank_results(batch, left_out=own if noise else None)
            progress.update(len(batch))
    scores = gather_objects([bank_scores for bank_scores, _ in results], group)
    maps = gather_objects([bank_maps for _, bank_maps in results], group)
    fusion = None
    if is_main(group) and noise:
        fusion = fit_noise_units(scores, maps)
    elif is_main(group):
        lambdas = config.lambdas_of_banks
        fusion = fit_decision_fusion(scores, maps, *lambdas, config.ocsvm_nu, config.ocsvm_maxiter)
    return broadcast_object(fusion, group)


def calibrate_detectors(
    detectors: Mapping[str, Detector],
    features: TrainingFeatures,
    target_fpr: float,
    source: Source,
    stopwatches: Mapping[str, Stopwatch] | None = None,
) -> None:
    """Calibrate the thresholds of each method's detector on good samples, preferably not those of the fit.

    `source` is their split, see thresholds.calibrate. Peak memory: a map of img_size**2 float32 for each sample and
    detector; the first rank holds the maps of all ranks.
    """
    stopwatches = stopwatches or {name: Stopwatch() for name in detectors}
    group = features.group
    scores: dict[str, list[float]] = {name: [] for name in detectors}
    maps: dict[str, list[Tensor]] = {name: [] for name in detectors}
    # 1. Predictions for the good samples of this rank
    for batch in batches(features, next(iter(detectors.values())).extractor.batch_size):
        for name, detector in detectors.items():
            with stopwatches[name].measure("calibrate"):
                predictions = detector.predict_features(batch)
            scores[name] += [each.score for each in predictions]
            maps[name] += [each.anomaly_map for each in predictions]
    # 2. Thresholds from the predictions of all ranks
    for name, detector in detectors.items():
        with stopwatches[name].measure("calibrate"):
            all_scores, all_maps = gather_objects(scores[name], group), gather_objects(maps.pop(name), group)
            calibration = None
            if is_main(group):
                calibration = calibrate(all_scores, [plane.numpy() for plane in all_maps], target_fpr, source)
            detector.calibration = broadcast_object(calibration, group)
            detector.thresholds = detector.calibration.thresholds(target_fpr)


def evaluate(
    detectors: Mapping[str, Detector],
    samples: Iterable[Sample],
    count: int,
    stopwatches: Mapping[str, Stopwatch] | None = None,
    group: Group | None = None,
    split: str = "test",
) -> dict[str, Evaluation]:
    """Predict the `count` samples of this rank with each method's detector, and compute the metrics of the class.

    Samples of another `split` than "test" are good and have served to fit or calibrate, so all metrics are None.

    Returns evaluations over the samples of all ranks on the first rank of the group, {} on the others. The detectors
    share an extractor; every stopwatch includes its time. Peak memory: (K + 1) * img_size**2 float32 for each sample
    and detector of K banks.
    """
    stopwatches = stopwatches or {name: Stopwatch() for name in detectors}
    extractor = next(iter(detectors.values())).extractor
    results: dict[str, list[SampleResult]] = {name: [] for name in detectors}
    # 1. Predictions for the samples of this rank
    with progress_bar(total=count, desc=split, unit="sample") as progress:
        for batch, inputs in _read_batches(extractor, samples):
            features, seconds = _extract_timed(extractor, inputs)
            for name, detector in detectors.items():
                stopwatches[name].seconds["extract"] += seconds
                results[name] += _predict_timed(detector, batch, features, seconds, stopwatches[name])
            progress.update(len(batch))
    # 2. Metrics over the samples of all ranks
    evaluations = {}
    for name in detectors:
        gathered = gather_objects(results.pop(name), group)
        if is_main(group):
            if split != "test":
                evaluations[name] = Evaluation(gathered, undefined_metrics(), None, split)
                continue
            with stopwatches[name].measure("metrics"):
                masks = [each.mask.numpy() for each in gathered]
                maps = [each.prediction.anomaly_map.numpy() for each in gathered]
                metrics, curve = compute_metrics(*_labels_and_scores(gathered), masks, maps)
            evaluations[name] = Evaluation(gathered, metrics, curve)
    return evaluations


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one possibly shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def class_entry(detector: Detector, evaluation: Evaluation) -> dict[str, Any]:
    """Entry of a class in results.json, without seconds and memory."""
    results, thresholds = evaluation.results, detector.thresholds
    labels, scores = _labels_and_scores(results)
    threshold = asdict(thresholds) if thresholds else {}
    threshold.pop("typical", None)
    severities = [thresholds.severity(score) if thresholds else None for score in scores]
    deciding = thresholds if evaluation.split == "test" else None
    return {
        "split": evaluation.split,
        **evaluation.metrics,
        **decision_metrics(labels, scores, deciding.image if deciding else None),
        "threshold": threshold or None,
        "latency": latency_percentiles(each.seconds for each in results),
        "samples": [
            {"path": each.path, "label": each.label, "score": each.prediction.score, "severity": severity}
            for each, severity in zip(results, severities, strict=True)
        ],
    }


def _read_batches(extractor: PatchExtractor, samples: Iterable[Sample]) -> Iterator[tuple[list[Sample], Inputs]]:
    """Batches of samples with their inputs on the extractor's device. For a GPU, a thread prepares the next batch."""
    pairs = ((batch, extractor.prepare(batch)) for batch in batches(samples, extractor.batch_size))
    return read_ahead(pairs) if extractor.device.type == "cuda" else pairs


def _extract_timed(extractor: PatchExtractor, inputs: Inputs) -> tuple[list[PatchFeatures], float]:
    """Features of a batch, and the seconds spent."""
    begin = time.perf_counter()
    extracted = extractor.extract_prepared(inputs)
    if extractor.device.type == "cuda":
        torch.cuda.current_stream(extractor.device).synchronize()  # so that scoring is timed without the extraction
    return extracted, time.perf_counter() - begin


def _predict_timed(
    detector: Detector,
    batch: Sequence[Sample],
    features: Sequence[PatchFeatures],
    extraction: float,
    stopwatch: Stopwatch,
) -> list[SampleResult]:
    """Results of a batch whose extraction took `extraction` seconds. Each sample gets an equal share of the time."""
    begin = time.perf_counter()
    predictions = detector.predict_features(features)
    seconds = time.perf_counter() - begin
    stopwatch.seconds["score"] += seconds
    share = (extraction + seconds) / len(batch)
    results = []
    for sample, prediction in zip(batch, predictions, strict=True):
        if sample.label is None or sample.mask is None:
            raise ValueError(f"{sample.path} has no label or no mask. Pass samples of the test split.")
        results.append(SampleResult(sample.path, sample.label, sample.mask[0], prediction, share))
    return results


def _labels_and_scores(results: Sequence[SampleResult]) -> tuple[list[int], list[float]]:
    return [each.label for each in results], [each.prediction.score for each in results]

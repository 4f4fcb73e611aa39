"""Fitting a detector on good parts, calibrating its thresholds, and running it over the test split.

Several processes may share the work. Each then has samples of its own, in the order of the ranks, and all call these
functions together.
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

from feature_extractors.banks import build_banks
from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion, fit_decision_fusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.thresholds import Source, calibrate
from feature_extractors.training_features import TrainingFeatures
from utils.distributed import Group, broadcast_object, gather_objects, is_main, progress_bar
from utils.metrics import decision_metrics, latency_percentiles
from utils.metrics import evaluate as compute_metrics
from utils.records import PatchFeatures, Prediction, Sample

Item = TypeVar("Item")

STAGES = ("extract", "coreset", "fuse", "calibrate", "score", "metrics")


class Stopwatch:
    """Seconds spent in each named stage.

    Args:
        seconds: what was spent before, copied; None: nothing.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin


class SampleResult(NamedTuple):
    """A test sample without its pictures, and what the detector said about it."""

    path: str  # as in Sample
    label: int
    mask: Tensor  # (S, S) uint8
    prediction: Prediction
    # Its share of the extraction of its batch, plus its scoring; without reading its files. The extraction is that of
    # all networks that run, also of those that only other methods of a comparison use.
    seconds: float


class Evaluation(NamedTuple):
    """What a detector said about the test split of a class, and how good that is."""

    results: list[SampleResult]
    metrics: dict[str, Any]  # under the keys of results.json, see utils.metrics.evaluate


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
    """Extract every sample of good parts once.

    Args:
        extractor: see PatchExtractor.
        samples: to fit on, or to calibrate with; those of this process.
        count: how many there are.
        stopwatch: where the seconds are added.
        on_features: called with each sample and its features, to save them for instance.
        memory_budget: see TrainingFeatures.
        dtype: see TrainingFeatures.
        group: the processes that share the class.
    """
    collected = TrainingFeatures(count, memory_budget, dtype, empty=extractor.no_patches, group=group)
    with (stopwatch or Stopwatch()).measure("extract"):
        progress = progress_bar(samples, total=count, desc="features", unit="sample")
        for batch in batches(progress, extractor.batch_size):
            for sample, features in zip(batch, extractor.extract(batch), strict=True):
                if on_features is not None:
                    on_features(sample, features)
                collected.append(features, sample.path)
    return collected


def fit_detector(
    config: DetectorConfig, extractor: PatchExtractor, features: TrainingFeatures, stopwatch: Stopwatch | None = None
) -> Detector:
    """Build the banks, then fit decision fusion on the same samples scored against them."""
    stopwatch = stopwatch or Stopwatch()
    with torch.inference_mode():
        with stopwatch.measure("coreset"):
            detector = Detector(config, extractor, build_banks(config, features))
        if config.method.fusion == "svm":
            with stopwatch.measure("fuse"):
                detector.decision_fusion = _fit_fusion(detector, features)
    return detector


def calibrate_detectors(
    detectors: Mapping[str, Detector],
    features: Iterable[PatchFeatures],
    target_fpr: float,
    source: Source,
    stopwatches: Mapping[str, Stopwatch] | None = None,
    group: Group | None = None,
) -> None:
    """Set the thresholds of each detector, from what it says about good parts.

    Keeps a map, img_size**2 float32, of each part and detector until all are judged; the first process, of all parts.

    Args:
        detectors: by name of the method.
        features: of the good parts, none of them of the banks' parts where there is a choice; those of this process.
        target_fpr: see thresholds.calibrate.
        source: see thresholds.calibrate.
        stopwatches: where the seconds of each detector are added.
        group: the processes that share the class.
    """
    stopwatches = stopwatches or {name: Stopwatch() for name in detectors}
    scores: dict[str, list[float]] = {name: [] for name in detectors}
    maps: dict[str, list[Tensor]] = {name: [] for name in detectors}
    for each in features:
        for name, detector in detectors.items():
            with stopwatches[name].measure("calibrate"):
                prediction = detector.predict_features(each)
            scores[name].append(prediction.score)
            maps[name].append(prediction.anomaly_map)
    for name, detector in detectors.items():
        with stopwatches[name].measure("calibrate"):
            scores_of_all, maps_of_all = gather_objects(scores[name], group), gather_objects(maps.pop(name), group)
            thresholds = None
            if is_main(group):
                thresholds = calibrate(scores_of_all, [plane.numpy() for plane in maps_of_all], target_fpr, source)
            detector.thresholds = broadcast_object(thresholds, group)


def evaluate(
    detectors: Mapping[str, Detector],
    samples: Iterable[Sample],
    count: int,
    stopwatches: Mapping[str, Stopwatch] | None = None,
    group: Group | None = None,
) -> dict[str, Evaluation]:
    """Judge every test sample, in order, by each detector, and compute the metrics of the class.

    Features are extracted once a sample, by the extractor that the detectors share; every stopwatch counts that time.
    Keeps the maps: (K + 1) * img_size**2 float32 a sample for K banks, of each detector.

    Args:
        detectors: by name of the method.
        samples: of the test split; those of this process.
        count: how many there are.
        stopwatches: where the seconds of each detector are added.
        group: the processes that share the class.

    Returns:
        what each detector said of the samples of all processes, in the first process of the group; nothing in others.
    """
    stopwatches = stopwatches or {name: Stopwatch() for name in detectors}
    extractor = next(iter(detectors.values())).extractor
    results: dict[str, list[SampleResult]] = {name: [] for name in detectors}
    progress = progress_bar(samples, total=count, desc="test", unit="sample")
    extracted = _extracted(extractor, progress, stopwatches)
    for each in extracted:
        for name, detector in detectors.items():
            results[name].append(_result(detector, *each, stopwatches[name]))
    evaluations = {}
    for name in detectors:
        of_detector = gather_objects(results.pop(name), group)
        if not is_main(group):
            continue
        with stopwatches[name].measure("metrics"):
            metrics = compute_metrics(
                [result.label for result in of_detector],
                [result.prediction.score for result in of_detector],
                [result.mask.numpy() for result in of_detector],
                [result.prediction.anomaly_map.numpy() for result in of_detector],
            )
        evaluations[name] = Evaluation(of_detector, metrics)
    return evaluations


def class_entry(detector: Detector, evaluation: Evaluation) -> dict[str, Any]:
    """What results.json says about the test split of a class."""
    results, thresholds = evaluation.results, detector.thresholds
    image_threshold, threshold = None, None
    if thresholds is not None:
        image_threshold = thresholds.image
        threshold = {key: value for key, value in asdict(thresholds).items() if key != "typical"}
    return {
        **evaluation.metrics,
        **decision_metrics(
            [each.label for each in results],
            [each.prediction.score for each in results],
            image_threshold,
        ),
        "threshold": threshold,
        "latency": latency_percentiles(each.seconds for each in results),
        "samples": [
            {
                "path": each.path,
                "label": each.label,
                "score": each.prediction.score,
                "normalised": None if thresholds is None else thresholds.normalize(each.prediction.score),
            }
            for each in results
        ],
    }


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last time what is left."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _extracted(
    extractor: PatchExtractor, samples: Iterable[Sample], stopwatches: Mapping[str, Stopwatch]
) -> Iterator[tuple[Sample, PatchFeatures, float]]:
    """Each sample, its features, and its share of the seconds that its batch took."""
    for batch in batches(samples, extractor.batch_size):
        extracted, seconds = extract_timed(extractor, batch, stopwatches)
        for sample, features in zip(batch, extracted, strict=True):
            yield sample, features, seconds / len(batch)


def extract_timed(
    extractor: PatchExtractor, batch: Sequence[Sample], stopwatches: Mapping[str, Stopwatch]
) -> tuple[list[PatchFeatures], float]:
    """The features of a batch and the seconds they took, which every stopwatch counts."""
    begin = time.perf_counter()
    extracted = extractor.extract(batch)
    if extractor.device.type == "cuda":
        torch.cuda.synchronize(extractor.device)  # else the first sample's scoring would wait for the whole batch
    seconds = time.perf_counter() - begin
    for stopwatch in stopwatches.values():
        stopwatch.seconds["extract"] += seconds
    return extracted, seconds


def _result(
    detector: Detector, sample: Sample, features: PatchFeatures, extraction: float, stopwatch: Stopwatch
) -> SampleResult:
    if sample.label is None or sample.mask is None:
        raise ValueError(f"{sample.path} has no label or no mask: evaluate takes samples of the test split")
    begin = time.perf_counter()
    prediction = detector.predict_features(features)
    seconds = time.perf_counter() - begin
    stopwatch.seconds["score"] += seconds
    return SampleResult(sample.path, sample.label, sample.mask[0], prediction, extraction + seconds)


def _fit_fusion(detector: Detector, features: TrainingFeatures) -> DecisionFusion:
    config, group = detector.config, features.group
    scores: list[list[float]] = []
    maps: list[list[Tensor]] = []
    samples = progress_bar(range(len(features)), desc="decision fusion", unit="sample")
    for i in samples:
        bank_scores, bank_maps = detector.bank_results(features.sample(i))
        scores.append(list(bank_scores.values()))
        maps.append(list(bank_maps.values()))
    scores, maps = gather_objects(scores, group), gather_objects(maps, group)
    fusion = None
    if is_main(group):
        lambdas = config.lambdas_of_banks
        fusion = fit_decision_fusion(scores, maps, *lambdas, config.ocsvm_nu, config.ocsvm_maxiter)
    return broadcast_object(fusion, group)

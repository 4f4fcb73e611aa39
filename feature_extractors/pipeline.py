"""Fitting a detector on good parts, calibrating its thresholds, and running it over the test split."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion, fit_decision_fusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank, mean_and_std, select_coreset
from feature_extractors.thresholds import calibrate
from feature_extractors.training_features import PatchRows, TrainingFeatures
from utils.errors import InputError
from utils.metrics import decision_metrics, latency_percentiles
from utils.metrics import evaluate as compute_metrics
from utils.records import PatchFeatures, Prediction, Sample

logger = logging.getLogger(__name__)

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
) -> TrainingFeatures:
    """Extract every sample of good parts once.

    Args:
        extractor: see PatchExtractor.
        samples: to fit on, or to calibrate with.
        count: how many there are.
        stopwatch: where the seconds are added.
        on_features: called with each sample and its features, to save them for instance.
        memory_budget: see TrainingFeatures.
        dtype: see TrainingFeatures.
    """
    collected = TrainingFeatures(count, memory_budget, dtype)
    with (stopwatch or Stopwatch()).measure("extract"):
        progress = tqdm(samples, total=count, desc="features", unit="sample", leave=False)
        for batch in batches(progress, extractor.batch_size):
            for sample, features in zip(batch, extractor.extract(batch), strict=True):
                if on_features is not None:
                    on_features(sample, features)
                collected.append(features)
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


def build_banks(config: DetectorConfig, features: TrainingFeatures) -> dict[str, MemoryBank]:
    """Statistics, coreset and normalised rows of each bank of the method, in its order (xyz first)."""
    method, protocol = config.method, config.protocol
    drop_background = protocol.drop_background or config.rm_zero_for_project
    rows = {name: features.rows(name, None if name == "rgb" else config.asy_memory_bank) for name in method.banks}
    if "xyz" in rows and drop_background:
        rows["xyz"] = _without_background(rows["xyz"], config)
    statistics = _bank_statistics(config, rows)
    banks: dict[str, MemoryBank] = {}
    reduced_xyz = None
    for name, raw in rows.items():
        base = len(raw) if protocol.own_coreset_size or reduced_xyz is None else reduced_xyz
        chosen = _select(config, features, name, raw, statistics[name], base)
        if name == "xyz":
            reduced_xyz = len(chosen)
            if drop_background:
                chosen = torch.cat([chosen, statistics[name].normalize(chosen.new_zeros(1, chosen.shape[1]))])
            elif method.zero_row:  # zero after normalisation, so the mean patch and not the background: the reference's
                chosen = chosen[(chosen != 0).all(dim=1)]
                chosen = torch.cat([chosen, chosen.new_zeros(1, chosen.shape[1])])
        banks[name] = MemoryBank(chosen, statistics[name])
        logger.info("%s bank: %d of %d patches", name, len(chosen), len(raw))
    return banks


def calibrate_detectors(
    detectors: Mapping[str, Detector],
    features: Iterable[PatchFeatures],
    target_fpr: float,
    source: str,
    stopwatches: Mapping[str, Stopwatch] | None = None,
) -> None:
    """Set the thresholds of each detector, from what it says about good parts.

    Keeps a map, img_size**2 float32, of each part and detector until all are judged.

    Args:
        detectors: by name of the method.
        features: of the good parts, none of them of the banks' parts where there is a choice.
        target_fpr: see thresholds.calibrate.
        source: see thresholds.calibrate.
        stopwatches: where the seconds of each detector are added.
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
            planes = [plane.numpy() for plane in maps.pop(name)]
            detector.thresholds = calibrate(scores[name], planes, target_fpr, source)


def evaluate(
    detectors: Mapping[str, Detector],
    samples: Iterable[Sample],
    count: int,
    stopwatches: Mapping[str, Stopwatch] | None = None,
) -> dict[str, Evaluation]:
    """Judge every test sample, in order, by each detector, and compute the metrics of the class.

    Features are extracted once a sample, by the extractor that the detectors share; every stopwatch counts that time.
    Keeps the maps: (K + 1) * img_size**2 float32 a sample for K banks, of each detector.

    Args:
        detectors: by name of the method.
        samples: of the test split.
        count: how many there are.
        stopwatches: where the seconds of each detector are added.

    Returns:
        what each detector said.
    """
    stopwatches = stopwatches or {name: Stopwatch() for name in detectors}
    extractor = next(iter(detectors.values())).extractor
    results: dict[str, list[SampleResult]] = {name: [] for name in detectors}
    progress = tqdm(samples, total=count, desc="test", unit="sample", leave=False)
    for batch in batches(progress, extractor.batch_size):
        extracted, seconds = extract_timed(extractor, batch, stopwatches)
        for name, detector in detectors.items():
            for sample, features in zip(batch, extracted, strict=True):
                results[name].append(_result(detector, sample, features, seconds / len(batch), stopwatches[name]))
    evaluations = {}
    for name, of_detector in results.items():
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
    threshold = None
    if thresholds is not None:
        threshold = {key: value for key, value in thresholds._asdict().items() if key != "typical"}
    return {
        **evaluation.metrics,
        **decision_metrics(
            [each.label for each in results],
            [each.prediction.score for each in results],
            thresholds and thresholds.image,
        ),
        "threshold": threshold,
        "latency": latency_percentiles(each.seconds for each in results),
        "samples": [
            {
                "path": each.path,
                "label": each.label,
                "score": each.prediction.score,
                "normalised": thresholds and thresholds.normalize(each.prediction.score),
            }
            for each in results
        ],
    }


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last time what is left."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


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


def _bank_statistics(config: DetectorConfig, rows: dict[str, PatchRows]) -> dict[str, BankStatistics]:
    if config.protocol.own_statistics or config.method.statistics == "own":
        return {name: mean_and_std(raw) for name, raw in rows.items()}
    if config.method.statistics == "shared":
        shared = BankStatistics(mean_and_std(rows["xyz"]).mean, mean_and_std(rows["rgb"]).std)
        return dict.fromkeys(rows, shared)
    return dict.fromkeys(rows, BankStatistics())


def _without_background(xyz: PatchRows, config: DetectorConfig) -> PatchRows:
    """The rows of patches with a valid point. --rm_zero_for_project keeps only rows without any exact zero."""

    def wanted(rows: Tensor) -> Tensor:
        nonzero = rows != 0
        return nonzero.all(dim=1) if config.rm_zero_for_project else nonzero.any(dim=1)

    kept = xyz.where(wanted)
    if len(kept) == 0:
        raise InputError(
            f"none of the {len(xyz)} xyz patches of the training samples is left without the background: "
            "check the scans, or use --protocol reference without --rm_zero_for_project"
        )
    return kept


def _select(
    config: DetectorConfig, features: TrainingFeatures, name: str, raw: PatchRows, statistics: BankStatistics, base: int
) -> Tensor:
    """The normalised coreset of raw rows; its size is f_coreset of `base`, within 1 and all rows.

    A coreset is chosen once for all methods that ask for the same one. Without a random_state each chooses its own.
    """
    if config.f_coreset == 1:
        return statistics.normalize(raw[torch.arange(len(raw))])
    n = min(max(int(config.f_coreset * base), 1), len(raw))
    key = (name, len(raw), statistics, n, config.coreset_eps, config.random_state)
    chosen = features.coresets.get(key)
    if chosen is None:
        chosen = select_coreset(raw, statistics, n, config.coreset_eps, config.random_state)
        if config.random_state is not None:
            features.coresets[key] = chosen
    return statistics.normalize(raw[chosen])


def _fit_fusion(detector: Detector, features: TrainingFeatures) -> DecisionFusion:
    config = detector.config
    scores, maps = [], []
    for i in tqdm(range(len(features)), desc="decision fusion", unit="sample", leave=False):
        bank_scores, bank_maps = detector.bank_results(features.sample(i))
        scores.append(list(bank_scores.values()))
        maps.append(list(bank_maps.values()))
    return fit_decision_fusion(scores, maps, *config.lambdas_of_banks, config.ocsvm_nu, config.ocsvm_maxiter)

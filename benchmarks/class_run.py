"""Fitting and evaluating a whole class in a process of its own, the fast way or the plain one: seconds and memory."""

import time
from typing import Any, NamedTuple

import torch

from benchmarks import plain, plain_class
from benchmarks.measuring import peak_mb
from benchmarks.workload import SIZES, Networks, build_networks, detector_config, made_up_samples
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, collect_features, evaluate, fit_detector
from utils.records import Sample


class ClassRun(NamedTuple):
    """What a whole class took."""

    train: int  # training samples
    test: int
    seconds: dict[str, float]  # "fit", "evaluate", "total"; of the plain form also the stages of "fit"
    start_mb: float  # resident with networks and samples, before the work
    peak_mb: float
    metrics: dict[str, Any]  # as in results.json


def run_class(variant: str, size: str, train: int, test: int, stop: int | None) -> ClassRun:
    """Fit and evaluate.

    Args:
        variant: "plain", or the precision of the fast form.
        size: a key of SIZES.
        train, test: numbers of samples.
        stop: picks after which the plain greedy loop ends; its seconds are multiplied up to all picks. None: it runs.
    """
    numbers = SIZES[size]
    networks = build_networks(numbers)
    good, judged = (
        made_up_samples(count, split, numbers.img_size) for count, split in ((train, "train"), (test, "test"))
    )
    config = detector_config(numbers, "fp32" if variant == "plain" else variant)
    start = peak_mb()
    if variant == "plain":
        seconds, metrics = _run_plain(config, plain.make_plain(networks), good, judged, stop)
    else:
        seconds, metrics = _run_fast(config, networks, good, judged)
    return ClassRun(train, test, seconds, start, peak_mb(), metrics)


def _run_fast(
    config: DetectorConfig, networks: Networks, train: list[Sample], test: list[Sample]
) -> tuple[dict[str, float], dict[str, Any]]:
    begin = time.perf_counter()
    extractor = PatchExtractor(config, networks.rgb, networks.xyz)
    detector = fit_detector(config, extractor, collect_features(extractor, train, len(train)))
    fitted = time.perf_counter()
    metrics = evaluate({config.method_name: detector}, test, len(test))[config.method_name].metrics
    end = time.perf_counter()
    return {"fit": fitted - begin, "evaluate": end - fitted, "total": end - begin}, metrics


@torch.inference_mode()
def _run_plain(
    config: DetectorConfig, networks: Networks, train: list[Sample], test: list[Sample], stop: int | None
) -> tuple[dict[str, float], dict[str, Any]]:
    stages = Stopwatch(dict.fromkeys(plain_class.STAGES, 0.0))
    fitted = plain_class.fit(config, networks, train, stages, stop)
    for name, bank in fitted.banks.items():
        picks = len(bank) - 1
        stages.seconds[f"pick {name}"] *= picks / min(picks, (stop or len(bank)) - 1)
    of_fit = dict(stages.seconds)
    metrics = plain_class.evaluate(config, networks, fitted, test, stages)
    fit, total = sum(of_fit.values()), sum(stages.seconds.values())
    return {"fit": fit, "evaluate": total - fit, "total": total, **of_fit}, metrics

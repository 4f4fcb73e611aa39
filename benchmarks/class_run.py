"""Time and memory of fitting and evaluating a whole class in its own process, in the fast form or the plain one."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from torch import Tensor

from benchmarks import workload
from benchmarks.measuring import PRODUCT_SIDE, count_flops, matrix_product, median_seconds_of, timed_calls
from feature_extractors import reference
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import collect_features, evaluate, fit_detector
from utils.memory import peak_memory_mb
from utils.metrics import evaluate as compute_metrics
from utils.records import Sample


class ClassRun(NamedTuple):
    """Time and memory of fitting and evaluating a whole class."""

    train: int  # number of samples
    test: int
    seconds: dict[str, float]  # "fit", "evaluate", "total"; of the plain form also "pick" and "score" of fitting
    start_mb: float  # resident with networks and samples, before the work
    peak_mb: float
    share_of_product: float  # rate of the counted operations over that of a large matrix product
    metrics: dict[str, Any]  # as in results.json


def run_class(form: str, size: str, train: int, test: int, stop: int | None, memory_budget: float) -> ClassRun:
    """Fit and evaluate a class in the `form` "plain", or in the fast form with this precision.

    The plain greedy loop ends after `stop` picks, and its time is extrapolated to all picks; None: it runs to the end.
    """
    numbers = workload.SIZES[size]
    networks = workload.build_networks(numbers)
    good = workload.made_up_samples(train, "train", numbers.img_size)
    tested = workload.made_up_samples(test, "test", numbers.img_size)
    config = workload.detector_config(numbers, "fp32" if form == "plain" else form)
    product = matrix_product("bf16" if form == "bf16" else "fp32")
    product_seconds = [median_seconds_of(product, 4)]
    start = peak_memory_mb()
    if form == "plain":
        plain = workload.plain_networks(numbers)
        seconds, metrics = _run_plain(config, plain, good, tested, stop)
        of_sample = count_flops(partial(workload.plain_features, config, plain, good[0]))
    else:
        seconds, metrics = _run_fast(config, networks, good, tested, memory_budget)
        image, points = cast(Tensor, good[0].rgb), workload.valid_points(good[0])
        of_sample = count_flops(lambda: (networks.rgb(image[None]), networks.xyz([points])))
    peak = peak_memory_mb()
    product_seconds.append(median_seconds_of(product, 4))
    seconds["total"] = seconds["fit"] + seconds["evaluate"]
    rate = count_operations(config, networks, of_sample, train, test) / seconds["total"]
    share = rate * statistics.mean(product_seconds) / (2 * PRODUCT_SIDE**3)
    return ClassRun(train, test, seconds, start, peak, share, metrics)


def count_operations(
    config: DetectorConfig, networks: workload.Networks, of_sample: float, train: int, test: int
) -> float:
    """Operations of the features, with `of_sample` of each sample, and of the coresets and searches of both banks."""
    rgb, xyz = networks
    total = (train + test) * of_sample
    picks = train * config.xyz_grid**2
    for patches, dim in ((config.xyz_grid**2, xyz.embed_dim), (rgb.grid_size**2, rgb.embed_dim)):
        rows, picks = train * patches, int(config.f_coreset * picks)
        width = min(johnson_lindenstrauss_min_dim(rows, eps=config.coreset_eps), dim)
        total += workload.distance_flops(picks, rows, width)
        total += (train + test) * workload.distance_flops(patches, picks, dim)
    return total


def _run_fast(
    config: DetectorConfig, networks: workload.Networks, train: list[Sample], test: list[Sample], memory_budget: float
) -> tuple[dict[str, float], dict[str, Any]]:
    begin = time.perf_counter()
    extractor = PatchExtractor(config, *networks)
    features = collect_features(extractor, train, len(train), memory_budget=memory_budget)
    detector = fit_detector(config, extractor, features)
    fitted = time.perf_counter()
    metrics = evaluate({config.method_name: detector}, test, len(test))[config.method_name].metrics
    return {"fit": fitted - begin, "evaluate": time.perf_counter() - fitted}, metrics


def _run_plain(
    config: DetectorConfig, networks: dict[str, Any], train: list[Sample], test: list[Sample], stop: int | None
) -> tuple[dict[str, float], dict[str, Any]]:
    begin = time.perf_counter()
    with (
        timed_calls(reference, "extract") as extract,
        timed_calls(reference, "score_banks") as score,
        stopped_coreset(stop) as picking,
    ):
        patches = [workload.plain_features(config, networks, each) for each in [*train, *test]]
        scores, maps = reference.fit_and_score(config, patches[: len(train)], patches[len(train) :])
    of_test = sum(extract[len(train) :]) + sum(score[len(train) :])
    pick = sum(seconds * factor for seconds, factor in picking)
    fit = time.perf_counter() - begin - of_test + pick - sum(seconds for seconds, _ in picking)
    begin = time.perf_counter()
    masks = [sample.mask[0].numpy() for sample in test if sample.mask is not None]
    metrics, _ = compute_metrics([int(sample.label or 0) for sample in test], scores.tolist(), masks, list(maps))
    evaluate = of_test + time.perf_counter() - begin
    return {"fit": fit, "evaluate": evaluate, "pick": pick, "score": sum(score[: len(train)])}, metrics


@contextmanager
def stopped_coreset(stop: int | None) -> Iterator[list[tuple[float, float]]]:
    """End the plain greedy loop after `stop` picks; the first rows left fill up the selection.

    Yields the seconds of each selection, and the factor that extrapolates them to all of its picks.
    """
    original, picking = reference.greedy_coreset, []

    def stopped(rows: Tensor, n: int) -> Tensor:
        begin = time.perf_counter()
        picks = original(rows, min(n, stop or n))
        picking.append((time.perf_counter() - begin, (n - 1) / max(len(picks) - 1, 1)))
        left = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, picks, False).nonzero()[:, 0]
        return torch.cat([picks, left[: n - len(picks)]])

    with patch.object(reference, "greedy_coreset", stopped):
        yield picking

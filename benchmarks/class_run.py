"""Fitting and evaluating a whole class in a process of its own, the fast way or the plain one: seconds and memory."""

import statistics
import time
from typing import Any, NamedTuple

import torch
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from benchmarks import plain, plain_class
from benchmarks.measuring import PRODUCT_SIDE, matrix_product, median_seconds
from benchmarks.workload import (
    SIZES,
    Networks,
    build_networks,
    coreset_flops,
    detector_config,
    group_encoder_flops,
    made_up_samples,
    point_transformer_flops,
    search_flops,
    vit_flops,
)
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, collect_features, evaluate, fit_detector
from utils.memory import peak_memory_mb
from utils.records import Sample


class ClassRun(NamedTuple):
    """What a whole class took."""

    train: int  # training samples
    test: int
    seconds: dict[str, float]  # "fit", "evaluate", "total"; of the plain form also the stages of "fit"
    start_mb: float  # resident with networks and samples, before the work
    peak_mb: float
    share_of_product: float  # counted operations over the total seconds, of the rate of a large matrix product
    metrics: dict[str, Any]  # as in results.json


def run_class(variant: str, size: str, train: int, test: int, stop: int | None, memory_budget: float) -> ClassRun:
    """Fit and evaluate.

    Args:
        variant: "plain", or the precision of the fast form.
        size: a key of SIZES.
        train, test: numbers of samples.
        stop: picks after which the plain greedy loop ends; its seconds are multiplied up to all picks. None: it runs.
        memory_budget: of the fast form, GB, see TrainingFeatures.
    """
    numbers = SIZES[size]
    networks = build_networks(numbers)
    good, judged = (
        made_up_samples(count, split, numbers.img_size) for count, split in ((train, "train"), (test, "test"))
    )
    config = detector_config(numbers, "fp32" if variant == "plain" else variant)
    product = matrix_product("bf16" if variant == "bf16" else "fp32")
    product_seconds = [median_seconds({"product": product}, 3)["product"]]
    start = peak_memory_mb()
    if variant == "plain":
        seconds, metrics = _run_plain(config, plain.make_plain(networks), good, judged, stop)
    else:
        seconds, metrics = _run_fast(config, networks, good, judged, memory_budget)
    peak = peak_memory_mb()
    product_seconds.append(median_seconds({"product": product}, 3)["product"])
    product_rate = 2 * PRODUCT_SIDE**3 / statistics.mean(product_seconds)
    rate = count_operations(config, networks, train, test, variant == "plain") / seconds["total"]
    return ClassRun(train, test, seconds, start, peak, rate / product_rate, metrics)


def count_operations(config: DetectorConfig, networks: Networks, train: int, test: int, twice: bool) -> float:
    """Of features (of the training samples `twice` in the plain form), coresets and searches of both banks."""
    rgb, xyz = networks
    of_sample = vit_flops(rgb) + group_encoder_flops(xyz, plain=twice) + point_transformer_flops(xyz)
    total = ((1 + twice) * train + test) * of_sample
    picks = train * config.xyz_grid**2
    for patches, dim in ((config.xyz_grid**2, xyz.embed_dim), (rgb.grid_size**2, rgb.embed_dim)):
        rows, picks = train * patches, int(config.f_coreset * picks)
        width = min(johnson_lindenstrauss_min_dim(rows, eps=config.coreset_eps), dim)
        total += coreset_flops(rows, width, picks) + (train + test) * search_flops(patches, picks, dim)
    return total


def _run_fast(
    config: DetectorConfig, networks: Networks, train: list[Sample], test: list[Sample], memory_budget: float
) -> tuple[dict[str, float], dict[str, Any]]:
    begin = time.perf_counter()
    extractor = PatchExtractor(config, networks.rgb, networks.xyz)
    features = collect_features(extractor, train, len(train), memory_budget=memory_budget)
    detector = fit_detector(config, extractor, features)
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

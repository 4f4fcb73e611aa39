"""Speed of the triple method on a GPU: throughput, each stage against its limit, waits of the host, and the fit.

    python benchmarks/gpu.py                                         # 244 training samples, like bagel
    python benchmarks/gpu.py --device cpu --networks tiny --train 4  # quick trial

The weights are random. The samples are synthetic and held in main memory, so reading files takes no time. Only
--distinct different samples are made; larger numbers repeat them. For the fit, Gaussian noise is added to the features
of the training samples. Without noise, random networks give nearly equal features, so bounded searches are incomplete
and every batch is scored twice. Trained networks do not have this problem. A measured time ends when the device has
finished, and the median is reported. The script prints tables and writes JSON.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fusion_pretrain
from benchmarks import workload
from benchmarks.gpu_stages import Rates, stages_of
from benchmarks.gpu_waits import count_batched_scoring, count_waits, print_batched_scoring, print_waits
from benchmarks.measuring import make_parser, matrix_product, median_seconds, synchronize, write_record
from feature_extractors.coreset import select_coreset
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import mean_and_std
from feature_extractors.pipeline import Stopwatch, collect_features, fit_detector
from feature_extractors.training_features import TrainingFeatures
from models.contrastive import contrastive_loss
from models.feature_fusion import FeatureFusion
from models.point_ops import farthest_point_sample, knn
from runner.pretrain_config import PretrainConfig, Progress
from runner.training import Trainer, make_loader, make_optimizer
from utils.distributed import Ranks, choose_device
from utils.feature_store import resize_patches
from utils.memory import default_memory_budget, peak_memory_mb
from utils.precision import DTYPES
from utils.records import PatchFeatures, Sample

PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
FIT_NOISE = 1.0  # times the standard deviation of a column
Extractors = Mapping[str, PatchExtractor]  # by precision


class Bench:
    """Timer of work on a device. `time` also prints the result and keeps it in `steps`."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.steps: dict[str, dict[str, float]] = {}

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds from the start of `work` until the device has finished."""

        def finished() -> None:
            work()
            synchronize(self.device)

        return median_seconds({"": finished}, self.repeats)[""]

    def time(self, name: str, work: Callable[[], object], *, flops: float = 0, moved: float = 0) -> float:
        """Median seconds of a step that does `flops` operations and moves `moved` bytes."""
        seconds = self.seconds(work)
        self.steps[name] = {"seconds": seconds, "tflop_per_second": flops / seconds / 1e12}
        rate = f"{flops / seconds / 1e12:12.2f} TFLOP/s" if flops else ""
        rate += f"{moved / seconds / 1e9:12.1f} GB/s" if moved else ""
        print(f"{name:44}{1e3 * seconds:12.3f} ms{rate}", flush=True)
        return seconds


def measure_rates(bench: Bench) -> Rates:
    """Measure the rates of large matrix products and large copies. On a CPU, copies from the host take no time."""
    device, product, copy = bench.device, {}, {}
    side, size = PRODUCT_SIDE[device.type], COPY_BYTES[device.type]
    for precision in DTYPES:
        name, flops = f"matrix product of {side} x {side}, {precision}", 2.0 * side**3
        product[precision] = flops / bench.time(name, matrix_product(precision, side, device), flops=flops)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy["memory"] = 2 * size / bench.time("copy in memory", partial(target.copy_, source), moved=2 * size)
    copy["host"] = math.inf
    if device.type == "cuda":
        host = torch.zeros(size, dtype=torch.uint8).pin_memory()
        work = partial(target.copy_, host, non_blocking=True)
        copy["host"] = size / bench.time("copy from pinned memory", work, moved=size)
    return Rates(product, copy)


@torch.inference_mode()
def time_point_searches(bench: Bench, sample: Sample, size: workload.Size) -> None:
    """Time the point searches of one cloud with each backend."""
    points = workload.valid_points(sample).to(bench.device)[None]
    for backend in ("triton", "torch") if bench.device.type == "cuda" else ("auto",):
        sampling = partial(farthest_point_sample, points, size.num_group, backend)
        bench.time(f"farthest point sampling of a cloud, {backend}", sampling)
        centers = points[:, sampling()[0]]
        bench.time(f"neighbors of a cloud, {backend}", partial(knn, centers, points, size.group_size, backend))


@torch.inference_mode()
def time_coreset(bench: Bench, features: Sequence[PatchFeatures], train: int, f_coreset: float) -> None:
    """Time coreset selection from as many xyz patches as `train` training samples have."""
    patches = torch.cat([each.xyz for each in features if each.xyz is not None])
    rows = workload.grown(patches, train * len(patches) // len(features))
    count = int(f_coreset * len(rows))
    selection = partial(select_coreset, rows, mean_and_std(patches), count, 0.9, workload.SEED)
    bench.time(f"coreset {len(rows)} x {rows.shape[1]} to {count}", selection)


def time_training(bench: Bench, features: Sequence[PatchFeatures], precision: str) -> None:
    """Time one update of UFF training on all samples, with their patches on the device."""
    items: Any = []  # a dataset
    for number, each in enumerate(features):
        assert each.xyz is not None
        assert each.rgb is not None
        rgb = resize_patches(each.rgb, math.isqrt(len(each.xyz)))
        items.append((each.xyz.clone(), rgb.clone(), number))  # tensors of inference mode cannot be trained with
    defaults = PretrainConfig(**vars(fusion_pretrain.parse_args([])))
    lengths: Any = {"epochs": bench.repeats + 1, "warmup_epochs": 0, "accum_iter": 1, "batch_size": len(items)}
    config = replace(defaults, lr=1e-4, num_workers=0, precision=precision, **lengths)
    model = FeatureFusion(*(patches.shape[1] for patches in items[0][:2])).to(bench.device)
    loader, optimizer = make_loader(items, config, Ranks()), make_optimizer(model, weight_decay=0.0)
    trainer = Trainer(config, model, contrastive_loss, loader, optimizer, Progress(), bench.device)
    name = f"UFF update, {len(items)} samples of {len(items[0][0])} patches, {precision}"
    bench.time(name, lambda: list(trainer.train_epoch()))


def fit_class(extractors: Extractors, samples: Sequence[Sample], train: int) -> tuple[Detector, dict[str, float]]:
    """Fit a detector to `train` training samples; return it with the seconds of each stage, features by precision."""
    seconds = {}
    extractor = extractors["fp32"]
    budget = default_memory_budget(extractor.device)
    for precision, each in extractors.items():
        stopwatch = Stopwatch()
        collect_features(each, islice(cycle(samples), train), train, stopwatch, memory_budget=budget)
        seconds[f"features, {precision}"] = stopwatch.seconds["extract"]
    features = TrainingFeatures(train, budget)
    generator = torch.Generator(extractor.device).manual_seed(workload.SEED)
    for of_sample in islice(cycle(extractor.extract(samples)), train):
        features.append(workload.varied_features(of_sample, generator, FIT_NOISE))
    stopwatch = Stopwatch()
    detector = fit_detector(extractor.config, extractor, features, stopwatch)
    seconds |= {"coresets": stopwatch.seconds["coreset"], "decision fusion": stopwatch.seconds["fuse"]}
    print(f"\nfit to {train} training samples; rows of the banks: ", end="")
    print(", ".join(f"{name} {len(bank)}" for name, bank in detector.banks.items()))
    for name, value in seconds.items():
        print(f"{name:44}{value:12.2f} s")
    return detector, seconds


def time_batches(bench: Bench, detectors: Mapping[str, Detector], batches: Sequence[Sequence[Sample]]) -> Any:
    """Measure samples per second, by precision and batch size. Samples and predictions are in main memory."""
    found: dict[str, dict[int, float]] = {precision: {} for precision in detectors}
    print(f"\n{'samples per second':20}" + "".join(f"{precision:>12}" for precision in detectors))
    for batch in batches:
        for precision, detector in detectors.items():
            found[precision][len(batch)] = len(batch) / bench.seconds(partial(detector.predict_batch, batch))
        rates = "".join(f"{of_sizes[len(batch)]:12.4g}" for of_sizes in found.values())
        print(f"{f'batch of {len(batch)}':20}{rates}", flush=True)
    return found


@torch.inference_mode()
def time_stages(bench: Bench, detector: Detector, samples: Sequence[Sample], rates: Rates) -> dict[str, Any]:
    """Time each stage of a batch on its own, and the whole prediction; print the times per sample."""
    count, precision = len(samples), detector.extractor.precision
    prediction, found = stages_of(detector, samples), {}
    title = f"stages of a batch of {count}, {precision}"
    print(f"\n{title:36}{'ms/sample':>10}{'GFLOP':>10}{'MB':>10}{'limit, ms':>11}{'reached':>9}")
    for stage in prediction.stages:
        seconds, limit = bench.seconds(stage.work), stage.limit(rates)
        found[stage.name] = {"seconds": seconds / count, "flops": stage.flops / count, "bytes": stage.moved / count}
        found[stage.name] |= {"limit_seconds": limit / count, "share_of_limit": limit / seconds}
        columns = f"{1e3 * seconds / count:10.3f}{stage.flops / count / 1e9:10.3g}{stage.moved / count / 1e6:10.3g}"
        print(f"{stage.name:36}{columns}{1e3 * limit / count:11.3g}{limit / seconds:9.1%}", flush=True)
    whole = bench.seconds(partial(detector.predict_batch, samples)) / count
    print(f"{'sum':36}{1e3 * sum(each['seconds'] for each in found.values()):10.3f}")
    print(f"{'prediction':36}{1e3 * whole:10.3f}")
    if not prediction.complete:
        print("The bounded searches were incomplete, so the batch is scored twice.")
    return {"samples": count, "stages": found, "prediction_seconds": whole, "complete": prediction.complete}


def make_extractors(size: workload.Size, device: torch.device) -> dict[str, PatchExtractor]:
    """Extractors with the same networks in each precision."""
    extractors = {}
    for precision in DTYPES:
        networks = workload.build_networks(size)
        config = workload.detector_config(size, precision, method_name=workload.TRIPLE, use_uff=True)
        with torch.random.fork_rng():
            torch.manual_seed(workload.SEED)
            fusion = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim)
        extractors[precision] = PatchExtractor(config, *networks, fusion, device)
    return extractors


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "gpu")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--train", type=int, default=244, help="number of training samples")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="samples per batch")
    parser.add_argument("--distinct", type=int, default=16, help="different samples; a UFF update uses all")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement; the median is reported")
    parser.add_argument("--networks", choices=workload.SIZES, default="published", help="tiny is for quick trials")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, size = choose_device(args.device), workload.SIZES[args.networks]
    bench = Bench(device, args.repeats)
    rates = measure_rates(bench)
    made = {split: workload.made_up_samples(args.distinct, split, size.img_size) for split in ("train", "test")}
    extractors = make_extractors(size, device)
    features = {precision: extractor.extract(made["train"]) for precision, extractor in extractors.items()}
    time_point_searches(bench, made["test"][0], size)
    time_coreset(bench, features["fp32"], args.train, extractors["fp32"].config.f_coreset)
    for precision in DTYPES:
        time_training(bench, features["fp32"], precision)
    fitted, fit = fit_class(extractors, made["train"], args.train)
    detectors = {
        precision: Detector(extractor.config, extractor, fitted.banks, fitted.decision_fusion)
        for precision, extractor in extractors.items()
    }
    default = extractors["fp32"].batch_size
    batches = {count: list(islice(cycle(made["test"]), count)) for count in (*args.batch_sizes, default, 1)}
    throughput = time_batches(bench, detectors, [batches[count] for count in args.batch_sizes])
    stages = {name: time_stages(bench, detector, batches[default], rates) for name, detector in detectors.items()}
    waits = [count_waits(detectors["bf16"], batches[count]) for count in (1, default)]
    print_waits(waits, device)
    together = [count_batched_scoring(detectors["bf16"], batches[count]) for count in (1, default)]
    print_batched_scoring(together)
    peak = peak_memory_mb(device)
    print(f"\n{'peak memory':44}{peak:12.0f} MB")
    found = {"steps": bench.steps, "fit_seconds": fit, "samples_per_second": throughput}
    write_record(args, {**found, "stages": stages, "waits": waits, "batched_scoring": together, "peak_mb": peak})


if __name__ == "__main__":
    main()

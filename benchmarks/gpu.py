"""What a GPU takes for the triple method: a part from its scan to its map, a coreset, a batch of the UFF's training.

    python benchmarks/gpu.py                                                             # 244 good parts, as of a bagel
    python benchmarks/gpu.py --device cpu --networks tiny --train 4 --batch 2 --repeats 1  # to try the script

Random weights and made-up scans, in memory, so that nothing is read while the clock runs. The xyz bank is the coreset
that is timed; the others, as large as the reference protocol has them, are the first patches of the parts. All banks
are of features in fp32. A time ends when the device has finished; the median counts. Prints a table; writes JSON.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import describe_machine, matrix_product, median_seconds, plain_arguments, write_json
from benchmarks.rows import CORESET_EPS, F_CORESET
from benchmarks.workload import (
    SEED,
    SIZES,
    build_networks,
    detector_config,
    grown,
    made_up_samples,
    search_flops,
    vit_flops,
)
from feature_extractors.alignment import valid_pixels
from feature_extractors.coreset import select_coreset
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank, mean_and_std
from models.contrastive import contrastive_loss
from models.feature_fusion import FeatureFusion
from models.point_ops import farthest_point_sample, knn
from models.rgb_backbone import VisionTransformerBackbone
from runner.training import Schedule, Trainer, make_loader, make_optimizer
from runner.training_state import Progress
from utils.distributed import Ranks, choose_device
from utils.feature_store import resize_patches
from utils.memory import peak_memory_mb
from utils.precision import DTYPES, autocast
from utils.records import PatchFeatures, Sample

METHOD = "DINO+Point_MAE+Fusion"
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


class Bench:
    """Times steps on a device, prints each and keeps it."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.steps: dict[str, dict[str, float]] = {}

    def time(self, name: str, work: Callable[[], object], *, pieces: int = 1, flops: float = 0) -> float:
        """Seconds of one of the `pieces` that `work` treats; `flops` counts the operations of all of them."""

        def finished() -> None:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        seconds = median_seconds({name: finished}, self.repeats)[name]
        step = self.steps[name] = {"seconds": seconds / pieces}
        rate = ""
        if flops:
            step["tflop_per_second"] = flops / seconds / 1e12
            rate = f"{step['tflop_per_second']:12.2f} TFLOP/s"
        print(f"{name:44}{1e3 * step['seconds']:12.3f} ms{rate}", flush=True)
        return step["seconds"]


def time_products(bench: Bench) -> None:
    """The rate that the other steps are held against."""
    side = PRODUCT_SIDE[bench.device.type]
    for precision in DTYPES:
        product = matrix_product(precision, side, bench.device)
        bench.time(f"matrix product of {side} x {side}, {precision}", product, flops=2 * side**3)


@torch.inference_mode()
def time_extraction(bench: Bench, extractors: dict[str, PatchExtractor], samples: list[Sample]) -> None:
    """The features of a sample, and what they are made of."""
    config = extractors["fp32"].config
    pictures = torch.stack([sample.rgb for sample in samples if sample.rgb is not None]).to(bench.device)
    scans = [sample.xyz for sample in samples if sample.xyz is not None]
    clouds = [xyz[:, valid_pixels(xyz)].T.contiguous().to(bench.device) for xyz in scans]  # (N, 3) each
    points = clouds[0][None]
    for backend in ("triton", "torch") if bench.device.type == "cuda" else ("auto",):
        sampling = partial(farthest_point_sample, points, config.num_group, backend)
        bench.time(f"farthest point sampling of a cloud, {backend}", sampling)
        centers = points[:, sampling()[0]]
        bench.time(f"neighbors of a cloud, {backend}", partial(knn, centers, points, config.group_size, backend))
    for precision, extractor in extractors.items():
        rgb, xyz = extractor.rgb_backbone, extractor.xyz_backbone
        assert isinstance(rgb, VisionTransformerBackbone)
        assert xyz is not None
        with autocast(bench.device, precision):
            flops = len(pictures) * vit_flops(rgb)
            bench.time(f"ViT, {precision}", partial(rgb, pictures), pieces=len(pictures), flops=flops)
            bench.time(f"point network, {precision}", partial(xyz, clouds), pieces=len(clouds))
        bench.time(f"features, {precision}", partial(extractor.extract, samples), pieces=len(samples))


@torch.inference_mode()
def make_banks(bench: Bench, seen: list[PatchFeatures], train: int) -> dict[str, MemoryBank]:
    """The banks that `train` good parts leave, in the order of the method; times the coreset of the first."""
    patches = {name: torch.cat([getattr(each, name) for each in seen]) for name in ("xyz", "rgb", "fusion")}
    rows = grown(patches["xyz"], train * len(patches["xyz"]) // len(seen))
    statistics = {name: mean_and_std(each) for name, each in patches.items()}
    count = int(F_CORESET * len(rows))
    chosen: list[Tensor] = []
    selection = partial(select_coreset, rows, statistics["xyz"], count, CORESET_EPS, SEED)
    bench.time(f"coreset {len(rows)} x {rows.shape[1]} to {count}", lambda: chosen.append(selection()))
    patches["xyz"] = rows[chosen[-1]]
    fewer = int(F_CORESET * count)  # of the other banks, as the reference protocol has it
    for name in ("rgb", "fusion"):
        patches[name] = grown(patches[name], fewer)
    return {name: MemoryBank(statistics[name].normalize(each), statistics[name]) for name, each in patches.items()}


@torch.inference_mode()
def time_judging(bench: Bench, detector: Detector, samples: list[Sample]) -> None:
    """Searches, all that follows on the features, and the whole way of a sample from main memory and back."""
    features, precision = detector.extractor.extract(samples), detector.extractor.precision
    for name, bank in detector.banks.items():
        queries = bank.statistics.normalize(getattr(features[0], name))
        search, flops = partial(bank.nearest, queries, "cancelling"), search_flops(len(queries), *bank.rows.shape)
        bench.time(f"search in {len(bank)} rows, {name}, {precision}", search, flops=flops)

    def scored() -> None:
        for each in features:
            detector.predict_features(each)

    bench.time(f"score and map, {precision}", scored, pieces=len(samples))

    def judged() -> None:
        for each in detector.extractor.extract(samples):
            detector.predict_features(each)

    seconds = bench.time(f"a part from scan to map, {precision}", judged, pieces=len(samples))
    bench.steps[f"parts per second, {precision}"] = {"rate": 1 / seconds}
    print(f"{f'parts per second, {precision}':44}{1 / seconds:12.1f}")


def time_training(bench: Bench, model: FeatureFusion, seen: list[PatchFeatures], precision: str) -> None:
    """Batches of the UFF's training, each with its update, of all parts at once; their patches are on the device."""
    items: Any = []  # a dataset: what has a length and items
    for number, each in enumerate(seen):
        assert each.xyz is not None
        assert each.rgb is not None
        rgb = resize_patches(each.rgb, math.isqrt(len(each.xyz)))
        # Clones, since tensors of inference mode cannot be trained with.
        items.append((each.xyz.clone(), rgb.clone(), number))
    loader = make_loader(
        items, batch_size=len(items), accum_iter=1, ranks=Ranks(), seed=SEED, num_workers=0, pin_memory=False
    )
    optimizer = make_optimizer(model, weight_decay=0.0)
    schedule = Schedule(1e-4, 0.0, 0, bench.repeats + 1)
    trainer = Trainer(
        model, contrastive_loss, loader, optimizer, schedule, Progress(), 1, bench.device, precision=precision
    )
    rows = sum(len(xyz) for xyz, _, _ in items)
    bench.time(f"UFF, a batch of {len(items)} parts, {precision}", lambda: list(trainer.train_epoch()))
    print(f"{'  of patches':44}{rows:12}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--train", type=int, default=244, help="good parts whose patches the coreset is chosen from")
    parser.add_argument("--batch", type=int, default=16, help="parts that are judged, and others that are learned")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts")
    parser.add_argument("--networks", choices=SIZES, default="published", help="tiny: to try the script")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_gpu.json"))
    args = parser.parse_args(argv)
    device, size = choose_device(args.device), SIZES[args.networks]
    machine = describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    bench = Bench(device, args.repeats)
    time_products(bench)
    samples, learned = (made_up_samples(args.batch, split, size.img_size) for split in ("test", "train"))
    extractors = {}
    for precision in DTYPES:
        networks = build_networks(size)
        config = detector_config(size, precision, method_name=METHOD, use_uff=True)
        fusion = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim)
        extractors[precision] = PatchExtractor(config, *networks, fusion, device)
    time_extraction(bench, extractors, samples)
    seen = extractors["fp32"].extract(learned)
    banks = make_banks(bench, seen, args.train)
    weights = np.ones(len(banks))  # as quick as fitted ones
    fusion_of_decisions = DecisionFusion(weights, weights, (1.0, 0.1, 1.0), (1.0, 0.1, 1.0))
    for extractor in extractors.values():
        time_judging(bench, Detector(extractor.config, extractor, banks, fusion_of_decisions), samples)
    for precision, extractor in extractors.items():
        widths = (network.embed_dim for network in (extractor.xyz_backbone, extractor.rgb_backbone) if network)
        time_training(bench, FeatureFusion(*widths).to(device), seen, precision)
    peak = peak_memory_mb(device)
    print(f"{'peak memory':44}{peak:12.0f} MB")
    record = {
        "schema": 1,
        "machine": machine,
        "arguments": plain_arguments(args),
        "steps": bench.steps,
        "peak_mb": peak,
    }
    write_json(args.output, record)


if __name__ == "__main__":
    main()

"""Time of each step of the triple method on a GPU: a sample from image and cloud to map, a coreset, a UFF update.

    python benchmarks/gpu.py                                                   # 244 training samples, like bagel
    python benchmarks/gpu.py --device cpu --networks tiny --train 4 --batch 2  # for a trial

Weights are random, and synthetic samples are held in main memory, so that no time goes into reading. The xyz bank is
the timed coreset. The other banks have the sizes of the reference protocol and hold the first patches. A time ends when
the device has finished; the median counts. The script prints a table and writes JSON.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fusion_pretrain
from benchmarks import workload
from benchmarks.measuring import count_flops, make_parser, matrix_product, median_seconds, write_record
from feature_extractors.coreset import select_coreset
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank, mean_and_std
from models.contrastive import contrastive_loss
from models.feature_fusion import FeatureFusion
from models.point_ops import farthest_point_sample, knn
from runner.pretrain_config import PretrainConfig, Progress
from runner.training import Trainer, make_loader, make_optimizer
from utils.distributed import Ranks, choose_device
from utils.feature_store import resize_patches
from utils.memory import peak_memory_mb
from utils.precision import DTYPES, autocast
from utils.records import PatchFeatures, Sample

PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


class Bench:
    """Timer of steps on a device; prints and keeps each time."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.steps: dict[str, dict[str, float]] = {}

    def time(self, name: str, work: Callable[[], object], *, pieces: int = 1, flops: float = 0) -> float:
        """Seconds of one of the `pieces` of `work`; `flops` counts the operations of all."""

        def finished() -> None:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        seconds = median_seconds({name: finished}, self.repeats)[name]
        self.steps[name] = {"seconds": seconds / pieces, "tflop_per_second": flops / seconds / 1e12}
        rate = f"{flops / seconds / 1e12:12.2f} TFLOP/s" if flops else ""
        print(f"{name:44}{1e3 * seconds / pieces:12.3f} ms{rate}", flush=True)
        return seconds / pieces


@torch.inference_mode()
def time_extraction(bench: Bench, extractors: dict[str, PatchExtractor], samples: list[Sample]) -> None:
    """Time the features of a sample and each network."""
    config = extractors["fp32"].config
    images = torch.stack([sample.rgb for sample in samples if sample.rgb is not None]).to(bench.device)
    clouds = [workload.valid_points(sample).to(bench.device) for sample in samples]
    points = clouds[0][None]
    for backend in ("triton", "torch") if bench.device.type == "cuda" else ("auto",):
        sampling = partial(farthest_point_sample, points, config.num_group, backend)
        bench.time(f"farthest point sampling of a cloud, {backend}", sampling)
        centers = points[:, sampling()[0]]
        bench.time(f"neighbors of a cloud, {backend}", partial(knn, centers, points, config.group_size, backend))
    for precision, extractor in extractors.items():
        rgb, xyz = extractor.rgb_backbone, extractor.xyz_backbone
        assert rgb is not None
        assert xyz is not None
        with autocast(bench.device, precision):
            flops = count_flops(partial(rgb, images))
            bench.time(f"ViT, {precision}", partial(rgb, images), pieces=len(images), flops=flops)
            bench.time(f"point network, {precision}", partial(xyz, clouds), pieces=len(clouds))
        bench.time(f"features, {precision}", partial(extractor.extract, samples), pieces=len(samples))


@torch.inference_mode()
def make_banks(bench: Bench, features: list[PatchFeatures], train: int, f_coreset: float) -> dict[str, MemoryBank]:
    """Return banks as large as those of `train` training samples, and time the coreset of the first."""
    patches = {name: torch.cat([getattr(each, name) for each in features]) for name in ("xyz", "rgb", "fusion")}
    rows = workload.grown(patches["xyz"], train * len(patches["xyz"]) // len(features))
    statistics = {name: mean_and_std(each) for name, each in patches.items()}
    count = int(f_coreset * len(rows))
    chosen: list[Tensor] = []
    selection = partial(select_coreset, rows, statistics["xyz"], count, 0.9, workload.SEED)
    bench.time(f"coreset {len(rows)} x {rows.shape[1]} to {count}", lambda: chosen.append(selection()))
    patches["xyz"] = rows[chosen[-1]]
    for name in ("rgb", "fusion"):
        patches[name] = workload.grown(patches[name], int(f_coreset * count))
    return {name: MemoryBank(statistics[name].normalize(each), statistics[name]) for name, each in patches.items()}


@torch.inference_mode()
def time_prediction(bench: Bench, detector: Detector, samples: list[Sample]) -> None:
    """Time the scoring of given features, and of a sample from main memory and back."""
    features, precision = detector.extractor.extract(samples), detector.extractor.precision

    bench.time(f"score and map, {precision}", partial(detector.predict_features, features), pieces=len(samples))
    name = f"a sample from image and cloud to map, {precision}"
    seconds = bench.time(name, partial(detector.predict_batch, samples), pieces=len(samples))
    bench.steps[f"samples per second, {precision}"] = {"rate": 1 / seconds}
    print(f"{f'samples per second, {precision}':44}{1 / seconds:12.1f}")


def time_training(bench: Bench, model: FeatureFusion, features: list[PatchFeatures], precision: str) -> None:
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
    loader, optimizer = make_loader(items, config, Ranks()), make_optimizer(model, weight_decay=0.0)
    trainer = Trainer(config, model, contrastive_loss, loader, optimizer, Progress(), bench.device)
    name = f"UFF update, {len(items)} samples of {len(items[0][0])} patches, {precision}"
    bench.time(name, lambda: list(trainer.train_epoch()))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "gpu")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--train", type=int, default=244, help="training samples of the coreset")
    parser.add_argument("--batch", type=int, default=16, help="samples that are predicted, and others for training")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--networks", choices=workload.SIZES, default="published", help="tiny: for a trial")
    args = parser.parse_args(argv)
    device, size = choose_device(args.device), workload.SIZES[args.networks]
    bench = Bench(device, args.repeats)
    side = PRODUCT_SIDE[device.type]
    for precision in DTYPES:
        product = matrix_product(precision, side, device)
        bench.time(f"matrix product of {side} x {side}, {precision}", product, flops=2 * side**3)
    test, train = (workload.made_up_samples(args.batch, split, size.img_size) for split in ("test", "train"))
    extractors = {}
    for precision in DTYPES:
        networks = workload.build_networks(size)
        config = workload.detector_config(size, precision, method_name=workload.TRIPLE, use_uff=True)
        fusion = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim)
        extractors[precision] = PatchExtractor(config, *networks, fusion, device)
    time_extraction(bench, extractors, test)
    features = extractors["fp32"].extract(train)
    banks = make_banks(bench, features, args.train, config.f_coreset)
    decision_fusion = DecisionFusion(np.ones(3), np.ones(3), *config.lambdas_of_banks)
    for extractor in extractors.values():
        time_prediction(bench, Detector(extractor.config, extractor, banks, decision_fusion), test)
    for precision in DTYPES:
        model = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim).to(device)
        time_training(bench, model, features, precision)
    peak = peak_memory_mb(device)
    print(f"{'peak memory':44}{peak:12.0f} MB")
    write_record(args, {"steps": bench.steps, "peak_mb": peak})


if __name__ == "__main__":
    main()

"""Fitting the largest class of MVTec 3D-AD, 361 good parts, within a memory budget: three banks, reference protocol.

    python benchmarks/largest_class.py                       # 6 GB, about half an hour on two cores
    python benchmarks/largest_class.py --memory_budget 4 --train_feature_dtype fp16

The features of a few made-up parts come from the networks, with random weights; those of all others are theirs with
noise, since how they come about does not change the memory that they take. The rest is main.py's own fit, in a process
of its own. Prints the seconds of each stage and the peak of resident memory; writes JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from benchmarks.measuring import describe_machine, in_fresh_process, write_json
from benchmarks.workload import SEED, SIZES, build_networks, detector_config, made_up_samples, varied
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, fit_detector
from feature_extractors.training_features import TrainingFeatures
from models.feature_fusion import FeatureFusion
from utils.feature_store import STORAGE_DTYPES
from utils.memory import peak_memory_mb
from utils.records import PatchFeatures

METHOD = "DINO+Point_MAE+Fusion"


class LargestClass(NamedTuple):
    """What fitting took."""

    train: int
    on_disk: bool  # where the features lay
    rows: dict[str, int]  # of each bank
    seconds: dict[str, float]  # by stage, as in results.json
    start_mb: float  # resident with the networks, before the features
    peak_mb: float


def fit_class(size_name: str, train: int, distinct: int, memory_budget: float, dtype: torch.dtype) -> LargestClass:
    """Fit, see the flags of the script for the arguments."""
    size = SIZES[size_name]
    networks = build_networks(size)
    fusion = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim)
    config = detector_config(size, "fp32", method_name=METHOD, use_uff=True)
    extractor = PatchExtractor(config, *networks, fusion)
    seen = [extractor(sample) for sample in made_up_samples(distinct, "train", size.img_size)]
    start = peak_memory_mb()
    features = TrainingFeatures(train, memory_budget, dtype)
    generator = torch.Generator().manual_seed(SEED)
    for i in tqdm(range(train), desc="features", unit="sample", leave=False):
        features.append(seen[i] if i < distinct else _like(seen[i % distinct], generator))
    stopwatch = Stopwatch()
    detector = fit_detector(config, extractor, features, stopwatch)
    rows = {name: len(bank.rows) for name, bank in detector.banks.items()}
    return LargestClass(train, features.on_disk, rows, stopwatch.seconds, start, peak_memory_mb())


def _like(seen: PatchFeatures, generator: torch.Generator) -> PatchFeatures:
    """The features of another part of the same kind."""
    return PatchFeatures(*(None if each is None else varied(each, generator) for each in seen))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--train", type=int, default=361, help="training samples")
    parser.add_argument("--distinct", type=int, default=8, help="of them with features from the networks")
    parser.add_argument("--memory_budget", type=float, default=6.0, help="GB")
    parser.add_argument("--train_feature_dtype", default="fp32", choices=STORAGE_DTYPES)
    parser.add_argument("--networks", choices=SIZES, default="published", help="tiny: to try the script")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_largest_class.json"))
    args = parser.parse_args(argv)
    dtype = STORAGE_DTYPES[args.train_feature_dtype]
    found = in_fresh_process(fit_class, args.networks, args.train, args.distinct, args.memory_budget, dtype)
    rows = ", ".join(f"{name} {count}" for name, count in found.rows.items())
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in found.seconds.items() if value)
    print(f"{found.train} training samples, features {'on disk' if found.on_disk else 'in memory'}; rows: {rows}")
    print(f"{seconds}; peak {found.peak_mb:.0f} MB ({found.start_mb:.0f} MB before)")
    record = {"schema": 1, "machine": describe_machine(), "memory_budget": args.memory_budget, **found._asdict()}
    write_json(args.output, record)


if __name__ == "__main__":
    main()

"""Fitting the largest class of MVTec 3D-AD, 361 training samples and three banks, within a memory budget.

    python benchmarks/largest_class.py                       # 6 GB, about half an hour on two cores
    python benchmarks/largest_class.py --memory_budget 4 --train_feature_dtype fp16

Networks with random weights extract a few synthetic samples. The features of all other samples are copies of these with
noise. The rest is the fit of main.py in its own process. The script prints the time of each stage and the peak of
resident memory, and writes JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)


from benchmarks.measuring import in_fresh_process, make_parser, write_record
from benchmarks.workload import SEED, SIZES, TRIPLE, build_networks, detector_config, made_up_samples, varied_features
from feature_extractors.extractor import PatchExtractor
from feature_extractors.pipeline import Stopwatch, fit_detector
from feature_extractors.training_features import TrainingFeatures
from models.feature_fusion import FeatureFusion
from utils.feature_store import STORAGE_DTYPES
from utils.memory import peak_memory_mb
from utils.reporting.progress import progress_bar


def fit_class(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of each bank, seconds of each stage, and resident memory with the networks alone and at its peak."""
    size = SIZES[args.networks]
    networks = build_networks(size)
    config = detector_config(size, "fp32", method_name=TRIPLE, use_uff=True)
    fusion = FeatureFusion(networks.xyz.embed_dim, networks.rgb.embed_dim)
    extractor = PatchExtractor(config, *networks, fusion)
    extracted = [extractor(sample) for sample in made_up_samples(args.distinct, "train", size.img_size)]
    start = peak_memory_mb()
    features = TrainingFeatures(args.train, args.memory_budget, STORAGE_DTYPES[args.train_feature_dtype])
    generator = torch.Generator().manual_seed(SEED)
    for i in progress_bar(range(args.train), desc="features", unit="sample"):
        of_sample = extracted[i % args.distinct]
        features.append(of_sample if i < args.distinct else varied_features(of_sample, generator))
    stopwatch = Stopwatch()
    detector = fit_detector(config, extractor, features, stopwatch)
    rows = {name: len(bank.rows) for name, bank in detector.banks.items()}
    memory = {"on_disk": features.on_disk, "start_mb": start, "peak_mb": peak_memory_mb()}
    return {"rows": rows, "seconds": stopwatch.seconds, **memory}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "largest_class")
    parser.add_argument("--train", type=int, default=361, help="training samples")
    parser.add_argument("--distinct", type=int, default=8, help="training samples with features from the networks")
    parser.add_argument("--memory_budget", type=float, default=6.0, help="GB")
    parser.add_argument("--train_feature_dtype", default="fp32", choices=STORAGE_DTYPES)
    parser.add_argument("--networks", choices=SIZES, default="published", help="tiny: for a trial")
    args = parser.parse_args(argv)
    found = in_fresh_process(fit_class, args)
    rows = ", ".join(f"{name} {count}" for name, count in found["rows"].items())
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in found["seconds"].items() if value)
    print(f"{args.train} training samples, features {'on disk' if found['on_disk'] else 'in memory'}; rows: {rows}")
    print(f"{seconds}; peak {found['peak_mb']:.0f} MB ({found['start_mb']:.0f} MB before)")
    write_record(args, found)


if __name__ == "__main__":
    main()

"""What half precision in the networks changes: patch by patch, and in the metrics of a class.

    python benchmarks/precision.py --dataset_path demo/parts --classes gasket bracket cookie \\
        --rgb_backbone_name efficientnet_lite0 --xyz_backbone_name FPFH
    python benchmarks/precision.py --dataset_path datasets/mvtec3d --classes bagel

For each bank the cosine between a patch in fp32 and the same in bf16, over the test split's patches that hold a point:
mean and least. Then the metrics of the method in both. Prints them; writes JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import describe_machine, write_json
from dataset import AnomalyDataset, SampleFiles, index_split
from feature_extractors.config import METHODS, DetectorConfig
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.pipeline import collect_features, evaluate, fit_detector
from utils.errors import exit_on_input_error
from utils.precision import DTYPES
from utils.records import PatchFeatures

METRICS = ("image_rocauc", "pixel_rocauc", "au_pro")


def cosines(whole: list[PatchFeatures], half: list[PatchFeatures], bank: str) -> Tensor:
    """Of each patch that is not exactly zero: (patches,)."""
    first, second = (torch.cat([getattr(each, bank) for each in features]) for features in (whole, half))
    occupied = (first != 0).any(dim=1)
    return F.cosine_similarity(first[occupied].double(), second[occupied].double(), dim=1)


def compare_class(folder: Path, extractors: dict[str, PatchExtractor]) -> dict[str, Any]:
    """Cosines by bank and metrics by precision of one class."""
    config = extractors["fp32"].config

    def load(files: list[SampleFiles]) -> AnomalyDataset:
        return AnomalyDataset(files, config.method.modalities, config.img_size)

    train, test = (load(index_split(folder, split, config.method.modalities)) for split in ("train", "test"))
    features, metrics = {}, {}
    for precision, extractor in extractors.items():
        features[precision] = [extractor(test[i]) for i in range(len(test))]
        good = collect_features(extractor, (train[i] for i in range(len(train))), len(train))
        detector = fit_detector(extractor.config, extractor, good)
        evaluation = evaluate({"it": detector}, (test[i] for i in range(len(test))), len(test))["it"]
        metrics[precision] = {name: evaluation.metrics[name] for name in METRICS}
    found = {bank: cosines(features["fp32"], features["bf16"], bank) for bank in config.method.banks}
    return {
        "cosine": {bank: {"mean": float(each.mean()), "least": float(each.min())} for bank, each in found.items()},
        "metrics": metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--method_name", default="DINO+Point_MAE+Fusion", choices=METHODS)
    parser.add_argument("--rgb_backbone_name", default="vit_base_patch8_224_dino")
    parser.add_argument("--xyz_backbone_name", default="Point_MAE")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--fusion_module_path", type=Path, help="with it fused features, without it concatenated ones")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_precision.json"))
    args = parser.parse_args()
    extractors = {}
    for precision in DTYPES:
        config = DetectorConfig(
            method_name=args.method_name,
            rgb_backbone_name=args.rgb_backbone_name,
            xyz_backbone_name=args.xyz_backbone_name,
            use_uff=args.fusion_module_path is not None,
            precision=precision,
            random_state=0,
        )
        extractors[precision] = build_extractor(config, args.checkpoint_dir, args.fusion_module_path or Path())
    record: dict[str, Any] = {"schema": 1, "machine": describe_machine(), "method": args.method_name, "classes": {}}
    for name in args.classes:
        record["classes"][name] = found = compare_class(args.dataset_path / name, extractors)
        for bank, of_bank in found["cosine"].items():
            print(f"{name:12} {bank:7} cosine mean {of_bank['mean']:.6f}, least {of_bank['least']:.4f}")
        for metric in METRICS:
            values = ", ".join(f"{each} {found['metrics'][each][metric]:.4f}" for each in DTYPES)
            print(f"{name:12} {metric:13} {values}")
    write_json(args.output, record)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

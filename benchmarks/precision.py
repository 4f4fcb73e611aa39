"""Effect of half precision in the networks, patch by patch and on the metrics of a class.

    python benchmarks/precision.py --dataset_path demo/parts --classes gasket bracket cookie \\
        --rgb_backbone_name efficientnet_lite0 --xyz_backbone_name FPFH
    python benchmarks/precision.py --dataset_path datasets/mvtec3d --classes bagel

The script prints the mean and the minimum of the cosine between a test patch in fp32 and in bf16, for each bank and
without background, and the metrics of the method in both precisions. It also writes JSON.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import make_parser, write_record
from dataset import AnomalyDataset, index_split, load_samples
from feature_extractors.config import METHODS, DetectorConfig
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.pipeline import collect_features, evaluate, fit_detector
from utils.precision import DTYPES
from utils.reporting.messages import exit_on_error

METRICS = ("image_rocauc", "pixel_rocauc", "au_pro")


def compare_class(folder: Path, extractors: dict[str, PatchExtractor]) -> dict[str, Any]:
    """Cosines by bank and metrics by precision of one class."""
    config = extractors["fp32"].config
    modalities = config.method.modalities
    files = (index_split(folder, split, modalities) for split in ("train", "test"))
    train, test = (list(load_samples(AnomalyDataset(each, modalities, config.img_size), 0)) for each in files)
    features, metrics = {}, {}
    for precision, extractor in extractors.items():
        features[precision] = [extractor(sample) for sample in test]
        detector = fit_detector(extractor.config, extractor, collect_features(extractor, train, len(train)))
        evaluation = evaluate({"": detector}, test, len(test))[""]
        metrics[precision] = {name: evaluation.metrics[name] for name in METRICS}
    cosines = {}
    for bank in config.method.banks:
        fp32, bf16 = (torch.cat([getattr(each, bank) for each in features[name]]) for name in ("fp32", "bf16"))
        occupied = (fp32 != 0).any(dim=1)
        cosine = F.cosine_similarity(fp32[occupied].double(), bf16[occupied].double(), dim=1)
        cosines[bank] = {"mean": float(cosine.mean()), "min": float(cosine.min())}
    return {"cosine": cosines, "metrics": metrics}


@exit_on_error()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "precision")
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--method_name", default="DINO+Point_MAE+Fusion", choices=METHODS)
    parser.add_argument("--rgb_backbone_name", default="vit_base_patch8_224_dino")
    parser.add_argument("--xyz_backbone_name", default="Point_MAE")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--fusion_module_path", type=Path, help="UFF checkpoint; without it, patches are concatenated")
    args = parser.parse_args(argv)
    names = {name: getattr(args, name) for name in ("method_name", "rgb_backbone_name", "xyz_backbone_name")}
    extractors = {}
    for precision in DTYPES:
        use_uff = args.fusion_module_path is not None
        config = DetectorConfig(**names, use_uff=use_uff, precision=precision, random_state=0)
        extractors[precision] = build_extractor(config, args.checkpoint_dir, args.fusion_module_path or Path())
    classes = {}
    for name in args.classes:
        classes[name] = found = compare_class(args.dataset_path / name, extractors)
        for bank, of_bank in found["cosine"].items():
            print(f"{name:12} {bank:7} cosine mean {of_bank['mean']:.6f}, min {of_bank['min']:.4f}")
        for metric in METRICS:
            values = ", ".join(f"{each} {found['metrics'][each][metric]:.4f}" for each in DTYPES)
            print(f"{name:12} {metric:13} {values}")
    write_record(args, {"classes": classes})


if __name__ == "__main__":
    main()

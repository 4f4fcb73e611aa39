"""The command line of main.py: its flags, and the frozen settings that they become."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dataset import DATASET_CLASSES
from feature_extractors.config import (
    BANKS,
    MEMORY_BANKS,
    METHODS,
    PROTOCOLS,
    DetectorConfig,
    Method,
    covering_method,
)
from feature_extractors.thresholds import check_target_fpr
from models import XYZ_BACKBONES, rgb_spec
from models.point_ops import check_backend
from runner.scheduling import PARALLEL
from utils.choices import PAIRINGS, POINT_NORMS, POINT_OPS, PRECISIONS, STORAGE_DTYPE_NAMES
from utils.distributed import Ranks, choose_device
from utils.errors import InputError
from utils.feature_store import STORAGE_DTYPES
from utils.memory import default_memory_budget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """What surrounds the detector: where files are read and written, and how much of them."""

    dataset_type: str
    dataset_path: Path
    classes: tuple[str, ...] | None
    checkpoint_dir: Path
    rgb_checkpoint: Path | None
    xyz_checkpoint: Path | None
    fusion_module_path: Path | None  # None: the UFF is that of a saved detector
    output_dir: Path
    save_feature_path: Path | None  # None: features are not saved
    feature_dtype: torch.dtype
    uff_pairing: str
    save_preds: tuple[str, ...]  # the methods whose predictions are saved
    report_parts: int  # shown in report.html of each class
    max_sample: int
    num_workers: int
    device: torch.device
    memory_budget: float  # GB
    train_feature_dtype: torch.dtype
    target_fpr: float
    save_detector: Path | None
    detector_dtype: torch.dtype
    parallel: str
    resume: bool

    def __post_init__(self) -> None:
        if not self.memory_budget > 0:
            raise InputError(f"memory_budget is {self.memory_budget}, expected a number of GB above 0")
        if self.max_sample < 1:
            raise InputError(f"max_sample is {self.max_sample}, expected at least 1")
        if self.report_parts < 0:
            raise InputError(f"report_parts is {self.report_parts}, expected 0 (no pictures in report.html) or more")
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}, expected 0 or more")
        check_target_fpr(self.target_fpr)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return _parser().parse_args(argv)


def given_flags(argv: Sequence[str] | None = None) -> frozenset[str]:
    """The names of the flags that a command line gives, be it with the value that they have by default."""
    parser, absent = _parser(), object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), absent))
    return frozenset(name for name, value in vars(parser.parse_args(argv, namespace)).items() if value is not absent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fit Multi-3D-Memory on the good parts of each class and evaluate it on the test split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("which method, on which data").add_argument
    add(
        "--method_name",
        nargs="+",
        default=["DINO+Point_MAE+Fusion"],
        choices=METHODS,
        help="which banks, and how they are fused; several share the features and are put side by side",
    )
    add(
        "--memory_bank",
        choices=MEMORY_BANKS,
        help="single for methods of one bank, multiple for the others; by default the one that the method needs",
    )
    add(
        "--rgb_backbone_name",
        default="vit_base_patch8_224_dino",
        metavar="NAME",
        help="network of the RGB branch: see --list_backbones, or any vision transformer of timm by its name there",
    )
    add("--xyz_backbone_name", default="Point_MAE", choices=XYZ_BACKBONES, help="network of the 3D branch")
    add("--use_uff", action="store_true", help="fuse patches with the trained UFF; without it they are concatenated")
    add("--fusion_module_path", type=Path, default=Path("checkpoints/checkpoint-0.pth"), help="checkpoint of the UFF")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--rgb_checkpoint", type=Path, help="checkpoint of the RGB backbone, wherever it lies and whatever its name")
    add("--xyz_checkpoint", type=Path, help="checkpoint of the 3D backbone, likewise")
    add("--inspect_dataset", action="store_true", help="read every file, print what is in them in one table, and end")
    add("--list_backbones", action="store_true", help="print the backbones with their weights, and end")
    add("--dataset_type", default="mvtec3d", choices=DATASET_CLASSES, help="whose classes are looked for")
    add("--dataset_path", type=Path, default=Path("datasets/mvtec3d"), help="folder that holds the class folders")
    add("--classes", nargs="+", help="class folders to run; by default all of the dataset type that are there")
    add("--max_sample", type=int, default=400, help="fit on the first N training samples")
    add(
        "--load_detector",
        type=Path,
        metavar="FOLDER",
        help="evaluate the detectors that --save_detector wrote there, without fitting",
    )

    add = parser.add_argument_group("what a run leaves").add_argument
    add("--output_dir", type=Path, default=Path("results"), help="folder of the tables and results.json")
    add(
        "--save_preds",
        nargs="*",
        choices=METHODS,
        metavar="METHOD",
        help="also write the anomaly maps and a picture of each prediction; of these methods, or of all that run",
    )
    add("--report_parts", type=int, default=24, metavar="N", help="parts of each class that report.html shows, or 0")
    add(
        "--save_detector",
        type=Path,
        metavar="FOLDER",
        help="keep the fitted detectors, each in <class>/ there, or in <method>/<class>/ where several methods run",
    )
    add("--detector_dtype", default="fp32", choices=STORAGE_DTYPE_NAMES, help="numbers of the banks of these detectors")
    add(
        "--target_fpr",
        type=float,
        default=0.01,
        help="false-alarm rate that thresholds are calibrated for, on validation/good, else on the training samples",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with an interrupted run of the same flags: classes that it has finished in --output_dir are kept",
    )
    add("--save_feature", action="store_true", help="write the training samples' patches for fusion_pretrain.py")
    add("--save_feature_path", type=Path, default=Path("datasets/patch_lib"), help="folder of these patch files")
    add("--feature_dtype", default="fp16", choices=STORAGE_DTYPE_NAMES, help="numbers of these patch files")
    add("--uff_pairing", default="aligned", choices=PAIRINGS, help="pairing that the patch files ask training for")

    add = parser.add_argument_group("what the detector computes").add_argument
    add("--protocol", default="reference", choices=PROTOCOLS, help="as published, or with the README's corrections")
    add("--point_norm", default="cloud", choices=POINT_NORMS, help="batch norm of the group encoder: whose statistics")
    add("--img_size", type=int, default=224, help="side that pictures and scans are resized to, pixels")
    add("--group_size", type=int, default=128, help="points per group of the point transformer")
    add("--num_group", type=int, default=1024, help="groups per scan of the point transformer")
    add("--f_coreset", type=float, default=0.1, help="share of the patches that the coreset keeps")
    add("--coreset_eps", type=float, default=0.9, help="distortion allowed to the random projection")
    add("--random_state", type=int, help="seed of the random projection; None draws another each run")
    add("--asy_memory_bank", type=int, help="xyz and fusion banks from the first N samples only")
    add("--rm_zero_for_project", action="store_true", help="leave background patches out of the bank of Point_MAE")
    add("--ocsvm_nu", type=float, default=0.5, help="nu of the one-class SVMs")
    add("--ocsvm_maxiter", type=int, default=1000, help="epochs of the one-class SVMs at most")
    for name, weight in zip(BANKS, (1.0, 0.1, 1.0), strict=True):
        add(f"--{name}_s_lambda", type=float, default=weight, help=f"factor of the {name} score in decision fusion")
        add(f"--{name}_smap_lambda", type=float, default=weight, help=f"factor of the {name} map in decision fusion")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    add(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="of the networks; the rest is right to fp32 or better. auto: bf16 where the device is faster in it",
    )
    add(
        "--memory_budget",
        type=float,
        metavar="GB",
        help="of each process, by default half of what its machine has for each; training features that "
        "take more than half of it lie in files of the folder that the environment variable TMPDIR names",
    )
    add("--train_feature_dtype", default="fp32", choices=STORAGE_DTYPE_NAMES, help="numbers of these training features")
    add(
        "--point_ops",
        default="auto",
        choices=POINT_OPS,
        help="of the point searches; auto: k-d trees on CPU, on GPU triton or else torch; extension: see the README",
    )
    add("--num_workers", type=int, default=2, help="threads of each process that read files ahead")
    add(
        "--parallel",
        default="auto",
        choices=PARALLEL,
        help="of several processes (torchrun): each, or each group of them, takes classes of its own, or all share the "
        "samples of one class after the other; auto: whichever ends sooner",
    )
    return parser


def detector_configs(args: argparse.Namespace) -> dict[str, DetectorConfig]:
    """The configuration of each method, by its name, in the order of the command line.

    Where several methods are compared, a flag that is for some of them leaves the others as they are.
    """
    methods = {name: METHODS[name] for name in args.method_name}

    def meant_for(value: Any, suits: Callable[[Method], bool], method: Method, without: Any) -> Any:
        return value if suits(method) or not any(map(suits, methods.values())) else without

    return {
        name: DetectorConfig(
            method_name=name,
            memory_bank=meant_for(args.memory_bank, lambda m: m.memory_bank == args.memory_bank, method, None),
            rgb_backbone_name=args.rgb_backbone_name,
            xyz_backbone_name=args.xyz_backbone_name,
            use_uff=meant_for(args.use_uff, lambda m: "fusion" in m.banks, method, False),
            protocol=PROTOCOLS[args.protocol],
            point_norm=args.point_norm,
            point_ops=args.point_ops,
            precision=args.precision,
            img_size=args.img_size,
            group_size=args.group_size,
            num_group=args.num_group,
            f_coreset=args.f_coreset,
            coreset_eps=args.coreset_eps,
            random_state=args.random_state,
            asy_memory_bank=meant_for(args.asy_memory_bank, lambda m: len(m.banks) > 1, method, None),
            rm_zero_for_project=meant_for(args.rm_zero_for_project, lambda m: m.banks == ("xyz",), method, False),
            ocsvm_nu=args.ocsvm_nu,
            ocsvm_maxiter=args.ocsvm_maxiter,
            score_lambdas=(args.xyz_s_lambda, args.rgb_s_lambda, args.fusion_s_lambda),
            map_lambdas=(args.xyz_smap_lambda, args.rgb_smap_lambda, args.fusion_smap_lambda),
        )
        for name, method in methods.items()
    }


def applied_flags(config: DetectorConfig) -> dict[str, Any]:
    """The flags that give this configuration: `detector_configs` the other way round."""
    same = {field.name for field in fields(config)} - {"protocol", "xyz_grid", "score_lambdas", "map_lambdas"}
    flags = {name: getattr(config, name) for name in same}
    flags["protocol"] = next((name for name, each in PROTOCOLS.items() if each == config.protocol), "custom")
    for name, of_score, of_map in zip(BANKS, config.score_lambdas, config.map_lambdas, strict=True):
        flags |= {f"{name}_s_lambda": of_score, f"{name}_smap_lambda": of_map}
    return flags


def extraction_config(configs: Mapping[str, DetectorConfig]) -> DetectorConfig:
    """The configuration whose features serve every method."""
    covering = covering_method(configs)
    use_uff = any(config.use_uff for config in configs.values())
    return replace(
        next(iter(configs.values())),
        method_name=covering,
        memory_bank=None,
        use_uff=use_uff,
        asy_memory_bank=None,
        rm_zero_for_project=False,
    )


def method_folder(folder: Path, configs: Mapping[str, DetectorConfig], method: str) -> Path:
    """Where that of a method goes which is for `folder`: there, or into a folder in it where several methods run."""
    return folder / method if len(configs) > 1 else folder


def run_settings(
    args: argparse.Namespace, config: DetectorConfig, methods: Sequence[str], ranks: Ranks | None = None
) -> RunSettings:
    """`config` is that of the extraction, `methods` those that run, `ranks` the place of this process."""
    ranks = ranks or Ranks()
    modalities = config.method.modalities
    if args.save_feature and len(modalities) < 2:
        raise InputError(
            f"--save_feature writes rgb and xyz patches, but {config.method_name} extracts only "
            f"{', '.join(modalities)}: use DINO+Point_MAE"
        )
    for method in args.save_preds or ():
        if method not in methods:
            raise InputError(f"--save_preds {method}: this method does not run; give it to --method_name as well")
    if args.save_detector is None and args.detector_dtype != "fp32":
        raise InputError("--detector_dtype is about what --save_detector keeps: give both, or leave it out")
    if args.save_detector is not None:
        kept, left = args.save_detector.resolve(), args.output_dir.resolve()
        if kept.is_relative_to(left) or left.is_relative_to(kept):
            raise InputError(
                f"--save_detector {args.save_detector} and --output_dir {args.output_dir} lie in one another, where "
                "their files could meet: choose folders beside each other"
            )
    for modality in BANKS[:2]:
        given = getattr(args, f"{modality}_checkpoint")
        if given is not None and modality not in modalities:
            raise InputError(f"--{modality}_checkpoint is not used: {config.method_name} has no {modality} branch")
    if "rgb" in modalities:
        rgb_spec(config.rgb_backbone_name)  # an unknown name is refused here
    device = choose_device(args.device, ranks.local_rank)
    check_backend(config.point_ops, device)
    loads = args.load_detector is not None
    # The processes of a machine share its memory, but each has a GPU of its own.
    neighbors = ranks.local_world_size if device.type == "cpu" else 1
    budget = default_memory_budget(device) / neighbors if args.memory_budget is None else args.memory_budget
    if not loads and not config.use_uff and "fusion" in config.method.banks and args.fusion_module_path.exists():
        logger.warning("%s is not used: --use_uff is not given", args.fusion_module_path)
    return RunSettings(
        dataset_type=args.dataset_type,
        dataset_path=args.dataset_path,
        classes=tuple(args.classes) if args.classes else None,
        checkpoint_dir=args.checkpoint_dir,
        rgb_checkpoint=args.rgb_checkpoint,
        xyz_checkpoint=args.xyz_checkpoint,
        fusion_module_path=None if loads else args.fusion_module_path,
        output_dir=args.output_dir,
        save_feature_path=args.save_feature_path if args.save_feature else None,
        feature_dtype=STORAGE_DTYPES[args.feature_dtype],
        uff_pairing=args.uff_pairing,
        save_preds=() if args.save_preds is None else tuple(args.save_preds or methods),
        report_parts=args.report_parts,
        max_sample=args.max_sample,
        num_workers=args.num_workers,
        device=device,
        memory_budget=budget,
        train_feature_dtype=STORAGE_DTYPES[args.train_feature_dtype],
        target_fpr=args.target_fpr,
        save_detector=args.save_detector,
        detector_dtype=STORAGE_DTYPES[args.detector_dtype],
        parallel=args.parallel,
        resume=args.resume,
    )

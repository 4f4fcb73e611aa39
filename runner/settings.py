"""Flags of main.py, and the frozen settings that they become. Importing this module does not import torch."""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from os.path import normpath
from pathlib import Path
from typing import Any

from dataset import DATASET_CLASSES
from feature_extractors.config import BANKS, MEMORY_BANKS, METHODS, PROTOCOLS, DetectorConfig, Method, covering_method
from models import XYZ_BACKBONES, rgb_spec
from runner.scheduling import PARALLEL
from utils.choices import PAIRINGS, POINT_NORMS, POINT_OPS, PRECISIONS, STORAGE_DTYPE_NAMES
from utils.command_line import FILE_BOUNDS, MOST_WORKERS, Parser, add_file_flags, from_flags
from utils.errors import InputError

logger = logging.getLogger(__name__)

# Flags that do not apply to every method, with a test: does this value apply to this method?
CONCERNS: dict[str, Callable[[Method, Any], bool]] = {
    "memory_bank": lambda method, value: method.memory_bank == value,
    "use_uff": lambda method, value: "fusion" in method.banks,
    "asy_memory_bank": lambda method, value: len(method.banks) > 1,
    "rm_zero_for_project": lambda method, value: method.banks == ("xyz",),
}

BOUNDS = DetectorConfig.BOUNDS | FILE_BOUNDS | {"max_sample": (1, 10**6), "num_workers": (0, MOST_WORKERS)}
BOUNDS |= {"report_parts": (0, 10_000), "target_fpr": (1e-6, 1 - 1e-6), "memory_budget": (1e-6, 10**6)}
BOUNDS |= {"few_shot": (1, 10**6), "rgb_layers": (0, 1000), "seeds": BOUNDS.pop("random_state")}


@dataclass(frozen=True)
class RunSettings:
    """Flags outside the detector: input and output files, and the machine."""

    dataset_type: str
    dataset_path: Path
    classes: list[str] | None
    max_sample: int
    few_shot: int | None
    seeds: list[int] | None
    checkpoint_dir: Path
    rgb_checkpoint: Path | None
    xyz_checkpoint: Path | None
    fusion_module_path: Path
    load_detector: Path | None
    output_dir: Path
    save_preds: list[str] | None  # methods; an empty list means all of --method_name
    report_parts: int
    save_detector: Path | None
    detector_dtype: str
    target_fpr: float
    resume: bool
    save_feature: bool
    save_feature_path: Path
    feature_dtype: str
    uff_pairing: str
    memory_budget: float | None  # GB; None: half of the machine's memory, see runner.class_run
    train_feature_dtype: str
    num_workers: int
    parallel: str

    def __post_init__(self) -> None:
        if self.save_detector is None and self.detector_dtype != "fp32":
            raise InputError("--detector_dtype only applies to --save_detector. Give both, or leave it out.")
        if self.save_detector is not None:
            saved, out = self.save_detector.resolve(), self.output_dir.resolve()
            if saved.is_relative_to(out) or out.is_relative_to(saved):
                raise InputError(
                    f"--save_detector {self.save_detector} and --output_dir {self.output_dir} are the same folder, or "
                    "one is inside the other. Choose separate folders."
                )
        several = len(set(self.seeds or ())) > 1
        if several and self.save_detector is not None:
            raise InputError("--save_detector saves the detectors of one seed, but --seeds has several. Give one.")
        if several and self.save_feature and self.few_shot is not None:
            raise InputError("--save_feature would mix the samples that --few_shot draws for each seed. Give one seed.")

    def saves_predictions(self, method: str) -> bool:
        """True if the anomaly maps and figures of a method are written."""
        return self.save_preds is not None and (not self.save_preds or method in self.save_preds)

    def check_use(self, config: DetectorConfig, methods: Iterable[str]) -> None:
        """Refuse flags without effect on these methods; `config` is the one of their `extraction_config`."""
        name, modalities = config.method_name, config.method.modalities
        if self.save_feature and len(modalities) < 2:
            raise InputError(
                f"--save_feature needs rgb and xyz, but {name} has only {', '.join(modalities)}. Use DINO+Point_MAE."
            )
        for method in self.save_preds or ():
            if method not in methods:
                raise InputError(f"--save_preds {method} is not a method of this run. Add it to --method_name.")
        branches: dict[str, Any] = {"xyz_checkpoint": self.xyz_checkpoint, "rgb_checkpoint": self.rgb_checkpoint}
        for flag, value in (branches | {"rgb_layers": config.rgb_layers}).items():
            modality = flag[:3]
            if value is not None and modality not in modalities:
                raise InputError(f"--{flag} is not used: {name} has no {modality} branch. Leave it out.")
        if "rgb" in modalities:
            rgb_spec(config.rgb_backbone_name)  # raises InputError for an unknown name
        unfused = "fusion" in config.method.banks and not config.use_uff
        if unfused and self.load_detector is None and self.fusion_module_path.exists():
            logger.warning("%s is not used: --use_uff is not given", self.fusion_module_path)


def make_parser() -> Parser:
    """The parser of main.py."""
    parser = Parser(
        "Fit Multi-3D-Memory on the good samples of each class, and test it if there is a test split.", BOUNDS
    )
    _add_input_flags(parser.add_argument_group("method and data").add_argument)
    _add_output_flags(parser.add_argument_group("output").add_argument)
    _add_detector_flags(parser.add_argument_group("detector").add_argument)
    _add_machine_flags(parser.add_argument_group("computation").add_argument)
    defaults = applied_flags(DetectorConfig())
    del defaults["random_state"]  # --seeds
    parser.set_defaults(**defaults | {"method_name": [defaults["method_name"]]})
    return parser


def _add_input_flags(add: Callable[..., Any]) -> None:
    add("--method_name", nargs="+", choices=METHODS, help="banks and their fusion; several methods share the features")
    add("--memory_bank", choices=MEMORY_BANKS, help="single or multiple banks; by default what the method needs")
    add("--rgb_backbone_name", metavar="NAME", help="network of the RGB branch: any timm network, see --list_backbones")
    help_text = "its layers, from 0: blocks of a plain ViT, else stages; default: the last block, or strides 8 and 16"
    add("--rgb_layers", nargs="+", type=int, metavar="N", help=help_text)
    add("--xyz_backbone_name", choices=XYZ_BACKBONES, help="network of the 3D branch")
    add("--use_uff", action="store_true", help="fuse patches with the trained UFF; without it, concatenate them")
    add("--fusion_module_path", type=Path, default=Path("checkpoints/checkpoint-0.pth"), help="checkpoint of the UFF")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--rgb_checkpoint", type=Path, help="checkpoint of the RGB backbone, instead of a file in --checkpoint_dir")
    add("--xyz_checkpoint", type=Path, help="checkpoint of the 3D backbone, instead of a file in --checkpoint_dir")
    help_text = "check every file (images alone if there are no xyz folders), print a table, and exit"
    add("--inspect_dataset", action="store_true", help=help_text)
    add("--list_backbones", action="store_true", help="print the backbones and their weights, and exit")
    add("--dataset_type", default="mvtec3d", choices=DATASET_CLASSES, help="dataset whose class names are used")
    add("--dataset_path", type=Path, default=Path("datasets/mvtec3d"), help="folder of the class folders")
    add_file_flags(add)
    add("--classes", nargs="+", type=normpath, help="class folders; by default the existing ones of --dataset_type")
    add("--max_sample", type=int, default=400, help="fit on the first N training samples")
    help_text = (
        "fit on K training samples, drawn at random for each class and seed; without --seeds, the seed is random"
    )
    add("--few_shot", type=int, metavar="K", help=help_text)
    help_text = "evaluate the detectors saved there; with --target_fpr and --save_detector, change their thresholds"
    add("--load_detector", type=Path, metavar="FOLDER", help=help_text)


def _add_output_flags(add: Callable[..., Any]) -> None:
    add("--output_dir", type=Path, default=Path("results"), help="folder of the tables, results.json and report.html")
    help_text = "also write anomaly maps and figures of these methods; without a name, of all"
    add("--save_preds", nargs="*", choices=METHODS, metavar="METHOD", help=help_text)
    add("--report_parts", type=int, default=24, metavar="N", help="samples of each class that report.html shows")
    help_text = "save the fitted detectors in FOLDER/<class>, those of several methods in FOLDER/<method>/<class>"
    add("--save_detector", type=Path, metavar="FOLDER", help=help_text)
    add("--detector_dtype", default="fp32", choices=STORAGE_DTYPE_NAMES, help="dtype of the saved memory banks")
    help_text = "false-alarm rate of good samples that the thresholds are calibrated for"
    add("--target_fpr", type=float, default=0.01, help=help_text)
    add("--resume", action="store_true", help="keep the classes that an interrupted run of the same flags finished")
    add("--save_feature", action="store_true", help="write the training samples' patches for fusion_pretrain.py")
    add("--save_feature_path", type=Path, default=Path("datasets/patch_lib"), help="folder of these patch files")
    add("--feature_dtype", default="fp16", choices=STORAGE_DTYPE_NAMES, help="dtype of these patch files")
    add("--uff_pairing", default="aligned", choices=PAIRINGS, help="pairing in UFF training, stored in these files")


def _add_detector_flags(add: Callable[..., Any]) -> None:
    """Flags that become a DetectorConfig and have its defaults."""
    help_text = "reference: as published; corrected: with the README's corrections; extended: beyond the paper"
    add("--protocol", choices=PROTOCOLS, help=help_text)
    add("--point_norm", choices=POINT_NORMS, help="BatchNorm statistics: cloud (its own) or running (the checkpoint's)")
    add("--img_size", type=int, help="side that images and clouds are resized to, pixels")
    add("--group_size", type=int, help="points per group of the point transformer")
    add("--num_group", type=int, help="groups per cloud of the point transformer")
    add("--f_coreset", type=float, help="fraction of the patches that the coreset keeps")
    add("--coreset_eps", type=float, help="distortion allowed to the random projection")
    help_text = "seeds of the random projection and --few_shot, a fit for each; without them, projections vary by run"
    add("--seeds", type=int, nargs="+", metavar="N", help=help_text)
    add("--asy_memory_bank", type=int, help="build the xyz and fusion banks from the first N samples only")
    add("--rm_zero_for_project", action="store_true", help="leave background patches out of the bank of Point_MAE")
    add("--ocsvm_nu", type=float, help="nu of the one-class SVMs")
    add("--ocsvm_maxiter", type=int, help="maximum number of epochs of the one-class SVMs")
    for bank in BANKS:
        add(f"--{bank}_s_lambda", type=float, help=f"factor of the {bank} score in decision fusion by SVMs")
        add(f"--{bank}_smap_lambda", type=float, help=f"factor of the {bank} map in decision fusion by SVMs")


def _add_machine_flags(add: Callable[..., Any]) -> None:
    add("--device", default="auto", help="cpu, cuda, or cuda:<number>; auto takes a GPU where there is one")
    add("--precision", choices=PRECISIONS, help="precision of the networks; auto: bf16 where the device supports it")
    help_text = (
        "memory budget per process (default: half the machine's, shared); features that need over half are in TMPDIR"
    )
    add("--memory_budget", type=float, metavar="GB", help=help_text)
    add("--train_feature_dtype", default="fp32", choices=STORAGE_DTYPE_NAMES, help="dtype of features in the fit")
    add("--point_ops", choices=POINT_OPS, help="backend of the point searches; auto: k-d trees on CPU, triton on GPU")
    add("--num_workers", type=int, default=2, help="threads of each process that read files ahead")
    help_text = "work that processes divide: classes, or the samples of each class; auto: the faster division"
    add("--parallel", default="auto", choices=PARALLEL, help=help_text)


def detector_configs(args: argparse.Namespace) -> dict[str, DetectorConfig]:
    """Configuration of each fit: of each method or, with several --seeds, of each method and seed.

    Keys are "DINO" or "DINO, seed 0". A flag that concerns only some of the methods keeps its default in the others.
    """
    methods = {name: METHODS[name] for name in args.method_name}
    common = {
        "protocol": PROTOCOLS[args.protocol],
        "rgb_layers": None if args.rgb_layers is None else tuple(args.rgb_layers),
        "score_lambdas": tuple(getattr(args, f"{bank}_s_lambda") for bank in BANKS),
        "map_lambdas": tuple(getattr(args, f"{bank}_smap_lambda") for bank in BANKS),
    }
    configs = {}
    for name, method in methods.items():
        own = {"method_name": name}
        for flag, concerns in CONCERNS.items():
            value = getattr(args, flag)
            if not concerns(method, value) and any(concerns(other, value) for other in methods.values()):
                own[flag] = getattr(DetectorConfig, flag)
        configs[name] = from_flags(DetectorConfig, args, **common | own)
    seeds = list(dict.fromkeys(args.seeds or [None]))
    return {
        name if len(seeds) == 1 else f"{name}, seed {seed}": replace(config, random_state=seed)
        for seed in seeds
        for name, config in configs.items()
    }


def applied_flags(config: DetectorConfig) -> dict[str, Any]:
    """Flags that give this configuration, the inverse of `detector_configs`; its seed is under random_state."""
    flags = dict(vars(config))
    del flags["xyz_grid"]
    flags["rgb_layers"] = None if config.rgb_layers is None else list(config.rgb_layers)  # as argparse gives them
    lambdas = zip(BANKS, flags.pop("score_lambdas"), flags.pop("map_lambdas"), strict=True)
    for bank, of_score, of_map in lambdas:
        flags |= {f"{bank}_s_lambda": of_score, f"{bank}_smap_lambda": of_map}
    flags["protocol"] = next((name for name, each in PROTOCOLS.items() if each == config.protocol), "custom")
    return flags


def extraction_config(configs: Mapping[str, DetectorConfig]) -> DetectorConfig:
    """Configuration whose features serve every fit."""
    return replace(
        next(iter(configs.values())),
        method_name=covering_method(config.method_name for config in configs.values()),
        memory_bank=None,
        use_uff=any(config.use_uff for config in configs.values()),
        asy_memory_bank=None,
        rm_zero_for_project=False,
    )

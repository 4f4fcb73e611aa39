"""Fit Multi-3D-Memory on the good parts of each class and evaluate it on the test split.

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \\
        --fusion_module_path checkpoints/checkpoint-2.pth
    python main.py --method_name DINO --dataset_path my_parts --classes bracket --output_dir results/bracket
    python main.py --method_name DINO Point_MAE DINO+Point_MAE --output_dir results/compared
    python main.py --list_backbones

Writes image_rocauc_results.md, pixel_rocauc_results.md, aupro_results.md and results.json to --output_dir, with
--save_preds also anomaly_maps/ and pred_maps/. Several methods share the features, which are extracted once; each then
has a row in the tables and a folder of its own, <output_dir>/<method>, for the rest.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from dataset import (
    DATASET_CLASSES,
    AnomalyDataset,
    SampleFiles,
    check_files,
    class_folders,
    find_classes,
    index_split,
    load_samples,
    original_size,
    read_photo,
)
from feature_extractors.config import (
    BANKS,
    MEMORY_BANKS,
    METHODS,
    PRECISIONS,
    PROTOCOLS,
    DetectorConfig,
    Method,
    covering_method,
)
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.pipeline import SampleResult, Stopwatch, collect_features, evaluate, fit_detector
from inspection import print_inspection, warn_of_raw_scans, warn_of_unfinished_scans
from models import XYZ_BACKBONES, BackboneRow, list_backbones, rgb_spec
from models.point_ops import BACKENDS, check_backend
from models.point_transformer import POINT_NORMS
from utils.distributed import choose_device
from utils.errors import InputError, exit_on_input_error
from utils.feature_store import PAIRINGS, STORAGE_DTYPES, write_features
from utils.files import make_folder
from utils.memory import default_memory_budget, peak_memory_mb
from utils.records import PatchFeatures, Sample
from utils.report import append_tables, format_tables, print_columns, result_line, results_record, write_results
from utils.visualization import FUSED, color_scale, save_anomaly_map, save_prediction_figure

logger = logging.getLogger("main")


class SplitFiles(NamedTuple):
    """The files of one class."""

    train: list[SampleFiles]
    test: list[SampleFiles]


@dataclass(frozen=True)
class RunSettings:
    """What surrounds the detector: where files are read and written, and how much of them."""

    dataset_type: str
    dataset_path: Path
    classes: tuple[str, ...] | None
    checkpoint_dir: Path
    rgb_checkpoint: Path | None
    xyz_checkpoint: Path | None
    fusion_module_path: Path
    output_dir: Path
    save_feature_path: Path | None  # None: features are not saved
    feature_dtype: torch.dtype
    uff_pairing: str
    save_preds: tuple[str, ...]  # the methods whose predictions are saved
    max_sample: int
    num_workers: int
    device: torch.device
    memory_budget: float  # GB
    train_feature_dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.memory_budget > 0:
            raise InputError(f"memory_budget is {self.memory_budget}, expected a number of GB above 0")
        if self.max_sample < 1:
            raise InputError(f"max_sample is {self.max_sample}, expected at least 1")
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}, expected 0 or more")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
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

    add = parser.add_argument_group("what a run leaves").add_argument
    add("--output_dir", type=Path, default=Path("results"), help="folder of the tables and results.json")
    add(
        "--save_preds",
        nargs="*",
        choices=METHODS,
        metavar="METHOD",
        help="also write the anomaly maps and a picture of each prediction; of these methods, or of all that run",
    )
    add("--save_feature", action="store_true", help="write the training samples' patches for fusion_pretrain.py")
    add("--save_feature_path", type=Path, default=Path("datasets/patch_lib"), help="folder of these patch files")
    add("--feature_dtype", default="fp16", choices=STORAGE_DTYPES, help="numbers of these patch files")
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
        help="of the networks; all else is fp32 or better. auto: bf16 where the device is faster in it",
    )
    add(
        "--memory_budget",
        type=float,
        metavar="GB",
        help="of the run, by default half of what there is; training features that take more than half of it lie in "
        "files of the folder that the environment variable TMPDIR names",
    )
    add("--train_feature_dtype", default="fp32", choices=STORAGE_DTYPES, help="numbers of these training features")
    add(
        "--point_ops",
        default="auto",
        choices=BACKENDS,
        help="of the point searches; auto: k-d trees on CPU, on GPU triton or else torch; extension: see the README",
    )
    add("--num_workers", type=int, default=2, help="threads that read files ahead")
    return parser.parse_args(argv)


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
    """The flags whose value is a method's own where several methods run."""
    names = ("method_name", "memory_bank", "use_uff", "asy_memory_bank", "rm_zero_for_project")
    return {name: getattr(config, name) for name in names}


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


def run_settings(args: argparse.Namespace, config: DetectorConfig) -> RunSettings:
    """`config` is that of the extraction."""
    modalities = config.method.modalities
    if args.save_feature and len(modalities) < 2:
        raise InputError(
            f"--save_feature writes rgb and xyz patches, but {config.method_name} extracts only "
            f"{', '.join(modalities)}: use DINO+Point_MAE"
        )
    for method in args.save_preds or ():
        if method not in args.method_name:
            raise InputError(f"--save_preds {method}: this method does not run; give it to --method_name as well")
    for modality in BANKS[:2]:
        given = getattr(args, f"{modality}_checkpoint")
        if given is not None and modality not in modalities:
            raise InputError(f"--{modality}_checkpoint is not used: {config.method_name} has no {modality} branch")
    if "rgb" in modalities:
        rgb_spec(config.rgb_backbone_name)  # an unknown name is refused here
    device = choose_device(args.device)
    check_backend(config.point_ops, device)
    if not args.use_uff and "fusion" in config.method.banks and args.fusion_module_path.exists():
        logger.warning("%s is not used: --use_uff is not given", args.fusion_module_path)
    return RunSettings(
        dataset_type=args.dataset_type,
        dataset_path=args.dataset_path,
        classes=tuple(args.classes) if args.classes else None,
        checkpoint_dir=args.checkpoint_dir,
        rgb_checkpoint=args.rgb_checkpoint,
        xyz_checkpoint=args.xyz_checkpoint,
        fusion_module_path=args.fusion_module_path,
        output_dir=args.output_dir,
        save_feature_path=args.save_feature_path if args.save_feature else None,
        feature_dtype=STORAGE_DTYPES[args.feature_dtype],
        uff_pairing=args.uff_pairing,
        save_preds=() if args.save_preds is None else tuple(args.save_preds or args.method_name),
        max_sample=args.max_sample,
        num_workers=args.num_workers,
        device=device,
        memory_budget=default_memory_budget(device) if args.memory_budget is None else args.memory_budget,
        train_feature_dtype=STORAGE_DTYPES[args.train_feature_dtype],
    )


def index_classes(settings: RunSettings, config: DetectorConfig) -> dict[str, SplitFiles]:
    """Training and test files of each class, checked as far as headers tell, before any work starts."""
    modalities = config.method.modalities
    indexed = {}
    for name in find_classes(settings.dataset_path, settings.dataset_type, settings.classes):
        folder = settings.dataset_path / name
        train = index_split(folder, "train", modalities)[: settings.max_sample]
        indexed[name] = SplitFiles(train, index_split(folder, "test", modalities))
    shown = modalities | ({"rgb"} if settings.save_preds else frozenset())
    for train, test in indexed.values():
        check_files(train, modalities)
        check_files(test, shown)
    return indexed


def run_class(
    name: str,
    files: SplitFiles,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    extractor: PatchExtractor,
) -> dict[str, dict[str, Any]]:
    """Fit and evaluate one class; returns its entry of results.json for each method."""
    config, extraction = extractor.config, Stopwatch()
    train, test = (AnomalyDataset(each, config.method.modalities, config.img_size) for each in files)
    saver = feature_saver(name, settings, config)
    features = collect_features(
        extractor,
        load_samples(train, settings.num_workers),
        len(train),
        extraction,
        saver,
        memory_budget=settings.memory_budget,
        dtype=settings.train_feature_dtype,
    )
    stopwatches, detectors = {}, {}
    for method, each in configs.items():
        stopwatches[method] = Stopwatch(extraction.seconds)
        detectors[method] = fit_detector(each, extractor, features, stopwatches[method])
    del features  # the banks have copied what they keep
    evaluations = evaluate(detectors, load_samples(test, settings.num_workers), len(test), stopwatches)
    entries = {}
    for method, (results, metrics) in evaluations.items():
        if method in settings.save_preds:
            save_predictions(name, files.test, results, method_folder(settings, configs, method))
        entries[method] = {
            **metrics,
            "samples": [{"path": each.path, "label": each.label, "score": each.prediction.score} for each in results],
            "seconds": stopwatches[method].seconds,
            "peak_memory_mb": peak_memory_mb(settings.device),
        }
    return entries


def method_folder(settings: RunSettings, configs: Mapping[str, DetectorConfig], method: str) -> Path:
    """Where the results of a method go: --output_dir, or a folder in it where several methods are compared."""
    return settings.output_dir / method if len(configs) > 1 else settings.output_dir


def feature_saver(
    class_name: str, settings: RunSettings, config: DetectorConfig
) -> Callable[[Sample, PatchFeatures], None] | None:
    """What writes a training sample's patch file, or None where --save_feature is not given."""
    if settings.save_feature_path is None:
        return None
    folder = settings.save_feature_path

    def save(sample: Sample, features: PatchFeatures) -> None:
        write_features(
            folder,
            class_name,
            Path(sample.path).name,
            features,
            xyz_backbone=config.xyz_backbone_name,
            rgb_backbone=config.rgb_backbone_name,
            pairing=settings.uff_pairing,
            dtype=settings.feature_dtype,
        )

    return save


def save_predictions(class_name: str, files: list[SampleFiles], results: list[SampleResult], output_dir: Path) -> None:
    """Write the anomaly map of each test sample at the size of its ground truth, and its picture."""
    predictions = [result.prediction for result in results]
    scale = {FUSED: color_scale([prediction.anomaly_map.numpy() for prediction in predictions])}
    for bank in predictions[0].bank_maps:
        scale[bank] = color_scale([prediction.bank_maps[bank].numpy() for prediction in predictions])
    pairs = tqdm(zip(files, results, strict=True), total=len(files), desc="pictures", unit="sample", leave=False)
    for file, result in pairs:
        prediction, plane = result.prediction, result.prediction.anomaly_map.numpy()
        save_anomaly_map(output_dir / "anomaly_maps" / class_name / f"{file.path}.tiff", plane, original_size(file))
        save_prediction_figure(
            output_dir / "pred_maps" / class_name / f"{file.path.removeprefix('test/')}.png",
            read_photo(file),
            result.mask.numpy(),
            {bank: bank_map.numpy() for bank, bank_map in prediction.bank_maps.items()},
            plane,
            scale,
            f"{class_name}/{file.path}  score {prediction.score:.4g}",
        )


def table_note(config: DetectorConfig, protocol: str) -> str:
    """What every table says beside the method's name: backbones, protocol, and whether features are fused."""
    names = {"rgb": config.rgb_backbone_name, "xyz": config.xyz_backbone_name}
    backbones = ", ".join(f"{modality} {names[modality]}" for modality in sorted(config.method.modalities))
    note = f"Backbones: {backbones}. Protocol: {protocol}."
    if "fusion" in config.method.banks and not config.use_uff:
        note += " Without --use_uff the fusion bank holds the concatenated features, unfused (the paper's ablation)."
    return note


def print_backbones(rows: Sequence[BackboneRow]) -> None:
    print_columns([("name", "branch", "width", "grid", "weights"), *[tuple(map(str, row[:5])) for row in rows]])
    print("\nPublished as:")
    for row in rows:
        if row.published:
            print(f"  {row.name}: {row.published}")
    print("\nAny other vision transformer of timm works by its name there, such as vit_small_patch14_dinov2.lvd142m.")


def run(args: argparse.Namespace) -> None:
    if args.list_backbones:
        print_backbones(list_backbones(args.checkpoint_dir, args.img_size))
        return
    configs = detector_configs(args)
    config = extraction_config(configs)
    if args.inspect_dataset:
        chosen = args.classes or class_folders(args.dataset_path)
        classes = find_classes(args.dataset_path, args.dataset_type, chosen)
        if print_inspection(args.dataset_path, classes, config.method.modalities, args.num_workers):
            raise SystemExit(1)
        return
    settings = run_settings(args, config)
    indexed = index_classes(settings, config)
    if "xyz" in config.method.modalities:
        for split in (split for files in indexed.values() for split in files):
            warn_of_raw_scans(split)
    warn_of_unfinished_scans(settings.dataset_path, {name: files.train + files.test for name, files in indexed.items()})
    for method in configs:
        make_folder(method_folder(settings, configs, method), "--output_dir")
    if settings.save_feature_path is not None:
        make_folder(settings.save_feature_path, "--save_feature_path")
    extractor = build_extractor(
        config,
        settings.checkpoint_dir,
        settings.fusion_module_path,
        settings.device,
        rgb_checkpoint=settings.rgb_checkpoint,
        xyz_checkpoint=settings.xyz_checkpoint,
    )
    note = table_note(config, args.protocol)
    logger.info(note)
    exact = config.protocol.exact_au_pro
    methods: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in configs}
    for name, files in indexed.items():
        logger.info("%s: %d training and %d test samples", name, len(files.train), len(files.test))
        try:
            entries = run_class(name, files, settings, configs, extractor)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None  # a sample's path begins below its class
        for method, entry in entries.items():
            methods[method][name] = entry
            label = name if len(configs) == 1 else f"{name}, {method}"
            print(result_line(label, entry, exact), flush=True)
            record = results_record(sys.argv, vars(args) | applied_flags(configs[method]), methods[method])
            write_results(method_folder(settings, configs, method), record)
    append_tables(settings.output_dir, methods, sys.argv, exact, note)
    print(f"\n{format_tables(methods, exact, note)}\n\nwritten to {settings.output_dir}/")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    with exit_on_input_error():
        run(parse_args())


if __name__ == "__main__":
    main()

"""Fit Multi-3D-Memory on the good parts of each class and evaluate it on the test split.

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \\
        --fusion_module_path checkpoints/checkpoint-2.pth
    python main.py --method_name DINO --dataset_path my_parts --classes bracket --output_dir results/bracket
    python main.py --method_name DINO Point_MAE DINO+Point_MAE --output_dir results/compared
    python main.py --method_name DINO --save_detector detectors
    python main.py --load_detector detectors
    python main.py --list_backbones

Writes image_rocauc_results.md, pixel_rocauc_results.md, aupro_results.md, results.json and report.html to --output_dir,
with --save_preds also anomaly_maps/ and pred_maps/. Several methods share the features, which are extracted once; each
then has a row in the tables and a folder of its own, <output_dir>/<method>, for the rest. --save_detector keeps the
fitted detectors; --load_detector evaluates them again.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm import tqdm

from dataset import (
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
from feature_extractors.config import DetectorConfig
from feature_extractors.detector import Detector
from feature_extractors.detector_record import SavedDetector
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.persistence import check_target, restore_detectors, round_banks, save_detector
from feature_extractors.pipeline import (
    SampleResult,
    Stopwatch,
    calibrate_detectors,
    class_entry,
    collect_features,
    evaluate,
    fit_detector,
)
from feature_extractors.training_features import TrainingFeatures
from inspection import print_inspection, warn_of_raw_scans, warn_of_unfinished_scans
from models import BackboneRow, list_backbones
from saved_detectors import FITTING_FLAGS, Saved, check_layout, read_detectors
from settings import (
    RunSettings,
    applied_flags,
    detector_configs,
    extraction_config,
    given_flags,
    parse_args,
    run_settings,
)
from utils.errors import InputError, exit_on_input_error
from utils.feature_store import write_features
from utils.files import make_folder
from utils.html_report.class_report import ClassReport, report_class
from utils.html_report.gallery import ReadArray
from utils.html_report.report_page import FILE_NAME, write_report
from utils.memory import peak_memory_mb
from utils.organized_pc import read_organized_pc
from utils.records import PatchFeatures, Sample
from utils.report import append_tables, format_tables, print_columns, result_line, results_record, write_results
from utils.visualization import FUSED, color_scale, save_anomaly_map, save_prediction_figure

logger = logging.getLogger("main")


class SplitFiles(NamedTuple):
    """The files of one class; no training and validation files where its detectors are loaded."""

    train: list[SampleFiles]
    validation: list[SampleFiles]  # none where the dataset has no such split
    test: list[SampleFiles]


def index_classes(settings: RunSettings, config: DetectorConfig, fits: bool) -> dict[str, SplitFiles]:
    """The files of each class that are needed, checked as far as headers tell, before any work starts."""
    modalities = config.method.modalities
    indexed = {}
    for name in find_classes(settings.dataset_path, settings.dataset_type, settings.classes):
        folder = settings.dataset_path / name
        train = index_split(folder, "train", modalities)[: settings.max_sample] if fits else []
        validates = fits and (folder / "validation" / "good").is_dir()
        validation = index_split(folder, "validation", modalities) if validates else []
        indexed[name] = SplitFiles(train, validation, index_split(folder, "test", modalities))
    for train, validation, test in indexed.values():
        check_files(train + validation, modalities)
        check_files(test, shown_modalities(settings, config))
    return indexed


def run_class(
    name: str,
    files: SplitFiles,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    extractor: PatchExtractor,
    saved: Mapping[str, SavedDetector] | None = None,
) -> dict[str, ClassReport]:
    """Fit one class, or load its `saved` detectors, and evaluate it; returns per method what its report keeps of it."""
    if saved:
        detectors = restore_detectors(saved, extractor)
        stopwatches = {method: Stopwatch() for method in detectors}
    else:
        detectors, stopwatches = fit_class(name, files, settings, configs, extractor)
    test = AnomalyDataset(files.test, extractor.config.method.modalities, extractor.config.img_size)
    evaluations = evaluate(detectors, load_samples(test, settings.num_workers), len(test), stopwatches)
    reports = {}
    for method, evaluation in evaluations.items():
        if method in settings.save_preds:
            save_predictions(name, files.test, evaluation.results, method_folder(settings.output_dir, configs, method))
        entry = class_entry(detectors[method], evaluation) | {
            "seconds": stopwatches[method].seconds,
            "peak_memory_mb": peak_memory_mb(settings.device),
        }
        readers = part_readers(files.test, settings, extractor.config)
        reports[method] = report_class(name, entry, evaluation.results, *readers, limit=settings.report_parts)
    return reports


def part_readers(
    files: list[SampleFiles], settings: RunSettings, config: DetectorConfig
) -> tuple[ReadArray, ReadArray]:
    """What reads photo and scan of a test part by its number, of those kinds of files that the run has checked."""

    def photo(number: int) -> NDArray | None:
        return read_photo(files[number]) if "rgb" in shown_modalities(settings, config) else None

    def cloud(number: int) -> NDArray | None:
        path = files[number].xyz
        return read_organized_pc(path) if path is not None and "xyz" in config.method.modalities else None

    return photo, cloud


def shown_modalities(settings: RunSettings, config: DetectorConfig) -> frozenset[str]:
    """The kinds of test files that are read: those of the method, and photos to put under its predictions."""
    return config.method.modalities | ({"rgb"} if settings.save_preds else frozenset())


def fit_class(
    name: str,
    files: SplitFiles,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    extractor: PatchExtractor,
) -> tuple[dict[str, Detector], dict[str, Stopwatch]]:
    """The detectors of one class by method, calibrated and kept where that was asked for, and what they took."""
    extraction, config = Stopwatch(), extractor.config

    def collect(split: list[SampleFiles], **options: Any) -> TrainingFeatures:
        dataset = AnomalyDataset(split, config.method.modalities, config.img_size)
        samples = load_samples(dataset, settings.num_workers)
        budget = settings.memory_budget
        return collect_features(extractor, samples, len(dataset), extraction, memory_budget=budget, **options)

    # Before the fit, which a scan at fault would waste; each split takes half of the memory budget at most.
    validation = collect(files.validation) if files.validation else None
    saver = feature_saver(name, settings, config)
    features = collect(files.train, on_features=saver, dtype=settings.train_feature_dtype)
    stopwatches, detectors = {}, {}
    for method, each in configs.items():
        stopwatches[method] = Stopwatch(extraction.seconds)
        detectors[method] = fit_detector(each, extractor, features, stopwatches[method])
        if settings.save_detector is not None:
            round_banks(detectors[method], settings.detector_dtype)
    if validation is None:
        logger.warning(
            "no validation/good: the thresholds are calibrated on the training samples, whose scores are lower than "
            "those of other good parts, since the banks hold them; expect more false alarms than --target_fpr"
        )
    source, good = ("training", features) if validation is None else ("validation", validation)
    good_parts = (good.sample(i) for i in range(len(good)))
    calibrate_detectors(detectors, good_parts, settings.target_fpr, source, stopwatches)
    for method, detector in detectors.items():
        if settings.save_detector is not None:
            folder = method_folder(settings.save_detector, configs, method) / name
            save_detector(detector, folder, class_name=name, dtype=settings.detector_dtype)
    return detectors, stopwatches


def method_folder(folder: Path, configs: Mapping[str, DetectorConfig], method: str) -> Path:
    """Where that of a method goes which is for `folder`: there, or into a folder in it where several methods run."""
    return folder / method if len(configs) > 1 else folder


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


def table_note(config: DetectorConfig) -> str:
    """What every table says beside the method's name: backbones, protocol, and whether features are fused."""
    backbones = ", ".join(f"{modality} {name}" for modality, name in config.backbone_names.items())
    note = f"Backbones: {backbones}. Protocol: {applied_flags(config)['protocol']}."
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


def make_folders(settings: RunSettings, configs: Mapping[str, DetectorConfig], classes: Sequence[str]) -> None:
    """Before the work starts, all folders that its results go to; those of detectors are checked."""
    if settings.save_detector is not None:
        check_layout(settings.save_detector, configs, classes)
        for method in configs:
            for name in classes:
                check_target(method_folder(settings.save_detector, configs, method) / name)
        make_folder(settings.save_detector, "--save_detector")
    for method in configs:
        folder = make_folder(method_folder(settings.output_dir, configs, method), "--output_dir")
        if (folder / FILE_NAME).is_dir():
            raise InputError(f"{folder / FILE_NAME} is a folder, where the report goes: choose another --output_dir")
    if settings.save_feature_path is not None:
        make_folder(settings.save_feature_path, "--save_feature_path")


def inspect(args: argparse.Namespace) -> None:
    modalities = extraction_config(detector_configs(args)).method.modalities
    chosen = args.classes or class_folders(args.dataset_path)
    classes = find_classes(args.dataset_path, args.dataset_type, chosen)
    if print_inspection(args.dataset_path, classes, modalities, args.num_workers):
        raise SystemExit(1)


def run(args: argparse.Namespace, given: frozenset[str]) -> None:
    if args.list_backbones:
        print_backbones(list_backbones(args.checkpoint_dir, args.img_size))
        return
    if args.inspect_dataset:
        inspect(args)
        return
    saved: Saved = {} if args.load_detector is None else read_detectors(args, given)
    if saved:
        configs = {method: each.record.config for method, each in next(iter(saved.values())).items()}
    else:
        configs = detector_configs(args)
    config = extraction_config(configs)
    settings = run_settings(args, config, list(configs))
    indexed = index_classes(settings, config, fits=not saved)
    if "xyz" in config.method.modalities:
        for split in (split for files in indexed.values() for split in files):
            warn_of_raw_scans(split)
    all_files = {name: files.train + files.validation + files.test for name, files in indexed.items()}
    warn_of_unfinished_scans(settings.dataset_path, all_files)
    make_folders(settings, configs, list(indexed))
    extractor = build_extractor(
        config,
        settings.checkpoint_dir,
        settings.fusion_module_path,
        settings.device,
        rgb_checkpoint=settings.rgb_checkpoint,
        xyz_checkpoint=settings.xyz_checkpoint,
    )
    evaluate_classes(args, settings, configs, indexed, extractor, saved)


def evaluate_classes(
    args: argparse.Namespace,
    settings: RunSettings,
    configs: Mapping[str, DetectorConfig],
    indexed: Mapping[str, SplitFiles],
    extractor: PatchExtractor,
    saved: Saved,
) -> None:
    """Run one class after the other, writing the results so far after each, and all tables at the end."""
    note, exact = table_note(extractor.config), extractor.config.protocol.exact_au_pro
    logger.info(note)
    flags = vars(args) | (dict.fromkeys(FITTING_FLAGS) if saved else {})
    methods: dict[str, dict[str, Mapping[str, Any]]] = {method: {} for method in configs}
    reports: dict[str, list[ClassReport]] = {method: [] for method in configs}
    for name, files in indexed.items():
        logger.info("%s: %d training, %d validation and %d test samples", name, *map(len, files))
        try:
            of_class = run_class(name, files, settings, configs, extractor, saved.get(name))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None  # a sample's path begins below its class
        for method, report in of_class.items():
            entry = methods[method][name] = report.entry
            reports[method].append(report)
            label = name if len(configs) == 1 else f"{name}, {method}"
            print(result_line(label, entry, exact), flush=True)
            applied = applied_flags(configs[method]) | {"precision": extractor.precision}
            record = results_record(sys.argv, flags | applied, methods[method])
            folder = method_folder(settings.output_dir, configs, method)
            write_results(folder, record)
            write_report(folder, record, reports[method], table_note(configs[method]))
    append_tables(settings.output_dir, methods, sys.argv, exact, note)
    print(f"\n{format_tables(methods, exact, note)}\n\nwritten to {settings.output_dir}/")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    with exit_on_input_error():
        run(parse_args(), given_flags())


if __name__ == "__main__":
    main()

"""The detectors that main.py --load_detector names: found, and compared with each other and with the command line."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path

from dataset import find_classes
from feature_extractors.config import METHODS, DetectorConfig
from feature_extractors.detector_record import SavedDetector, read_saved
from settings import applied_flags
from utils.errors import InputError

# By class and then by method.
Saved = Mapping[str, Mapping[str, SavedDetector]]

# What has no effect where detectors are loaded: it is about fitting, or in the detector.
FITTING_FLAGS = (
    "max_sample", "fusion_module_path", "save_detector", "detector_dtype", "target_fpr", "save_feature",
    "save_feature_path", "feature_dtype", "uff_pairing", "memory_budget", "train_feature_dtype",
)  # fmt: skip
# How it is computed: may be chosen anew.
RUNNING_FLAGS = {"point_ops", "precision"}
# What belongs to one method of several, of all that a detector computes. (memory_bank follows from the method.)
FIELDS_OF_A_METHOD = ("method_name", "use_uff", "asy_memory_bank", "rm_zero_for_project")


def read_detectors(args: argparse.Namespace, given: Collection[str]) -> Saved:
    """The detectors of each class to run, without their tensors.

    In the folder of --load_detector lie classes, or methods and in these the classes. All detectors of a run compute
    the same but for what is a method's own.

    Args:
        args: the flags of main.py.
        given: which of them the command line gives.

    Raises:
        InputError: a class has no detector there, one is damaged or differs from the others, or a flag contradicts
            them.
    """
    for name in sorted(set(given).intersection(FITTING_FLAGS)):
        raise InputError(f"--{name} has no effect with --load_detector, which fits nothing: leave it out")
    root: Path = args.load_detector
    precision = args.precision if "precision" in given else None
    asked = args.method_name if "method_name" in given else []
    by_method = [name for name in METHODS if (root / name).is_dir()]
    saved: dict[str, dict[str, SavedDetector]] = {}
    for name in find_classes(args.dataset_path, args.dataset_type, args.classes):
        folders = [root / method / name for method in asked or by_method] if by_method else [root / name]
        found = [read_saved(folder, point_ops=args.point_ops, precision=precision) for folder in folders]
        for each in found:
            if each.record.class_name != name or (by_method and each.record.method != each.folder.parent.name):
                raise InputError(
                    f"{each.folder} holds a detector of class {each.record.class_name} by {each.record.method}: move "
                    "it back to where it was saved"
                )
        saved[name] = {each.record.method: each for each in found}
    _check_alike(saved)
    first = next(iter(saved.values()))
    if asked and set(asked) != set(first):
        raise InputError(
            f"--method_name {' '.join(asked)} contradicts {root}, whose detectors are by {' and '.join(first)}: leave "
            "it out, or fit anew without --load_detector"
        )
    _check_flags(args, given, {method: each.record.config for method, each in first.items()})
    return saved


def _check_alike(saved: Saved) -> None:
    """Refuse detectors whose results do not belong into one table."""
    first = next(iter(saved.values()))
    leading = next(iter(first.values()))
    for each in (each for of_class in saved.values() for each in of_class.values()):
        _compare(first.get(each.record.method, leading), each)
        _compare(leading, each, FIELDS_OF_A_METHOD)


def _compare(one: SavedDetector, other: SavedDetector, but: Collection[str] = ()) -> None:
    names = [field.name for field in fields(DetectorConfig) if field.name not in ("memory_bank", *but)]
    differing = [name for name in names if getattr(one.record.config, name) != getattr(other.record.config, name)]
    if differing:
        raise InputError(
            f"{one.folder} and {other.folder} were fitted with different {', '.join(differing)}: evaluate them in runs "
            "of their own, with --classes or --method_name"
        )


def _check_flags(args: argparse.Namespace, given: Collection[str], configs: Mapping[str, DetectorConfig]) -> None:
    """Refuse flags of the command line that contradict the detectors."""
    saved = [applied_flags(config) | {"memory_bank": config.method.memory_bank} for config in configs.values()]
    for name in sorted((saved[0].keys() & given) - {"method_name"} - RUNNING_FLAGS):
        value, found = getattr(args, name), list(dict.fromkeys(flags[name] for flags in saved))
        if value not in found:
            raise InputError(
                f"--{name} {value} contradicts {args.load_detector}, whose detectors were fitted with "
                f"{' and '.join(map(str, found))}: leave it out, or fit anew without --load_detector"
            )

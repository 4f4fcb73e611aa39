"""Where main.py keeps detectors, and those of --load_detector compared with each other and with the command line."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import repr as shortened

from dataset import find_classes
from feature_extractors.config import METHODS, DetectorConfig
from feature_extractors.detector_record import CONFIG_FILE, SavedDetector, read_saved
from runner.settings import applied_flags
from utils.errors import InputError
from utils.scans.files import cannot_read, set_aside

# By class and then by method.
Saved = Mapping[str, Mapping[str, SavedDetector]]

FLAT = ""  # in place of a method, where a folder holds the detector of the only one
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

    In the folder of --load_detector they lie by class, or by method and class, see `_find`. All detectors of a
    run compute the same but for what is a method's own, and all classes have the same methods.

    Args:
        args: the flags of main.py.
        given: which of them the command line gives.

    Raises:
        InputError: a class has no detector there or both kinds, one is damaged or differs from the others, or a flag
            contradicts them.
    """
    for name in sorted(set(given).intersection(FITTING_FLAGS)):
        raise InputError(f"--{name} has no effect with --load_detector, which fits nothing: leave it out")
    root: Path = args.load_detector
    if not root.is_dir():
        raise InputError(f"{root} is no folder: give the one that --save_detector named, or save detectors there first")
    if _has_record(root):
        raise InputError(f"{root} is a detector itself: give the folder above it, {root.absolute().parent}")
    precision = args.precision if "precision" in given else None
    asked = args.method_name if "method_name" in given else []
    saved: dict[str, dict[str, SavedDetector]] = {}
    for name in find_classes(args.dataset_path, args.dataset_type, args.classes):
        folders = _folders_of(root, name)
        chosen = {method: folders[method] for method in asked if method in folders} or folders
        saved[name] = {}
        for method, folder in chosen.items():
            each = read_saved(folder, point_ops=args.point_ops, precision=precision)
            own_method = each.record.config.method_name
            if each.record.class_name != name or method not in (FLAT, own_method):
                raise InputError(
                    f"{folder} holds a detector of class {shortened(each.record.class_name)} by {own_method}: "
                    "move it back to where it was saved"
                )
            saved[name][own_method] = each
        if asked and set(asked) != set(saved[name]):
            raise InputError(
                f"--method_name {' '.join(asked)} contradicts {root}, whose detectors of {name} are by "
                f"{' and '.join(saved[name])}: leave it out, or fit anew without --load_detector"
            )
    _check_alike(saved)
    _check_flags(args, given, {method: each.record.config for method, each in next(iter(saved.values())).items()})
    return saved


def check_layout(root: Path, methods: Collection[str], classes: Collection[str]) -> None:
    """Before detectors are saved to a folder: they must be found again there, and leave others to be found.

    Raises:
        InputError: a class has a detector of the other layout there, or the folder for a method is a detector.
    """
    several = len(methods) > 1
    in_the_way = [root / method for method in methods if several and _has_record(root / method)]
    for name in classes:
        in_the_way += [folder for method, folder in _find(root, name).items() if several == (method == FLAT)]
    if in_the_way:
        raise InputError(
            f"{in_the_way[0]} holds a detector of a run of {'one method' if several else 'several methods'}, beside "
            "which --load_detector could not tell those of this run: move it away, or choose another --save_detector"
        )


def _find(root: Path, name: str) -> dict[str, Path]:
    """Where detectors of a class are: <root>/<class> as FLAT, of a run of one method, and <root>/<method>/<class>.

    A folder counts where it has a config.json, or had one until saving a newer one was interrupted.
    """
    folders = {FLAT: root / name} | {method: root / method / name for method in METHODS}
    return {method: folder for method, folder in folders.items() if _has_record(folder) or set_aside(folder)}


def _has_record(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file()
    except OSError as error:
        raise cannot_read(folder, error) from None


def _folders_of(root: Path, name: str) -> dict[str, Path]:
    """What `_find` finds, if it leaves no doubt which is meant."""
    found = _find(root, name)
    if FLAT in found and len(found) > 1:
        flat, other, *_ = found.values()
        raise InputError(
            f"{flat} and {other} both hold a detector of {name}, of a run of one method and of one of several: move "
            "away those that are not meant"
        )
    if not found:
        raise InputError(
            f"{root} holds no detector of {name}, neither in {name} nor in <method>/{name}: fit one with "
            "--save_detector, or name fitted classes with --classes"
        )
    return found


def _check_alike(saved: Saved) -> None:
    """Refuse detectors whose results do not belong into one table."""
    leader, first = next(iter(saved.items()))
    leading = next(iter(first.values()))
    for name, of_class in saved.items():
        if set(of_class) != set(first):
            raise InputError(
                f"the detectors of {leader} are by {' and '.join(first)}, those of {name} by {' and '.join(of_class)}: "
                "name methods that all classes have with --method_name, or fewer classes with --classes"
            )
        for method, each in of_class.items():
            _compare(first[method], each)
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

"""Saved detectors of main.py: their folders, the checks of --load_detector, and new thresholds."""

import argparse
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from reprlib import repr as shortened

from dataset import find_classes
from feature_extractors.config import METHODS, DetectorConfig
from feature_extractors.detector_record import CONFIG_FILE, SavedDetector, check_target, read_saved, recalibrate
from feature_extractors.thresholds import warn_of_few_samples
from runner.settings import CONCERNS, applied_flags
from utils.errors import InputError
from utils.reporting.messages import show
from utils.reporting.tables import print_columns
from utils.scans.files import check_folder, locked, make_folder, set_aside, subfolders

Saved = Mapping[str, Mapping[str, SavedDetector]]  # by class, then by method

FLAT = "."  # key, instead of the method, of a detector saved in <root>/<class> by a run of one method
# Flags without effect if detectors are loaded.
FITTING_FLAGS = (
    "max_sample", "few_shot", "seeds", "fusion_module_path", "save_detector", "detector_dtype", "target_fpr",
    "save_feature", "save_feature_path", "feature_dtype", "uff_pairing", "memory_budget", "train_feature_dtype",
)  # fmt: skip
# Flags that may differ from the fit.
FREE_FLAGS = {"point_ops", "precision"}
# Flags of a run that only changes thresholds.
THRESHOLD_FLAGS = ("load_detector", "target_fpr", "save_detector", "classes", "method_name")
SHOWN = ("target_fpr", "image", "pixel")  # of the old and new thresholds


def read_detectors(args: argparse.Namespace, given: Collection[str]) -> Saved:
    """Read the detectors of each class to run from --load_detector, without their tensors.

    `args` are the flags of main.py, `given` the names of those on the command line.

    Raises:
        InputError: a class has no detector, has both layouts, or lacks a method; a detector is damaged or its settings
            differ from the others'; or a flag contradicts them.
    """
    for name in sorted(set(given).intersection(FITTING_FLAGS)):
        raise InputError(f"--{name} has no effect with --load_detector. Leave it out.")
    check_folder(args.load_detector, "Give the one that --save_detector named.")
    _refuse_detector(args.load_detector)
    classes = find_classes(args.dataset_path, args.dataset_type, args.classes)
    saved = {name: _read_class(name, args, given) for name in classes}
    _check_alike(saved)
    _check_flags(args, given, [each.record.config for each in next(iter(saved.values())).values()])
    return saved


def change_thresholds(args: argparse.Namespace, given: Collection[str]) -> None:
    """Save the detectors of --load_detector with thresholds for --target_fpr, and print old and new thresholds.

    The thresholds come from the stored calibration, so neither dataset nor checkpoints are read. Raises InputError for
    flags without effect, and as `read_detectors` and `check_layout`.
    """
    if not {"target_fpr", "save_detector"} <= set(given):
        raise InputError("With --load_detector, --target_fpr and --save_detector only work together. Give both.")
    for name in sorted(set(given).difference(THRESHOLD_FLAGS)):
        raise InputError(f"--{name} has no effect on a change of thresholds. Leave it out.")
    saved, root = _detectors_in(args, given), args.load_detector
    target: Path = args.save_detector
    places = {name: [each.folder.relative_to(root) for each in of_class.values()] for name, of_class in saved.items()}
    check_layout(target, {name: [str(path.parent) for path in paths] for name, paths in places.items()})
    folders = [target / path for paths in places.values() for path in paths]
    for folder in folders:
        check_target(folder)
    rows: list[tuple[str, ...]] = [("class", "method", "false-alarm rate", "image threshold", "pixel threshold")]
    counts: dict[str, int] = {}
    with locked(make_folder(target, "--save_detector"), "--save_detector", [each / CONFIG_FILE for each in folders]):
        for name, of_class in saved.items():
            for method, each in of_class.items():
                new = recalibrate(each, args.target_fpr, target / each.folder.relative_to(root))
                values = ((getattr(found, key) for found in (each.record.thresholds, new)) for key in SHOWN)
                rows.append((name, method, *("{:.4g} -> {:.4g}".format(*pair) for pair in values)))
                counts[name] = new.parts
    warn_of_few_samples(counts, args.target_fpr)
    print_columns(rows)
    show(f"written to {target}/")


def _detectors_in(args: argparse.Namespace, given: Collection[str]) -> Saved:
    """Detectors in --load_detector: those of --classes and --method_name if these are given, else all."""
    root = args.load_detector
    check_folder(root, "Give the one that --save_detector named.")
    _refuse_detector(root)
    names = dict.fromkeys(path.name for folder in (root, *map(root.joinpath, METHODS)) for path in subfolders(folder))
    found = [name for name in names if _find(root, name)]
    if not found:
        raise InputError(f"{root} holds no detector. Give the folder that --save_detector named.")
    if unknown := [name for name in args.classes or () if name not in found]:
        problem = f"{root} holds no detector of {unknown[0]}, only of {', '.join(found)}"
        raise InputError(f"{problem}. Name these with --classes.")
    return {name: _read_class(name, args, given) for name in args.classes or found}


def _refuse_detector(root: Path) -> None:
    """Refuse a detector where a folder of detectors is expected."""
    if (root / CONFIG_FILE).is_file():
        raise InputError(f"{root} is a detector itself. Give the folder above it, {root.absolute().parent}.")


def _read_class(name: str, args: argparse.Namespace, given: Collection[str]) -> dict[str, SavedDetector]:
    """Detectors of a class by method: those of --method_name if it is given, else all."""
    asked = args.method_name if "method_name" in given else []
    folders = _folders_of(args.load_detector, name)
    detectors = {}
    for method, folder in ({each: folders[each] for each in asked if each in folders} or folders).items():
        precision = args.precision if "precision" in given else None
        saved = read_saved(folder, point_ops=args.point_ops, precision=precision)
        own_method = saved.record.config.method_name
        if saved.record.class_name != name or method not in (FLAT, own_method):
            other = f"class {shortened(saved.record.class_name)} by {own_method}"
            raise InputError(f"{folder} holds a detector of {other}. Move it back to its own folder.")
        detectors[own_method] = saved
    if asked and set(asked) != set(detectors):
        raise InputError(
            f"--method_name {' '.join(asked)} contradicts {args.load_detector}, whose detectors of {name} are by "
            f"{' and '.join(detectors)}. Leave it out, or fit again without --load_detector."
        )
    return detectors


def check_layout(root: Path, places: Mapping[str, Collection[str]]) -> None:
    """Check, before detectors are saved in a folder, that --load_detector will find them there.

    `places` are the folders in `root` by class: those of methods, or FLAT alone. Raises InputError if a class has a
    detector of the other layout there, or `root` or the folder of a method is a detector.
    """
    _refuse_detector(root)
    in_the_way: list[tuple[Path, str]] = []
    for name, folders in places.items():
        flat = FLAT in folders
        kind = "several methods" if flat else "one method"
        in_the_way += [(root / each, kind) for each in folders if not flat and (root / each / CONFIG_FILE).is_file()]
        in_the_way += [(found, kind) for each, found in _find(root, name).items() if flat != (each == FLAT)]
    if in_the_way:
        raise InputError(
            f"{in_the_way[0][0]} holds a detector from a run of {in_the_way[0][1]}, which "
            "--load_detector could not tell from this run's. Move it away, or choose another --save_detector."
        )


def _find(root: Path, name: str) -> dict[str, Path]:
    """Folders of a class's detectors by method: <root>/<method>/<class>, and <root>/<class> under the key FLAT.

    A folder counts if it has a config.json, or if its replacement was interrupted.
    """
    folders = {each: root / each / name for each in (FLAT, *METHODS)}
    return {
        method: folder for method, folder in folders.items() if (folder / CONFIG_FILE).is_file() or set_aside(folder)
    }


def _folders_of(root: Path, name: str) -> dict[str, Path]:
    """Folders of a class's detectors by method, of one layout."""
    found = _find(root, name)
    if FLAT in found and len(found) > 1:
        flat, other, *_ = found.values()
        raise InputError(f"{flat} and {other} both hold a detector of {name}. Move away the ones you do not want.")
    if not found:
        raise InputError(
            f"{root} holds no detector of {name}, neither in {name} nor in <method>/{name}. Fit one with "
            "--save_detector, or name fitted classes with --classes."
        )
    return found


def _check_alike(saved: Saved) -> None:
    """Refuse detectors whose results are not comparable in one table."""
    first_class, first = next(iter(saved.items()))
    first_detector = next(iter(first.values()))
    for name, detectors in saved.items():
        if set(detectors) != set(first):
            raise InputError(
                f"The detectors of {first_class} are by {' and '.join(first)}, those of {name} by "
                f"{' and '.join(detectors)}. Name common methods with --method_name, or fewer classes with --classes."
            )
        for method, each in detectors.items():
            _compare(first[method], each, but=["memory_bank"])
            _compare(first_detector, each, but=["method_name", *CONCERNS])


def _compare(one: SavedDetector, other: SavedDetector, but: Collection[str]) -> None:
    values, others = vars(one.record.config), vars(other.record.config)
    differing = ", ".join(name for name in values if name not in but and values[name] != others[name])
    if differing:
        raise InputError(
            f"{one.folder} and {other.folder} were fitted with different {differing}. Evaluate them in separate runs."
        )


def _check_flags(args: argparse.Namespace, given: Collection[str], configs: Iterable[DetectorConfig]) -> None:
    """Refuse flags of the command line that contradict the detectors."""
    saved = [applied_flags(config) | {"memory_bank": config.method.memory_bank} for config in configs]
    for name in sorted((saved[0].keys() & given) - {"method_name"} - FREE_FLAGS):
        value, found = getattr(args, name), [flags[name] for flags in saved]
        if value not in found:
            raise InputError(
                f"--{name} {value} contradicts {args.load_detector}, whose detectors were fitted with "
                f"{' and '.join(dict.fromkeys(map(str, found)))}. Leave it out, or fit again without --load_detector."
            )

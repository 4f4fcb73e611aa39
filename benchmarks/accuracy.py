"""Accuracy of the protocols, and of each field beyond `corrected`, on synthetic samples and on real images.

    python benchmarks/accuracy.py --set choosing       # to choose fields: half of the seeds, without the class HELD_OUT
    python benchmarks/accuracy.py                      # also to confirm the choice: other seeds, all classes
    python benchmarks/accuracy.py --set --images ../mvtec3d_tire_rgb    # only real images, with the rgb bank

Synthetic samples have weak defects and are cleaned like real ones. Images are read from
FOLDER/<class>/{train,validation,test}. The backbones are EfficientNet-Lite0 and FPFH, which need no download. Features
and results are kept in --work_dir, and the same command continues an interrupted run. After a change of the protocols,
remove results.jsonl there; after a change of the features, remove the whole folder. The script prints the Markdown
tables of docs/ACCURACY.md.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.accuracy_features import FULL, RGB, Features, Trial, detector_config, extract, read_features
from benchmarks.accuracy_tables import Key, classes_table, differences_table, means_table
from feature_extractors.config import EXTENSIONS, METHODS, PROTOCOLS, Protocol
from feature_extractors.extractor import build_extractor
from feature_extractors.pipeline import fit_detector
from feature_extractors.training_features import TrainingFeatures
from utils.command_line import Parser
from utils.metrics import evaluate
from utils.reporting.messages import start_messages
from utils.reporting.progress import progress_bar
from utils.scans.files import subfolders
from utils.synthetic_data.parts import PARTS

HELD_OUT = "rope"  # class left out when choosing
SETS = ("choosing", "confirming")
IMAGE_SIZES = (224, 448)

Values = list[float]  # in the order of METRICS


def make_trials(args: Any) -> list[Trial]:
    """Trials of the chosen sets: even seeds choose, odd seeds confirm."""
    synthetic = [Trial(name, args.img_size, seed) for seed in range(args.seeds) for name in args.classes]
    trials = [each for each in synthetic if each.set_name in args.set]
    trials = [each for each in trials if each.set_name == "confirming" or each.class_name != HELD_OUT]
    if args.images is not None:
        names = [folder.name for folder in subfolders(args.images)]
        trials += [Trial(name, size, images=args.images) for name in names for size in IMAGE_SIZES]
    return trials


def make_variants() -> dict[str, Protocol]:
    """Protocols by name: the named ones, and each field beyond `corrected` switched on alone and left out alone."""
    variants = dict(PROTOCOLS)
    variants |= {f"corrected + {name}": replace(PROTOCOLS["corrected"], **{name: True}) for name in EXTENSIONS}
    variants |= {f"extended - {name}": replace(PROTOCOLS["extended"], **{name: False}) for name in EXTENSIONS}
    return variants


class Measurement(NamedTuple):
    """Detectors of one protocol to fit and to test on one trial."""

    trial: Trial
    variant: str
    protocol: Protocol
    methods: Sequence[str]


def plan_measurements(args: Any, trials: Sequence[Trial]) -> list[Measurement]:
    """All measurements: the named protocols with every method, the variants of single fields with the full one."""
    planned = []
    for trial in trials:
        methods = args.methods if trial.images is None else [RGB]
        for name, protocol in make_variants().items():
            if name in (args.variants or [name]):
                of_variant = methods if name in PROTOCOLS else [trial.full_method]
                planned.append(Measurement(trial, name, protocol, of_variant))
    return planned


def measure(planned: Sequence[Measurement], work_dir: Path) -> dict[Key, Values]:
    """Metrics of all measurements; those of each trial and variant are added to results.jsonl once they are done."""
    results = read_results(work_dir)
    pending = [m for m in planned if any((m.trial.name, method, m.variant) not in results for method in m.methods)]
    for each in progress_bar(pending, desc="accuracy", unit="fit"):
        extract(each.trial, [other.protocol for other in pending if other.trial == each.trial], work_dir)
        found = fit_and_test(each, *read_features(each.trial, each.protocol, work_dir))
        with (work_dir / "results.jsonl").open("a") as file:
            file.writelines(json.dumps([key, values]) + "\n" for key, values in found.items())
        results |= found
    return results


def read_results(work_dir: Path) -> dict[Key, Values]:
    path = work_dir / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {tuple(key): values for key, values in map(json.loads, lines)}


def fit_and_test(measurement: Measurement, features: Features, masks: Tensor, labels: Tensor) -> dict[Key, Values]:
    """Metrics of each method on the test samples."""
    trial, variant, protocol, methods = measurement
    extractor = build_extractor(detector_config(trial, trial.full_method, protocol), Path(), None)
    training = TrainingFeatures(len(features["train"]))
    for patches in features["train"]:
        training.append(patches)
    found = {}
    for method in methods:
        detector = fit_detector(detector_config(trial, method, protocol), extractor, training)
        predictions = detector.predict_features(features["test"])
        scores, maps = [each.score for each in predictions], [each.anomaly_map.numpy() for each in predictions]
        metrics, _ = evaluate(labels.numpy(), scores, masks.numpy(), maps)
        exact = metrics["au_pro_exact"]
        values = [metrics["image_rocauc"], metrics["pixel_rocauc"], exact["0.3"], exact["0.01"]]
        found[trial.name, method, variant] = values
    return found


def print_tables(results: dict[Key, Values], planned: Sequence[Measurement]) -> None:
    """Print the tables of each set of synthetic samples, and of each class of images and input size."""
    methods = list(dict.fromkeys(method for each in planned for method in each.methods))
    variants = list(dict.fromkeys(each.variant for each in planned))
    protocols = [name for name in variants if name in PROTOCOLS]
    trials = list(dict.fromkeys(each.trial for each in planned))
    for name in dict.fromkeys(each.set_name for each in trials):
        group = [each for each in trials if each.set_name == name]
        if group[0].images is not None:
            print(f"\n## {name}\n\n{means_table(results, group, [RGB], variants)}")
            continue
        print(f"\n## {name}\n\n{means_table(results, group, methods, protocols)}")
        print(f"\n{FULL}, difference from `reference`:\n\n{differences_table(results, group, FULL, variants)}")
        for protocol in protocols[1:]:
            print(f"\nThe same by class, `{protocol}`:\n\n{classes_table(results, group, FULL, protocol)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--set", nargs="*", choices=SETS, default=SETS, help="sets of synthetic trials; --set alone leaves them out")
    add("--classes", nargs="+", choices=PARTS, default=tuple(PARTS), help="synthetic classes")
    add("--seeds", type=int, default=6, help="number of seeds; even ones are for choosing, odd ones for confirming")
    add("--img_size", type=int, default=224, help="side of the input of synthetic samples, pixels")
    add(
        "--methods", nargs="+", choices=METHODS, default=("Point_MAE", RGB, FULL), help="methods of the named protocols"
    )
    add("--variants", nargs="+", choices=make_variants(), help="protocols to measure; all by default")
    add("--images", type=Path, metavar="FOLDER", help="dataset of real images")
    add("--work_dir", type=Path, default=Path("results/accuracy"), help="folder of features and results")
    args = parser.parse_args(argv)
    start_messages("%(message)s")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    planned = plan_measurements(args, make_trials(args))
    print_tables(measure(planned, args.work_dir), planned)


if __name__ == "__main__":
    main()

"""Files of each class that a run reads, and the draw of training samples for --few_shot."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from dataset import check_files, find_classes, good_folders, index_split
from feature_extractors.thresholds import warn_of_few_samples
from runner.dataset_check import lacks_test
from runner.saved_detectors import Saved
from runner.settings import RunSettings
from utils.errors import InputError
from utils.records import CloudForm, SampleFiles
from utils.scans.cloud_check import class_distance

logger = logging.getLogger(__name__)


class ClassFiles(NamedTuple):
    """Files of one class by split; empty for a split that the dataset lacks or the run does not read."""

    train: list[SampleFiles]
    validation: list[SampleFiles]
    test: list[SampleFiles]

    @property
    def evaluated(self) -> tuple[str, list[SampleFiles]]:
        """The test split. Without one, the good samples of the validation split, or else of the training split."""
        if self.test:
            return "test", self.test
        split = "validation" if self.validation else "train"
        return split, [each._replace(label=0) for each in getattr(self, split)]


Draws = Mapping[int | None, list[str]]  # paths of the training samples that --few_shot draws, by seed


def index_classes(
    settings: RunSettings, modalities: frozenset[str], form: CloudForm, saved: Saved
) -> tuple[dict[str, ClassFiles], dict[str, Draws]]:
    """Files of each class, with checked headers, and the samples drawn for --few_shot.

    Clouds have this `form`, and the distance of any `saved` detector.
    """
    indexed: dict[str, ClassFiles] = {}
    draws: dict[str, Draws] = {}
    for name in find_classes(settings.dataset_path, settings.dataset_type, settings.classes):
        splits = _index_class(settings, name, modalities)
        if settings.few_shot is not None:
            paths = [each.path for each in splits.train]
            draws[name] = {seed: draw_samples(name, paths, settings.few_shot, seed) for seed in settings.seeds or ()}
            drawn = set(chain(*draws[name].values()))
            splits = splits._replace(train=[each for each in splits.train if each.path in drawn])
        stored = [each._replace(form=form) for each in splits.train or splits.evaluated[1]]
        distance = class_distance(stored) if "xyz" in modalities else None
        for detector in saved.get(name, {}).values():
            distance = detector.record.clouds.distance or distance
        of_class = replace(form, distance=distance)
        indexed[name] = ClassFiles(*([each._replace(form=of_class) for each in split] for split in splits))
    for files in indexed.values():
        check_files(files.train + files.validation, modalities)
        check_files(files.evaluated[1], shown_modalities(settings, modalities))
    return indexed, draws


def draw_samples(class_name: str, paths: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw `count` of the training samples at random, in their order. A larger `count` includes the same samples.

    Raises InputError if there are fewer.
    """
    if len(paths) < count:
        problem = f"{class_name} has {len(paths)} training samples to draw from, fewer than --few_shot {count}"
        raise InputError(f"{problem}. Give a smaller number, or raise --max_sample if it is the limit.")
    order = np.random.default_rng([seed, *class_name.encode("utf-8", "surrogateescape")]).permutation(len(paths))
    return [paths[number] for number in sorted(order[:count])]


def _index_class(settings: RunSettings, name: str, modalities: frozenset[str]) -> ClassFiles:
    """Files of a class that the run reads. With loaded detectors, good samples are read only without a test split."""
    folder, fits = settings.dataset_path / name, settings.load_detector is None
    tested = not lacks_test(folder, chosen=settings.classes is not None)
    validated = bool(good_folders(folder / "validation"))
    train: list[SampleFiles] = []
    validation: list[SampleFiles] = []
    if fits or not (tested or validated):
        train = index_split(folder, "train", modalities)[: settings.max_sample]
    if validated and (fits or not tested):
        validation = index_split(folder, "validation", modalities)
    return ClassFiles(train, validation, index_split(folder, "test", modalities) if tested else [])


def warn_of_missing_samples(
    files: Mapping[str, ClassFiles], target_fpr: float | None, few_shot: int | None = None
) -> None:
    """Warn of classes without a test split and, unless `target_fpr` is None, with too few samples for calibration."""
    if untested := [name for name, splits in files.items() if not splits.test]:
        logger.warning(
            "%s %s no test split, so I-AUROC, P-AUROC, AU-PRO, precision, recall and false-alarm rate cannot be "
            "measured. The report shows good samples instead",
            *(", ".join(untested), "has" if len(untested) == 1 else "have"),
        )
    if target_fpr is None:
        return
    if uncalibrated := [name for name, splits in files.items() if not splits.validation]:
        logger.warning(
            "%s %s no validation/good, so thresholds are calibrated on the training samples. These score low; expect "
            "more false alarms than --target_fpr",
            *(", ".join(uncalibrated), "has" if len(uncalibrated) == 1 else "have"),
        )
    counts = {name: len(splits.validation) or few_shot or len(splits.train) for name, splits in files.items()}
    warn_of_few_samples(counts, target_fpr)


def shown_modalities(settings: RunSettings, modalities: frozenset[str]) -> frozenset[str]:
    """Modalities of the test files that are read: the method's, and images if predictions are saved as figures."""
    return modalities if settings.save_preds is None else modalities | {"rgb"}

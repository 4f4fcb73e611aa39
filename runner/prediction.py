"""Prediction of files outside a dataset, in memory that does not grow with their number."""

import csv
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dataset import load_samples, make_sample, read_ahead, read_rgb
from feature_extractors.detector import Detector
from feature_extractors.extractor import Inputs, PatchExtractor
from feature_extractors.pipeline import batches
from feature_extractors.thresholds import Thresholds
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, crop_padding, is_cleaned, shows_table
from utils.errors import InputError
from utils.records import METERS, CloudForm, Prediction, Sample, SampleFiles
from utils.reporting.messages import warn_once
from utils.reporting.visualization import FUSED, caption, color_scale, resize_map, save_anomaly_map, save_figure
from utils.scans.depth_camera import Camera
from utils.scans.files import atomic_path, writing
from utils.scans.images import shrink_image
from utils.scans.json_records import encode_record
from utils.scans.sample_files import FoundSamples, check_same_view, read_cloud, stamp_of

SCHEMA = 2  # of the lines of predictions.jsonl
PREDICTIONS, TABLE = "predictions.jsonl", "predictions.csv"
COLUMNS = (
    "schema", "name", "rgb", "xyz", "stamp", "score", "severity", "anomalous", "threshold", "seconds", "map", "overlay",
    "error",
)  # fmt: skip
logger = logging.getLogger(__name__)


class LoadedSample(NamedTuple):
    """Files of a sample and the sample itself, or the problem with reading it."""

    files: SampleFiles
    sample: Sample | None = None
    problem: str = ""
    stamp: str = ""  # see `stamp_of`, before the files were read
    image: np.ndarray | None = None  # (h, w, 3) uint8, for the overlay, scaled by `shrink_image`
    size: tuple[int, int] = (0, 0)  # (H, W) of the cloud, or of the image if there is no cloud
    side: int | None = None  # of the cloud, pixels, once cleaning has padded it to a square


class Outcome(NamedTuple):
    """Prediction of a sample, or the reason why there is none."""

    loaded: LoadedSample
    prediction: Prediction | None = None
    seconds: float = 0.0  # of extraction and scoring: time of its batch divided by the number of samples
    problem: str = ""


@dataclass(frozen=True)
class SampleReader:
    """Samples by number, read on access and not kept."""

    files: Sequence[SampleFiles]
    modalities: frozenset[str]  # those that the detector uses
    img_size: int  # side of the detector's input, pixels
    camera: Camera | None = None  # of depth images
    cleaning: CleaningRule | None = None  # of the clouds that are not clean already; None leaves all as they are
    tables_refused: bool = False  # refuse clouds that show their table, because the detector was fitted without

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LoadedSample:
        files = self.files[index]
        stamp = stamp_of(files)
        try:
            return self._read(files)._replace(stamp=stamp)
        except InputError as error:
            return LoadedSample(files, problem=str(error), stamp=stamp)

    def _read(self, files: SampleFiles) -> LoadedSample:
        image = read_rgb(files)
        image_size = None if image is None else image.shape[:2]
        form = files.form if self.cleaning is None else replace(files.form, distance=None)  # of cleaned clouds only
        xyz = None if files.xyz is None else read_cloud(files.xyz, self.camera, image_size, form)
        if image is not None and xyz is not None:
            check_same_view(files.path, image, xyz)
        view = image if xyz is None else xyz
        assert view is not None, "a sample has a file"
        rgb, cloud, side = image, xyz, None
        if self.cleaning is not None and self._is_raw(files, xyz, self.cleaning):
            assert xyz is not None
            rgb, cloud = _clean(files, image, xyz, self.cleaning)
            side = len(cloud)
        elif self.tables_refused and xyz is not None and shows_table(xyz, CleaningRule()):
            problem = f"{files.xyz} shows the table, but the detector was fitted on cleaned samples"
            raise InputError(f"{problem}. Leave out --no-preprocess, or clean it with utils/preprocessing.py.")
        used = rgb if "rgb" in self.modalities else None, cloud if "xyz" in self.modalities else None
        form = replace(files.form, unit="m", missing_value=None)  # of `cloud`
        sample = make_sample(str(files.xyz or files.rgb), *used, self.img_size, form)  # errors name this file
        image = None if image is None else shrink_image(image)  # keeps samples in memory small
        return LoadedSample(files, sample, image=image, size=view.shape[:2], side=side)

    def _is_raw(self, files: SampleFiles, xyz: np.ndarray | None, rule: CleaningRule) -> bool:
        if files.xyz is None or xyz is None:
            raise InputError(f"{files.rgb} cannot be cleaned without its cloud. Give the cloud as well.")
        if not is_cleaned(xyz, rule):
            return True
        problem = f"{files.xyz} has no measurements along its border, so it is used as a clean cloud"
        warn_once("clean", files.xyz.parent, f"{problem}. If it is raw, give --preprocess --empty_margins.")
        return False


def _clean(
    files: SampleFiles, image: np.ndarray | None, xyz: np.ndarray, rule: CleaningRule
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the image, if there is one, and the cloud of a raw scan without its table, padded to a square."""
    rgb = np.zeros_like(xyz, dtype=np.uint8) if image is None else image
    try:
        clean = clean_scan(xyz, rgb, None, rule)
    except InputError as error:
        raise InputError(f"{files.xyz} cannot be cleaned: {error}") from None
    if clean.doubt:
        logger.warning("The table of %s may not have been found: %s. Check its overlay", files.xyz, clean.doubt)
    return None if image is None else clean.rgb, clean.xyz


def predict_samples(detector: Detector, reader: SampleReader, batch_size: int, num_workers: int) -> Iterator[Outcome]:
    """Predict samples in order. A problem with one of them does not affect the others.

    Memory holds at most one batch of `batch_size` samples (two for a GPU), and two more samples for each of the
    `num_workers` threads.
    """
    prepare = partial(_prepare, detector.extractor)
    prepared = map(prepare, batches(load_samples(reader, num_workers), batch_size))
    for batch in read_ahead(prepared) if detector.extractor.device.type == "cuda" else prepared:
        yield from _predict_batch(detector, batch)


class PreparedBatch(NamedTuple):
    """Batch of samples, and the inputs on the detector's device of those that can be predicted."""

    samples: list[LoadedSample]
    inputs: Inputs | None  # None: no sample can be predicted


def _prepare(extractor: PatchExtractor, batch: list[LoadedSample]) -> PreparedBatch:
    try:
        samples = [each.sample for each in batch if each.sample is not None]
        return PreparedBatch(batch, extractor.prepare(samples) if samples else None)
    except InputError as error:
        if len(batch) == 1:
            return PreparedBatch([LoadedSample(batch[0].files, problem=str(error), stamp=batch[0].stamp)], None)
        checked = [_prepare(extractor, [each]).samples[0] for each in batch]
        return _prepare(extractor, checked)


def _predict_batch(detector: Detector, batch: PreparedBatch) -> list[Outcome]:
    begin = time.perf_counter()
    predicted: Iterator[Prediction] = iter(())
    if batch.inputs is not None:
        predicted = iter(detector.predict_features(detector.extractor.extract_prepared(batch.inputs)))
    count = sum(each.sample is not None for each in batch.samples)
    share = (time.perf_counter() - begin) / max(count, 1)
    outcomes = []
    for loaded in batch.samples:
        if loaded.sample is None:
            outcomes.append(Outcome(loaded, problem=loaded.problem))
            continue
        prediction = next(predicted)
        if math.isfinite(prediction.score) and prediction.anomaly_map.isfinite().all():
            outcomes.append(Outcome(loaded, prediction, share))
        else:
            problem = f"{loaded.sample.path} gives a score or a map that is not finite. Restore its files."
            outcomes.append(Outcome(loaded, problem=problem))
    return outcomes


@dataclass(frozen=True)
class Predictor:
    """Detector with a reader and settings, to predict any number of samples."""

    detector: Detector
    reader: SampleReader  # without files
    form: CloudForm = METERS  # of the clouds
    batch_size: int = 1
    num_workers: int = 0

    def outcomes(self, found: FoundSamples) -> Iterator[Outcome]:
        """Yield the problems of incomplete samples, then predict the others as `predict_samples` does."""
        for files, problem in found.incomplete:
            yield Outcome(LoadedSample(files, stamp=stamp_of(files)), problem=problem)
        reader = replace(self.reader, files=[each._replace(form=self.form) for each in found.samples])
        yield from predict_samples(self.detector, reader, self.batch_size, self.num_workers)


class PredictionWriter:
    """Writer of predictions.jsonl and predictions.csv, with a line for each sample, and with `images` of its images.

    `thresholds` give the decisions. With `typical`, the map's value at a typical good pixel, they also give the colors
    of all overlays. `append` continues existing files, after removing an incomplete last line. Raises InputError, also
    from `add`, if a file cannot be written.
    """

    def __init__(
        self, folder: Path, thresholds: Thresholds | None, images: bool, append: bool = False, typical: float = 0.0
    ) -> None:
        self.folder, self.thresholds, self.images, self.typical = folder, thresholds, images, typical
        self.path, self.table = folder / PREDICTIONS, folder / TABLE
        with writing(self.path), self.path.open("ab+") as lines:
            lines.seek(0)
            complete = sum(len(line) for line in lines if line.endswith(b"\n")) if append else 0
            if append and complete < lines.tell():
                logger.warning("%s ends in an incomplete line of an interrupted run. It is removed", self.path)
            lines.truncate(complete)
        with atomic_path(self.table) as temporary, _open_table(temporary, "w") as file:
            rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            rows.writeheader()
            rows.writerows(map(_cells, read_predictions(self.path)))

    def add(self, outcome: Outcome) -> dict[str, Any]:
        """Write the files and the line of a sample; returns the content of the line."""
        files, prediction, thresholds = outcome.loaded.files, outcome.prediction, self.thresholds
        record: dict[str, Any] = {"schema": SCHEMA, "name": files.path, "rgb": files.rgb, "xyz": files.xyz}
        record["stamp"] = outcome.loaded.stamp
        if prediction is None:
            record["error"] = outcome.problem
        else:
            record |= {
                "score": prediction.score,
                "severity": None if thresholds is None else thresholds.severity(prediction.score),
                "anomalous": None if thresholds is None else prediction.score > thresholds.image,
                "threshold": None if thresholds is None else thresholds.image,
                "seconds": outcome.seconds,
            }
            paths = self._save_images(outcome.loaded, prediction, record) if self.images else (None, None)
            record |= dict(zip(("map", "overlay"), paths, strict=True))
        with writing(self.path), self.path.open("a", encoding="utf-8") as lines:
            lines.write(encode_record(record))
        with writing(self.table), _open_table(self.table, "a") as file:
            csv.DictWriter(file, COLUMNS).writerow(_cells(record))
        return record

    def _save_images(self, loaded: LoadedSample, prediction: Prediction, record: Mapping) -> tuple[Path, Path]:
        padded = loaded.size if loaded.side is None else (loaded.side, loaded.side)
        plane = crop_padding(resize_map(prediction.anomaly_map.numpy(), padded), loaded.size)
        pixel = None if self.thresholds is None else self.thresholds.pixel
        scale = color_scale([plane] if pixel is None else [np.array(self.typical)], pixel)
        map_path, overlay_path = output_paths(self.folder, loaded.files.path)
        save_anomaly_map(map_path, plane, loaded.size)
        valid = None
        if loaded.sample is not None and loaded.sample.xyz is not None:
            valid = crop_padding(resize_map(loaded.sample.xyz.any(dim=0).numpy(), padded) > 0.5, loaded.size)
        title = caption(loaded.files.path, record["severity"], record["anomalous"])
        save_figure(overlay_path, title, loaded.image, plane, {FUSED: scale}, pixel, valid=valid)
        return map_path, overlay_path


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of each line of predictions.jsonl, without lines that are not JSON objects."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _open_table(path: Path, mode: str) -> IO[str]:
    return path.open(mode, encoding="utf-8", errors="backslashreplace", newline="")


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a line of predictions.csv; true and false are written as in JSON."""
    return {name: json.dumps(value) if isinstance(value, bool) else value for name, value in record.items()}


def output_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Paths of the map and the overlay of a sample."""
    return folder / f"{name}.tiff", folder / f"{name}_overlay.png"

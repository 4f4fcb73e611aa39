"""Prediction of files outside a dataset, in memory that does not grow with their number."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset import load_samples, make_sample, read_rgb
from feature_extractors.detector import Detector
from feature_extractors.pipeline import batches, extract_timed
from feature_extractors.thresholds import Thresholds
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, crop_padding, shows_table
from utils.errors import InputError
from utils.records import Prediction, Sample, SampleFiles
from utils.reporting.visualization import FUSED, caption, color_scale, resize_map, save_anomaly_map, save_figure
from utils.scans.cloud_check import spread
from utils.scans.depth_camera import Camera
from utils.scans.files import writing
from utils.scans.images import shrink_image, warn_once
from utils.scans.sample_files import check_same_view, read_cloud

PREDICTIONS = "predictions.jsonl"
logger = logging.getLogger(__name__)


class LoadedSample(NamedTuple):
    """Files of a sample and the sample itself, or the problem with reading it."""

    files: SampleFiles
    sample: Sample | None = None
    problem: str = ""
    image: np.ndarray | None = None  # (h, w, 3) uint8, for the overlay, scaled by `shrink_image`
    size: tuple[int, int] = (0, 0)  # (H, W) of the cloud, or of the image if there is no cloud
    side: int | None = None  # of the cloud, pixels, once cleaning has padded it to a square


class Outcome(NamedTuple):
    """Prediction of a sample, or the reason why there is none."""

    loaded: LoadedSample
    prediction: Prediction | None = None
    seconds: float = 0.0  # share of the batch's extraction plus the sample's scoring, without reading its files
    problem: str = ""


@dataclass(frozen=True)
class SampleReader:
    """Samples by number, read on access and not kept."""

    files: Sequence[SampleFiles]
    modalities: frozenset[str]  # those that the detector uses
    img_size: int  # side of the detector's input, pixels
    camera: Camera | None = None  # of depth images
    cleaning: CleaningRule | None = None  # of the clouds; None leaves them as they are

    @cached_property
    def checked_for_table(self) -> frozenset[str]:
        """Names of a few samples whose clouds are checked for a table; none if they are cleaned here."""
        needs_cleaning = "xyz" in self.modalities and self.cleaning is None
        return frozenset(each.path for each in spread(self.files)) if needs_cleaning else frozenset()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LoadedSample:
        files = self.files[index]
        try:
            return self._read(files)
        except InputError as error:
            return LoadedSample(files, problem=str(error))

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
        if self.cleaning is not None and xyz is not None:
            rgb = np.zeros_like(xyz, dtype=np.uint8) if image is None else image
            try:
                cloud, rgb, _, doubt = clean_scan(xyz, rgb, None, self.cleaning)
            except InputError as error:
                raise InputError(f"{files.xyz} cannot be cleaned: {error}") from None
            if doubt:
                logger.warning("The table of %s may not have been found: %s. Check its overlay", files.xyz, doubt)
            side = len(cloud)
        used = rgb if "rgb" in self.modalities else None, cloud if "xyz" in self.modalities else None
        form = replace(files.form, unit="m", missing_value=None)  # of `cloud`
        sample = make_sample(str(files.xyz or files.rgb), *used, self.img_size, form)  # errors name this file
        if files.path in self.checked_for_table and files.xyz and xyz is not None and shows_table(xyz, CleaningRule()):
            problem = f"{files.xyz} shows the table, which the detector takes for a defect"
            fix = "Give --preprocess, or clean the scans with utils/preprocessing.py"
            warn_once("table", files.xyz.parent, f"{problem}. {fix}.")
        image = None if image is None else shrink_image(image)  # keeps samples in memory small
        return LoadedSample(files, sample, image=image, size=view.shape[:2], side=side)


def predict_samples(detector: Detector, reader: SampleReader, batch_size: int, num_workers: int) -> Iterator[Outcome]:
    """Predict samples in order. A problem with one of them does not affect the others.

    Memory holds at most a batch of `batch_size` samples, and two more for each of the `num_workers` threads.
    """
    for batch in batches(load_samples(reader, num_workers), batch_size):
        predicted = iter(_predict_batch(detector, [each for each in batch if each.sample is not None]))
        for loaded in batch:
            yield Outcome(loaded, problem=loaded.problem) if loaded.sample is None else next(predicted)


def _predict_batch(detector: Detector, batch: Sequence[LoadedSample]) -> list[Outcome]:
    if not batch:
        return []
    samples = [each.sample for each in batch if each.sample is not None]
    try:
        features, seconds = extract_timed(detector.extractor, samples)
    except InputError as error:
        if len(batch) == 1:
            return [Outcome(batch[0], problem=str(error))]
        return [outcome for each in batch for outcome in _predict_batch(detector, [each])]
    outcomes = []
    for loaded, sample, of_sample in zip(batch, samples, features, strict=True):
        begin = time.perf_counter()
        prediction = detector.predict_features(of_sample)
        spent = seconds / len(batch) + time.perf_counter() - begin
        if math.isfinite(prediction.score) and prediction.anomaly_map.isfinite().all():
            outcomes.append(Outcome(loaded, prediction, spent))
        else:
            problem = f"{sample.path} gives a score or a map that is not finite. Restore its files."
            outcomes.append(Outcome(loaded, problem=problem))
    return outcomes


class PredictionWriter:
    """Writer of predictions.jsonl, one line of JSON for each sample, and, if `images` is set, of maps and overlays.

    The detector's `thresholds` give the decisions and the colors of all overlays. `append` continues an existing file,
    after removing an incomplete last line. Raises InputError, also from `add`, if a file cannot be written.
    """

    def __init__(self, folder: Path, thresholds: Thresholds | None, images: bool, append: bool = False) -> None:
        self.folder, self.thresholds, self.images = folder, thresholds, images
        self.path = folder / PREDICTIONS
        with writing(self.path):
            content = self.path.read_bytes() if append and self.path.exists() else b""
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                logger.warning("%s ends in an incomplete line of an interrupted run. It is removed", self.path)
            with self.path.open("ab") as lines:
                lines.truncate(complete)

    def add(self, outcome: Outcome) -> dict[str, Any]:
        """Write the files and the line of a sample; returns the content of the line."""
        files, prediction, thresholds = outcome.loaded.files, outcome.prediction, self.thresholds
        record: dict[str, Any] = {"name": files.path, "rgb": files.rgb, "xyz": files.xyz}
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
            lines.write(json.dumps(record, allow_nan=False, default=str) + "\n")
        return record

    def _save_images(self, loaded: LoadedSample, prediction: Prediction, record: Mapping) -> tuple[Path, Path]:
        padded = loaded.size if loaded.side is None else (loaded.side, loaded.side)
        plane = crop_padding(resize_map(prediction.anomaly_map.numpy(), padded), loaded.size)
        pixel = None if self.thresholds is None else self.thresholds.pixel
        scale = color_scale([plane]) if pixel is None else (0.0, 2 * pixel)  # the same for all samples
        map_path, overlay_path = output_paths(self.folder, loaded.files.path)
        save_anomaly_map(map_path, plane, loaded.size)
        valid = None
        if loaded.sample is not None and loaded.sample.xyz is not None:
            valid = crop_padding(resize_map(loaded.sample.xyz.any(dim=0).numpy(), padded) > 0.5, loaded.size)
        title = caption(loaded.files.path, record["severity"], record["anomalous"])
        save_figure(overlay_path, title, loaded.image, plane, {FUSED: scale}, pixel, valid=valid)
        return map_path, overlay_path


def output_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Paths of the map and the overlay of a sample."""
    return folder / f"{name}.tiff", folder / f"{name}_overlay.png"

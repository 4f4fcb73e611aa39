"""Judging parts outside a dataset, one after the other: what is read, what the detector says, what is written.

predict.py is the command line over it. Memory does not grow with the number of parts.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset import load_samples, make_sample, read_rgb
from feature_extractors.detector import Detector
from feature_extractors.pipeline import batches, extract_timed
from feature_extractors.thresholds import Thresholds
from runner.dataset_check import spread
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, crop_padding, shows_table
from utils.errors import InputError
from utils.records import Prediction, Sample, SampleFiles
from utils.reporting.visualization import color_scale, resize_map, save_anomaly_map, save_overlay, threshold_scale
from utils.scans.depth_camera import Camera
from utils.scans.files import cannot_write
from utils.scans.sample_files import check_same_view, read_cloud

PREDICTIONS = "predictions.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How the files of a part become a sample."""

    modalities: frozenset[str]  # that the detector looks at
    img_size: int  # pixels
    camera: Camera | None = None  # of depth pictures
    unit: str = "m"  # of coordinates, a key of UNITS
    preprocess: bool = False  # clean the scan first
    keep_rgb: bool = False  # but leave the photo its background
    photos: bool = True  # they are drawn


class LoadedPart(NamedTuple):
    """A part, read and ready to be judged, or what is wrong with it."""

    files: SampleFiles
    fault: str = ""
    sample: Sample | None = None  # None where there is a fault
    photo: np.ndarray | None = None  # (h, w, 3) uint8 as it was taken, to be drawn
    size: tuple[int, int] = (0, 0)  # (H, W) of the scan, without one of the photo
    side: int | None = None  # of the square that cleaning padded it to
    shows_table: bool = False


class Verdict(NamedTuple):
    """What the detector says."""

    prediction: Prediction
    seconds: float  # its share of the extraction of its batch, plus its scoring; without its files


class PartReader:
    """Parts by number, read when asked for: nothing is kept.

    Args:
        parts: to be read.
        reading: how.
    """

    def __init__(self, parts: Sequence[SampleFiles], reading: Reading) -> None:
        self.parts = parts
        self.reading = reading
        raw_is_wrong = "xyz" in reading.modalities and not reading.preprocess
        self.looked_at = {part.path for part in spread(parts)} if raw_is_wrong else set()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> LoadedPart:
        part = self.parts[index]
        try:
            return self._read(part)
        except InputError as error:
            return LoadedPart(part, str(error))

    def _read(self, part: SampleFiles) -> LoadedPart:
        how = self.reading
        photo = read_rgb(part)
        image_size = None if photo is None else photo.shape[:2]
        xyz = None if part.xyz is None else read_cloud(part.xyz, how.camera, how.unit, image_size)
        if photo is not None and xyz is not None:
            check_same_view(part.path, photo, xyz, same_pixels=how.preprocess)
        rgb, cloud, side = photo, xyz, None
        if how.preprocess and xyz is not None:
            view = np.zeros_like(xyz, dtype=np.uint8) if photo is None else photo
            try:
                cloud, rgb, _ = clean_scan(xyz, view, None, CleaningRule(), how.keep_rgb)
            except InputError as error:
                raise InputError(f"{part.xyz} cannot be cleaned: {error}") from None
            side = len(cloud)
        sample = make_sample(
            str(part.xyz or part.rgb),  # an error names the file
            rgb if "rgb" in how.modalities else None,
            cloud if "xyz" in how.modalities else None,
            how.img_size,
        )
        scan = photo if xyz is None else xyz
        assert scan is not None, "a part has a file"
        return LoadedPart(
            part,
            sample=sample,
            photo=photo if how.photos else None,
            size=scan.shape[:2],
            side=side,
            shows_table=part.path in self.looked_at and xyz is not None and shows_table(xyz, CleaningRule()),
        )


def judge(detector: Detector, samples: Sequence[Sample]) -> list[Verdict | str]:
    """What a detector says about some samples, or of each that it cannot judge what is wrong with it."""
    try:
        extracted, seconds = extract_timed(detector.extractor, samples, {})
    except InputError as error:
        if len(samples) == 1:
            return [str(error)]
        return [verdict for sample in samples for verdict in judge(detector, [sample])]
    verdicts: list[Verdict | str] = []
    for sample, features in zip(samples, extracted, strict=True):
        begin = time.perf_counter()
        prediction = detector.predict_features(features)
        if not (math.isfinite(prediction.score) and prediction.anomaly_map.isfinite().all()):
            verdicts.append(
                f"{sample.path} gives a score or a map that is no number: its coordinates are damaged or far out of "
                "range, restore the scan"
            )
            continue
        verdicts.append(Verdict(prediction, seconds / len(samples) + time.perf_counter() - begin))
    return verdicts


def judge_parts(
    detector: Detector, reader: PartReader, batch_size: int, num_workers: int
) -> Iterator[tuple[LoadedPart, Verdict | str]]:
    """Judge the parts in order, or tell what is wrong with them.

    Args:
        detector: see `judge`.
        reader: of the parts.
        batch_size: how many go through the networks together.
        num_workers: threads that read ahead, two parts each; no more parts than these and a batch are ever held.
    """
    loaded = load_samples(reader, num_workers)
    for batch in batches(loaded, batch_size):
        samples = [part.sample for part in batch if part.sample is not None]
        verdicts = iter(judge(detector, samples) if samples else [])
        for part in batch:
            yield part, part.fault or next(verdicts)


class Output:
    """What a run leaves: maps, overlays, and predictions.jsonl, which has a line of JSON for each part.

    Args:
        folder: of all of it; it is there.
        thresholds: of the detector: they decide, and set the colors of all overlays.
        images: whether maps and overlays are written.
        append: add to the lines that are there; half a line at their end, of a run that was killed, is cut off.

    Raises:
        InputError: like all methods, where a file cannot be written.
    """

    def __init__(self, folder: Path, thresholds: Thresholds | None, images: bool, append: bool = False) -> None:
        self.folder = folder
        self.path = folder / PREDICTIONS
        self.thresholds = thresholds
        self.images = images
        with _writing(self.path):
            if append:
                _drop_half_line(self.path)
            else:
                self.path.write_text("")

    def add(self, part: LoadedPart, verdict: Verdict) -> dict[str, Any]:
        """Write what was said about a part; returns its line."""
        prediction, thresholds = verdict.prediction, self.thresholds
        score = prediction.score
        map_path, overlay_path = self._save_images(part, prediction) if self.images else (None, None)
        record = {
            **_paths(part.files),
            "score": score,
            "normalised": None if thresholds is None else thresholds.normalize(score),
            "anomalous": None if thresholds is None else score > thresholds.image,
            "threshold": None if thresholds is None else thresholds.image,
            "seconds": verdict.seconds,
            "map": map_path,
            "overlay": overlay_path,
        }
        self._write(record)
        return record

    def add_fault(self, part: SampleFiles, fault: str) -> None:
        """Write why a part was not judged."""
        self._write({**_paths(part), "error": fault})

    def _write(self, record: dict[str, Any]) -> None:
        """The line is in the file, or in the hands of the system, before the next part is looked at."""
        with _writing(self.path), self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, allow_nan=False) + "\n")

    def _save_images(self, part: LoadedPart, prediction: Prediction) -> tuple[str, str]:
        padded = part.size if part.side is None else (part.side, part.side)
        plane = crop_padding(resize_map(prediction.anomaly_map.numpy(), padded), part.size)
        pixel = None if self.thresholds is None else self.thresholds.pixel
        scale = color_scale([plane]) if pixel is None else threshold_scale(pixel)
        map_path, overlay_path = output_paths(self.folder, part.files.path)
        with _writing(map_path):
            save_anomaly_map(map_path, plane, part.size)
        with _writing(overlay_path):
            save_overlay(overlay_path, part.photo, plane, scale, pixel)
        return str(map_path), str(overlay_path)


def output_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """The map and the overlay of the part of this name."""
    return folder / f"{name}.tiff", folder / f"{name}_overlay.png"


def _drop_half_line(path: Path) -> None:
    """Cut a file off behind its last line end, with a warning where something follows it."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s ended in half a line, of a run that was killed: it is cut off", path)
        os.truncate(path, whole)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _paths(part: SampleFiles) -> dict[str, str | None]:
    rgb, xyz = (None if path is None else str(path) for path in (part.rgb, part.xyz))
    return {"name": part.path, "rgb": rgb, "xyz": xyz}

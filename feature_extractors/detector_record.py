"""Folder of a saved detector and its config.json: settings, thresholds, and checksums of its files and backbones."""

import hashlib
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from feature_extractors.config import DetectorConfig
from feature_extractors.thresholds import Calibration, Thresholds
from utils.errors import InputError
from utils.records import METERS, CloudForm
from utils.scans.files import atomic_folder, read_bytes, set_aside, writing
from utils.scans.json_records import encode_record, plain_json, read_record

SCHEMA = 4
CONFIG_FILE, STATE_FILE = "config.json", "state.safetensors"
FIX = "Restore the folder from a copy, or fit the detector again with main.py --save_detector"


class DetectorRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of config.json."""

    schema: int = SCHEMA
    class_name: str
    written: str  # date and time, ISO 8601
    versions: dict[str, str | None]  # of Python and of the packages
    config: DetectorConfig  # its precision is that of the features, never "auto"
    backbone_sha256: dict[str, str]  # checksum of the weights by modality, see models.checkpoints.weights_checksum
    thresholds: Thresholds | None
    calibration: Calibration | None
    dtype: Literal["fp16", "fp32"]  # of the rows of the banks
    state_sha256: str  # of state.safetensors
    clouds: CloudForm = METERS  # form of raw clouds
    cleaned: dict[str, bool] | None = None  # flags of the cleaning of the training samples; None: not cleaned
    config_sha256: str = ""  # of all other fields of config.json, see record_checksum


class SavedDetector(NamedTuple):
    """Folder of a detector and its config.json; the tensors are still on disk."""

    folder: Path
    record: DetectorRecord


def read_saved(folder: Path | str, *, point_ops: str = "auto", precision: str | None = None) -> SavedDetector:
    """Read the config.json of a saved detector. `point_ops`, and `precision` if given, replace the saved settings.

    Raises InputError if the folder is not a detector, or its config.json is damaged or of another version.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file, but a detector is a folder. Give the one around it, {folder.parent}.")
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{folder} is not a detector, because it has no {CONFIG_FILE}. {_fix_of_missing(folder)}.")
    record = read_record(path, DetectorRecord, SCHEMA, FIX)
    if record_checksum(record) != record.config_sha256:
        raise InputError(f"{path} was changed: it does not match its config_sha256. {FIX}.")
    config = replace(record.config, point_ops=point_ops, precision=precision or record.config.precision)
    return SavedDetector(folder, msgspec.structs.replace(record, config=config))


def _fix_of_missing(folder: Path) -> str:
    interrupted = set_aside(folder)
    if interrupted:
        return f"Saving it was interrupted. Rename {interrupted} to {folder.name}"
    inside = ", ".join(sorted(each.parent.name for each in folder.glob(f"[!.]*/{CONFIG_FILE}"))[:5])
    return f"Name one of the detectors in it ({inside})" if inside else "Save one with main.py --save_detector"


def read_state(saved: SavedDetector) -> bytes:
    """Content of state.safetensors; InputError if its checksum is not that in config.json."""
    path = saved.folder / STATE_FILE
    content = read_bytes(path, "weights")  # one read, so that the checked bytes are the used ones
    if hashlib.sha256(content).hexdigest() != saved.record.state_sha256:
        raise InputError(f"{path} is damaged or of another detector: it does not match {CONFIG_FILE}. {FIX}.")
    return content


def check_target(folder: Path | str) -> None:
    """Check that a detector may be saved in `folder`; InputError if it holds anything but a detector."""
    folder = Path(folder)
    found = sorted(folder.iterdir()) if folder.exists() else []
    names = [path.name for path in found]
    is_detector = names == [CONFIG_FILE, STATE_FILE] and all(path.is_file() for path in found)
    if names and not is_detector:
        raise InputError(f"{folder} is not a detector and holds {', '.join(names[:5])}. Save to another folder.")


def write_detector(folder: Path, record: DetectorRecord, state: bytes) -> None:
    """Write the files of a detector; an older detector is replaced once the new one is complete."""
    text = encode_record(msgspec.structs.replace(record, config_sha256=record_checksum(record)), indent=1)
    with writing(folder), atomic_folder(folder) as temporary:
        (temporary / STATE_FILE).write_bytes(state)  # a file of save_file can be read by its owner only
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")


def recalibrate(saved: SavedDetector, target_fpr: float, folder: Path) -> Thresholds:
    """Write a copy of a saved detector with thresholds for another false-alarm rate, and return these.

    Raises InputError if the detector has no calibration, is damaged, or cannot be written.
    """
    if saved.record.calibration is None:
        raise InputError(f"{saved.folder} has no calibration. Fit it again with main.py --save_detector.")
    thresholds = saved.record.calibration.thresholds(target_fpr)
    record = msgspec.structs.replace(saved.record, thresholds=thresholds, written=now())
    write_detector(folder, record, read_state(saved))
    return thresholds


def now() -> str:
    """Date and time, ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def record_checksum(record: DetectorRecord) -> str:
    """SHA-256 of a record's JSON with sorted keys, without config_sha256; 1 and 1.0 count as the same number."""
    typed = msgspec.convert(msgspec.to_builtins(record) | {"config_sha256": ""}, DetectorRecord)
    return hashlib.sha256(json.dumps(typed, sort_keys=True, default=plain_json).encode()).hexdigest()

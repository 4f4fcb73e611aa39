"""config.json of a saved detector: settings, thresholds, and checksums of its files and backbones."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from feature_extractors.config import DetectorConfig
from feature_extractors.thresholds import Calibration, Thresholds
from utils.errors import InputError
from utils.records import METERS, CloudForm
from utils.scans.files import set_aside
from utils.scans.json_records import plain_json, read_record

SCHEMA = 3
CONFIG_FILE = "config.json"
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


def record_checksum(record: DetectorRecord) -> str:
    """SHA-256 of a record's JSON with sorted keys, without config_sha256; 1 and 1.0 count as the same number."""
    typed = msgspec.convert(msgspec.to_builtins(record) | {"config_sha256": ""}, DetectorRecord)
    return hashlib.sha256(json.dumps(typed, sort_keys=True, default=plain_json).encode()).hexdigest()

"""What a saved detector says about itself: the content of its config.json, written and read with every key checked."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from feature_extractors.config import DetectorConfig, Protocol
from feature_extractors.thresholds import SOURCES, Thresholds
from utils.errors import InputError
from utils.feature_store import STORAGE_DTYPES
from utils.scans.files import cannot_read, set_aside

SCHEMA = 1
CONFIG_FILE = "config.json"
KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
MEND = "restore the folder from a copy, or save the detector anew with main.py --save_detector"


class SavedBackbone(NamedTuple):
    """A backbone that a detector was fitted with."""

    name: str
    sha256: str  # see models.checkpoints.weights_checksum


class DetectorRecord(NamedTuple):
    """The content of config.json."""

    schema: int
    class_name: str
    method: str
    written: str  # date and time, ISO 8601
    versions: dict[str, str | None]  # of Python and of the packages, when it was written
    config: DetectorConfig  # precision is the one that the features were computed in, never "auto"
    config_sha256: str  # see config_checksum
    backbones: dict[str, SavedBackbone]  # by modality
    thresholds: Thresholds | None
    dtype: str  # of the banks' rows, a key of STORAGE_DTYPES
    state_sha256: str  # of state.safetensors


class SavedDetector(NamedTuple):
    """A folder that holds a detector, of which only config.json has been read."""

    folder: Path
    record: DetectorRecord


def write_record(folder: Path, record: DetectorRecord) -> None:
    """Write config.json into a folder."""
    try:
        text = json.dumps(_plain(record), indent=1, allow_nan=False)
    except ValueError:
        raise InputError(f"the thresholds {record.thresholds} are not finite: calibrate the detector anew") from None
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_saved(folder: Path | str, *, point_ops: str = "auto", precision: str | None = None) -> SavedDetector:
    """Read and check the config.json of a saved detector; its tensors are not looked at.

    Args:
        folder: what was written.
        point_ops: what `record.config.point_ops` becomes.
        precision: what `record.config.precision` becomes; None: the one that the detector was fitted with.

    Raises:
        InputError: the folder is no detector, its config.json is damaged, or of another version.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inside = ", ".join(sorted(each.parent.name for each in folder.glob(f"[!.]*/{CONFIG_FILE}"))[:5])
        mend = f"name one of those in it ({inside})" if inside else "save one with main.py --save_detector"
        for older in set_aside(folder):
            mend = f"saving it was interrupted, rename {older} back to {folder.name}"
        raise InputError(f"{folder} is no detector, it has no {CONFIG_FILE}: {mend}") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError):  # of JSON, and of UTF-8
        raise damaged(path, "is no JSON") from None
    _check_schema(path, raw)
    try:
        record: DetectorRecord = _parse(path, "", raw, DetectorRecord)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}; {MEND}") from None
    _check_record(path, record)
    if _checksum(raw["config"]) != record.config_sha256:
        raise damaged(path, "has a config that was changed: its checksum is not config_sha256")
    config = replace(record.config, point_ops=point_ops, precision=precision or record.config.precision)
    return SavedDetector(folder, record._replace(config=config))


def config_checksum(config: DetectorConfig) -> str:
    """SHA-256 of the JSON of a configuration, keys sorted."""
    return _checksum(_plain(config))


def _checksum(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}: {MEND}")


def _plain(value: Any) -> Any:
    """Records and configurations as what JSON knows."""
    if isinstance(value, DetectorConfig):
        return _plain(asdict(value))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _check_schema(path: Path, raw: Any) -> None:
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int:
        raise damaged(path, "has no schema number, so it is not the config.json of a detector")
    if schema > SCHEMA:
        raise InputError(
            f"{path} was written by a newer version (schema {shortened(schema)}, this one reads {SCHEMA}): update this "
            "program"
        )
    if schema < SCHEMA:
        raise InputError(
            f"{path} was written by an older version (schema {shortened(schema)}, this one reads {SCHEMA}): save the "
            "detector anew with main.py --save_detector"
        )


def _parse(path: Path, name: str, raw: Any, hint: Any) -> Any:
    """A value of JSON as what a type hint says: records key by key, all keys there and none left over."""
    if hint in (DetectorRecord, DetectorConfig, Protocol, Thresholds, SavedBackbone):
        hints = get_type_hints(hint)
        entries = _entries(path, name, raw)
        unknown = [shortened(key) for key in entries.keys() - hints.keys()]
        for what, keys in (("lacks", hints.keys() - entries.keys()), ("has an unknown", unknown)):
            if keys:
                raise damaged(path, f"{what} {', '.join(sorted(_dotted(name, key) for key in keys)[:5])}")
        return hint(**{key: _parse(path, _dotted(name, key), entries[key], each) for key, each in hints.items()})
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        entries = _entries(path, name, raw)
        return {key: _parse(path, _dotted(name, shortened(key)), value, kind) for key, value in entries.items()}
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(raw, list) or len(raw) != len(kinds):
            raise damaged(path, f"has {name} {shortened(raw)}, expected a list of {len(kinds)}")
        return tuple(_parse(path, name, value, kind) for value, kind in zip(raw, kinds, strict=True))
    if isinstance(hint, UnionType):
        (kind,) = (each for each in get_args(hint) if each is not NoneType)
        return None if raw is None else _parse(path, name, raw, kind)
    value = raw
    if hint is float and type(raw) is int:
        value = float(raw) if abs(raw) <= sys.float_info.max else math.inf
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise damaged(path, f"has {name} {shortened(raw)}, expected {KINDS[hint]}")
    return value


def _entries(path: Path, name: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise damaged(path, f"has {name} {shortened(raw)}, expected an object")
    return raw


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check_record(path: Path, record: DetectorRecord) -> None:
    """What the types do not tell."""
    config, thresholds = record.config, record.thresholds
    if {modality: backbone.name for modality, backbone in record.backbones.items()} != config.backbone_names:
        raise damaged(path, f"names other backbones than its config, which has {shortened(config.backbone_names)}")
    if record.method != config.method_name:
        raise damaged(path, f"has method {shortened(record.method)}, but its config {config.method_name}")
    if record.dtype not in STORAGE_DTYPES:
        raise damaged(path, f"has dtype {shortened(record.dtype)}, expected one of {', '.join(STORAGE_DTYPES)}")
    if thresholds is not None and not (
        0 < thresholds.target_fpr < 1 and thresholds.parts >= 1 and thresholds.source in SOURCES
    ):
        raise damaged(
            path,
            f"has thresholds with target_fpr {thresholds.target_fpr}, parts {shortened(thresholds.parts)}, source "
            f"{shortened(thresholds.source)}, expected a rate between 0 and 1, at least one part, "
            f"{' or '.join(SOURCES)}",
        )

"""Files of finished classes, <output_dir>/classes/<class>.json, from which --resume continues."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from utils.errors import InputError
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.messages import escape_controls
from utils.reporting.tables import one_line
from utils.scans.json_records import plain_json, read_record, write_record

FOLDER = "classes"
SCHEMA = 2  # of the files of finished classes
FIX = "Delete it to compute its class again"
# Flags that a resumed run may change, because the numbers of a class do not depend on them.
FREE_FLAGS = (
    "classes", "output_dir", "resume", "parallel", "num_workers", "device", "memory_budget", "point_ops",
    "report_parts", "max_megapixels", "list_backbones", "inspect_dataset",
)  # fmt: skip


class FinishedClass(msgspec.Struct, frozen=True):
    """Content of <output_dir>/classes/<class>.json."""

    schema: int
    flags: dict[str, Any]  # of the run, without FREE_FLAGS
    inputs: str  # checksum of everything else that the numbers depend on
    report_sha256: str
    report: ClassReport


def class_file(output_dir: Path, name: str) -> Path:
    """Path of the file of a finished class."""
    return output_dir / FOLDER / f"{name}.json"


def write_class(output_dir: Path, report: ClassReport, flags: Mapping[str, Any], inputs: str = "") -> None:
    """Write the file of a finished class; arguments as in FinishedClass, errors as in `write_record`."""
    content = FinishedClass(SCHEMA, _binding(flags), inputs, _checksum(report), report)
    write_record(class_file(output_dir, report.name), content)


def read_class(output_dir: Path, name: str, flags: Mapping[str, Any], inputs: str = "") -> ClassReport | None:
    """Read the file of a finished class; None if there is none. Arguments as in `write_class`.

    Raises InputError if the file is damaged or of another version, or was written with other flags or inputs.
    """
    path = class_file(output_dir, name)
    if not path.exists():
        return None
    content = read_record(path, FinishedClass, SCHEMA, FIX)
    then, now = content.flags, _binding(flags)
    differing = [flag for flag in sorted(then.keys() | now.keys()) if then.get(flag) != now.get(flag)]
    if differing:
        pairs = (f"{_short(flag)} {_short(then.get(flag))}, now {_short(now.get(flag))}" for flag in differing[:5])
        raise InputError(f"{path} was computed with {', '.join(pairs)}. Use the same flags, or omit --resume.")
    if content.inputs != inputs:
        raise InputError(f"{path} was computed from other samples, weights or detectors. {FIX}, or omit --resume.")
    if content.report_sha256 != _checksum(content.report) or content.report.name != name:
        raise InputError(f"{path} is damaged (it does not match its checksum). {FIX}.")
    return content.report


def _binding(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that the numbers depend on, as read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(flags), default=plain_json))
    return {name: value for name, value in plain.items() if name not in FREE_FLAGS}


def _checksum(report: ClassReport) -> str:
    return hashlib.sha256(json.dumps(report, default=plain_json).encode()).hexdigest()


def _short(value: Any) -> str:
    """A value from a file as one line of printable text."""
    text = escape_controls(one_line(str(value)))
    return text if len(text) <= 60 else text[:59] + "…"

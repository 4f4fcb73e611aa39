"""The classes that a run has finished, each in a file of its own, so that another run can go on after them.

<output_dir>/classes/<class>.json: what results.json and report.html say about it, and the flags that it hangs on
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import InputError
from utils.report import plain_json
from utils.reporting.html_report.class_report import ClassReport, Curve
from utils.reporting.html_report.gallery import Decision
from utils.scans.files import atomic_path, cannot_read, cannot_write

FOLDER = "classes"
SCHEMA = 1
# What may differ between the runs: where and how fast it is computed, and what else is done.
FREE_FLAGS = (
    "classes", "output_dir", "resume", "parallel", "num_workers", "device", "memory_budget", "point_ops",
    "report_parts", "list_backbones", "inspect_dataset",
)  # fmt: skip


def class_file(output_dir: Path, name: str) -> Path:
    return output_dir / FOLDER / f"{name}.json"


def write_class(output_dir: Path, report: ClassReport, flags: Mapping[str, Any], inputs: str = "") -> None:
    """Keep a finished class.

    Args:
        output_dir: the folder of its results.json.
        report: what is kept.
        flags: of the run, as in results.json.
        inputs: a checksum of what the figures come from beside the flags.

    Raises:
        InputError: the file cannot be written.
    """
    path = class_file(output_dir, report.name)
    kept = json.loads(json.dumps(report._asdict(), allow_nan=False, default=plain_json))
    content = {
        "schema": SCHEMA,
        "flags": _binding(flags),
        "inputs": inputs,
        "report_sha256": _checksum(kept),
        "report": kept,
    }
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def read_class(output_dir: Path, name: str, flags: Mapping[str, Any], inputs: str = "") -> ClassReport | None:
    """What `write_class` kept of a class, None where nothing is there; arguments as there.

    Raises:
        InputError: the file is damaged or of another version, or was written with other flags or of other inputs.
    """
    path = class_file(output_dir, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path} is no file of schema {SCHEMA}: delete it, and its class is computed anew")
    then, now = content.get("flags"), _binding(flags)
    if not isinstance(then, dict):
        raise _damaged(path)
    differing = [flag for flag in sorted(then.keys() | now.keys()) if then.get(flag) != now.get(flag)]
    if differing:
        pairs = ((_line(flag), _line(then.get(flag)), _line(now.get(flag))) for flag in differing[:5])
        told = ", ".join(f"{flag} {old}, now {new}" for flag, old, new in pairs)
        raise InputError(
            f"{path} was computed with {told}: give --resume the flags of the run that it goes on with, or leave it out"
        )
    if content.get("inputs") != inputs:
        raise InputError(
            f"{path} was computed from other scans, weights of networks or saved detectors than are there now: leave "
            "out --resume, or delete it, and its class is computed anew"
        )
    kept: Any = content.get("report")
    if not isinstance(kept, dict) or content.get("report_sha256") != _checksum(kept) or kept.get("name") != name:
        raise _damaged(path)
    try:
        return _report(**kept)
    except (TypeError, ValueError):
        raise _damaged(path) from None


def _binding(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the figures hang on, as JSON holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(flags), default=plain_json))
    return {name: value for name, value in plain.items() if name not in FREE_FLAGS}


def _line(value: Any, most: int = 60) -> str:
    """A value of a file in one line of a sentence."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(value).split()))
    return text if len(text) <= most else text[: most - 1] + "…"


def _checksum(report: Any) -> str:
    """By which damage is noticed: a value of another kind would only be noticed where it is drawn."""
    return hashlib.sha256(json.dumps(report).encode()).hexdigest()


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged: delete it, and its class is computed anew")


def _report(
    *,
    name: str,
    entry: dict[str, Any],
    decision: list[Any] | None,
    outcomes: dict[str, int],
    roc: list[Any] | None,
    pro: list[Any] | None,
    good_scores: list[float],
    defective_scores: list[float],
    parts: list[dict[str, Any]],
) -> ClassReport:
    return ClassReport(
        name,
        entry,
        None if decision is None else Decision(*decision),
        outcomes,
        _curve(roc),
        _curve(pro),
        _numbers(good_scores),
        _numbers(defective_scores),
        parts,
    )


def _curve(points: list[Any] | None) -> Curve | None:
    if points is None:
        return None
    fprs, shares = map(_numbers, points)
    return fprs, shares


def _numbers(values: Any) -> NDArray:
    return np.array(values, dtype=np.float64).reshape(-1)

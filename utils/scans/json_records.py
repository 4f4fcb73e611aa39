"""JSON records, written atomically and read into typed classes."""

import json
import math
import os
import re
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import msgspec

from utils.errors import InputError
from utils.reporting.messages import escape_controls
from utils.scans.files import atomic_path, read_bytes

Record = TypeVar("Record")


def read_record(path: Path, kind: type[Record], schema: int | None, fix: str) -> Record:
    """Read a JSON file into a typed class.

    `kind` is a msgspec.Struct or a dataclass with type hints, nested as needed; named tuples become JSON lists.
    `schema` is the required value of the file's "schema", None if it has no such field. `fix` is the remedy for a
    missing, damaged or older file: a sentence without its final period.

    Raises InputError if the file is missing or cannot be read, is not JSON, has another schema, or has a wrong field.
    """
    if not path.exists():
        raise InputError(f"{path} is missing. {fix}.")
    try:
        text = read_bytes(path, "record").decode().removeprefix("\ufeff")  # byte order mark of Windows
    except UnicodeDecodeError as error:
        raise _damaged(path, f"not JSON: {error.reason}", fix) from None
    return decode_record(text, kind, path, fix, schema)


def decode_record(text: str, kind: type[Record], path: Path, fix: str, schema: int | None = None) -> Record:
    """Decode one JSON text, such as a line of the file at `path`; arguments and errors as in `read_record`."""
    try:
        content = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise _damaged(path, problem, fix) from None
    if schema is not None:
        found = content.get("schema") if isinstance(content, dict) else None
        if type(found) is not int:
            raise _damaged(path, "no schema number", fix)
        if found != schema:
            age, remedy = ("a newer", "Update this program") if found > schema else ("an older", fix)
            raise InputError(f"{path} is from {age} version (schema {found}, expected {schema}). {remedy}.")
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        problem = re.sub(r"(\. [^`]*)? - at `\$\.", " at `", str(error))  # of two sentences only the problem
        raise _damaged(path, problem, fix) from None


def encode_record(record: object, indent: int | None = None) -> str:
    """Encode Structs, dataclasses, mappings, NumPy values and paths as JSON.

    Raises ValueError for a number that is NaN or infinite, TypeError for a value that JSON has no form for.
    """
    return json.dumps(record, indent=indent, allow_nan=False, default=plain_json) + "\n"


def write_record(path: Path, record: object, indent: int | None = None) -> None:
    """Replace a file by a record. An older file stays until the new one is complete.

    Raises InputError if the file cannot be written, and the errors of `encode_record`.
    """
    text = encode_record(record, indent)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def plain_json(value: object) -> Any:
    """Convert a value that json.dumps does not know; TypeError if JSON has no form for it."""
    if isinstance(value, msgspec.Struct) or is_dataclass(value):
        return msgspec.to_builtins(value, enc_hook=plain_json)
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r}")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is not a finite number")
    return number


def _damaged(path: Path, problem: str, fix: str) -> InputError:
    """Return an error without the file's control characters, which a terminal might execute."""
    return InputError(f"{path} is damaged ({escape_controls(problem)[:200]}). {fix}.")

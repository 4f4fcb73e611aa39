"""JSON records: written as a whole, read into typed classes, refused with one sentence."""

import json
import math
import os
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar

import msgspec

from utils.errors import InputError
from utils.scans.files import atomic_path, cannot_read, cannot_write

Record = TypeVar("Record")


class MissingRecordError(InputError):
    """The file does not exist."""


def read_record(path: Path, kind: type[Record], schema: int, fix: str) -> Record:
    """Read a JSON file into a typed class.

    Args:
        path: the file.
        kind: a msgspec.Struct or a dataclass with type hints, nested as needed. Named tuples become JSON lists.
        schema: the number that the file's "schema" must have.
        fix: the remedy for a missing, damaged or older file, a sentence without its full stop.

    Raises:
        MissingRecordError: the file does not exist.
        InputError: the file cannot be read, is not JSON, has another schema, or a field is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise MissingRecordError(f"{path} is missing. {fix}.") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    except UnicodeDecodeError as error:
        raise _damaged(path, f"not JSON: {error.reason}", fix) from None
    content = _parse(text, path, fix)
    found = content.get("schema") if isinstance(content, dict) else None
    if type(found) is not int:
        raise _damaged(path, "no schema number", fix)
    if found > schema:
        raise InputError(f"{path} is from a newer version (schema {found}, expected {schema}). Update this program.")
    if found < schema:
        raise InputError(f"{path} is from an older version (schema {found}, expected {schema}). {fix}.")
    return _convert(content, kind, path, fix)


def decode_record(text: str, kind: type[Record], path: Path, fix: str) -> Record:
    """Decode one JSON text, such as a line of the file at `path`; arguments and errors as in `read_record`."""
    return _convert(_parse(text, path, fix), kind, path, fix)


def encode_record(record: object, indent: int | None = None) -> str:
    """Encode Structs, dataclasses, mappings, NumPy values and paths as JSON.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
        TypeError: the record holds an object that is no data.
    """
    return json.dumps(record, indent=indent, allow_nan=False, default=plain_json) + "\n"


def write_record(path: Path, record: object, indent: int | None = None) -> None:
    """Write a record in place of an older file, which stays until the new one is complete.

    Raises:
        InputError: the file cannot be written.
        ValueError, TypeError: see `encode_record`.
    """
    text = encode_record(record, indent)
    try:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def plain_json(value: object) -> Any:
    """JSON's form of a value that json.dumps does not know.

    Raises:
        TypeError: the value is no data.
    """
    if isinstance(value, msgspec.Struct):
        return dict(zip(value.__struct_encode_fields__, msgspec.structs.astuple(value), strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r}")


def _parse(text: str, path: Path, fix: str) -> Any:
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise _damaged(path, "not JSON: too deeply nested", fix) from None
    except ValueError as error:
        raise _damaged(path, f"not JSON: {error}", fix) from None


def _finite(digits: str) -> float:
    return float(digits) if math.isfinite(float(digits)) else _refuse(digits)


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number} is not a finite number")


def _convert(content: Any, kind: type[Record], path: Path, fix: str) -> Record:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise _damaged(path, str(error).replace(" - at `$.", " at `"), fix) from None


def _damaged(path: Path, problem: str, fix: str) -> InputError:
    """An error whose text from the file cannot control a terminal."""
    text = "".join(letter if letter.isprintable() else "?" for letter in problem)
    return InputError(f"{path} is damaged ({text[:200]}). {fix}.")

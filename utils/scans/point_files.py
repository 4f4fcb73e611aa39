"""Organized point clouds in files of other programs: .npy arrays, .pcd of PCL, .ply of scanners.

Every reader returns (H, W, 3) float in the units of the file, with NaN or zeros for a pixel without a point. The points
are in the order of the pixels, row by row. open3d's readers do not serve: they ignore height and width, fill files that
are cut short with arbitrary numbers, and stop at an infinite coordinate.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from utils.errors import InputError
from utils.scans.files import open_file, read_bytes
from utils.scans.organized_pc import check_organized

AXES = ("x", "y", "z")
LONGEST_HEADER = 1 << 16  # bytes
# Missing coordinates as the C library of Windows prints them, such as 1.#QNAN, -1.#IND00, 1.#INF and -nan(ind).
_NOT_A_NUMBER = re.compile(rb"[-+]?(?:1\.#\w+|nan\(\w*\))", re.IGNORECASE)
_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip

_Field = tuple[str, str, int]  # name, NumPy's code without byte order ("f4"), count of numbers


def read_npy(path: Path, depth: bool = False) -> np.ndarray:
    """Read a NumPy array that `check_organized` accepts; InputError for any other, a pickled one or one cut short."""
    open_file(path, "cloud").close()
    try:
        xyz = open_memmap(path, mode="r")  # reads only this format, and no pickled objects
    except Exception as error:  # with damaged bytes it may raise almost anything
        raise InputError(f"{path} is not a complete .npy array of numbers. Write it again with numpy.save.") from error
    check_organized(path, xyz.shape, xyz.dtype, depth)
    return np.array(xyz)


def read_pcd(path: Path) -> np.ndarray:
    """Read an organized PCD file: ascii, binary or binary_compressed, with x, y, z and any other fields.

    Raises InputError if the file is not PCD, its cloud is unorganized (HEIGHT 1), x, y or z is not floating-point, or
    it has fewer points than its header says.
    """
    lines, body = _split_header(path, "PCD", b"", b"DATA ")
    with _header_errors(path, "PCD"):
        entries = {words[0]: words[1:] for line in lines if (words := line.split())}
        size, encoding = (int(entries["HEIGHT"][0]), int(entries["WIDTH"][0])), entries["DATA"][0]
        names = entries["FIELDS"]
        codes = [_PCD_TYPES[kind] + width for kind, width in zip(entries["TYPE"], entries["SIZE"], strict=True)]
        counts = map(int, entries.get("COUNT", ["1"] * len(names)))
        point = _point_type(path, list(zip(names, codes, counts, strict=True)), "<")
    if min(size) <= 1:
        problem = f"{path} holds {size[1]} x {size[0]} points (WIDTH x HEIGHT), an unorganized cloud"
        raise InputError(f"{problem}. Export it with a point for each pixel, NaN where there is no measurement.")
    return _decode(path, body, point, size, encoding, ("ascii", "binary", "binary_compressed"))


def read_ply(path: Path, image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a PLY file with a point for each pixel: ascii or binary, with x, y, z and any other properties.

    The format has no fields for height and width. Scanners write lines such as `obj_info num_cols 640` and `obj_info
    num_rows 480` (or with `comment`). Without them, the size is `image_size`, the (H, W) of the image of the same view.
    Errors are those of `read_pcd`.
    """
    lines, body = _split_header(path, "PLY", b"ply", b"end_header")
    with _header_errors(path, "PLY"):
        encoding = next(line.split()[1] for line in lines if line.startswith("format "))
        number, fields, size = _parse_ply(path, lines)
        point = _point_type(path, fields, ">" if encoding == "binary_big_endian" else "<")
    size = size or image_size
    if size is None or min(size) < 1 or size[0] * size[1] != number:
        expected = (
            "num_rows and num_cols in its header, or an image of its size"
            if size is None
            else f"{size[0]} x {size[1]}, one for each pixel"
        )
        raise InputError(
            f"{path} holds {number} points, expected {expected}. Export it with a point for each pixel, NaN where there"
            " is no measurement, or as .tiff or .npy of H x W x 3."
        )
    return _decode(path, body, point, size, encoding, ("ascii", "binary_little_endian", "binary_big_endian"))


def _parse_ply(path: Path, lines: Sequence[str]) -> tuple[int, list[_Field], tuple[int, int] | None]:
    """Return the number of points in a PLY header, their fields, and (H, W) if it is there."""
    counts: list[int] = []  # of the elements; the first element must be the points
    fields: list[_Field] = []
    sides = {}
    for words in map(str.split, lines):
        match words:
            case ["comment" | "obj_info", "num_rows" | "num_cols" as side, digits] if digits.isdecimal():
                sides[side] = int(digits)
            case ["element", name, *_] if not counts and name != "vertex":
                raise InputError(f"{path} begins with the element {name}, expected vertex. Export points alone.")
            case ["element", *_]:
                counts.append(int(words[2]))
            case ["property", "list", *_] if len(counts) == 1:
                raise InputError(f"{path} has points with a list, {words[-1]}. Export it without the list.")
            case ["property", kind, *_] if len(counts) == 1:
                fields.append((words[-1], _PLY_TYPES[kind], 1))
    return counts[0], fields, (sides["num_rows"], sides["num_cols"]) if len(sides) == 2 else None


def _split_header(path: Path, kind: str, first: bytes, last: bytes) -> tuple[list[str], bytes]:
    """Return the lines of a header, from `first` through the line that begins with `last`, and the bytes after it."""
    content = read_bytes(path, "cloud")
    lines, start = [], 0
    header = content[:LONGEST_HEADER] if content.startswith(first) else b""
    for line in header.splitlines(keepends=True):
        lines.append(line.decode("utf-8", "replace").strip())
        start += len(line)
        if line.startswith(last):
            return lines, content[start:]
    raise InputError(f"{path} is not a {kind} file, or is cut short. Export the cloud again.")


@contextmanager
def _header_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn errors about the words of a header into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, OverflowError, StopIteration) as error:
        word = f" ({error.args[0]} is missing or unknown)" if isinstance(error, KeyError) else ""
        raise InputError(f"{path} has no valid {kind} header{word}. Export the cloud again.") from error


def _point_type(path: Path, fields: Sequence[_Field], order: str) -> np.dtype:
    """Return the type of a point, with fields x, y and z; InputError if one of them is not a floating-point number."""
    if not {name for name, code, count in fields if code[0] == "f" and count == 1}.issuperset(AXES):
        found = ", ".join(f"{count} {name} ({code})" for name, code, count in fields)
        problem = f"{path} holds {found or 'no fields'}, expected x, y and z as floating-point numbers"
        raise InputError(f"{problem}. Export them.")
    # Other names may occur twice, such as "_" of padding.
    names = [name if name in AXES else f"field {i}" for i, (name, _, _) in enumerate(fields)]
    return np.dtype([(name, order + code, (count,)) for name, (_, code, count) in zip(names, fields, strict=True)])


def _decode(
    path: Path, body: bytes, point: np.dtype, size: tuple[int, int], encoding: str, known: Sequence[str]
) -> np.ndarray:
    """Decode the points (H, W, 3); InputError for an encoding that is not `known`, or an impossible size."""
    check_organized(path, (*size, len(AXES)), point[AXES[0]].base)
    if encoding not in known:
        raise InputError(f"{path} is encoded as {encoding!r}, expected {', '.join(known)}. Export it as one of these.")
    decode = {"ascii": _from_ascii, "binary_compressed": _from_compressed}.get(encoding, _from_binary)
    return decode(path, body, point, size[0] * size[1]).reshape(*size, 3)


def _from_ascii(path: Path, body: bytes, point: np.dtype, number: int) -> np.ndarray:
    """Decode `number` points of type `point` as (number, 3); the other decoders have the same contract."""
    if b"#" in body or b"(" in body:
        body = _NOT_A_NUMBER.sub(b"nan", body)
    lines = [line for line in body.decode("utf-8", "replace").splitlines() if line.strip()][:number]
    if len(lines) < number:
        raise _cut_short(path, len(lines), number)
    names = list(point.names or ())
    columns = [sum(point[name].shape[0] for name in names[: names.index(axis)]) for axis in AXES]
    try:
        return np.loadtxt(lines, usecols=columns, ndmin=2, comments=None).reshape(number, 3)
    except ValueError as error:
        raise InputError(f"{path} has a line that is not a point. Export the cloud again.") from error


def _from_binary(path: Path, body: bytes, point: np.dtype, number: int) -> np.ndarray:
    if len(body) < number * point.itemsize:
        raise _cut_short(path, len(body) // point.itemsize, number)
    points = np.frombuffer(body, point, number)
    return np.concatenate([points[axis] for axis in AXES], axis=-1)


def _from_compressed(path: Path, body: bytes, point: np.dtype, number: int) -> np.ndarray:
    """Decode compressed points: the lengths after and before compression, then the numbers, field by field."""
    packed, unpacked = struct.unpack_from("<II", body) if len(body) >= 8 else (0, 0)
    if unpacked != number * point.itemsize:
        raise _cut_short(path, unpacked // point.itemsize, number)
    if len(body) < 8 + packed:
        raise InputError(f"{path} has {len(body) - 8} of {packed} compressed bytes. Copy it again.")
    try:
        whole = decompress_lzf(body[8 : 8 + packed], unpacked)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}). Copy or export it again.") from error
    assert point.fields is not None
    columns = [np.frombuffer(whole, point[axis].base, number, number * point.fields[axis][1]) for axis in AXES]
    return np.stack(columns, axis=-1)


def decompress_lzf(packed: bytes, length: int) -> bytes:
    """Undo the LZF compression of `length` bytes; ValueError if the result has another length.

    A control byte c below 32 precedes c + 1 literal bytes. Any other one repeats earlier bytes: their number is its
    upper 3 bits plus 2 (plus the next byte, if 7), and their distance its lower 5 bits, then the next byte, plus 1.
    """
    whole, i = bytearray(), 0
    while i < len(packed) and len(whole) <= length:
        control = packed[i]
        i += 1
        if control < 32:
            whole += packed[i : i + control + 1]
            i += control + 1
            continue
        extra = control >> 5 == 7
        if i + extra >= len(packed):
            raise ValueError("it ends within a repetition")
        count = (control >> 5) + 2 + (packed[i] if extra else 0)
        distance = ((control & 31) << 8) + packed[i + extra] + 1
        i += 1 + extra
        if distance > len(whole):
            raise ValueError("it repeats bytes before its beginning")
        repeated = whole[-distance:][:count]  # shorter than count if the repetition overlaps itself
        whole += (repeated * (count // len(repeated) + 1))[:count]
    if len(whole) != length:
        raise ValueError(f"it has {len(whole)} bytes instead of {length}")
    return bytes(whole)


def _cut_short(path: Path, found: int, promised: int) -> InputError:
    return InputError(f"{path} holds {found} points, but its header says {promised}. Copy or export it again.")

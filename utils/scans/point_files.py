"""Organized point clouds in files of other programs: .npy arrays, .pcd of PCL, .ply of scanners.

Every reader returns (H, W, 3) float in the units of the file, with NaN or zeros where a pixel has no point. The order
of the points is that of the pixels, row by row. open3d cannot read them: it ignores height and width, fills files that
are cut short with arbitrary numbers, and stops at an infinite coordinate.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from utils.errors import InputError
from utils.scans.files import cannot_read
from utils.scans.organized_pc import check_organized

AXES = ("x", "y", "z")
LONGEST_HEADER = 1 << 16  # bytes
_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


class _Record(NamedTuple):
    """Position of x, y and z in each point."""

    binary: np.dtype  # with fields x, y, z; its size is that of the whole point
    columns: tuple[int, ...]  # of an ascii line


_Decoder = Callable[[Path, bytes, _Record, int], np.ndarray]


class _Property(NamedTuple):
    name: str
    code: str  # NumPy's, without byte order: "f4"
    length: int = 1  # numbers


def read_npy(path: Path) -> np.ndarray:
    """Read a NumPy array of H x W x 3 floating-point numbers; InputError where it is none, is pickled or cut short."""
    try:
        xyz = open_memmap(path, mode="r")  # reads this format alone, and no pickled objects
    except OSError as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # rubbish bytes make it raise almost anything
        raise InputError(f"{path} is no complete .npy array ({error}). Write it again with numpy.save.") from error
    check_organized(path, xyz.shape, xyz.dtype)
    return np.array(xyz)


def read_pcd(path: Path) -> np.ndarray:
    """Read an organized PCD file: ascii, binary or binary_compressed, with x, y, z and any other fields.

    Raises:
        InputError: no PCD file, an unorganized cloud (HEIGHT 1), no floating-point x, y, z, or fewer points than the
            header promises.
    """
    lines, body = _split_header(path, "PCD", b"", b"DATA ")
    with _header_of(path, "PCD"):
        entries = {words[0]: words[1:] for line in lines if (words := line.split()) and words[0] != "#"}
        size, encoding = (int(entries["HEIGHT"][0]), int(entries["WIDTH"][0])), entries["DATA"][0]
        names = entries["FIELDS"]
        lengths = map(int, entries.get("COUNT", ["1"] * len(names)))
        codes = [_PCD_TYPES[kind] + width for kind, width in zip(entries["TYPE"], entries["SIZE"], strict=True)]
        record = _record(path, [_Property(*each) for each in zip(names, codes, lengths, strict=True)], "<")
    if min(size) <= 1:
        raise InputError(
            f"{path} holds {size[1]} x {size[0]} points (WIDTH x HEIGHT), an unorganized cloud, expected one point per "
            "pixel. Export the cloud organized, with NaN for pixels without a measurement."
        )
    decoders = {"ascii": _from_ascii, "binary": _from_binary, "binary_compressed": _from_compressed}
    return _decode(path, body, record, size, encoding, decoders)


def read_ply(path: Path, image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a PLY file that holds a point for each pixel: ascii or binary, with x, y, z and any other properties.

    The format has no place for height and width. They are taken from lines such as `obj_info num_cols 640` and
    `obj_info num_rows 480` (or with `comment`), as scanners write them, else from the image of the same view.

    Args:
        path: of the file.
        image_size: (H, W) of that image, if there is one.

    Raises:
        InputError: no PLY file, a cloud that is not organized, no floating-point x, y, z, or fewer points than the
            header promises.
    """
    lines, body = _split_header(path, "PLY", b"ply", b"end_header")
    with _header_of(path, "PLY"):
        encoding = next(words[1] for line in lines if (words := line.split())[:1] == ["format"])
        number, properties = _vertices(path, lines)
        record = _record(path, properties, ">" if encoding == "binary_big_endian" else "<")
        size = _grid(lines) or image_size
    if size is None or min(size) < 1 or size[0] * size[1] != number:
        expected = "num_rows and num_cols in its header" if size is None else f"{size[0]} x {size[1]}, one a pixel"
        raise InputError(
            f"{path} holds {number} points, expected {expected}. Export the cloud organized, with NaN for pixels "
            "without a measurement, or as .tiff or .npy of H x W x 3."
        )
    binary = dict.fromkeys(("binary_little_endian", "binary_big_endian"), _from_binary)
    return _decode(path, body, record, size, encoding, {"ascii": _from_ascii, **binary})


def _split_header(path: Path, kind: str, first: bytes, last: bytes) -> tuple[list[str], bytes]:
    """The lines of a header, which begins with `first`, through the one that begins with `last`, and what follows."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error
    lines, start = [], 0
    while content.startswith(first) and start < min(len(content), LONGEST_HEADER):
        end = content.find(b"\n", start)
        line = content[start : end if end >= 0 else None]
        lines.append(line.decode("utf-8", "replace").strip())
        start += len(line) + 1
        if line.startswith(last):
            return lines, content[start:]
    raise InputError(f"{path} is no {kind} file, or only its beginning. Export the cloud again.")


@contextmanager
def _header_of(path: Path, kind: str) -> Iterator[None]:
    """Turn errors about the words of a header into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, OverflowError, StopIteration) as error:
        raise InputError(
            f"The header of {path} is not that of a {kind} file ({error!r}). Export the cloud again."
        ) from error


def _vertices(path: Path, lines: Sequence[str]) -> tuple[int, list[_Property]]:
    """Number of points in a PLY header, and their properties; InputError where they are not its first element."""
    number, properties, elements = 0, [], 0
    for words in map(str.split, lines):
        if words[:1] == ["element"]:
            elements += 1
            if elements == 1 and words[1] == "vertex":
                number = int(words[2])
            elif elements == 1:
                raise InputError(f"{path} begins with the element {words[1]}, expected vertex. Export points alone.")
        elif words[:2] == ["property", "list"] and elements == 1:
            raise InputError(f"{path} has points with a list, {words[-1]}, expected numbers alone. Export it without.")
        elif words[:1] == ["property"] and elements == 1:
            properties.append(_Property(words[-1], _PLY_TYPES[words[1]]))
    return number, properties


def _grid(lines: Sequence[str]) -> tuple[int, int] | None:
    """(H, W) from num_rows and num_cols of a PLY header."""
    remarks = [words[1:] for line in lines if (words := line.split())[:1] in (["comment"], ["obj_info"])]
    pairs = [words for words in remarks if len(words) == 2 and words[1].isdecimal()]
    found = {name: int(number) for name, number in pairs if name in ("num_rows", "num_cols")}
    return (found["num_rows"], found["num_cols"]) if len(found) == 2 else None


def _record(path: Path, properties: Sequence[_Property], order: str) -> _Record:
    """Layout of points with these properties; InputError where they lack a floating-point x, y or z."""
    offsets, columns, codes = {}, {}, {}
    offset = column = 0
    for name, code, length in properties:
        offsets[name], columns[name], codes[name] = offset, column, code
        offset += np.dtype(code).itemsize * length
        column += length
    single = {name for name, code, length in properties if code[0] == "f" and length == 1}
    if not single.issuperset(AXES):
        fields = ", ".join(f"{length} {name} ({code})" for name, code, length in properties)
        raise InputError(
            f"{path} holds {fields or 'no fields'}, expected x, y and z as floating-point numbers. Export them."
        )
    layout = {
        "names": list(AXES),
        "formats": [order + codes[axis] for axis in AXES],
        "offsets": [offsets[axis] for axis in AXES],
        "itemsize": offset,
    }
    return _Record(np.dtype(layout), tuple(columns[axis] for axis in AXES))  # type: ignore[call-overload]


def _decode(
    path: Path, body: bytes, record: _Record, size: tuple[int, int], encoding: str, decoders: Mapping[str, _Decoder]
) -> np.ndarray:
    """Decode the points (H, W, 3); InputError for an encoding without a decoder, or an impossible size."""
    check_organized(path, (*size, len(AXES)), record.binary[AXES[0]])
    if encoding not in decoders:
        raise InputError(f"{path} is encoded as {encoding!r}, expected {', '.join(decoders)}. Export the cloud so.")
    return decoders[encoding](path, body, record, size[0] * size[1]).reshape(*size, 3)


def _from_ascii(path: Path, body: bytes, record: _Record, number: int) -> np.ndarray:
    lines = [line for line in body.decode("utf-8", "replace").splitlines() if line.strip()][:number]
    if len(lines) < number:
        raise _cut_short(path, len(lines), number)
    try:
        return np.loadtxt(lines, usecols=record.columns, ndmin=2, comments=None).reshape(number, 3)
    except ValueError as error:
        raise InputError(f"{path} holds a line that is no point ({error}). Export the cloud again.") from error


def _from_binary(path: Path, body: bytes, record: _Record, number: int) -> np.ndarray:
    if len(body) < number * record.binary.itemsize:
        raise _cut_short(path, len(body) // record.binary.itemsize, number)
    points = np.frombuffer(body, record.binary, number)
    return np.stack([points[axis] for axis in AXES], axis=-1)


def _from_compressed(path: Path, body: bytes, record: _Record, number: int) -> np.ndarray:
    """The lengths before and after compression, then the compressed numbers, field by field."""
    if len(body) < 8:
        raise _cut_short(path, 0, number)
    packed, unpacked = struct.unpack_from("<II", body)
    if unpacked != number * record.binary.itemsize:
        raise _cut_short(path, unpacked // record.binary.itemsize, number)
    if len(body) < 8 + packed:
        raise InputError(f"{path} has {len(body) - 8} of {packed} compressed bytes, it is cut short. Copy it again.")
    try:
        whole = decompress_lzf(body[8 : 8 + packed], unpacked)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}). Copy or export it again.") from error
    fields = record.binary.fields
    assert fields is not None
    return np.stack(
        [np.frombuffer(whole, fields[axis][0], number, offset=fields[axis][1] * number) for axis in AXES], axis=-1
    )


def decompress_lzf(packed: bytes, length: int) -> bytes:
    """Undo the LZF compression of `length` bytes; ValueError where the result is not that long.

    A control byte c below 32 is followed by c + 1 literal bytes. Any other one repeats earlier bytes. Their number is
    its upper 3 bits (7: and the next byte) plus 2, their distance its lower 5 bits and the next byte, plus 1.
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
            raise ValueError("it repeats what is before its beginning")
        repeated = whole[-distance:][:count]  # shorter than count where it repeats itself
        whole += (repeated * (count // len(repeated) + 1))[:count]
    if len(whole) != length:
        raise ValueError(f"it has {len(whole)} bytes instead of {length}")
    return bytes(whole)


def _cut_short(path: Path, found: int, promised: int) -> InputError:
    return InputError(f"{path} holds {found} points where its header promises {promised}. Copy or export it again.")

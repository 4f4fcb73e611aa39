"""Image and cloud files of samples: exact values of every format, errors of damaged files, and pairing."""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from msgspec.structs import asdict, replace
from PIL import Image

from utils.errors import InputError
from utils.records import CloudForm, SampleFiles
from utils.scans.depth_camera import OFF_AXIS, Camera, back_project, read_camera
from utils.scans.files import atomic_path
from utils.scans.organized_pc import as_cloud, organized_pc_header, write_organized_pc
from utils.scans.point_files import decompress_lzf, read_pcd, read_ply
from utils.scans.sample_files import (
    LONGEST_NAME,
    FoundSamples,
    check_same_view,
    find_samples,
    holds_depth,
    read_cloud,
    stamp_of,
)

H, W = 3, 5
PCD_ENCODINGS = ("ascii", "binary", "binary_compressed")
PLY_ENCODINGS = ("ascii", "binary_little_endian", "binary_big_endian")
# Extra fields before, between and after the coordinates, which are in an unusual order.
MIXED = (("intensity", "u2", 1), ("z", "f4", 1), ("normal", "f4", 3), ("x", "f4", 1), ("y", "f8", 1), ("rgb", "u4", 1))
PLAIN = (("x", "f4", 1), ("y", "f4", 1), ("z", "f4", 1))
PLY_NAMES = {"u1": "uchar", "u2": "ushort", "u4": "uint", "f4": "float", "f8": "double"}


def cloud() -> np.ndarray:
    """Cloud (H, W, 3) float32 as stored, with every kind of missing point."""
    xyz = np.random.default_rng(0).uniform((-0.2, -0.2, 0.2), 0.8, (H, W, 3)).astype(np.float32)
    xyz[0, 1] = np.nan
    xyz[1, 0, 2] = np.inf
    xyz[1, 3] = 0
    xyz[2, 4, 0] = -np.inf
    return xyz


def expected() -> np.ndarray:
    """The same cloud as read: missing points are zero."""
    xyz = cloud()
    for row, column in ((0, 1), (1, 0), (1, 3), (2, 4)):
        xyz[row, column] = 0
    return xyz


def table(xyz: np.ndarray, fields: Sequence[tuple[str, str, int]], order: str = "<") -> np.ndarray:
    """Points (N,) as records with these fields; fields other than coordinates hold other numbers."""
    rows = np.zeros(xyz.size // 3, [(name, order + code, (length,)) for name, code, length in fields])
    for name, _, length in fields:
        values = xyz[..., "xyz".index(name)].ravel() if name in "xyz" else np.arange(len(rows)) + 7
        rows[name] = np.repeat(values[:, None], length, axis=1)
    return rows


def ascii_lines(rows: np.ndarray) -> bytes:
    assert rows.dtype.names
    lines = [" ".join(f"{value:.9g}" for name in rows.dtype.names for value in row[name]) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def literal_lzf(content: bytes) -> bytes:
    """LZF stream without repeats: runs of up to 32 bytes, each after its length minus one."""
    runs = [content[i : i + 32] for i in range(0, len(content), 32)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def pcd_bytes(
    encoding: str, fields: Sequence[tuple[str, str, int]] = PLAIN, height: int = H, width: int = W, newline: str = "\n"
) -> bytes:
    rows = table(cloud(), fields)
    names, codes, lengths = zip(*fields, strict=True)
    header = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        f"FIELDS {' '.join(names)}",
        f"SIZE {' '.join(code[1] for code in codes)}",
        f"TYPE {' '.join(code[0].upper() for code in codes)}",
        f"COUNT {' '.join(map(str, lengths))}",
        f"WIDTH {width}",
        f"HEIGHT {height}",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {height * width}",
        f"DATA {encoding}",
    ]
    body = {"ascii": ascii_lines(rows), "binary": rows.tobytes()}.get(encoding)
    if body is None:  # field by field, then compressed
        whole = b"".join(rows[name].tobytes() for name in names)
        packed = literal_lzf(whole)
        body = struct.pack("<II", len(packed), len(whole)) + packed
    return (newline.join(header) + newline).encode() + body


def ply_bytes(
    encoding: str, fields: Sequence[tuple[str, str, int]] = PLAIN, remarks: Sequence[str] = (), points: int = H * W
) -> bytes:
    order = ">" if encoding == "binary_big_endian" else "<"
    single = [(f"{name}{i}" if length > 1 else name, code, 1) for name, code, length in fields for i in range(length)]
    rows = table(cloud(), single, order)
    properties = [f"property {PLY_NAMES[code]} {name}" for name, code, _ in single]
    header = ["ply", f"format {encoding} 1.0", *remarks, f"element vertex {points}", *properties]
    header += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    body = ascii_lines(rows) if encoding == "ascii" else rows.tobytes()
    return ("\n".join(header) + "\n").encode() + body + (b"3 0 1 2\n" if encoding == "ascii" else b"\3" + bytes(12))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def error_of(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        read()
    message = str(error.value)
    assert "\n" not in message and 40 < len(message) < 500 and message.endswith(".")
    return message


# Formats


@pytest.mark.parametrize("fields", [PLAIN, MIXED])
@pytest.mark.parametrize("encoding", PCD_ENCODINGS)
def test_pcd(tmp_path: Path, encoding: str, fields: Sequence[tuple[str, str, int]]) -> None:
    path = write(tmp_path / "a.pcd", pcd_bytes(encoding, fields))
    read = read_cloud(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected())


@pytest.mark.parametrize("encoding", PCD_ENCODINGS)
def test_pcd_keeps_missing_points_until_they_are_zeroed(tmp_path: Path, encoding: str) -> None:
    read = read_pcd(write(tmp_path / "a.pcd", pcd_bytes(encoding)))
    np.testing.assert_array_equal(read.astype(np.float32), cloud())


def test_pcd_with_other_line_ends_and_without_count(tmp_path: Path) -> None:
    content = pcd_bytes("binary", newline="\r\n").replace(b"COUNT 1 1 1\r\n", b"")
    np.testing.assert_array_equal(read_cloud(write(tmp_path / "a.PCD", content)), expected())


def test_lzf_by_hand() -> None:
    assert decompress_lzf(b"\x02abc", 3) == b"abc"
    assert decompress_lzf(b"\x02abc\x20\x02", 6) == b"abcabc"  # 3 bytes from 3 back
    assert decompress_lzf(b"\x00a\xe0\x05\x00", 15) == b"a" * 15  # 7 + 5 + 2 bytes from 1 back, an overlapping copy
    assert decompress_lzf(b"\x01ab\x40\x01", 6) == b"ababab"
    for packed, length in (
        (b"\x02abc", 4),
        (b"\x02abc", 2),
        (b"\x00a\x20\x01", 4),
        (b"\x00a\x20", 4),
        (b"\x00a\xe0", 4),
    ):
        with pytest.raises(ValueError, match="it "):
            decompress_lzf(packed, length)


def test_pcd_compressed_by_open3d(tmp_path: Path) -> None:
    import open3d

    path = tmp_path / "a.pcd"
    big = np.tile(cloud(), (40, 40, 1))  # repeated, so that it can be compressed
    written = open3d.t.geometry.PointCloud(big.reshape(-1, 3))
    open3d.t.io.write_point_cloud(path, written, write_ascii=False, compressed=True)
    content = path.read_bytes()
    assert len(content) < big.nbytes / 2
    size = f"WIDTH {big.shape[1]}\nHEIGHT {big.shape[0]}\n"
    path.write_bytes(content.replace(f"WIDTH {big.size // 3}\nHEIGHT 1\n".encode(), size.encode()))
    np.testing.assert_array_equal(as_cloud(read_pcd(path)), np.tile(expected(), (40, 40, 1)))


@pytest.mark.parametrize("fields", [PLAIN, MIXED])
@pytest.mark.parametrize("encoding", PLY_ENCODINGS)
def test_ply_sized_by_its_image(tmp_path: Path, encoding: str, fields: Sequence[tuple[str, str, int]]) -> None:
    path = write(tmp_path / "a.ply", ply_bytes(encoding, fields))
    read = read_cloud(path, image_size=(H, W))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected())


@pytest.mark.parametrize("word", ["obj_info", "comment"])
@pytest.mark.parametrize("encoding", PLY_ENCODINGS)
def test_ply_sized_by_its_header(tmp_path: Path, encoding: str, word: str) -> None:
    remarks = [f"{word} num_cols {W}", "comment num_cols and num_rows follow", f"{word} num_rows {H}"]
    remarks += ["comment num_rows first"]
    path = write(tmp_path / "a.ply", ply_bytes(encoding, remarks=remarks))
    np.testing.assert_array_equal(read_cloud(path), expected())
    np.testing.assert_array_equal(read_cloud(path, image_size=(2 * H, 2 * W)), expected())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npy(tmp_path: Path, dtype: str | type) -> None:
    stored = np.asfortranarray(cloud().astype(dtype))
    np.save(tmp_path / "a.npy", stored)
    read = read_cloud(tmp_path / "a.npy")
    assert read.dtype == np.float32
    as_stored = np.where(expected() == 0, 0, stored.astype(np.float32))
    np.testing.assert_array_equal(read, as_stored)
    np.save(tmp_path / "a.npy", np.asfortranarray((1000 * cloud()).astype(dtype)))
    stored = np.load(tmp_path / "a.npy").astype(np.float64) / 1000  # the conversion loses no precision of the file
    in_meters = np.where(expected() == 0, 0, stored)
    np.testing.assert_allclose(read_cloud(tmp_path / "a.npy", form=CloudForm("mm")), in_meters, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".tiff", ".TIF"])
def test_tiff(tmp_path: Path, suffix: str) -> None:
    write_organized_pc(tmp_path / f"a{suffix}", cloud())
    np.testing.assert_array_equal(read_cloud(tmp_path / f"a{suffix}"), expected())


def wall(z: float) -> np.ndarray:
    """Cloud (4, 4, 3) float32 of a wall at a distance `z`, near the axis of the camera."""
    v, u = np.indices((4, 4))
    return np.stack([(u + 1) * z / 1000, (v - 7) * z / 1000, np.full((4, 4), z)], axis=-1).astype(np.float32)


def test_compressed_tiffs_are_read(tmp_path: Path) -> None:
    for name, predictor in (("lzw", None), ("zstd", True), ("deflate", True), ("lerc", None), ("packbits", None)):
        path = tmp_path / f"{name}.tiff"
        tifffile.imwrite(path, cloud(), photometric="rgb", compression=name, predictor=predictor)
        np.testing.assert_array_equal(read_cloud(path), expected())


@pytest.mark.parametrize("table", ["DECOMPRESSORS", "UNPREDICTORS"])
def test_a_compression_without_decoder_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    tifffile.imwrite(tmp_path / "a.tiff", cloud(), photometric="rgb", compression="zstd", predictor=True)
    monkeypatch.setattr(tifffile.TIFF, table, {1: lambda data: data})
    for read in (read_cloud, organized_pc_header):  # headers are read before a run
        message = error_of(lambda read=read: read(tmp_path / "a.tiff"))  # type: ignore[misc]
        assert "pip install imagecodecs, or save it without compression" in message


@pytest.mark.parametrize("word", ["1.#QNAN", "-1.#IND00", "1.#INF", "-1.#INF", "-nan(ind)", "NAN(SNAN)", "nan", "-nan"])
def test_missing_points_as_other_libraries_print_them(tmp_path: Path, word: str) -> None:
    xyz = np.random.default_rng(0).uniform(0.2, 0.8, (H, W, 3)).astype(np.float32)
    xyz[1, 1] = np.nan
    lines = "\n".join(" ".join(word if np.isnan(each) else str(each) for each in point) for point in xyz.reshape(-1, 3))
    header = pcd_bytes("ascii").split(b"DATA ascii\n")[0] + b"DATA ascii\n"
    read = read_cloud(write(tmp_path / "a.pcd", header + lines.encode()))
    np.testing.assert_array_equal(read, np.nan_to_num(xyz, nan=0.0))


def test_millimeters(tmp_path: Path) -> None:
    millimeters = wall(480.0)
    np.save(tmp_path / "a.npy", millimeters)
    write_organized_pc(tmp_path / "a.tiff", millimeters)
    for name in ("a.npy", "a.tiff"):
        message = error_of(lambda name=name: read_cloud(tmp_path / name))  # type: ignore[misc]
        assert "480 m" in message and "--xyz_unit mm or cm" in message
        read = read_cloud(tmp_path / name, form=CloudForm("mm"))
        np.testing.assert_allclose(read, millimeters / 1000, rtol=1e-6)
    np.save(tmp_path / "b.npy", millimeters * 1000)
    assert "--xyz_unit" not in error_of(lambda: read_cloud(tmp_path / "b.npy", form=CloudForm("mm")))


def test_meters_given_as_millimeters_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", wall(0.5))
    message = error_of(lambda: read_cloud(tmp_path / "a.npy", form=CloudForm("mm")))
    assert "0.0005 m away" in message and "Give --xyz_unit m " in message
    np.save(tmp_path / "b.npy", wall(0.031))
    assert "--xyz_unit" not in error_of(lambda: read_cloud(tmp_path / "b.npy"))
    np.save(tmp_path / "b.npy", wall(0.033))
    assert read_cloud(tmp_path / "b.npy").shape == (4, 4, 3)
    Image.fromarray(np.arange(500, 500 + H * W, dtype=np.uint16).reshape(H, W)).save(tmp_path / "a.png")
    message = error_of(lambda: read_cloud(tmp_path / "a.png", replace(CAMERA, depth_scale=1e-6)))
    assert "Correct the depth_scale" in message and "--xyz_unit" not in message


def test_few_far_points_are_accepted(tmp_path: Path) -> None:
    xyz = wall(0.5)
    xyz[0, :, 2] = (99, 80, 70, 60)
    np.save(tmp_path / "a.npy", xyz)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy"), xyz)


@pytest.mark.parametrize("huge", [101, -1000, 2e19, 3e38])
def test_single_huge_coordinate_is_refused(tmp_path: Path, huge: float) -> None:
    xyz = wall(0.5)
    xyz[1, 2, 0] = huge
    np.save(tmp_path / "a.npy", xyz)
    message = error_of(lambda: read_cloud(tmp_path / "a.npy"))
    assert f"reach {abs(huge):.4g} m, expected at most 100" in message and "--xyz_unit" not in message


# Depth images

CAMERA = Camera(fx=600.0, fy=500.0, cx=2.0, cy=0.75, depth_scale=0.001, width=W, height=H)


def write_camera(path: Path, **changed: object) -> Path:
    path.write_text(json.dumps({**asdict(CAMERA), **changed}))
    return path


def test_depth_image_is_back_projected(tmp_path: Path) -> None:
    depth = np.arange(400, 400 + H * W, dtype=np.uint16).reshape(H, W)
    depth[1, 1] = 0
    Image.fromarray(depth).save(tmp_path / "a.png")
    read = read_cloud(tmp_path / "a.png", read_camera(write_camera(tmp_path / "camera.json")))
    assert read.shape == (H, W, 3) and read.dtype == np.float32
    for v in range(H):
        for u in range(W):
            z = float(depth[v, u]) * 0.001
            x = (u - 2.0) * z / 600.0 if u != 2 else OFF_AXIS
            y = (v - 0.75) * z / 500.0
            by_hand = (0, 0, 0) if (v, u) == (1, 1) else (x, y, z)
            np.testing.assert_array_equal(read[v, u], np.array(by_hand, np.float32))


def test_depth_maps_in_other_formats(tmp_path: Path) -> None:
    depth = np.arange(400, 400 + H * W, dtype=np.uint16).reshape(H, W)
    Image.fromarray(depth).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tiff", depth)
    tifffile.imwrite(tmp_path / "b.tif", depth.astype(np.float32)[..., None])
    np.save(tmp_path / "a.npy", depth.astype(np.int32))
    expected = read_cloud(tmp_path / "a.png", CAMERA)
    for name in ("a.tiff", "b.tif", "a.npy"):
        np.testing.assert_array_equal(read_cloud(tmp_path / name, CAMERA), expected)
        assert holds_depth(tmp_path / name)
        message = error_of(lambda name=name: read_cloud(tmp_path / name))  # type: ignore[misc]
        assert "If it is a depth map, give predict.py or utils/convert.py its --intrinsics" in message
    tifffile.imwrite(tmp_path / "a.tiff", depth[1:])
    assert f"{H - 1} x {W} pixels (H x W), the intrinsics say {H} x {W}" in error_of(
        lambda: read_cloud(tmp_path / "a.tiff", CAMERA)
    )


@pytest.mark.parametrize(("value", "scale", "named"), [(-1, 0.001, -0.001), (-1, 1, -1), (65535, 0.001, 65.535)])
def test_missing_value_that_a_depth_map_is_refused_with_is_accepted(
    tmp_path: Path, value: int, scale: float, named: float
) -> None:
    depth = np.random.default_rng(0).uniform(400, 420, (H, W)).astype(np.float32) * np.float32(0.001 / scale)
    depth[:, 0] = value
    np.save(tmp_path / "a.npy", depth)
    camera = replace(CAMERA, depth_scale=scale)
    assert f"Give --missing_value={named:g} if" in error_of(lambda: read_cloud(tmp_path / "a.npy", camera))
    read = read_cloud(tmp_path / "a.npy", camera, form=CloudForm(missing_value=named))
    assert not read[:, 0].any() and read[:, 1:].all()


def test_clouds_beside_depth_maps(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cloud())
    write_organized_pc(tmp_path / "a.tiff", cloud())
    write(tmp_path / "a.pcd", pcd_bytes("ascii"))
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_cloud(path, CAMERA), expected())
        assert not holds_depth(path)


def test_pixels_on_the_camera_axes_are_valid(tmp_path: Path) -> None:
    read = back_project(np.ones((3, 3)), Camera(100.0, 100.0, 1.0, 1.0, 1.0))
    assert (read != 0).all()
    np.testing.assert_allclose(read[1, 1], (OFF_AXIS, OFF_AXIS, 1))
    nothing = back_project(np.full((3, 3), np.nan), Camera(100.0, 100.0, 1.0, 1.0, 1.0))
    np.testing.assert_array_equal(nothing, np.zeros((3, 3, 3)))


@pytest.mark.parametrize(
    ("changed", "expected_texts"),
    [
        ({"fx": 0}, [">= 1e-09", "`fx`"]),
        ({"fy": "600"}, ["got `str`", "`fy`"]),
        ({"cx": None}, ["got `null`", "`cx`"]),
        ({"cy": math.nan}, ["NaN is not a finite number"]),
        ({"depth_scale": True}, ["got `bool`", "`depth_scale`"]),
        ({"width": 5.5}, ["Expected `int", "`width`"]),
        ({"fx": 10**400}, ["`fx`"]),
        ({"k1": 0.1, "p2": 0.0}, ["unknown field `k1`", "distortion"]),
    ],
)
def test_invalid_intrinsics_are_refused(tmp_path: Path, changed: dict[str, object], expected_texts: list[str]) -> None:
    message = error_of(lambda: read_camera(write_camera(tmp_path / "camera.json", **changed)))
    assert all(text in message for text in [*expected_texts, "camera.json"]), message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"fx": 1}'])
def test_damaged_intrinsics_are_refused(tmp_path: Path, content: bytes) -> None:
    message = error_of(lambda: read_camera(write(tmp_path / "camera.json", content)))
    assert "camera.json" in message and "depth_scale" in message


def test_missing_intrinsics_are_refused(tmp_path: Path) -> None:
    message = error_of(lambda: read_camera(tmp_path / "camera.json"))
    assert "camera.json is missing. Write" in message and "sample" not in message


def test_intrinsics_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_camera(tmp_path / "camera.json")
    assert read_camera(write(path, b"\xef\xbb\xbf" + path.read_bytes())) == CAMERA


@pytest.mark.parametrize(
    ("pixels", "expected_text"),
    [
        (np.zeros((H, W), np.uint8), "holds L pixels"),
        (np.zeros((H, W, 3), np.uint8), "holds RGB pixels"),
        (np.ones((H + 1, W), np.uint16), f"{H + 1} x {W} pixels (H x W), the intrinsics say {H} x {W}"),
        (np.ones((H, W + 1), np.uint16), f"{H} x {W + 1} pixels (H x W), the intrinsics say {H} x {W}"),
    ],
)
def test_other_images_are_refused_as_depth(tmp_path: Path, pixels: np.ndarray, expected_text: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert expected_text in error_of(lambda: read_cloud(tmp_path / "a.png", CAMERA))


def test_depth_image_needs_intrinsics_with_its_scale(tmp_path: Path) -> None:
    Image.fromarray(np.full((H, W), 500, np.uint16)).save(tmp_path / "a.png")
    assert "--intrinsics" in error_of(lambda: read_cloud(tmp_path / "a.png"))
    message = error_of(lambda: read_cloud(tmp_path / "a.png", replace(CAMERA, depth_scale=1.0)))
    assert "500 m" in message and "depth_scale" in message


# Damaged files


def without(content: bytes, *lines: bytes) -> bytes:
    for line in lines:
        assert line in content
        content = content.replace(line, b"")
    return content


DAMAGED = {
    "empty.pcd": (b"", "not a PCD file"),
    "rubbish.pcd": (bytes(range(256)) * 600, "not a PCD file"),
    "header_only.pcd": (pcd_bytes("binary")[:100], "not a PCD file"),
    "flat.pcd": (pcd_bytes("binary", height=1, width=H * W), f"{H * W} x 1 points.*unorganized.*NaN"),
    "cut.pcd": (pcd_bytes("binary")[:-1], f"{H * W - 1} points, but its header says {H * W}"),
    "cut_ascii.pcd": (pcd_bytes("ascii").rsplit(b"\n", 3)[0], f"{H * W - 2} points, but"),
    "short_line.pcd": (pcd_bytes("ascii").rsplit(b" ", 1)[0] + b"\n", "a line that is not a point"),
    "words.pcd": (pcd_bytes("ascii").rsplit(b"\n", 2)[0] + b"\na b c\n", "a line that is not a point"),
    "blank.pcd": (pcd_bytes("ascii").split(b"DATA ascii\n")[0] + b"DATA ascii\n" + b"\n" * H * W, "0 points, but"),
    "cut_packed.pcd": (pcd_bytes("binary_compressed")[:-1], "compressed bytes"),
    "no_packed.pcd": (pcd_bytes("binary_compressed").split(b"compressed\n")[0] + b"compressed\n123", "0 points, but"),
    "few_packed.pcd": (
        pcd_bytes("binary_compressed").replace(f"WIDTH {W}".encode(), f"WIDTH {W + 1}".encode()),
        f"{H * W} points, but its header says {H * (W + 1)}",
    ),
    "bad_packed.pcd": (
        pcd_bytes("binary_compressed")[:-170] + b"\xff" * 170,
        "is damaged",
    ),
    "no_width.pcd": (without(pcd_bytes("binary"), f"WIDTH {W}\n".encode()), "WIDTH"),
    "word_width.pcd": (pcd_bytes("binary").replace(f"WIDTH {W}".encode(), b"WIDTH many"), "no valid PCD header"),
    "sizes.pcd": (pcd_bytes("binary").replace(b"SIZE 4 4 4", b"SIZE 4 4"), "header"),
    "strange_size.pcd": (pcd_bytes("binary").replace(b"SIZE 4 4 4", b"SIZE 4 4 3"), "header"),
    "strange_data.pcd": (pcd_bytes("binary").replace(b"DATA binary", b"DATA base64"), "base64.*binary_compressed"),
    "whole_numbers.pcd": (pcd_bytes("binary").replace(b"TYPE F F F", b"TYPE I I I"), "floating-point"),
    "no_z.pcd": (pcd_bytes("binary").replace(b"FIELDS x y z", b"FIELDS x y w"), r"1 w \(f4\), expected x, y and z"),
    "no_x.pcd": (pcd_bytes("binary").replace(b"COUNT 1 1 1", b"COUNT 0 1 1"), r"0 x \(f4\), .*expected x, y and z"),
    "many.pcd": (pcd_bytes("binary", MIXED).replace(b"COUNT 1", b"COUNT 1" + bytes(22).replace(b"\0", b"0")), "header"),
    "vast.pcd": (pcd_bytes("binary", height=8193, width=8192), "has 8193 x 8192 points.*at most"),
    "remark.pcd": (
        pcd_bytes("ascii").rsplit(b"\n", 2)[0] + b"\n# 1 2 3\n",
        "a line that is not a point",
    ),
    "empty.ply": (b"", "not a PLY file"),
    "pcd.ply": (pcd_bytes("binary"), "not a PLY file"),
    "header_only.ply": (ply_bytes("ascii")[:80], "not a PLY file"),
    "other_size.ply": (ply_bytes("ascii", points=H * W - 1), f"{H * W - 1} points, expected {H} x {W}"),
    "fewer_points.ply": (
        ply_bytes("ascii", remarks=[f"obj_info num_cols {W + 1}", f"obj_info num_rows {H}"]),
        f"expected {H} x {W + 1}.*NaN",
    ),
    "cut.ply": (ply_bytes("binary_little_endian")[:-14], f"{H * W - 1} points, but"),
    "cut_ascii.ply": (ply_bytes("ascii").rsplit(b"\n", 5)[0], f"{H * W - 3} points, but"),
    "no_format.ply": (without(ply_bytes("ascii"), b"format ascii 1.0\n"), "header"),
    "strange_format.ply": (ply_bytes("ascii").replace(b"format ascii", b"format text"), "'text'.*ascii"),
    "strange_type.ply": (ply_bytes("ascii").replace(b"property float x", b"property quad x"), "quad"),
    "no_z.ply": (without(ply_bytes("ascii"), b"property float z\n"), "expected x, y and z"),
    "list.ply": (
        ply_bytes("ascii").replace(b"property float x", b"property list uchar int near\nproperty float x"),
        "points with a list, near",
    ),
    "faces_first.ply": (
        ply_bytes("ascii").replace(b"element vertex", b"element face 0\nelement vertex"),
        "begins with the element face",
    ),
    "no_points.ply": (ply_bytes("ascii").replace(b"element vertex 15", b"element vertex"), "header"),
    "empty.npy": (b"", "not a complete"),
    "rubbish.npy": (b"\x93NUMPY\x01\x00" + bytes(200), "not a complete"),
    "zip.npy": (b"PK\x03\x04" + bytes(200), "not a complete"),
    "empty.tiff": (b"", "cannot be read as a tiff"),
}


def test_damaged_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (content, pattern) in DAMAGED.items():
        path = write(tmp_path / name, content)
        with pytest.raises(InputError) as error:
            read_cloud(path, image_size=(H, W))
        message = str(error.value)
        assert re.search(pattern, message), name
        assert str(path) in message and "\n" not in message and len(message) - len(str(path)) < 400
        assert capfd.readouterr() == ("", ""), f"{name}: the error is the only output"


def test_ply_without_a_size_is_refused(tmp_path: Path) -> None:
    message = error_of(lambda: read_ply(write(tmp_path / "a.ply", ply_bytes("ascii"))))
    assert "num_rows and num_cols" in message and ".npy" in message


@pytest.mark.parametrize(
    ("array", "expected_text"),
    [
        (np.ones((4, 4), np.float32), "4 x 4, expected H x W x 3"),
        (np.ones((4, 0, 3), np.float32), "4 x 0 x 3, expected H x W x 3"),
        (np.ones((16, 3), np.float32), "16 x 3, expected H x W x 3"),
        (np.ones((4, 4, 3), np.uint16), "uint16 numbers, expected floating-point"),
        (np.array([[["a", None, 1]]], dtype=object), "not a complete .npy array"),
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(tmp_path: Path, array: np.ndarray, expected_text: str) -> None:
    np.save(tmp_path / "a.npy", array)
    message = error_of(lambda: read_cloud(tmp_path / "a.npy"))
    assert expected_text in message and "a.npy" in message


def test_truncated_and_multiple_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cloud())
    content = (tmp_path / "a.npy").read_bytes()
    assert "not a complete" in error_of(lambda: read_cloud(write(tmp_path / "a.npy", content[:-1])))
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, cloud(), cloud())
    assert "not a complete" in error_of(lambda: read_cloud(tmp_path / "b.npy"))


@pytest.mark.parametrize("suffix", [".npy", ".pcd", ".ply", ".tiff"])
def test_missing_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    assert str(path) in error_of(lambda: read_cloud(path))


def test_image_and_cloud_must_show_the_same_view() -> None:
    def differ(image: tuple[int, int], cloud: tuple[int, int]) -> None:
        check_same_view("a", np.zeros((*image, 3), np.uint8), np.zeros((*cloud, 3), np.float32))

    differ((480, 640), (480, 640))
    differ((960, 1280), (480, 640))
    differ((963, 1280), (480, 640))  # rounded size
    message = error_of(lambda: differ((960, 1280), (640, 480)))
    assert "960 x 1280" in message and "640 x 480" in message
    error_of(lambda: differ((480, 640), (480, 480)))


# Pairing


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(samples: Sequence[SampleFiles]) -> list[str]:
    return [sample.path for sample in samples]


def test_folders_are_paired_by_stem(tmp_path: Path) -> None:
    touch(tmp_path / "rgb", "10.png", "2.JPG", "lone.jpeg", ".hidden.png", "notes.txt")
    touch(tmp_path / "xyz", "2.npy", "10.PLY", "stray.pcd", "notes.json")
    found = find_samples(str(tmp_path / "rgb"), str(tmp_path / "xyz"))
    assert found.samples == [
        SampleFiles("10", tmp_path / "rgb/10.png", tmp_path / "xyz/10.PLY"),
        SampleFiles("2", tmp_path / "rgb/2.JPG", tmp_path / "xyz/2.npy"),
    ]
    assert [sample for sample, _ in found.incomplete] == [
        SampleFiles("lone", tmp_path / "rgb/lone.jpeg"),
        SampleFiles("stray", None, tmp_path / "xyz/stray.pcd"),
    ]
    faults = [fault for _, fault in found.incomplete]
    assert "lone.jpeg has no cloud of the same stem" in faults[0]
    assert "stray.pcd has no image of the same stem" in faults[1]


def test_single_modality(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.png", "c.tiff")
    assert find_samples(str(tmp_path), None).samples == [
        SampleFiles("a", tmp_path / "a.png"),
        SampleFiles("b", tmp_path / "b.png"),
    ]
    assert find_samples(None, str(tmp_path)).samples == [SampleFiles("c", None, tmp_path / "c.tiff")]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "line/1/photo_a.png", "line/2/photo_b.png", "line/2/depth_b.png", "line/2/other.png", "x[1].png")
    for pattern in (str(tmp_path / "line/*/photo_*.png"), str(tmp_path / "**/photo_[ab].png")):
        assert names(find_samples(pattern, None).samples) == ["photo_a", "photo_b"]
    monkeypatch.chdir(tmp_path / "line/1")
    assert find_samples("../*/photo_?.png", None).samples[1].rgb == Path("../2/photo_b.png")
    assert names(find_samples("../../x[1].png", None).samples) == ["x[1]"], "an existing file is not a pattern"


def test_two_files_need_no_common_stem(tmp_path: Path) -> None:
    touch(tmp_path, "photo.png", "scan.tiff")
    found = find_samples(str(tmp_path / "photo.png"), str(tmp_path / "scan.tiff"))
    assert found == ([SampleFiles("photo", tmp_path / "photo.png", tmp_path / "scan.tiff")], [])


def test_a_file_and_a_folder_are_paired_by_stem(tmp_path: Path) -> None:
    touch(tmp_path, "rgb/a.png", "xyz/a.tiff", "xyz/b.tiff")
    found = find_samples(str(tmp_path / "rgb/a.png"), str(tmp_path / "xyz"))
    assert names(found.samples) == ["a"]
    assert names([sample for sample, _ in found.incomplete]) == ["b"]


def test_stems_must_be_unique(tmp_path: Path) -> None:
    touch(tmp_path, "rgb/a.png", "rgb/b.png", "xyz/a.npy", "xyz/a.tiff", "xyz/b.npy")
    found = find_samples(str(tmp_path / "rgb"), str(tmp_path / "xyz"))
    assert names(found.samples) == ["b"]
    ((sample, fault),) = found.incomplete
    assert sample.path == "a"
    assert "a.npy" in fault and "a.tiff share a stem" in fault


def test_depth_images_are_clouds_with_intrinsics(tmp_path: Path) -> None:
    touch(tmp_path, "rgb/a.png", "depth/a.png")
    found = find_samples(str(tmp_path / "rgb"), str(tmp_path / "depth"), depth=True)
    assert found.samples == [SampleFiles("a", tmp_path / "rgb/a.png", tmp_path / "depth/a.png")]
    for given in (tmp_path / "depth", tmp_path / "depth/a.png"):
        assert "--intrinsics" in error_of(lambda given=given: find_samples(None, str(given)))  # type: ignore[misc]


def test_no_complete_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "rgb/a.png", "xyz/b.tiff", "text/a.txt")
    for rgb, xyz, expected_texts in (
        ("empty", None, ["--rgb", "names no file"]),
        ("absent", None, ["--rgb", "names no file", "pattern"]),
        ("rgb/*.jpg", None, ["names no file"]),
        ("text", None, ["a.txt, expected .png"]),
        ("text/a.txt", None, ["names a.txt", ".png"]),
        (None, "rgb/a.png", ["--xyz", "depth images", "--intrinsics"]),
        ("rgb", "xyz", ["None of 2 samples", "a.png has no cloud"]),
    ):
        given = [None if each is None else str(tmp_path / each) for each in (rgb, xyz)]
        message = error_of(lambda given=given: find_samples(*given))  # type: ignore[misc]
        assert all(text in message for text in expected_texts), message
    for given in (("", None), (None, "")):
        assert "'' names no file" in error_of(lambda given=given: find_samples(*given))  # type: ignore[misc]


def test_names_too_long_for_output_files_are_refused(tmp_path: Path) -> None:
    longest, longer = "ä" * (LONGEST_NAME // 2), "ä" * (LONGEST_NAME // 2) + "a"
    touch(tmp_path, f"{longest}.png", f"{longer}.png")
    with atomic_path(tmp_path / f"{longest}_overlay.png") as temporary:
        temporary.touch()
    found = find_samples(str(tmp_path / "[aä]*[aä].png"), None)
    assert names(found.samples) == [longest]
    ((sample, fault),) = found.incomplete
    assert sample.path == longer and f"{LONGEST_NAME + 1} bytes" in fault


def test_a_stamp_identifies_the_files_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, size and time; the name of the sample and the form of its path do not matter."""
    image, cloud = write(tmp_path / "a.png", b"image"), write(tmp_path / "a.tiff", b"cloud")
    stamps = [stamp_of(SampleFiles("a", image, cloud))]
    monkeypatch.chdir(tmp_path)
    assert stamp_of(SampleFiles("b", Path("./a.png"), Path("a.tiff"))) == stamps[0]
    stamps += [stamp_of(SampleFiles("a", image)), stamp_of(SampleFiles("a", None, image))]
    os.utime(cloud, ns=(0, cloud.stat().st_mtime_ns + 1))
    stamps.append(stamp_of(SampleFiles("a", image, cloud)))
    write(image, b"another image")
    os.utime(image, ns=(0, 0))
    stamps.append(stamp_of(SampleFiles("a", image, cloud)))
    image.unlink()
    stamps.append(stamp_of(SampleFiles("a", image, cloud)))
    assert len(set(stamps)) == len(stamps) == 6 and all(re.fullmatch("[0-9a-f]{16}", each) for each in stamps)


def test_files_that_may_still_come(tmp_path: Path) -> None:
    assert find_samples(str(tmp_path), str(tmp_path / "*.tiff"), required=False) == FoundSamples([], [])
    image = write(tmp_path / "a.png", b"")
    found = find_samples(str(tmp_path), str(tmp_path / "*.tiff"), required=False)
    assert [files for files, _ in found.incomplete] == [SampleFiles("a", image)] and found.samples == []


def test_a_cloud_in_a_folder_of_both_is_no_image(tmp_path: Path) -> None:
    """Even before the first image has arrived."""
    cloud = write(tmp_path / "a.tiff", b"")
    found = find_samples(str(tmp_path), str(tmp_path), required=False)
    assert [files for files, _ in found.incomplete] == [SampleFiles("a", None, cloud)]
    assert find_samples(str(tmp_path), None).samples == [SampleFiles("a", cloud)]
    image = write(tmp_path / "a.png", b"")
    assert find_samples(str(tmp_path), str(tmp_path)).samples == [SampleFiles("a", image, cloud)]

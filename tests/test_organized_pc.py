"""Organized point clouds: tiff variants, damaged files, the valid mask and the nearest resize."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from utils.errors import InputError
from utils.scans.organized_pc import (
    MAX_PIXELS,
    as_cloud,
    check_organized,
    organized_pc_header,
    read_organized_pc,
    resize_nearest,
    valid_mask,
    write_organized_pc,
)


@pytest.fixture
def xyz() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, (20, 30, 3)).astype(np.float32)


SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -0.3, 0.7]


def test_valid_mask_equals_its_plain_form() -> None:
    points = np.array(np.meshgrid(SPECIAL, SPECIAL, SPECIAL), dtype=np.float32).reshape(3, -1).T
    expected = [all(value != 0 and np.isfinite(value) for value in point) for point in points]
    assert 0 < sum(expected) < len(expected)
    assert valid_mask(points).tolist() == expected
    cleaned = as_cloud(points)
    assert np.array_equal(cleaned[expected], points[expected])
    assert cleaned[~np.array(expected)].tobytes() == bytes(12 * (len(points) - sum(expected)))


@pytest.mark.parametrize(
    "height, width, size", [(400, 400, 224), (373, 401, 224), (10, 7, 24), (5, 9, 1), (64, 64, 64)]
)
def test_resize_nearest_equals_its_plain_form(height: int, width: int, size: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    positions = np.stack([rows, columns, rows * width + columns], axis=2).astype(np.float32)
    resized = resize_nearest(positions, size)
    assert resized.shape == (3, size, size)
    assert str(resized.dtype) == "torch.float32"
    for i in range(size):
        for j in range(0, size, 5):
            row = min(int(i * np.float32(height / size)), height - 1)
            column = min(int(j * np.float32(width / size)), width - 1)
            assert resized[:, i, j].tolist() == positions[row, column].tolist()


@pytest.mark.golden
def test_read_and_resize_are_bit_equal_to_the_original(goldens: Path) -> None:
    recorded = np.load(goldens / "stages_bagel_test_hole_000.npz")
    cloud = read_organized_pc(goldens / "data/bagel/test/hole/xyz/000.tiff")
    assert np.array_equal(resize_nearest(cloud, 224).numpy(), recorded["resized_pc"])
    mask = np.unpackbits(recorded["prep_mask_packed"], count=cloud.shape[0] * cloud.shape[1])
    assert np.array_equal(valid_mask(cloud), mask.reshape(cloud.shape[:2]).astype(bool))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"photometric": "minisblack"},  # one page per row
        {"photometric": "minisblack", "planarconfig": "contig", "metadata": None},
        {"compression": "zlib", "rowsperstrip": 4},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"photometric": "rgb", "compression": "zlib", "tile": (16, 16)},
    ],
)
def test_reads_every_tiff_layout(tmp_path: Path, xyz: np.ndarray, options: dict) -> None:
    path = tmp_path / "000.tiff"
    tifffile.imwrite(path, xyz, **options)
    assert organized_pc_header(path) == (20, 30)
    assert np.array_equal(read_organized_pc(path), xyz)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reads_every_float_type_as_float32(tmp_path: Path, xyz: np.ndarray, dtype: type) -> None:
    tifffile.imwrite(tmp_path / "000.tiff", xyz.astype(dtype))
    result = read_organized_pc(tmp_path / "000.tiff")
    assert result.dtype == np.float32
    assert np.array_equal(result, xyz.astype(dtype).astype(np.float32))


def test_reads_missing_pixels_as_zero(tmp_path: Path, xyz: np.ndarray) -> None:
    stored = xyz.astype(np.float64)
    stored[0, 0, 1], stored[1, 1, 2], stored[2, 2, 0], stored[3, 3] = np.nan, np.inf, 0, 1e300
    tifffile.imwrite(tmp_path / "000.tiff", stored)
    expected = xyz.copy()
    expected[range(4), range(4)] = 0
    assert np.array_equal(read_organized_pc(tmp_path / "000.tiff"), expected)


def test_round_trip_without_other_files(tmp_path: Path, xyz: np.ndarray) -> None:
    path = tmp_path / "new" / "000.tiff"
    write_organized_pc(path, xyz.astype(np.float64))
    assert np.array_equal(read_organized_pc(path), xyz)
    assert [p.name for p in path.parent.iterdir()] == ["000.tiff"]
    with tifffile.TiffFile(path) as tif:  # the layout that other readers of the dataset expect
        assert (len(tif.pages), tif.pages[0].shape, tif.pages[0].dtype) == (1, (20, 30, 3), np.float32)
    with pytest.raises(ValueError):
        write_organized_pc(path, xyz[..., :2])


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((20, 30), np.float32), r"20 x 30, expected H x W x 3"),
        (np.zeros((20, 30, 4), np.float32), r"20 x 30 x 4, expected H x W x 3"),
        (np.zeros((3, 20, 30), np.float32), r"3 x 20 x 30, expected H x W x 3"),
        (np.zeros((20, 30, 3), np.uint16), "uint16 numbers, expected floating-point coordinates"),
    ],
)
def test_refuses_other_shapes_and_types(tmp_path: Path, array: np.ndarray, message: str) -> None:
    tifffile.imwrite(tmp_path / "000.tiff", array)
    for read in (organized_pc_header, read_organized_pc):
        with pytest.raises(InputError, match=f"000.tiff holds .*{message}"):
            read(tmp_path / "000.tiff")


@pytest.mark.parametrize("options", [{}, {"photometric": "minisblack"}, {"compression": "zlib", "rowsperstrip": 4}])
def test_refuses_truncated_files(tmp_path: Path, xyz: np.ndarray, options: dict) -> None:
    whole, truncated = tmp_path / "whole.tiff", tmp_path / "truncated.tiff"
    tifffile.imwrite(whole, xyz, **options)
    with tifffile.TiffFile(whole) as tif:
        series, page = tif.series[0], tif.pages[0]
        end = page.dataoffsets[-1] + page.databytecounts[-1]
        if series.dataoffset is not None:
            end = series.dataoffset + series.nbytes
    for length in [0, 1, 4, 8, 9, 60, 150, 250, 300, 1000, 2000, end - 1]:
        truncated.write_bytes(whole.read_bytes()[:length])
        for read in (organized_pc_header, read_organized_pc):
            with pytest.raises(InputError) as caught:
                read(truncated)
            assert str(truncated) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_refuses_a_missing_file_and_another_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"000.tiff is missing"):
        read_organized_pc(tmp_path / "000.tiff")
    (tmp_path / "000.tiff").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(InputError, match="cannot be read as a tiff file"):
        organized_pc_header(tmp_path / "000.tiff")


def test_damaged_pixels_are_found_by_reading_not_by_the_header(tmp_path: Path, xyz: np.ndarray) -> None:
    path = tmp_path / "000.tiff"
    tifffile.imwrite(path, xyz, compression="zlib")
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    assert organized_pc_header(path) == (20, 30)
    with pytest.raises(InputError, match="cannot be read as a tiff file"):
        read_organized_pc(path)


def forge_height(path: Path, height: int) -> None:
    """Change the height in the header of a little-endian tiff."""
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags["ImageLength"]
    content = bytearray(path.read_bytes())
    struct.pack_into("<H" if tag.dtype == 3 else "<I", content, tag.valueoffset, height)
    path.write_bytes(content)


@pytest.mark.parametrize("rows", [4, 20])
def test_refuses_missing_strips(tmp_path: Path, xyz: np.ndarray, rows: int) -> None:
    path = tmp_path / "000.tiff"
    tifffile.imwrite(path, xyz, photometric="rgb", compression="zlib", rowsperstrip=rows, metadata=None)
    forge_height(path, 20_000)
    for read in (organized_pc_header, read_organized_pc):
        with pytest.raises(InputError, match=r"000\.tiff lacks strips or tiles"):
            read(path)


def test_refuses_an_empty_strip(tmp_path: Path, xyz: np.ndarray) -> None:
    path = tmp_path / "000.tiff"
    tifffile.imwrite(path, xyz, photometric="rgb", compression="zlib", rowsperstrip=4)
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags["StripByteCounts"]
    content = bytearray(path.read_bytes())
    width = 2 if tag.dtype == 3 else 4
    content[tag.valueoffset + width : tag.valueoffset + 2 * width] = bytes(width)
    path.write_bytes(content)
    with pytest.raises(InputError, match="lacks strips or tiles"):
        read_organized_pc(path)


def test_refuses_too_many_pixels(tmp_path: Path, xyz: np.ndarray) -> None:
    check_organized("a", (1 << 13, MAX_PIXELS >> 13, 3), np.dtype(np.float32))
    with pytest.raises(InputError, match=f"has 8193 x .* at most {MAX_PIXELS}"):
        check_organized("a", ((1 << 13) + 1, MAX_PIXELS >> 13, 3), np.dtype(np.float32))
    path = tmp_path / "000.tiff"
    tifffile.imwrite(path, xyz, photometric="rgb", compression="zlib", metadata=None)
    forge_height(path, 50_000_000)
    with pytest.raises(InputError, match="has 50000000 x 30 points"):
        organized_pc_header(path)


def test_refuses_a_file_of_several_clouds(tmp_path: Path, xyz: np.ndarray) -> None:
    path = tmp_path / "000.tiff"
    with tifffile.TiffWriter(path) as tif:
        tif.write(xyz, photometric="rgb")
        tif.write(xyz[:10], photometric="rgb")
    with pytest.raises(InputError, match="holds 2 images, expected one cloud"):
        read_organized_pc(path)

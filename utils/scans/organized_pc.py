"""Organized point clouds: tiff files of H x W x 3 coordinates, valid pixels, and nearest-neighbor resizing.

In the whole project, a cloud is float32, in meters, in the camera frame, and a pixel without a measurement is exactly
(0, 0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from utils.errors import InputError
from utils.scans.files import atomic_path, open_file

if TYPE_CHECKING:
    from torch import Tensor

MAX_COORDINATE = 100.0  # meters; a larger coordinate has another unit or is damaged
MAX_PIXELS = 1 << 26  # of a cloud, 0.8 GB of float32; no depth camera has more, so a larger header is damaged


def valid_mask(xyz: np.ndarray) -> np.ndarray:
    """Mask (...) of the measured pixels of `xyz` (..., 3): all three coordinates are non-zero and finite."""
    valid = (xyz != 0) & np.isfinite(xyz)
    return valid[..., 0] & valid[..., 1] & valid[..., 2]  # ten times as fast as all(axis=-1)


def check_organized(name: Path | str, shape: Sequence[int], dtype: np.dtype | None, depth: bool = False) -> None:
    """Raise InputError for an array that is not H x W x 3 floating-point numbers, or has more than MAX_PIXELS.

    With `depth`, it may also be a depth map: H x W numbers, or H x W x 1.
    """
    is_depth = len(shape) == 2 or tuple(shape[2:]) == (1,)
    if not all(shape) or (tuple(shape[2:]) != (3,) and not (depth and is_depth)):
        found, fix = " x ".join(map(str, shape)), "Store x, y and z as the last axis."
        if is_depth:
            fix = "If it is a depth map, give predict.py or utils/convert.py its --intrinsics."
        raise InputError(f"{name} holds an array of {found}, expected H x W x 3. {fix}")
    if dtype is None or dtype.kind not in ("fiu" if is_depth else "f"):
        raise InputError(f"{name} holds {dtype} numbers, expected floating-point coordinates. Store float32 meters.")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise InputError(
            f"{name} has {shape[0]} x {shape[1]} points (H x W) by its header, expected at most {MAX_PIXELS} in all. "
            "Scale it down, or copy it again if its header is damaged."
        )


def as_cloud(xyz: np.ndarray) -> np.ndarray:
    """Convert `xyz` (..., 3) to float32, with missing pixels (see `valid_mask`) exactly (0, 0, 0)."""
    with np.errstate(over="ignore"):  # a float64 beyond the range of float32 becomes infinite, which is missing
        cloud = xyz.astype(np.float32)
    np.copyto(cloud, 0, where=~valid_mask(cloud)[..., None])  # twice as fast as np.where
    return cloud


def organized_pc_header(path: Path | str) -> tuple[int, int]:
    """Return (H, W) of a cloud from the header of its file, fast enough for thousands of files.

    Raises InputError if the file is not a tiff of H x W x 3 floating-point numbers, or is shorter than its header says.
    Only `read_organized_pc` finds damage inside the pixel data.
    """
    with _open_checked(path) as tif:
        height, width, _ = tif.series[0].shape
        return height, width


def read_organized_pc(path: Path | str, depth: bool = False) -> np.ndarray:
    """Read a tiff of H x W x 3 floats as an organized point cloud, (H, W, 3) float32, in the unit of the file.

    A pixel with a coordinate that is zero, NaN or infinite becomes (0, 0, 0). With `depth`, a depth map is returned as
    stored. Raises InputError as `organized_pc_header`, and where the pixel data cannot be decoded.
    """
    with _open_checked(path, depth) as tif:
        array = tif.series[0].asarray()
    return as_cloud(array) if array.shape[2:] == (3,) else array


def write_organized_pc(path: Path | str, xyz: np.ndarray) -> None:
    """Write `xyz` (H, W, 3), meters, as an uncompressed float32 tiff, atomically; folders are made as needed."""
    with atomic_path(path) as temporary:
        # "rgb" means three interleaved samples per pixel: one image, not one page per row.
        tifffile.imwrite(temporary, xyz.astype(np.float32, copy=False), photometric="rgb")


def resize_nearest(xyz: np.ndarray, size: int) -> Tensor:
    """Resize a cloud to size x size by picking pixels, so that no coordinate is averaged with a missing one.

    `xyz` is (H, W, 3) float; returns (3, size, size) float32. Row i shows row floor(i * H / size), columns likewise.
    """
    import torch  # here, because preprocessing starts a process per core and does not need it

    planes = torch.from_numpy(np.ascontiguousarray(xyz.transpose(2, 0, 1), dtype=np.float32))
    return torch.nn.functional.interpolate(planes[None], size=(size, size), mode="nearest")[0]


@contextmanager
def _open_checked(path: Path | str, depth: bool = False) -> Iterator[tifffile.TiffFile]:
    """Open a tiff and check that its header is that of an organized point cloud. Every error becomes an InputError."""
    path = Path(path)
    try:
        with open_file(path, "cloud") as file, tifffile.TiffFile(file) as tif:
            _check_header(path, tif, depth)
            yield tif
    except InputError:
        raise
    except Exception as error:  # with damaged bytes the decoder may raise almost anything
        raise InputError(f"{path} cannot be read as a tiff file. Copy it again from its source.") from error


def _check_header(path: Path, tif: tifffile.TiffFile, depth: bool) -> None:
    series = tif.series[0]
    check_organized(path, series.shape, series.dtype, depth)
    if len(tif.series) > 1:
        raise InputError(f"{path} holds {len(tif.series)} images, expected one cloud. Store it alone.")
    first, known = series.keyframe, tifffile.TIFF
    if first.compression not in known.DECOMPRESSORS or first.predictor not in known.UNPREDICTORS:
        problem = f"{path} is compressed in a way that cannot be decoded here"
        raise InputError(f"{problem}. Run pip install imagecodecs, or save it without compression.")
    pages = [page for page in series.pages if page is not None]
    if any(len(page.dataoffsets) != math.prod(page.chunked) or 0 in page.databytecounts for page in pages):
        raise InputError(f"{path} lacks strips or tiles that its header lists. Copy it again from its source.")
    end = max(o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
    if series.dataoffset is not None:  # its pages follow one another, and share the first one's header
        end = series.dataoffset + series.nbytes
    size = path.stat().st_size
    if size < end:
        raise InputError(f"{path} is cut short, with {size} of {end} bytes. Copy it again from its source.")

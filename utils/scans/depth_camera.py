"""Depth pictures of a pinhole camera: its intrinsics, and the organized point cloud that a depth picture stands for.

The intrinsics are a JSON file, all in pixels but the scale:

    {"fx": 616.4, "fy": 616.6, "cx": 321.9, "cy": 238.2, "depth_scale": 0.001, "width": 640, "height": 480}
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import InputError
from utils.scans.files import cannot_read
from utils.scans.images import open_image
from utils.scans.organized_pc import as_cloud

REQUIRED = ("fx", "fy", "cx", "cy", "depth_scale")
SIZE = ("width", "height")
OFF_AXIS = 1e-6  # meters, far below what a camera resolves


class Camera(NamedTuple):
    """A pinhole camera without distortion."""

    fx: float  # focal lengths and center, pixels
    fy: float
    cx: float
    cy: float
    depth_scale: float  # meters per unit of the depth picture
    width: int | None = None  # of its pictures, pixels; None: not checked
    height: int | None = None


def read_camera(path: Path) -> Camera:
    """Read the intrinsics of a camera.

    Raises:
        InputError: no JSON object, a number that is missing or impossible, or a key that is not known, such as one of a
            distortion, which would be left out of the computation.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows begins files with a mark
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: write {_example()} into it, or name another file") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file ({error}): write {_example()} into it") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a JSON {type(record).__name__}, expected an object: write {_example()} into it")
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: the intrinsics of a depth camera are {_example()}")
    unknown = sorted(record.keys() - {*REQUIRED, *SIZE})
    if unknown:
        raise InputError(
            f"{path} holds {', '.join(map(repr, unknown))}, expected only {', '.join((*REQUIRED, *SIZE))}: take lens "
            "distortion out of the depth pictures first, and remove what is no intrinsic of a pinhole camera"
        )
    for name, value in record.items():
        _check_number(path, name, value)
    return Camera(**record)


def _check_number(path: Path, name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if name in ("cx", "cy"):
        good, expected = number, "a number of pixels"
    elif name in SIZE:
        good, expected = number and isinstance(value, int) and value > 0, "a whole number of pixels above 0"
    else:
        good, expected = number and value > 0, "a number above 0"
    if not good:
        raise InputError(f"{name} of {path} is {json.dumps(value):.40}, expected {expected}: correct it")


def _example() -> str:
    return '{"fx": .., "fy": .., "cx": .., "cy": .., "depth_scale": meters per unit}'


def read_depth_png(path: Path, camera: Camera) -> np.ndarray:
    """Read a 16-bit depth picture as an organized point cloud, (H, W, 3) float32, meters; 0 is no measurement.

    Raises:
        InputError: no complete PNG, not one channel of 16 bits, or not of the camera's size.
    """
    with open_image(path) as image:
        mode, depth = image.mode, np.asarray(image)
    if not mode.startswith("I"):
        raise InputError(
            f"{path} holds {mode} pixels, expected one channel of 16 bits: give the depth picture as the camera "
            "stores it, not one for the eye"
        )
    for name, found, expected in (("high", depth.shape[0], camera.height), ("wide", depth.shape[1], camera.width)):
        if expected is not None and found != expected:
            raise InputError(
                f"{path} is {found} pixels {name}, the intrinsics are for {expected}: give those of its resolution"
            )
    return back_project(depth, camera)


def back_project(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """z = depth * depth_scale, x = (u - cx) z / fx, y = (v - cy) z / fy, for the pixel in column u and row v.

    Args:
        depth: (H, W) numbers, units of the camera; 0 (or NaN, infinity): no measurement.
        camera: its intrinsics.

    Returns:
        (H, W, 3) float32, meters, camera frame (x right, y down, z away); no measurement is exactly 0. A pixel on an
        axis of the camera, whose x or y would be exactly 0 and read as missing, is put OFF_AXIS beside it.
    """
    z = np.asarray(depth, dtype=np.float64) * camera.depth_scale
    v, u = np.indices(z.shape)
    x = np.where(u == camera.cx, OFF_AXIS, (u - camera.cx) * z / camera.fx)
    y = np.where(v == camera.cy, OFF_AXIS, (v - camera.cy) * z / camera.fy)
    return as_cloud(np.stack([x, y, z], axis=-1))

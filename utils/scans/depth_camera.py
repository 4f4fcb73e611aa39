"""Depth images of a pinhole camera as organized point clouds.

The intrinsics are a JSON file. All numbers are in pixels except `depth_scale`, in meters per unit:

    {"fx": 616.4, "fy": 616.6, "cx": 321.9, "cy": 238.2, "depth_scale": 0.001, "width": 640, "height": 480}
"""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from utils.errors import InputError
from utils.scans.images import open_image
from utils.scans.json_records import read_record
from utils.scans.organized_pc import as_cloud

OFF_AXIS = 1e-6  # meters, far below the resolution of a camera
FIX = 'Write {"fx": .., "fy": .., "cx": .., "cy": .., "depth_scale": meters per unit} into it, without lens distortion'
Positive = Annotated[float, msgspec.Meta(ge=1e-9, le=1e9)]
Pixel = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Pixels = Annotated[int, msgspec.Meta(gt=0)]


class Camera(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pinhole camera without distortion."""

    fx: Positive  # focal lengths and center, pixels
    fy: Positive
    cx: Pixel
    cy: Pixel
    depth_scale: Positive  # meters per unit of the depth image
    width: Pixels | None = None  # of its images; None: not checked
    height: Pixels | None = None


def read_camera(path: Path) -> Camera:
    """Read the intrinsics of a camera; InputError for wrong numbers, or unknown keys such as those of distortion."""
    return read_record(path, Camera, None, FIX)


def read_depth_png(path: Path) -> np.ndarray:
    """Read a 16-bit depth image, (H, W); InputError if it is not a complete PNG with one 16-bit channel."""
    with open_image(path) as image:
        mode, depth = image.mode, np.asarray(image)
    if not mode.startswith("I"):
        raise InputError(f"{path} holds {mode} pixels, expected one channel of 16 bits. Give the camera's own file.")
    return depth


def back_project(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Back-project pixels in column u and row v: z = depth * depth_scale, x = (u - cx) z / fx, y = (v - cy) z / fy.

    `depth` is (H, W) in units of the camera; 0, NaN or infinity: no measurement. Returns (H, W, 3) float32, meters,
    camera frame (x right, y down, z away); a pixel without a measurement is exactly 0. On an axis of the camera, x or y
    of exactly 0 would mean a missing pixel, so OFF_AXIS replaces it.
    """
    z = np.asarray(depth, dtype=np.float64) * camera.depth_scale
    v, u = np.indices(z.shape)
    x = np.where(u == camera.cx, OFF_AXIS, (u - camera.cx) * z / camera.fx)
    y = np.where(v == camera.cy, OFF_AXIS, (v - camera.cy) * z / camera.fy)
    return as_cloud(np.stack([x, y, z], axis=-1))

"""Synthetic structured-light scanner: image and organized point cloud of a part on a table.

Camera frame: x right, y down, z away from the camera, meters. The camera hangs half a meter above a slightly tilted
table, with the projector beside it. The light is diffuse and every surface matte, so relief appears in the image only
as faint shading. Vectors run along the first axis: (3, S, S).
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from scipy.spatial.transform import Rotation

from utils.synthetic_data.defects import DEFECTS
from utils.synthetic_data.fields import CELL, GRID, TOP, smooth_noise
from utils.synthetic_data.parts import PARTS

FIELD_OF_VIEW = 0.32  # image width over distance: 16 cm at half a meter; parts are 9 to 10 cm wide
DISTANCE = 0.5  # meters from the camera to the table
PROJECTOR = (-0.09, 0.01, 0.0)  # meters, camera frame; its distance from the camera causes shadows
LIGHT = (-0.12, -0.22, -1.0)  # toward the light, camera frame
TILT = (4.0, -1.5)  # degrees about x and y; the rig is fixed, so scans differ by only a fraction of a degree
DEPTH_NOISE = 0.00012  # meters, independent for each pixel; neighbors share as much noise again
SPECKLE = 0.0004  # share of pixels that lack a value at random, as in real scans
DEPTH_CHANGE = 0.0002  # meters; a pixel is defective if its depth changes by more than this (above the noise) ...
COLOR_CHANGE = 0.04  # ... or its color by more than this (ten gray levels of 255)


class Scan(NamedTuple):
    """Files of one view, all of the same size."""

    rgb: np.ndarray  # (S, S, 3) uint8
    xyz: np.ndarray  # (S, S, 3) float32, meters, camera frame; missing pixels exactly 0
    gt: np.ndarray  # (S, S) uint8, 255 = defect, 0 = good


class Pose(NamedTuple):
    """Pose of the part: a point p in the part frame is `rotation @ p + origin` in the camera frame."""

    rotation: np.ndarray  # (3, 3); its columns are the axes u, v and height in the camera frame
    origin: np.ndarray  # (3,) meters, camera frame


class View(NamedTuple):
    """Noise-free view of every pixel; float32."""

    depth: np.ndarray  # (S, S) meters along the optical axis
    point: np.ndarray  # (3, S, S) u, v and height above the table, meters, part frame
    normal: np.ndarray  # (3, S, S) unit, part frame
    on_part: np.ndarray  # (S, S) bool, False where the pixel sees the table


def make_scan(part_class: str, path: str, size: int, seed: int, *, strength: float = 1.0, damaged: bool = True) -> Scan:
    """Make one scan of size x size pixels; the arguments determine everything.

    `part_class` is a key of PARTS. `path` is "split/defect/stem", like "test/dent/003", where the defect is "good" or a
    key of DEFECTS, of the given strength. `damaged` = False leaves out the defect but keeps part, pose and noise.
    """
    stream = partial(random_stream, seed, part_class, path)
    defect = path.split("/")[1]
    good = PARTS[part_class](stream("part"))
    part = DEFECTS[defect](good, stream("defect"), strength) if damaged and defect != "good" else good
    pose, rays = lay_down(stream("pose")), pixel_rays(size)
    view = look(part.height, pose, rays)
    changed = np.zeros((size, size), bool)
    if part.height is not good.height:
        changed |= np.abs(view.depth - look(good.height, pose, rays).depth) > DEPTH_CHANGE
    if part.albedo is not good.albedo:
        recolored = np.abs(_display(part.albedo) - _display(good.albedo)).max(0) > COLOR_CHANGE
        changed |= view.on_part & (_lookup(recolored.astype(np.float32), view.point) > 0.5)
    rgb = render_image(view, part.albedo, good.height, pose, stream("photo"))
    xyz = measure(view, part.height, pose, rays, stream("scanner"))
    return Scan(rgb, xyz, changed.astype(np.uint8) * 255)


def random_stream(seed: int, part_class: str, path: str, use: str) -> Generator:
    """Random generator for one use in one scan, independent of all others. Another name gives other numbers."""
    key = f"{part_class}/{path}/{use}".encode()
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(key)))


def pixel_rays(size: int) -> np.ndarray:
    """Rays (3, size, size) of the pixels with z = 1, camera frame, float32; a pixel sees the point depth * ray.

    The optical axis passes between pixels: x or y of exactly zero would read as a missing measurement.
    """
    focal = size / FIELD_OF_VIEW
    pixel = np.arange(size) - (size - 1) / 2
    rays = np.ones((3, size, size), np.float32)
    rays[0] = (pixel + 0.37) / focal
    rays[1] = (pixel[:, None] - 0.29) / focal
    return rays


def lay_down(rng: Generator) -> Pose:
    """Lay a part on the table by hand, with small shifts and turns."""
    tilt = Rotation.from_euler("xy", rng.normal(TILT, 0.5), degrees=True).as_matrix()
    turn = Rotation.from_euler("z", rng.uniform(-12, 12), degrees=True).as_matrix()
    facing = tilt @ np.diag([1.0, -1.0, -1.0])  # v up in the image, height toward the camera
    shift = facing[:, :2] @ rng.uniform(-0.005, 0.005, 2)
    return Pose(facing @ turn, shift + np.array([0, 0, rng.normal(DISTANCE, 0.002)]))


def look(height: np.ndarray, pose: Pose, rays: np.ndarray) -> View:
    """Cast the rays (3, S, S), camera frame, on the height field (GRID, GRID), meters, of a part in `pose`."""
    eye = _in_part_frame((0, 0, 0), pose)
    directions = np.einsum("ji,j...->i...", pose.rotation.astype(np.float32), rays)
    slant = directions[:2] / directions[2]  # meters sideways for each meter up
    foot = eye[:2, None, None] - eye[2] * slant  # where the ray would meet the table
    level = np.zeros(rays.shape[1:], np.float32)
    near = _near_part(height, foot)
    level[near] = _first_hit(height, foot[:, near], slant[:, near])
    point = np.stack([*(foot + level * slant), level])
    normal = np.zeros_like(point)
    normal[2] = 1
    slope_v, slope_u = np.gradient(height, CELL)
    normal[:2, near] = -_lookup(np.stack([slope_u, slope_v]).astype(np.float32), point[:, near])
    return View((level - eye[2]) / directions[2], point, normal / np.linalg.norm(normal, axis=0), level > 0.0005)


def _in_part_frame(point: tuple[float, float, float], pose: Pose) -> np.ndarray:
    """Transform a point (3,) from the camera frame to the part frame, float32."""
    return ((np.array(point) - pose.origin) @ pose.rotation).astype(np.float32)


def _near_part(height: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Mark the places (2, S, S) in a box around the part that contains its shadow and all rays that hit it."""
    occupied = np.concatenate([np.flatnonzero(height.any(axis=axis)) for axis in (0, 1)])
    reach = CELL * np.abs(occupied - (GRID - 1) / 2).max() + 0.01
    return (np.abs(place) < reach).all(0)


def _first_hit(height: np.ndarray, foot: np.ndarray, slant: np.ndarray) -> np.ndarray:
    """Height (N,) at which rays from above, given by foot and slant (2, N), hit the height field.

    The search takes steps, then bisects. A step is 2 mm of height and, because the rays are steep, half a millimeter
    sideways. A hit in the lowest step is the table. The bisection ends at 8 micrometers, well below the noise.
    """
    hit = np.zeros(foot.shape[1], np.float32)
    falling, way = np.arange(len(hit)), np.concatenate([foot, slant])
    step = TOP / 16
    levels = np.arange(15, 0, -1) * np.float32(step)
    for level in levels[levels < 1.001 * height.max()]:  # above the part there is nothing to meet
        inside = _lookup(height, way[:2] + level * way[2:]) >= level
        hit[falling[inside]] = level
        falling, way = falling[~inside], way.compress(~inside, axis=1)
    above = hit > 0
    low, foot, slant = hit[above], foot[:, above], slant[:, above]
    for halving in range(1, 9):
        middle = low + np.float32(step / 2**halving)
        low = np.where(_lookup(height, foot + middle * slant) >= middle, middle, low)
    hit[above] = low
    return hit


def _lookup(field: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Interpolate a field (..., GRID, GRID) linearly at points (2 or 3, *P) of the part frame; result (..., *P)."""
    column, row = (np.clip(axis / np.float32(CELL) + (GRID - 1) / 2, 0, GRID - 1.001) for axis in point[:2])
    i, j = row.astype(np.int32), column.astype(np.int32)
    row, column = row - i.astype(np.float32), column - j.astype(np.float32)
    flat, index = field.reshape(*field.shape[:-2], GRID * GRID), i * GRID + j
    a, b, c, d = (flat.take(index + step, axis=-1) for step in (0, 1, GRID, GRID + 1))
    top, bottom = a + column * (b - a), c + column * (d - c)
    return top + row * (bottom - top)


def _display(linear: np.ndarray) -> np.ndarray:
    """Convert linear light to image values in [0, 1]."""
    return np.clip(linear, 0, 1) ** np.float32(1 / 2.2)


def render_image(view: View, albedo: np.ndarray, surroundings: np.ndarray, pose: Pose, rng: Generator) -> np.ndarray:
    """Render the image (S, S, 3) uint8; the random numbers do not depend on the part.

    `albedo` is (3, GRID, GRID). `surroundings` is the height (GRID, GRID) of the undamaged part, meters. Places below
    their surroundings get less diffuse light; a defect does not change this light.
    """
    size = len(view.depth)
    spacing = FIELD_OF_VIEW * DISTANCE / size  # of the pixels, on the table
    table = np.array([0.022, 0.025, 0.030], np.float32)[:, None, None] * (
        1 + 0.06 * smooth_noise(rng, 0.02, size, spacing) + 0.10 * rng.standard_normal((size, size), np.float32)
    )
    table[:, view.on_part] = _lookup(albedo, view.point[:, view.on_part])
    light = ((np.array(LIGHT) + rng.normal(0, 0.03, 3)) @ pose.rotation).astype(np.float32)
    shade = 0.65 + 0.35 * np.clip(np.einsum("i,i...", light / np.linalg.norm(light, axis=0), view.normal), 0, 1)
    blurred = ndimage.uniform_filter(ndimage.uniform_filter(surroundings, 0.012 / CELL), 0.012 / CELL)
    near = _near_part(surroundings, view.point[:2])
    shade[near] /= 1 + _lookup(np.clip(blurred - surroundings, 0, None), view.point[:, near]) / 0.008
    across = np.linspace(-1, 1, size, dtype=np.float32)
    shade *= 1 - 0.10 * (across**2 + across[:, None] ** 2) + rng.normal(0, 0.02) * across
    exposure = 1.4 * rng.normal(1, 0.03) * rng.normal(1, 0.01, 3)
    sharp = _display(table * shade * exposure[:, None, None].astype(np.float32))
    lens = ndimage.gaussian_filter(sharp, (0, 0.6, 0.6), truncate=3)
    noise = 0.008 * rng.standard_normal(lens.shape, np.float32)
    gray_levels = np.rint(np.clip(lens + noise, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(gray_levels.transpose(1, 2, 0))


def measure(view: View, height: np.ndarray, pose: Pose, rays: np.ndarray, rng: Generator) -> np.ndarray:
    """Measure the cloud (S, S, 3) float32, meters, camera frame; missing pixels are exactly 0.

    `height`, `pose` and `rays` are as for `look`; the random numbers do not depend on the part.
    """
    size = len(view.depth)
    spacing = FIELD_OF_VIEW * DISTANCE / size  # of the pixels, on the table
    ripple = smooth_noise(rng, 0.004, size, spacing)
    depth = view.depth + np.float32(DEPTH_NOISE) * (ripple + rng.standard_normal((size, size), np.float32))
    luck = rng.random((size, size), np.float32)
    smudge = smooth_noise(rng, 0.003, size, spacing) > 3.3  # small patches without a value
    lamp = _in_part_frame(PROJECTOR, pose)
    ways = [source[:, None, None] - view.point for source in (_in_part_frame((0, 0, 0), pose), lamp)]
    cosines = [(view.normal * way).sum(0) / np.linalg.norm(way, axis=0) for way in ways]  # of the incidence
    facing = np.minimum(*cosines)
    grazing = luck < np.clip((0.45 - facing) / 0.2, SPECKLE, 1)
    jump = ndimage.maximum_filter(view.depth, 3) - ndimage.minimum_filter(view.depth, 3)
    edge = (jump > 0.003 + spacing) & (luck < 0.6)  # a pixel that sees two surfaces
    missing = grazing | edge | smudge | _in_shadow(view, height, lamp)
    return np.ascontiguousarray(np.where(missing, 0, depth * rays).transpose(1, 2, 0))


def _in_shadow(view: View, height: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """Mark the pixels (S, S) that the part hides from the projector, at `lamp` (3,) in the part frame."""
    shadow = _near_part(height, view.point[:2])
    start = view.point[:, shadow]
    slant = (lamp[:2, None] - start[:2]) / (lamp[2] - start[2])
    barred = np.zeros(start.shape[1], bool)
    shares = np.arange(1, 13, dtype=np.float32) / 12
    for share in shares[shares * TOP < 1.001 * height.max()]:  # above the part, nothing blocks the light
        rise = share * (TOP - start[2])
        barred |= _lookup(height, start[:2] + rise * slant) > start[2] + rise + 0.0004
    shadow[shadow] = barred
    return shadow

"""Synthetic parts and their defects: height fields and colors on a grid in the part frame.

Part frame: u and v on the table, height above it; meters. Row i of a grid lies at v = (i - (GRID - 1) / 2) * CELL,
column j at u = (j - (GRID - 1) / 2) * CELL. Colors are linear reflectances, red, green, blue. Good parts vary a
little in shape and color, so that not every difference is a defect.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import sparse

CELL = 0.0003  # meters; about one pixel of the finest scanners
GRID = 480  # cells a side: 144 mm
TOP = 0.032  # meters; no part is taller, its bumps included
SPLINE_GAIN = 1.41  # along each axis, for a smooth random field of deviation 1
HOLE_FLOOR = 0.0025  # meters above the table, where a hole ends; the floor has the color of the part


class Part(NamedTuple):
    """A part that lies on the table."""

    height: np.ndarray  # (GRID, GRID) float32, meters above the table, below TOP; exactly 0 where there is no part
    albedo: np.ndarray  # (3, GRID, GRID) float32, linear reflectance in [0, 1]; undefined where there is no part


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates u (1, GRID) and v (GRID, 1) of the cells, float32 meters."""
    axis = ((np.arange(GRID) - (GRID - 1) / 2) * CELL).astype(np.float32)
    return axis[None, :], axis[:, None]


def smooth_noise(rng: Generator, wavelength: float, size: int = GRID, cell: float = CELL) -> np.ndarray:
    """Random field (size, size) float32 of mean 0, deviation 1: a cubic B-spline of knots `wavelength` meters apart."""
    weights = _spline_weights(size, cell / wavelength)
    knots = rng.standard_normal((weights.shape[1], weights.shape[1]), np.float32)
    return weights @ (weights @ knots).T


@lru_cache(maxsize=64)
def _spline_weights(n: int, pace: float) -> sparse.csr_array:
    """Weights (n, knots) of a uniform cubic B-spline at n positions `pace` knots apart."""
    position = np.arange(n) * pace
    first = position.astype(int)
    t = (position - first).astype(np.float32)
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    index = (np.arange(n)[:, None] + np.zeros(4, int), first[:, None] + np.arange(4))
    flat = (np.stack(weights, 1).ravel() * (SPLINE_GAIN / 6), tuple(i.ravel() for i in index))
    return sparse.csr_array(flat, shape=(n, int(first[-1]) + 4))


def _bell(x: np.ndarray) -> np.ndarray:
    """Smooth bump: 1 at x = 0, 0 where |x| >= 1."""
    return np.square(np.clip(1 - np.square(x), 0, None))


def _step(x: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Smooth step from 0 at x = start to 1 at x = stop; start may be above stop."""
    t = np.clip((x - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)


def _extrude(inside: np.ndarray, height: float | np.ndarray, fillet: float) -> np.ndarray:
    """Plate with vertical walls and a rounded upper edge; `inside` is the distance from its outline, meters."""
    rounding = fillet - np.sqrt(np.clip(fillet**2 - np.square(np.clip(fillet - inside, 0, fillet)), 0, None))
    return np.where(inside > 0, height - rounding, 0).astype(np.float32)


def _box(u: np.ndarray, v: np.ndarray, left: float, right: float, low: float, high: float) -> np.ndarray:
    """Distance from the outline of an axis-aligned box, exact inside, negative outside."""
    return np.minimum(np.minimum(u - left, right - u), np.minimum(v - low, high - v))


def _paint(rng: Generator, color: tuple[float, float, float], mottle: float, grain: float) -> np.ndarray:
    """Color (3, GRID, GRID) that varies from part to part, over centimeters and as grain."""
    base = np.array(color) * (1 + rng.normal(0, 0.03)) * (1 + rng.normal(0, 0.012, 3))
    field = 1 + mottle * smooth_noise(rng, 0.012) + grain * smooth_noise(rng, 0.0008)
    return base.astype(np.float32)[:, None, None] * field


def gasket(rng: Generator) -> Part:
    """Molded red ring with a sealing bead and four lower lobes with bolt holes."""
    u, v = grid()
    outer, inner, tall, low = rng.normal([0.044, 0.022, 0.021, 0.016], 2e-4).tolist()
    radius = np.hypot(u, v)
    squeeze = rng.normal(0, 0.004)  # a soft part never lies perfectly round
    radius = radius * (1 + squeeze * np.cos(2 * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi)))
    ring = np.minimum(outer - radius, radius - inner)
    bolt = np.hypot(np.abs(u) - outer * 0.7071, np.abs(v) - outer * 0.7071)
    lobe = np.minimum(0.0105 - bolt, radius - inner)
    height = np.maximum(_extrude(ring, tall, 0.004), _extrude(lobe, low, 0.0015))
    height += np.where(ring > 0, 0.0013 * _bell((radius - 0.5 * (outer + inner)) / 0.0025), 0)
    height += 0.00012 * smooth_noise(rng, 0.01) * (height > 0)
    height[bolt < 0.0033] = 0
    albedo = _paint(rng, (0.40, 0.045, 0.03), mottle=0.03, grain=0.03)
    dust = 0.025 * _step(np.abs(radius - 0.5 * (outer + inner)), 0.004, 0.0025)  # the bead is rubbed lighter
    return Part(height, albedo + dust)


def bracket(rng: Generator) -> Part:
    """Cast gray L with an upright flange along its outer edges and three machined bosses with bores."""
    u, v = grid()
    thick, tall, width, *end = rng.normal([0.0155, 0.0255, 0.034, 0.046, 0.046], 2e-4).tolist()
    inner = -0.046 + width  # edge of the arms
    arms = np.maximum(_box(u, v, -0.046, end[0], -0.046, inner), _box(u, v, -0.046, inner, -0.046, end[1]))
    gusset = np.minimum(-(u + v + 0.002) * 0.7071, np.minimum(u + 0.046, v + 0.046))  # stiffens the inner corner
    height = _extrude(np.maximum(arms, gusset), thick, 0.002)
    along = np.where(u > v, u, v)
    ramp = thick + (tall - thick) * _step(along, 0.044, 0.01)
    flange = np.where((u < -0.038) | (v < -0.038), np.minimum(arms, -0.038 - np.minimum(u, v)), -1)
    height = np.maximum(height, _extrude(flange, ramp, 0.0018))
    height += 0.00008 * smooth_noise(rng, 0.0025) * (height > 0)
    albedo = _paint(rng, (0.23, 0.255, 0.25), mottle=0.03, grain=0.06)
    for center in ((-0.025, -0.025), (0.030, -0.025), (-0.025, 0.030)):
        place = np.hypot(u - center[0] - rng.normal(0, 2e-4), v - center[1] - rng.normal(0, 2e-4))
        height = np.maximum(height, _extrude(0.0085 - place, thick + 0.0025, 0.0008))
        height[place < 0.0038] = 0
        turned = 0.12 + 0.03 * np.sin(place * (2 * np.pi / 0.0011))  # tool marks of the facing cut
        albedo += turned * _step(place, 0.0083, 0.0078)
    return Part(height, albedo)


def cookie(rng: Generator) -> Part:
    """Baked dome with radial grooves, a rough surface, a browned rim and dark grains; no two are alike."""
    u, v = grid()
    angle = np.arctan2(v, u)
    outline = 0.046 * (1 + rng.normal(0, 0.006))
    for waves in (2, 3, 5):
        outline = outline * (1 + rng.normal(0, 0.007) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi)))
    reach = np.hypot(u, v) / outline
    dome = 0.0105 + (0.0115 + rng.normal(0, 4e-4)) * np.sqrt(np.clip(1 - reach**2, 0, None))
    phase = angle + 0.02 * smooth_noise(rng, 0.02)
    groove = _bell(np.sin(6 * phase) / 0.42) * _step(reach, 0.22, 0.4) * _step(reach, 1.0, 0.85)
    rough = 0.00025 * smooth_noise(rng, 0.005) + 0.00009 * smooth_noise(rng, 0.0012)
    height = _extrude((1 - reach) * 0.046, dome - 0.0014 * groove + rough, 0.003)
    albedo = _paint(rng, (0.47, 0.225, 0.06), mottle=0.05, grain=0.05)
    browned = _step(reach + 0.05 * smooth_noise(rng, 0.01), 0.7, 1.05) * 0.45 + 0.10 * groove
    albedo *= 1 - browned * np.array([0.75, 0.95, 1.0], np.float32)[:, None, None]
    grains = _step(smooth_noise(rng, 0.0022), 2.2, 2.5)
    return Part(height, albedo * (1 - 0.75 * grains))


PARTS: dict[str, Callable[[Generator], Part]] = {"gasket": gasket, "bracket": bracket, "cookie": cookie}


def _spot(part: Part, rng: Generator, radius: float) -> np.ndarray:
    """Distance (GRID, GRID) from a random place on the part, scaled to 1 on the outline of a spot.

    The outline is an irregular ellipse with mean `radius`, meters; where possible, at least 90 % of it lie on the part.
    """
    u, v = grid()
    cells = rng.choice(np.flatnonzero(part.height), 256)
    around = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rows = np.clip(cells[:, None] // GRID + np.rint(radius / CELL * np.sin(around)).astype(int), 0, GRID - 1)
    columns = np.clip(cells[:, None] % GRID + np.rint(radius / CELL * np.cos(around)).astype(int), 0, GRID - 1)
    on_part = (part.height[rows, columns] > 0).mean(1)
    row, column = divmod(int(cells[np.argmax(np.minimum(on_part, 0.9))]), GRID)
    du, dv = u - u[0, column], v - v[row, 0]
    turn, stretch = rng.uniform(0, np.pi), math.sqrt(rng.uniform(1, 1.8))
    along, across = du * math.cos(turn) + dv * math.sin(turn), dv * math.cos(turn) - du * math.sin(turn)
    distance = np.hypot(along / stretch, across * stretch) / radius
    angle = np.arctan2(across, along)
    for waves in (2, 3, 4):
        distance = distance * (1 + rng.normal(0, 0.06) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi)))
    return distance


def _relief(part: Part, spot: np.ndarray, amount: float) -> Part:
    """Raise the surface inside the spot by `amount` meters, or lower it if negative, with a soft edge."""
    return part._replace(height=np.where(part.height > 0, part.height + amount * _bell(spot), 0).astype(np.float32))


def _stain(part: Part, spot: np.ndarray, rng: Generator) -> Part:
    """Tint the surface inside the spot translucently and unevenly, with a soft edge."""
    tint = np.array([(0.45, 0.40, 0.30), (0.55, 0.35, 0.25), (0.35, 0.42, 0.55)][rng.integers(3)], np.float32)
    strength = rng.uniform(0.6, 0.9) * _step(spot, 1.0, 0.55) * np.clip(0.85 + 0.15 * smooth_noise(rng, 0.003), 0.6, 1)
    return part._replace(albedo=part.albedo * (1 - strength * (1 - tint[:, None, None])))


def _contaminate(part: Part, spot: np.ndarray, rng: Generator) -> Part:
    """Cover the spot with an opaque color that differs from the color of the part."""
    foreign = np.array(
        [(0.05, 0.12, 0.40), (0.06, 0.25, 0.10), (0.60, 0.60, 0.56), (0.03, 0.03, 0.03), (0.55, 0.42, 0.05)], np.float32
    )
    usual = part.albedo[:, part.height > 0].mean(1)
    contrast = np.abs(np.sqrt(foreign) - np.sqrt(usual)).max(1)
    color = rng.choice(foreign[contrast > 0.2])
    cover = rng.uniform(0.85, 1.0) * _step(spot, 1.0, 0.8)
    return part._replace(albedo=part.albedo * (1 - cover) + color[:, None, None] * cover)


def dent(part: Part, rng: Generator) -> Part:
    """Dent of 1.5 to 4 mm, 3D only."""
    return _relief(part, _spot(part, rng, rng.uniform(0.0035, 0.007)), -rng.uniform(0.0015, 0.004))


def bump(part: Part, rng: Generator) -> Part:
    """Bump of 1.5 to 4 mm, 3D only."""
    return _relief(part, _spot(part, rng, rng.uniform(0.003, 0.006)), rng.uniform(0.0015, 0.004))


def hole(part: Part, rng: Generator) -> Part:
    """Bore down to HOLE_FLOOR, 3D only."""
    depth = _step(_spot(part, rng, rng.uniform(0.0025, 0.0045)), 1.0, 0.85)
    return part._replace(height=np.where(part.height > 0, part.height * (1 - depth) + HOLE_FLOOR * depth, 0))


def stain(part: Part, rng: Generator) -> Part:
    """Smooth translucent discoloration, color only."""
    return _stain(part, _spot(part, rng, rng.uniform(0.004, 0.0075)), rng)


def contamination(part: Part, rng: Generator) -> Part:
    """One to three blobs of a foreign color, too thin to be measured; color only."""
    for _ in range(rng.integers(1, 4)):
        part = _contaminate(part, _spot(part, rng, rng.uniform(0.0018, 0.0038)), rng)
    return part


def combined(part: Part, rng: Generator) -> Part:
    """Stained dent, or lump of foreign matter: 3D and color in one place."""
    spot = _spot(part, rng, rng.uniform(0.003, 0.006))
    if rng.random() < 0.5:
        return _stain(_relief(part, spot, -rng.uniform(0.0015, 0.0035)), spot, rng)
    return _contaminate(_relief(part, spot, rng.uniform(0.0015, 0.0035)), spot, rng)


DEFECTS: dict[str, Callable[[Part, Generator], Part]] = {
    each.__name__: each for each in (dent, bump, hole, stain, contamination, combined)
}

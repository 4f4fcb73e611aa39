"""Height fields and colors of synthetic parts on a grid in the part frame, and the functions that build them.

Part frame: u and v on the table, height above it; meters. Row i of a grid lies at v = (i - (GRID - 1) / 2) * CELL,
column j at u = (j - (GRID - 1) / 2) * CELL. Colors are linear reflectances, red, green, blue. Good parts vary a
little in shape and color, so that not every difference is a defect.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import sparse

CELL = 0.0003  # meters; about one pixel of the finest scanners
GRID = 480  # cells a side: 144 mm
TOP = 0.032  # meters; no part is taller, its bumps included
SPLINE_GAIN = 1.41  # along each axis, for a smooth random field of deviation 1


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


def bell(x: np.ndarray) -> np.ndarray:
    """Smooth bump: 1 at x = 0, 0 where |x| >= 1."""
    return np.square(np.clip(1 - np.square(x), 0, None))


def step(x: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Smooth step from 0 at x = start to 1 at x = stop; start may be above stop."""
    t = np.clip((x - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)


def extrude(inside: np.ndarray, height: float | np.ndarray, fillet: float) -> np.ndarray:
    """Plate with vertical walls and a rounded upper edge; `inside` is the distance from its outline, meters."""
    rounding = fillet - np.sqrt(np.clip(fillet**2 - np.square(np.clip(fillet - inside, 0, fillet)), 0, None))
    return np.where(inside > 0, height - rounding, 0).astype(np.float32)


def box(u: np.ndarray, v: np.ndarray, left: float, right: float, low: float, high: float) -> np.ndarray:
    """Distance from the outline of an axis-aligned box, exact inside, negative outside."""
    return np.minimum(np.minimum(u - left, right - u), np.minimum(v - low, high - v))


def paint(rng: Generator, color: tuple[float, float, float], mottle: float, grain: float) -> np.ndarray:
    """Color (3, GRID, GRID) that varies from part to part, over centimeters and as grain."""
    base = np.array(color) * (1 + rng.normal(0, 0.03)) * (1 + rng.normal(0, 0.012, 3))
    field = 1 + mottle * smooth_noise(rng, 0.012) + grain * smooth_noise(rng, 0.0008)
    return base.astype(np.float32)[:, None, None] * field

"""Defects of synthetic parts.

The depth or contrast of a defect and its area are proportional to its strength, 1 by default.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from utils.synthetic_data.fields import CELL, GRID, Part, bell, grid, smooth_noise, step

HOLE_FLOOR = 0.0025  # meters above the table, where a hole ends; the floor has the color of the part


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
    return part._replace(height=np.where(part.height > 0, part.height + amount * bell(spot), 0).astype(np.float32))


def _stain(part: Part, spot: np.ndarray, rng: Generator, strength: float) -> Part:
    """Tint the surface inside the spot translucently and unevenly, with a soft edge."""
    tint = np.array([(0.45, 0.40, 0.30), (0.55, 0.35, 0.25), (0.35, 0.42, 0.55)][rng.integers(3)], np.float32)
    cover = rng.uniform(0.6, 0.9) * step(spot, 1.0, 0.55) * np.clip(0.85 + 0.15 * smooth_noise(rng, 0.003), 0.6, 1)
    return part._replace(albedo=part.albedo * (1 - strength * cover * (1 - tint[:, None, None])))


def _contaminate(part: Part, spot: np.ndarray, rng: Generator, strength: float) -> Part:
    """Cover the spot with a color that differs from the color of the part, opaque at strength 1."""
    foreign = np.array(
        [(0.05, 0.12, 0.40), (0.06, 0.25, 0.10), (0.60, 0.60, 0.56), (0.03, 0.03, 0.03), (0.55, 0.42, 0.05)], np.float32
    )
    usual = part.albedo[:, part.height > 0].mean(1)
    contrast = np.abs(np.sqrt(foreign) - np.sqrt(usual)).max(1)
    color = rng.choice(foreign[contrast > 0.2])
    cover = strength * rng.uniform(0.85, 1.0) * step(spot, 1.0, 0.8)
    return part._replace(albedo=part.albedo * (1 - cover) + color[:, None, None] * cover)


def dent(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """Dent of 1.5 to 4 mm, 3D only."""
    spot = _spot(part, rng, math.sqrt(strength) * rng.uniform(0.0035, 0.007))
    return _relief(part, spot, -strength * rng.uniform(0.0015, 0.004))


def bump(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """Bump of 1.5 to 4 mm, 3D only."""
    spot = _spot(part, rng, math.sqrt(strength) * rng.uniform(0.003, 0.006))
    return _relief(part, spot, strength * rng.uniform(0.0015, 0.004))


def hole(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """Bore down to HOLE_FLOOR, or less deep, 3D only."""
    depth = strength * step(_spot(part, rng, math.sqrt(strength) * rng.uniform(0.0025, 0.0045)), 1.0, 0.85)
    return part._replace(height=np.where(part.height > 0, part.height * (1 - depth) + HOLE_FLOOR * depth, 0))


def stain(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """Smooth translucent discoloration, color only."""
    spot = _spot(part, rng, math.sqrt(strength) * rng.uniform(0.004, 0.0075))
    return _stain(part, spot, rng, strength)


def contamination(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """One to three blobs of a foreign color, too thin to be measured; color only."""
    for _ in range(rng.integers(1, 4)):
        spot = _spot(part, rng, math.sqrt(strength) * rng.uniform(0.0018, 0.0038))
        part = _contaminate(part, spot, rng, strength)
    return part


def combined(part: Part, rng: Generator, strength: float = 1.0) -> Part:
    """Stained dent, or lump of foreign matter: 3D and color in one place."""
    spot = _spot(part, rng, math.sqrt(strength) * rng.uniform(0.003, 0.006))
    if rng.random() < 0.5:
        dented = _relief(part, spot, -strength * rng.uniform(0.0015, 0.0035))
        return _stain(dented, spot, rng, strength)
    lump = _relief(part, spot, strength * rng.uniform(0.0015, 0.0035))
    return _contaminate(lump, spot, rng, strength)


DEFECTS: dict[str, Callable[[Part, Generator, float], Part]] = {
    each.__name__: each for each in (dent, bump, hole, stain, contamination, combined)
}

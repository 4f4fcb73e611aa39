"""Synthetic parts. Good parts vary a little in shape and color, so that not every difference is a defect."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from utils.synthetic_data.fields import GRID, Part, bell, box, extrude, grid, paint, smooth_noise, step


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
    height = np.maximum(extrude(ring, tall, 0.004), extrude(lobe, low, 0.0015))
    height += np.where(ring > 0, 0.0013 * bell((radius - 0.5 * (outer + inner)) / 0.0025), 0)
    height += 0.00012 * smooth_noise(rng, 0.01) * (height > 0)
    height[bolt < 0.0033] = 0
    albedo = paint(rng, (0.40, 0.045, 0.03), mottle=0.03, grain=0.03)
    dust = 0.025 * step(np.abs(radius - 0.5 * (outer + inner)), 0.004, 0.0025)  # the bead is rubbed lighter
    return Part(height, albedo + dust)


def bracket(rng: Generator) -> Part:
    """Cast gray L with an upright flange along its outer edges and three machined bosses with bores."""
    u, v = grid()
    thick, tall, width, *end = rng.normal([0.0155, 0.0255, 0.034, 0.046, 0.046], 2e-4).tolist()
    inner = -0.046 + width  # edge of the arms
    arms = np.maximum(box(u, v, -0.046, end[0], -0.046, inner), box(u, v, -0.046, inner, -0.046, end[1]))
    gusset = np.minimum(-(u + v + 0.002) * 0.7071, np.minimum(u + 0.046, v + 0.046))  # stiffens the inner corner
    height = extrude(np.maximum(arms, gusset), thick, 0.002)
    along = np.where(u > v, u, v)
    ramp = thick + (tall - thick) * step(along, 0.044, 0.01)
    flange = np.where((u < -0.038) | (v < -0.038), np.minimum(arms, -0.038 - np.minimum(u, v)), -1)
    height = np.maximum(height, extrude(flange, ramp, 0.0018))
    height += 0.00008 * smooth_noise(rng, 0.0025) * (height > 0)
    albedo = paint(rng, (0.23, 0.255, 0.25), mottle=0.03, grain=0.06)
    for center in ((-0.025, -0.025), (0.030, -0.025), (-0.025, 0.030)):
        place = np.hypot(u - center[0] - rng.normal(0, 2e-4), v - center[1] - rng.normal(0, 2e-4))
        height = np.maximum(height, extrude(0.0085 - place, thick + 0.0025, 0.0008))
        height[place < 0.0038] = 0
        turned = 0.12 + 0.03 * np.sin(place * (2 * np.pi / 0.0011))  # tool marks of the facing cut
        albedo += turned * step(place, 0.0083, 0.0078)
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
    groove = bell(np.sin(6 * phase) / 0.42) * step(reach, 0.22, 0.4) * step(reach, 1.0, 0.85)
    rough = 0.00025 * smooth_noise(rng, 0.005) + 0.00009 * smooth_noise(rng, 0.0012)
    height = extrude((1 - reach) * 0.046, dome - 0.0014 * groove + rough, 0.003)
    albedo = paint(rng, (0.47, 0.225, 0.06), mottle=0.05, grain=0.05)
    browned = step(reach + 0.05 * smooth_noise(rng, 0.01), 0.7, 1.05) * 0.45 + 0.10 * groove
    albedo *= 1 - browned * np.array([0.75, 0.95, 1.0], np.float32)[:, None, None]
    grains = step(smooth_noise(rng, 0.0022), 2.2, 2.5)
    return Part(height, albedo * (1 - 0.75 * grains))


def carrot(rng: Generator) -> Part:
    """Tapered, slightly bent root with creases across it and a brown-green end; no two are alike."""
    u, v = grid()
    length, thick, end = 0.1 * (1 + rng.normal(0, 0.02)), 0.0122 * (1 + rng.normal(0, 0.03)), rng.normal(0.36, 0.03)
    along = u / length + 0.5  # 0 at the thick end, 1 at the tip
    inside = np.clip(along, 0, 1)
    round_ends = np.sqrt(np.clip(np.minimum(inside / 0.07, (1 - inside) / 0.05), 0, 1))
    radius = thick * (1 - (1 - end) * inside**1.3) * (1 + 0.03 * smooth_noise(rng, 0.02)[:1])
    middle = rng.normal(0, 0.003) * (2 * along - 1) ** 2 + rng.normal(0, 0.0012) * np.sin(2 * np.pi * along)
    across = (v - middle) / (1.25 * radius * round_ends + 1e-6)
    arch = np.sqrt(np.clip(1 - across**2, 0, None))
    crease = np.zeros((GRID, GRID), np.float32)
    for _ in range(16):  # each spans only some of the width
        place, side, strength = rng.uniform(0.03, 0.95), rng.uniform(-0.9, 0.9), rng.uniform(0.4, 1)
        wavy = along - place + 0.002 * np.sin(4 * across + rng.uniform(0, 2 * np.pi))
        crease += strength * bell(wavy * length / 0.0008) * bell((across - side) / rng.uniform(0.4, 1.2))
    rough = 0.00012 * smooth_noise(rng, 0.003) - 0.0005 * crease
    height = np.where(arch > 0, radius * (0.9 + round_ends * arch) + rough, 0)
    albedo = paint(rng, (0.60, 0.205, 0.03), mottle=0.06, grain=0.04) * (1 - 0.3 * np.clip(crease, 0, 1))
    top = step(along + 0.015 * smooth_noise(rng, 0.006), 0.10, 0.02) * rng.uniform(0.5, 0.8)
    brown = np.array((0.14, 0.12, 0.03), np.float32)[:, None, None]
    return Part(height.astype(np.float32), (albedo * (1 - top) + brown * top).astype(np.float32))


def peach(rng: Generator) -> Part:
    """Round fruit with a stem cavity, a seam and a red blush anywhere; no two are alike."""
    u, v = grid()
    angle, turn = np.arctan2(v, u), rng.uniform(0, 2 * np.pi)
    outline = 0.044 * (1 + rng.normal(0, 0.012))
    for waves in (2, 3):
        outline = outline * (1 + rng.normal(0, 0.016) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi)))
    reach = np.hypot(u, v) / outline
    along, beside = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    stem = np.hypot(along + rng.normal(0.013, 0.0015), beside)
    seam = bell((beside + 2.5 * (along + 0.013) ** 2 * rng.normal(0, 1)) / 0.003) * step(along, -0.013, 0.0)
    dome = 0.0095 + (0.0155 + rng.normal(0, 5e-4)) * np.sqrt(np.clip(1 - reach**2, 0, None))
    rough = 0.0003 * smooth_noise(rng, 0.015) + 0.00005 * smooth_noise(rng, 0.0015)
    dips = 0.0022 * bell(stem / 0.0085) + 0.0010 * seam * step(reach, 1.0, 0.8)
    height = extrude((1 - reach) * 0.044, dome - dips + rough, 0.003)
    albedo = paint(rng, (0.60, 0.33, 0.085), mottle=0.03, grain=0.03)
    sun = rng.uniform(0, 2 * np.pi)
    sunward = (u * np.cos(sun) + v * np.sin(sun)) / 0.044 + 0.3 * smooth_noise(rng, 0.018)
    blush = 0.85 * step(sunward + 0.06 * smooth_noise(rng, 0.0025), -0.3, 0.9)
    red = np.array((0.36, 0.05, 0.035), np.float32)[:, None, None]
    albedo = (albedo * (1 - blush) + red * blush) * (1 - 0.6 * bell(stem / 0.0022))
    return Part(height, albedo.astype(np.float32))


def rope(rng: Generator) -> Part:
    """Bent piece of a twisted rope of three strands, one of them colored; no two are alike."""
    u, v = grid()
    radius, lay = 0.0112 * (1 + rng.normal(0, 0.02)), 0.042 * (1 + rng.normal(0, 0.03))  # meters for one turn
    middle = rng.normal(0, 6.0) * (u**2 - 0.0008) + rng.normal(0, 0.002) * np.sin(u / 0.02 + rng.uniform(0, 2 * np.pi))
    across = (v - middle) / radius
    turns = u / lay - np.arcsin(np.clip(across, -1, 1)) / (2 * np.pi) + rng.uniform(0, 1)
    strand = 3 * (turns + 0.02 * smooth_noise(rng, 0.015))
    beside = 2 * (strand % 1) - 1  # -1 and 1 at the edges of a strand
    yarn = np.sin(2 * np.pi * (3.5 * beside + u / 0.009) + 0.7 * smooth_noise(rng, 0.005))
    inside = np.minimum((1 + 0.05 * (1 - beside**2) - np.abs(across)) * radius, 0.049 * rng.normal(1, 0.01) - np.abs(u))
    arch = radius * (0.75 + np.sqrt(np.clip(1 - across**2, 0, None)))
    relief = 0.0024 * (np.sqrt(np.clip(1 - beside**2, 0, 1)) - 1) + 0.00012 * yarn + 0.0001 * smooth_noise(rng, 0.0012)
    height = extrude(inside, arch + relief, 0.001)
    colored = (np.floor(strand) % 3 == 0) * step(np.abs(beside), 1.0, 0.93)
    albedo = paint(rng, (0.50, 0.42, 0.28), mottle=0.04, grain=0.08)
    blue = np.array((0.07, 0.16, 0.36), np.float32)[:, None, None] * (albedo / 0.42)
    albedo = albedo * (1 - colored) + blue * colored
    return Part(height, (albedo * (0.80 + 0.12 * yarn - 0.25 * beside**8)).astype(np.float32))


PARTS: dict[str, Callable[[Generator], Part]] = {
    each.__name__: each for each in (gasket, bracket, cookie, carrot, peach, rope)
}

"""Triton kernels of the point searches, called by `models.point_ops` for CUDA tensors.

The module can be imported without Triton. On CPU tensors the kernels run in Triton's interpreter, if TRITON_INTERPRET=1
was set before Triton was imported.

Squared distances are (x^2 + y^2) + z^2 in float32 without fused multiply-adds, and the lowest index wins a tie: results
do not depend on the block size, and picks equal those of the torch backend. Plain forms:
`reference.farthest_point_sample`, `reference.knn` and alpha of `reference.three_nn_interpolate`.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated without Triton

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # PyTorch for CPUs comes without it

    def _jit(kernel: Callable[..., None]) -> Any:
        return kernel

else:
    _jit = triton.jit

# Lanes of a program. A lane handles a point in the sampling and keys kernels, a query in the search for three.
SAMPLING_BLOCK, KEYS_BLOCK, THREE_BLOCK = 4096, 1024, 128
MAX_KEYS = 1 << 25  # 8 bytes each: 256 MB


def farthest_point_sample(coordinates: Tensor, nearest: Tensor, n: int, block: int = SAMPLING_BLOCK) -> Tensor:
    """Picks (B, n) int64 as in models.point_ops.farthest_point_sample, with one program per cloud.

    `coordinates` are (B, 3, N) float32, contiguous, meters. `nearest` (B, N) float32, contiguous, holds the squared
    distances to start from, negative for points that are never picked, and is overwritten. `block`: points at a time.
    """
    batch, _, count = coordinates.shape
    picks = coordinates.new_empty(batch, n, dtype=torch.int64)
    with torch.cuda.device_of(coordinates):
        launch = _sample_kernel[(batch,)]
        launch(coordinates, nearest, picks, count, n, BLOCK=block, num_warps=16, enable_fp_fusion=False)
    return picks


def knn(queries: Tensor, points: Tensor, k: int, block: int = KEYS_BLOCK) -> tuple[Tensor, Tensor]:
    """Search as in models.point_ops.knn, in float32; `block` points per program, a power of two.

    For k > 3, a key holds a squared distance in its upper 32 bits and the index of the point in its lower 32 bits, so
    the smallest keys are the neighbors. Peak memory is one block of MAX_KEYS keys.
    """
    if k <= 3:
        squared, index = three_nearest(queries, points)
        return squared[..., :k].sqrt(), index[..., :k]
    keys = _smallest_keys(queries, points.mT, k, block)
    return (keys >> 32).int().view(torch.float32).sqrt(), keys & 0xFFFFFFFF


def three_nearest(
    queries: Tensor, points: Tensor, expanded: bool = False, block: int = THREE_BLOCK
) -> tuple[Tensor, Tensor]:
    """Find the three of points (B, N, 3) nearest to each of queries (B, M, 3), float32; `block` queries per program.

    `expanded` computes squared distances from |q|^2 + |p|^2 - 2 q p, which cancels and may be negative.

    Returns:
        squared distance (B, M, 3) float32, ascending; index (B, M, 3) int64 into the points. Where N < 3 the last
        places hold infinity and index 0.
    """
    batch, count = queries.shape[:2]
    squared, index = queries.new_empty(batch, count, 3), queries.new_empty(batch, count, 3, dtype=torch.int64)
    with torch.cuda.device_of(queries):
        arguments = queries.contiguous(), points.contiguous(), squared, index, count, points.shape[1]
        launch = _three_kernel[(-(-count // block), batch)]
        launch(*arguments, EXPANDED=expanded, BLOCK=block, num_warps=4, enable_fp_fusion=False)
    return squared, index


def _smallest_keys(queries: Tensor, coordinates: Tensor, k: int, block: int) -> Tensor:
    """The k smallest keys (B, M, k) int64, ascending, of queries (B, M, 3) and points of coordinates (B, 3, N)."""
    coordinates, count = coordinates.contiguous(), coordinates.shape[2]
    rows = queries.reshape(-1, 3).contiguous()
    step = max(1, MAX_KEYS // count)
    found = []
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step]
        keys = chunk.new_empty(len(chunk), count, dtype=torch.int64)
        with torch.cuda.device_of(chunk):
            launch = _keys_kernel[(len(chunk), -(-count // block))]
            arguments = chunk, coordinates, keys, first, queries.shape[1], count
            launch(*arguments, BLOCK=block, num_warps=4, enable_fp_fusion=False)
        found.append(keys.topk(k, dim=1, largest=False, sorted=True).values)
    return torch.cat(found).view(*queries.shape[:2], k)


@_jit
def _squared_distance(x, y, z, other_x, other_y, other_z):  # type: ignore[no-untyped-def]
    x, y, z = x - other_x, y - other_y, z - other_z
    return x * x + y * y + z * z


@_jit
def _sample_kernel(coordinates, nearest, picks, n_points, n_picks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    cloud = tl.program_id(0).to(tl.int64)
    xs = coordinates + cloud * 3 * n_points
    ys, zs = xs + n_points, xs + 2 * n_points
    nearest += cloud * n_points
    picks += cloud * n_picks
    lane = tl.arange(0, BLOCK)
    pick = 0
    tl.store(picks, pick)
    for i in range(1, n_picks):
        x, y, z = tl.load(xs + pick), tl.load(ys + pick), tl.load(zs + pick)
        farthest = tl.full((BLOCK,), -2.0, tl.float32)  # below the -1 of points that are never picked
        farthest_index = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, n_points, BLOCK):
            index = begin + lane
            inside = index < n_points
            squared = _squared_distance(
                tl.load(xs + index, mask=inside, other=0.0),
                tl.load(ys + index, mask=inside, other=0.0),
                tl.load(zs + index, mask=inside, other=0.0),
                *(x, y, z),
            )
            known = tl.minimum(tl.load(nearest + index, mask=inside, other=-2.0), squared)
            tl.store(nearest + index, known, mask=inside)
            farther = known > farthest  # strictly, so that a lane keeps its lowest index
            farthest = tl.where(farther, known, farthest)
            farthest_index = tl.where(farther, index, farthest_index)
        pick = tl.min(tl.where(farthest == tl.max(farthest, axis=0), farthest_index, n_points), axis=0)
        tl.store(picks + i, pick)
        tl.debug_barrier()  # the next round reads what other threads may have stored


@_jit
def _keys_kernel(  # type: ignore[no-untyped-def]
    queries, coordinates, keys, first, n_queries, n_points, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    coordinates += (first + row) // n_queries * 3 * n_points
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n_points
    squared = _squared_distance(
        tl.load(coordinates + index, mask=inside, other=0.0),
        tl.load(coordinates + n_points + index, mask=inside, other=0.0),
        tl.load(coordinates + 2 * n_points + index, mask=inside, other=0.0),
        tl.load(queries + 3 * row),
        tl.load(queries + 3 * row + 1),
        tl.load(queries + 3 * row + 2),
    )
    bits = squared.to(tl.int32, bitcast=True).to(tl.int64)  # non-negative floats are ordered as their bits
    tl.store(keys + row * n_points + index, (bits << 32) | index, mask=inside)


@_jit
def _three_kernel(  # type: ignore[no-untyped-def]
    queries, points, squared, indices, n_queries, n_points, EXPANDED: tl.constexpr, BLOCK: tl.constexpr
):
    cloud = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_queries
    at = cloud * n_queries * 3 + row * 3
    points += cloud * n_points * 3
    x = tl.load(queries + at, mask=inside, other=0.0)
    y = tl.load(queries + at + 1, mask=inside, other=0.0)
    z = tl.load(queries + at + 2, mask=inside, other=0.0)
    norm = x * x + y * y + z * z
    # the three nearest so far, kept in order
    first, first_index = tl.full((BLOCK,), float("inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    second, second_index = first, first_index
    third, third_index = first, first_index
    for j in range(n_points):
        px, py, pz = tl.load(points + 3 * j), tl.load(points + 3 * j + 1), tl.load(points + 3 * j + 2)
        if EXPANDED:
            product = tl.fma(z, pz, tl.fma(y, py, x * px))  # rounds as a matrix product does
            new = -2 * product + norm + (px * px + py * py + pz * pz)
        else:
            new = _squared_distance(x, y, z, px, py, pz)
        # strictly, so that of equal ones the lower index, which came earlier, stays in front
        to_first, to_second, to_third = new < first, new < second, new < third
        third = tl.where(to_second, second, tl.where(to_third, new, third))
        third_index = tl.where(to_second, second_index, tl.where(to_third, j, third_index))
        second = tl.where(to_first, first, tl.where(to_second, new, second))
        second_index = tl.where(to_first, first_index, tl.where(to_second, j, second_index))
        first = tl.where(to_first, new, first)
        first_index = tl.where(to_first, j, first_index)
    tl.store(squared + at, first, mask=inside)
    tl.store(squared + at + 1, second, mask=inside)
    tl.store(squared + at + 2, third, mask=inside)
    tl.store(indices + at, first_index, mask=inside)
    tl.store(indices + at + 1, second_index, mask=inside)
    tl.store(indices + at + 2, third_index, mask=inside)

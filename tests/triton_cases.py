"""Cases for the Triton kernels, for any device: run as a script, in Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python tests/triton_cases.py

prints a JSON object with the traceback of each case, empty if it passed. Triton fixes when a kernel is defined whether
it is interpreted, so a process that tests on a GPU cannot also run the interpreter.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models import point_ops
from models import point_ops_triton as kernels

CASES: dict[str, Callable[[str], None]] = {}


def case(check: Callable[[str], None]) -> Callable[[str], None]:
    CASES[check.__name__] = check
    return check


def cloud(points: int, seed: int = 0, batch: int = 2) -> Tensor:
    """Random points in a box 0.2 m wide, half a meter from the camera, (batch, points, 3); none is ignored."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, points, 3, generator=generator) * 0.2 + torch.tensor([0.0, 0.0, 0.5])


def grid(side: int) -> Tensor:
    """Grid of whole numbers, (1, side**3, 3), whose distances are exact and tie."""
    return torch.cartesian_prod(*[torch.arange(1.0, side + 1)] * 3)[None]


def check_picks(clouds: Tensor, n: int, block: int, device: str) -> None:
    coordinates = clouds.mT.contiguous().to(device)
    start = point_ops._initial_distances(coordinates)
    picks = kernels.farthest_point_sample(coordinates, start, n, block).cpu()
    assert picks.dtype == torch.int64
    expected = torch.stack([point_ops._farthest_point_sample_torch(each, n) for each in clouds])
    assert torch.equal(picks, expected), (clouds.shape, n, block, picks, expected)


def sorted_distances(queries: Tensor, points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All squared distances in float32, summed as the kernels do, (B, M, N) ascending, and the points' indices."""
    x, y, z = np.moveaxis(queries.numpy()[:, :, None] - points.numpy()[:, None], -1, 0)
    squared = x * x + y * y + z * z
    index = np.argsort(squared, axis=-1, kind="stable")
    return np.take_along_axis(squared, index, axis=-1), index


def check_neighbors(queries: Tensor, points: Tensor, k: int, block: int, device: str) -> None:
    distance, index = kernels.knn(queries.to(device), points.to(device), k, block)
    assert (distance.dtype, index.dtype) == (torch.float32, torch.int64)
    squared, expected = sorted_distances(queries, points)
    np.testing.assert_array_equal(index.cpu(), expected[..., :k])
    np.testing.assert_allclose(distance.cpu(), np.sqrt(squared[..., :k]), rtol=2e-7)  # PyTorch's root is an ulp off
    for q, p, found in zip(queries, points, distance.cpu(), strict=True):
        torch.testing.assert_close(found, point_ops._knn_direct(q, p, k)[0], rtol=1e-6, atol=1e-8)


@case
def picks_equal_the_torch_path(device: str) -> None:
    for points, n, block in [
        (1, 1, 16),
        (2, 2, 16),
        (7, 7, 16),
        (16, 5, 16),
        (33, 33, 16),
        (150, 40, 64),
        (90, 20, 128),
    ]:
        check_picks(cloud(points, seed=points, batch=3), n, block, device)


@case
def tied_picks_take_the_lowest_index(device: str) -> None:
    check_picks(grid(3), 27, 8, device)
    check_picks(torch.ones(1, 21, 3), 21, 8, device)
    check_picks(torch.cat([cloud(10), cloud(10), cloud(10)], dim=1), 30, 8, device)  # each point three times


@case
def ignored_points_are_never_picked(device: str) -> None:
    clouds = cloud(50)
    clouds[0, 10:40] *= 0.03 / clouds[0, 10:40].norm(dim=1, keepdim=True)  # |p|^2 = 9e-4
    clouds[1, 0] = 0.0  # still the first pick
    check_picks(clouds, 20, 16, device)
    for kept in (0, 1, 3):
        padded = torch.zeros(1, 21, 3)
        padded[0, 12 : 12 + kept] = cloud(3)[0, :kept]
        check_picks(padded, 9, 8, device)


@case
def neighbors_equal_the_plain_form(device: str) -> None:
    for queries, points, k in [(1, 1, 1), (5, 2, 2), (3, 3, 3), (2, 4, 4), (9, 64, 64), (5, 200, 17), (6, 130, 128)]:
        check_neighbors(cloud(queries, seed=1), cloud(points), k, 64, device)


@case
def tied_neighbors_are_in_index_order(device: str) -> None:
    points = grid(4)
    for k in (2, 3, 10, 64):
        check_neighbors(points[:, ::7], points, k, 16, device)
    for k in (3, 9):
        check_neighbors(torch.ones(1, 4, 3), torch.ones(1, 9, 3), k, 16, device)


@case
def neighbors_are_the_same_in_chunks(device: str) -> None:
    queries, points, bound = cloud(7, seed=1), cloud(40), kernels.MAX_KEYS
    try:
        for entries in (3 * 40 + 1, 1):  # blocks of three queries, the last of one; below one row: blocks of one
            kernels.MAX_KEYS = entries
            check_neighbors(queries, points, 6, 16, device)
    finally:
        kernels.MAX_KEYS = bound


@case
def strided_input_is_read_correctly(device: str) -> None:
    queries, points = cloud(12, seed=1)[:, ::2], cloud(40).mT.contiguous().mT
    for k in (3, 5):
        check_neighbors(queries, points, k, 16, device)


@case
def three_nearest_equal_the_plain_form(device: str) -> None:
    for m, n, block in [(1, 3, 16), (16, 4, 16), (17, 3, 16), (40, 30, 16), (20, 65, 32)]:
        queries, points = cloud(m, seed=1), cloud(n)
        squared, index = kernels.three_nearest(queries.to(device), points.to(device), block=block)
        expected, expected_index = sorted_distances(queries, points)
        np.testing.assert_array_equal(squared.cpu(), expected[..., :3])
        np.testing.assert_array_equal(index.cpu(), expected_index[..., :3])


@case
def expanded_squares_equal_the_torch_path(device: str) -> None:
    """Squares agree within the rounding half a meter from the camera, and closely where nothing cancels."""
    for m, n in [(1, 3), (17, 40), (40, 5)]:
        queries, points = cloud(m, seed=1), cloud(n)
        squared, index = kernels.three_nearest(queries.to(device), points.to(device), expanded=True, block=16)
        exact = (queries[:, :, None] - points[:, None]).double().square().sum(dim=-1).gather(2, index.cpu())
        torch.testing.assert_close(squared.cpu().double(), exact, rtol=0, atol=3e-7)
        generator = torch.Generator().manual_seed(n)
        queries, points = (torch.randn(2, count, 3, generator=generator) for count in (m, n))
        squared, index = kernels.three_nearest(queries.to(device), points.to(device), expanded=True, block=16)
        weight, expected = point_ops.three_nn_weights_expanded(queries, points, "torch")
        assert torch.equal(index.cpu(), expected)
        torch.testing.assert_close(point_ops._inverse_distance_weights(squared.cpu()), weight, rtol=1e-3, atol=1e-6)


@case
def expanded_squares_really_cancel(device: str) -> None:
    points = cloud(60, batch=1).to(device)
    expanded, direct = (kernels.three_nearest(points, points, each, block=16)[0] for each in (True, False))
    assert (direct[..., 0] == 0).all()
    assert (expanded - direct).abs().max() > 1e-8  # the constant that a weight adds to the squares


@case
def expanded_ties_take_the_lowest_index(device: str) -> None:
    points = grid(3)
    _, index = kernels.three_nearest(points.to(device), points.to(device), expanded=True, block=16)
    np.testing.assert_array_equal(index.cpu(), sorted_distances(points, points)[1][..., :3])


def main() -> None:
    outcome = {}
    for name, check in CASES.items():
        try:
            check("cpu")
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()

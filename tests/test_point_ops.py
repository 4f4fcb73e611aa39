"""Point searches against their plain forms and against recorded results of the original."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_extractors import reference
from models import point_ops
from models.point_ops import (
    farthest_point_sample,
    knn,
    three_nn_interpolate,
    three_nn_weights,
    three_nn_weights_expanded,
)
from utils.errors import InputError

SEARCHES = {"k-d tree": point_ops._knn_kd_tree, "direct": point_ops._knn_direct}


def random_cloud(points: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Cloud (batch, points, 3) in a box 0.2 m wide, half a meter from the camera, so no point is ignored."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, points, 3, generator=generator) * 0.2 + torch.tensor([0.0, 0.0, 0.5])


def distances_between(queries: Tensor, points: Tensor) -> NDArray:
    """Euclidean distances (M, N) of all pairs in double precision."""
    return torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()


def plain_weights(points: Tensor, centers: Tensor) -> Tensor:
    """Interpolation weights (N, G) of the centers for each point, in double precision."""
    identity = torch.eye(len(centers), dtype=torch.float64)
    return reference.three_nn_interpolate(points.double(), centers.double(), identity, exact_distances=True)


def spread(weight: Tensor, index: Tensor, centers: int) -> Tensor:
    """Weights (N, 3) of the centers `index` as a dense (N, G) matrix."""
    return torch.zeros(len(index), centers, dtype=torch.float64).scatter_add_(1, index, weight.double())


# Farthest point sampling


@pytest.mark.parametrize(("points", "n"), [(1, 1), (2, 1), (2, 2), (7, 3), (40, 40), (150, 20), (200, 199)])
@pytest.mark.parametrize("seed", [0, 1])
def test_farthest_points_equal_their_plain_form(points: int, n: int, seed: int) -> None:
    cloud = random_cloud(points, seed)
    picks = farthest_point_sample(cloud, n)
    assert picks.shape == (1, n)
    assert picks.dtype == torch.int64
    assert picks[0].tolist() == reference.farthest_point_sample(cloud[0], n).tolist()


def test_farthest_points_of_a_batch_match_single_clouds() -> None:
    clouds = random_cloud(60, batch=3)
    picks = farthest_point_sample(clouds, 10)
    assert picks.tolist() == [reference.farthest_point_sample(cloud, 10).tolist() for cloud in clouds]
    assert len({tuple(row) for row in picks.tolist()}) == 3


def test_farthest_points_on_a_line() -> None:
    """The picks are the start, then the end, then the middle."""
    line = torch.tensor([[[0.0, 0, 1], [1, 0, 1], [2, 0, 1], [3, 0, 1], [4, 0, 1]]])
    assert farthest_point_sample(line, 3)[0].tolist() == [0, 4, 2]


def test_ties_pick_the_lowest_index() -> None:
    corners = torch.tensor([[[0.0, 0, 1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1], [1, -1, 1]]])
    assert farthest_point_sample(corners, 5)[0].tolist() == [0, 1, 2, 3, 4]
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 2, torch.ones(1))[None]  # exact coordinates, so distances tie
    assert farthest_point_sample(grid, 16)[0].tolist() == reference.farthest_point_sample(grid[0], 16).tolist()


def test_points_near_the_origin_are_never_picked() -> None:
    cloud = random_cloud(50)
    cloud[0, 10:40] *= 0.03 / cloud[0, 10:40].norm(dim=1, keepdim=True)  # |p|^2 = 9e-4
    picks = farthest_point_sample(cloud, 20)[0].tolist()
    assert sorted(picks) == sorted([*range(10), *range(40, 50)])
    assert picks == reference.farthest_point_sample(cloud[0], 20).tolist()


def test_points_of_squared_norm_below_a_thousandth_are_ignored() -> None:
    inside, outside = math.sqrt(0.9e-3), math.sqrt(1.1e-3)
    points = torch.tensor([[[0.0, 0, 1], [0, 0, inside], [0, 0, outside], [0, 0, -inside]]])
    assert farthest_point_sample(points, 2)[0].tolist() == [0, 2]  # index 3 is farther but ignored


def test_first_point_is_the_start_even_if_ignored() -> None:
    cloud = random_cloud(30)
    cloud[0, 0] = 0.0
    picks = farthest_point_sample(cloud, 8)[0].tolist()
    assert picks[0] == 0
    assert 0 not in picks[1:]
    assert picks == reference.farthest_point_sample(cloud[0], 8).tolist()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_picks_repeat_once_all_points_are_picked(kept: int) -> None:
    """All points except `kept` are padding at the origin, including index 0."""
    cloud = torch.zeros(1, 9, 3)
    cloud[0, 4 : 4 + kept] = random_cloud(kept)[0]
    picks = farthest_point_sample(cloud, 9)[0].tolist()
    assert picks == reference.farthest_point_sample(cloud[0], 9).tolist()
    assert set(picks) == {0, *range(4, 4 + kept)}


def test_identical_points_repeat_the_first() -> None:
    assert farthest_point_sample(torch.ones(1, 5, 3), 5)[0].tolist() == [0] * 5


def test_farthest_points_do_not_change_the_input() -> None:
    cloud = random_cloud(20)
    before = cloud.clone()
    farthest_point_sample(cloud, 5)
    assert torch.equal(cloud, before)


@pytest.mark.golden
def test_recorded_farthest_points_with_ignored_ones(goldens: Path) -> None:
    unit = np.load(goldens / "unit.npz")
    points, recorded = torch.from_numpy(unit["fps_skip_pts"]), unit["fps_skip_idx"]
    ignored = points.square().sum(dim=1) <= 1e-3
    assert int(ignored.sum()) == 42  # the recording does contain ignored points
    np.testing.assert_array_equal(farthest_point_sample(points[None], len(recorded))[0], recorded)


# Nearest neighbors


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize(
    ("queries", "points", "k"), [(1, 1, 1), (5, 1, 1), (1, 9, 9), (20, 64, 64), (33, 200, 1), (50, 300, 17)]
)
def test_neighbors_equal_their_plain_form(
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]], queries: int, points: int, k: int
) -> None:
    centers, cloud = random_cloud(queries, seed=1)[0], random_cloud(points)[0]
    expected_distance, expected_index = reference.knn(centers.double(), cloud.double(), k)
    distance, index = search(centers, cloud, k)
    assert distance.shape == index.shape == (queries, k)
    assert distance.dtype == torch.float32
    assert index.dtype == torch.int64
    assert torch.equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-6, atol=1e-8)
    assert (distance.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_distances_are_not_squared(
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    distance, index = search(torch.tensor([[0.0, 0, 1]]), torch.tensor([[3.0, 4, 1], [0, 0, 3], [0, 0, 1]]), 3)
    assert index.tolist() == [[2, 1, 0]]
    assert distance.tolist() == [[0.0, 2.0, 5.0]]  # not squared: 0, 4, 25


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_neighbors_with_ties(
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    """Equally near points may come in any order, but each appears only once."""
    grid = torch.cartesian_prod(*[torch.arange(5.0)] * 3)
    distance, index = search(grid, grid, 10)
    all_distances = distances_between(grid, grid)
    np.testing.assert_allclose(distance, np.sort(all_distances, axis=1)[:, :10], rtol=1e-6)
    np.testing.assert_allclose(distance, np.take_along_axis(all_distances, index.numpy(), axis=1), rtol=1e-6)
    assert all(len(set(row)) == 10 for row in index.tolist())


def test_direct_search_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, cloud = random_cloud(23, seed=1)[0], random_cloud(50)[0]
    whole = point_ops._knn_direct(queries, cloud, 6)
    monkeypatch.setattr(point_ops, "MAX_BLOCK_ENTRIES", 4 * 50 + 1)  # blocks of four queries, the last of three
    chunked = point_ops._knn_direct(queries, cloud, 6)
    monkeypatch.setattr(point_ops, "MAX_BLOCK_ENTRIES", 1)  # less than a row, so one query at a time
    single = point_ops._knn_direct(queries, cloud, 6)
    for values in (chunked, single):
        assert torch.equal(values[0], whole[0])
        assert torch.equal(values[1], whole[1])


def test_neighbors_of_a_batch_match_single_clouds() -> None:
    queries, clouds = random_cloud(6, seed=1, batch=3), random_cloud(40, batch=3)
    distance, index = knn(queries, clouds, 5)
    assert distance.shape == index.shape == (3, 6, 5)
    for i in range(3):
        expected_distance, expected_index = reference.knn(queries[i].double(), clouds[i].double(), 5)
        assert torch.equal(index[i], expected_index)
        np.testing.assert_allclose(distance[i], expected_distance, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_both_sampling_loops_pick_the_same_points(seed: int) -> None:
    cloud = random_cloud(3000, seed=seed)[0]
    picks = point_ops._farthest_point_sample_torch(cloud, 500)
    assert torch.equal(point_ops._farthest_point_sample_numpy(cloud, 500), picks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_gpu_finds_the_same_points(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    cloud, queries = random_cloud(4000), random_cloud(300, seed=1)
    picks = farthest_point_sample(cloud.cuda(), 300, backend)
    assert picks.is_cuda
    assert torch.equal(picks.cpu(), farthest_point_sample(cloud, 300))
    distance, index = knn(queries.cuda(), cloud.cuda(), 32, backend)
    assert distance.is_cuda
    all_distances = distances_between(queries[0], cloud[0])
    near = np.sort(all_distances, axis=1)[:, :32]  # rounding may swap almost equal distances
    np.testing.assert_allclose(distance[0].cpu(), near, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.take_along_axis(all_distances, index[0].cpu().numpy(), 1), near, rtol=1e-5, atol=1e-7)
    weight, three = three_nn_weights(cloud.cuda(), queries.cuda(), backend)
    expected, expected_three = three_nn_weights(cloud, queries)
    assert torch.equal(three.cpu(), expected_three)
    torch.testing.assert_close(weight.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_interpolates_the_same_features() -> None:
    cloud, centers, features = random_cloud(4000), random_cloud(300, seed=1), torch.rand(1, 300, 8)
    on_gpu = three_nn_interpolate(cloud.cuda(), centers.cuda(), features.cuda())
    torch.testing.assert_close(on_gpu.cpu(), three_nn_interpolate(cloud, centers, features), rtol=1e-4, atol=1e-5)


def test_torch_searches_do_not_read_values_back() -> None:
    """Tensors on the meta device have no values, so reading one would fail."""
    cloud = torch.empty(1, 200, 3, device="meta")
    assert farthest_point_sample(cloud, 20, "torch").is_meta
    distance, index = knn(cloud[:, :30], cloud, 16, "torch")
    assert distance.is_meta
    assert index.is_meta
    assert three_nn_weights(cloud, cloud[:, :30], "torch")[0].is_meta


# Backends


def test_torch_backend_on_the_cpu() -> None:
    """It differs from the default by its fp32 distances; the k-d tree rounds fp64 distances."""
    cloud, queries = random_cloud(3000, batch=2), random_cloud(500, seed=1, batch=2)
    assert torch.equal(farthest_point_sample(cloud, 50, "torch"), farthest_point_sample(cloud, 50))
    distance, index = knn(queries, cloud, 5, "torch")
    expected, expected_index = knn(queries, cloud, 5)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(distance, expected)
    for weights in (three_nn_weights, three_nn_weights_expanded):
        for ours, theirs in zip(weights(cloud, queries, "torch"), weights(cloud, queries), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "chosen"),
    [
        ("cpu", torch.float32, True, "host"),
        ("cuda", torch.float32, True, "triton"),
        ("cuda", torch.float32, False, "torch"),
        ("cuda", torch.float64, True, "torch"),
        ("meta", torch.float32, True, "torch"),
    ],
)
def test_backend_chosen_by_auto(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    points = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype)
    assert point_ops._choose_backend("auto", points) == chosen
    for backend in point_ops.POINT_OPS[1:] if chosen == "triton" else ("torch",):
        assert point_ops._choose_backend(backend, points) == backend


@pytest.mark.parametrize("backend", point_ops.CUDA_MODULES)
def test_backends_are_checked_before_work_starts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("auto", "torch"):
        point_ops.check_backend(other, torch.device("cpu"))
    with pytest.raises(InputError, match=f"--point_ops {backend} needs a GPU, but the device is cpu"):
        point_ops.check_backend(backend, torch.device("cpu"))
    monkeypatch.setitem(point_ops.CUDA_MODULES, backend, ("math", "no_such_module"))
    with pytest.raises(
        InputError, match=r"no_such_module cannot be imported \(.*\)\. Install it or use --point_ops auto"
    ):
        point_ops.check_backend(backend, torch.device("cuda"))
    monkeypatch.setitem(point_ops.CUDA_MODULES, backend, ("math",))
    point_ops.check_backend(backend, torch.device("cuda"))


def test_triton_needs_a_gpu_and_float32() -> None:
    cloud = random_cloud(9)
    searches = [
        lambda points: farthest_point_sample(points, 2, "triton"),
        lambda points: knn(points, points, 5, "triton"),
        lambda points: three_nn_weights(points, points, "triton"),
        lambda points: three_nn_weights_expanded(points, points, "triton"),
    ]
    for search in searches:
        with pytest.raises(ValueError, match="triton works on CUDA tensors, got one on cpu"):
            search(cloud)
        with pytest.raises(ValueError, match=r"take float32 points, got torch\.float64"):
            search(cloud.double())


# Interpolation


@pytest.mark.parametrize(("points", "centers"), [(1, 3), (10, 3), (10, 4), (60, 25)])
def test_weights_equal_their_plain_form(points: int, centers: int) -> None:
    cloud, middle = random_cloud(points), random_cloud(centers, seed=1)
    weight, index = three_nn_weights(cloud, middle)
    assert weight.shape == index.shape == (1, points, 3)
    assert (weight.diff(dim=2) <= 0).all()  # the nearest center first
    torch.testing.assert_close(
        spread(weight[0], index[0], centers), plain_weights(cloud[0], middle[0]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("points", "centers"), [(1, 3), (10, 4), (60, 25)])
def test_expanded_weights_match_exact_ones_at_large_distances(points: int, centers: int) -> None:
    """Squares do not cancel where distances are as large as the coordinates."""
    generator = torch.Generator().manual_seed(0)
    cloud, middle = (torch.randn(2, size, 3, generator=generator) for size in (points, centers))
    weight, index = three_nn_weights_expanded(cloud, middle)
    assert weight.shape == index.shape == (2, points, 3)
    for b in range(2):
        expected = plain_weights(cloud[b], middle[b])
        torch.testing.assert_close(spread(weight[b], index[b], centers), expected, rtol=1e-3, atol=0)


def test_expanded_weights_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, middle = random_cloud(50), random_cloud(20, seed=1)
    whole = three_nn_weights_expanded(cloud, middle)
    monkeypatch.setattr(point_ops, "MAX_BLOCK_ENTRIES", 7 * 20)
    chunked = three_nn_weights_expanded(cloud, middle)
    assert torch.equal(chunked[1], whole[1])
    # Chunk sizes change the rounding of the matrix product by up to 6e-8, against the epsilon of 1e-8 in a weight.
    torch.testing.assert_close(chunked[0], whole[0], rtol=0.05, atol=1e-3)


def test_negative_square_that_cancels_epsilon_gives_finite_weights() -> None:
    squared = torch.tensor([[-1e-8, 1e-8, 1.0]])
    assert float(squared[0, 0] + point_ops.INTERPOLATION_EPSILON) == 0.0
    weight = point_ops._inverse_distance_weights(squared)
    assert torch.isfinite(weight).all()
    np.testing.assert_allclose(weight, [[2 / 3, 1 / 3, 0.0]], atol=1e-6)


@pytest.mark.parametrize(("points", "centers", "width"), [(1, 3, 1), (30, 3, 2), (30, 12, 5)])
def test_interpolation_equals_its_plain_form(points: int, centers: int, width: int) -> None:
    cloud, middle = random_cloud(points, batch=2), random_cloud(centers, seed=1, batch=2)
    features = torch.randn(2, centers, width, generator=torch.Generator().manual_seed(2))
    interpolated = three_nn_interpolate(cloud, middle, features)
    assert interpolated.shape == (2, points, width)
    for b in range(2):
        expected = reference.three_nn_interpolate(cloud[b], middle[b], features[b], exact_distances=True)
        torch.testing.assert_close(interpolated[b], expected, rtol=1e-4, atol=1e-5)


def test_interpolation_at_a_center_returns_its_feature() -> None:
    middle = random_cloud(20)
    features = torch.arange(20.0)[None, :, None]
    torch.testing.assert_close(three_nn_interpolate(middle, middle, features), features, rtol=0, atol=1e-2)


def test_interpolation_by_hand() -> None:
    """Squared distances of the three nearest centers are 1, 4 and 4; the fourth center has weight 0."""
    middle = torch.tensor([[[9.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 2]]])
    features = torch.tensor([[[1000.0], [6.0], [12.0], [24.0]]])
    interpolated = three_nn_interpolate(torch.zeros(1, 1, 3), middle, features)
    assert float(interpolated) == pytest.approx((6 * 1 + 12 * 0.25 + 24 * 0.25) / 1.5, rel=1e-6)


# Errors


@pytest.mark.parametrize(
    "points",
    [
        torch.rand(10, 3),
        torch.rand(1, 3, 10),
        torch.rand(1, 1, 10, 3),
        torch.rand(1, 10, 2),
        torch.zeros(1, 10, 3, dtype=torch.int64),
    ],
    ids=["no batch", "channels first", "four axes", "two coordinates", "integers"],
)
def test_only_float_clouds_are_accepted(points: Tensor) -> None:
    good = random_cloud(5)
    with pytest.raises(ValueError, match=r"points must be a \(B, N, 3\) float tensor, got"):
        farthest_point_sample(points, 1)
    with pytest.raises(ValueError, match="points must be"):
        knn(good, points, 1)
    with pytest.raises(ValueError, match="queries must be"):
        knn(points, good, 1)
    for weights in (three_nn_weights, three_nn_weights_expanded):
        with pytest.raises(ValueError, match=r"must be a \(B, N, 3\) float tensor"):
            weights(points, good)
        with pytest.raises(ValueError, match=r"must be a \(B, N, 3\) float tensor"):
            weights(good, points)


@pytest.mark.parametrize("n", [0, -1, 6])
def test_more_picks_than_points_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pick {n} of 5 points"):
        farthest_point_sample(random_cloud(5), n)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_more_neighbors_than_points_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot find {k} neighbors among 5 points"):
        knn(random_cloud(2), random_cloud(5), k)


@pytest.mark.parametrize("weights", [three_nn_weights, three_nn_weights_expanded])
def test_fewer_than_three_centers_are_refused(weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(ValueError, match="cannot find 3 neighbors among 2 points"):
        weights(random_cloud(5), random_cloud(2))


@pytest.mark.parametrize("weights", [three_nn_weights, three_nn_weights_expanded])
def test_batches_of_different_sizes_are_refused(weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(ValueError, match="differ in batch size: 2 and 1"):
        weights(random_cloud(5, batch=2), random_cloud(5))


def test_the_extensions_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="extension works on CUDA tensors, got one on cpu"):
        farthest_point_sample(random_cloud(5), 2, backend="extension")
    with pytest.raises(ValueError, match="extension works on CUDA tensors"):
        knn(random_cloud(2), random_cloud(5), 2, backend="extension")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        farthest_point_sample(random_cloud(5), 2, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        knn(random_cloud(2), random_cloud(5), 2, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        three_nn_weights_expanded(random_cloud(5), random_cloud(5), backend="cuda")


# Recorded clouds


@pytest.fixture
def stages(goldens: Path) -> dict[str, NDArray]:
    return dict(np.load(goldens / "stages_bagel_test_hole_000.npz"))


@pytest.fixture
def cloud(stages: dict[str, NDArray]) -> Tensor:
    """Valid points (1, N, 3) of the recorded sample, in row-major order."""
    return torch.from_numpy(stages["resized_pc"].reshape(3, -1)[:, stages["nonzero_indices"]].T.copy())[None]


@pytest.fixture
def centers(stages: dict[str, NDArray], cloud: Tensor) -> Tensor:
    """Recorded centers (1, 1024, 3)."""
    return cloud[:, torch.from_numpy(stages["fps_idx"]).long()]


@pytest.mark.golden
def test_recorded_farthest_points(stages: dict[str, NDArray], cloud: Tensor) -> None:
    np.testing.assert_array_equal(farthest_point_sample(cloud, 1024)[0], stages["fps_idx"])


@pytest.mark.golden
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_recorded_neighbors(
    stages: dict[str, NDArray],
    cloud: Tensor,
    centers: Tensor,
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    distance, index = search(centers[0], cloud[0], 128)
    np.testing.assert_array_equal(np.sort(index[::4], axis=1), np.sort(stages["knn_idx"], axis=1))
    np.testing.assert_allclose(distance[:16], stages["knn_dist_rows0_16"], rtol=1e-6, atol=1e-8)


@pytest.mark.golden
def test_recorded_interpolation_weights_in_double_precision(
    stages: dict[str, NDArray], cloud: Tensor, centers: Tensor
) -> None:
    weight, index = three_nn_weights(cloud, centers)
    np.testing.assert_array_equal(index[0], stages["interp_idx3_exact64"])
    inverse = 1 / (stages["interp_sqdist3_exact64_s"] + 1e-8)
    expected = inverse / inverse.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weight[0, torch.from_numpy(stages["interp_cols"]).long()], expected, rtol=1e-4)


@pytest.mark.golden
def test_recorded_expanded_weights_are_bit_equal(stages: dict[str, NDArray], cloud: Tensor, centers: Tensor) -> None:
    weight, index = three_nn_weights_expanded(cloud, centers)
    squared = torch.from_numpy(stages["interp_sqdist3"])
    assert (squared < 0).any()  # the recording has the negative squares of the expanded form
    inverse = 1.0 / (squared + 1e-8)
    assert torch.equal(weight[0], inverse / inverse.sum(dim=1, keepdim=True))
    differs = (index[0].numpy() != stages["interp_idx3"]).any(axis=1)
    assert differs.mean() < 0.005
    for row in differs.nonzero()[0]:  # the same centers and weights, in another order of equal ones
        ours = sorted(zip(weight[0, row].tolist(), index[0, row].tolist(), strict=True))
        theirs = sorted(zip(weight[0, row].tolist(), stages["interp_idx3"][row].tolist(), strict=True))
        assert ours == theirs

"""The small steps, by pytest-benchmark, at the sizes of a real sample: pytest benchmarks --benchmark-only

`make bench` runs them, `make test` does not. A plain twin in benchmarks/plain.py stands beside its step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks import plain
from benchmarks.workload import SIZES, made_up_samples
from feature_extractors.alignment import align_to_patches
from feature_extractors.scoring import gaussian_blur
from models.point_ops import farthest_point_sample, knn, three_nn_weights, three_nn_weights_expanded
from models.point_transformer import PointFeatures
from utils.au_pro import au_pro
from utils.records import Sample

SIZE = SIZES["published"]
WIDTH = 1152  # of three blocks' tokens
Benchmark = Callable[..., Any]  # the fixture: calls a function with the arguments that follow it


@pytest.fixture(scope="module")
def sample() -> Sample:
    return made_up_samples(1, "train", SIZE.img_size)[0]


@pytest.fixture(scope="module")
def points(sample: Sample) -> Tensor:
    """(N, 3) valid points."""
    assert sample.xyz is not None
    return sample.xyz[:, (sample.xyz != 0).all(dim=0)].T.contiguous()


@pytest.fixture(scope="module")
def centers(points: Tensor) -> Tensor:
    return points[farthest_point_sample(points[None], SIZE.num_group)[0]]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(SIZE.num_group, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray]:
    """Masks (20, 224, 224) and maps of which every second one has a defect."""
    rng = np.random.default_rng(0)
    planes = gaussian_filter(rng.standard_normal((20, SIZE.img_size, SIZE.img_size)), (0, 4, 4)).astype(np.float32)
    masks = np.zeros_like(planes, bool)
    masks[::2, 100:130, 80:120] = True
    return masks, planes + 0.1 * masks


@pytest.mark.benchmark(group="farthest point sampling, 1024")
@pytest.mark.parametrize("form", ["ours", "plain"])
def test_farthest_point_sampling(benchmark: Benchmark, points: Tensor, form: str) -> None:
    if form == "ours":
        picks = benchmark(farthest_point_sample, points[None], SIZE.num_group)[0]
    else:
        picks = torch.tensor(benchmark(plain.farthest_points, points, SIZE.num_group))
    assert len(picks.unique()) == SIZE.num_group


@pytest.mark.benchmark(group="128 nearest neighbors")
def test_nearest_128(benchmark: Benchmark, points: Tensor, centers: Tensor) -> None:
    distance, _ = benchmark(knn, centers[None], points[None], SIZE.group_size)
    assert (distance.diff(dim=-1) >= 0).all()


@pytest.mark.benchmark(group="3-NN weights")
@pytest.mark.parametrize("weights", [three_nn_weights, three_nn_weights_expanded])
def test_three_nearest_weights(
    benchmark: Benchmark, points: Tensor, centers: Tensor, weights: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    weight, _ = benchmark(weights, points[None], centers[None])
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(1, len(points)))


@pytest.mark.benchmark(group="alignment")
@pytest.mark.parametrize("form", ["ours", "plain"])
def test_alignment(benchmark: Benchmark, sample: Sample, centers: Tensor, tokens: Tensor, form: str) -> None:
    if form == "ours":
        patches = benchmark(align_to_patches, PointFeatures(tokens, centers), sample.xyz, SIZE.xyz_grid)
    else:
        patches = benchmark(plain.pooled_plane, tokens, centers, sample.xyz, SIZE.xyz_grid)
    assert patches.shape == (SIZE.xyz_grid**2, WIDTH)


@pytest.mark.benchmark(group="blur")
@pytest.mark.parametrize("float_blur", [False, True])
def test_blur(benchmark: Benchmark, float_blur: bool) -> None:
    plane = torch.rand(SIZE.img_size, SIZE.img_size, generator=torch.Generator().manual_seed(0))
    assert benchmark(gaussian_blur, plane, float_blur).shape == plane.shape


@pytest.mark.benchmark(group="AU-PRO of 20 maps")
@pytest.mark.parametrize("num_thresholds", [None, 100])
def test_au_pro(benchmark: Benchmark, maps: tuple[np.ndarray, np.ndarray], num_thresholds: int | None) -> None:
    assert 0 <= benchmark(au_pro, *maps, 0.3, num_thresholds) <= 1

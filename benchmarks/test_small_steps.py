"""Small steps at the size of a real sample, timed by pytest-benchmark beside their plain forms.

pytest benchmarks --benchmark-only
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks.workload import SIZES, made_up_samples, valid_points
from feature_extractors import reference
from feature_extractors.alignment import align_to_patches, pack_clouds
from feature_extractors.scoring import anomaly_maps
from models.point_ops import farthest_point_sample, knn
from models.point_transformer import PointFeatures
from utils.au_pro import au_pro

SIZE = SIZES["published"]


class Inputs(NamedTuple):
    """Inputs of the steps, of one sample."""

    xyz: Tensor
    points: Tensor
    features: PointFeatures
    distances: Tensor


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    sample = made_up_samples(1, "train", SIZE.img_size)[0]
    assert sample.xyz is not None
    points = valid_points(sample)
    centers = points[farthest_point_sample(points[None], SIZE.num_group)[0]]
    features = PointFeatures(torch.randn(SIZE.num_group, 3 * SIZE.width), centers)
    return Inputs(sample.xyz, points, features, torch.rand(SIZE.xyz_grid**2))


def plain_alignment(features: PointFeatures, xyz: Tensor) -> Tensor:
    valid = (xyz != 0).all(dim=0)
    assert features.centers is not None
    at_points = reference.three_nn_interpolate(xyz[:, valid].T, features.centers, features.features)
    return reference.project_and_pool(at_points, valid, SIZE.xyz_grid)


STEPS: dict[str, dict[str, Any]] = {
    "1024 farthest points": {
        "fast": lambda each: farthest_point_sample(each.points[None], SIZE.num_group),
        "plain": lambda each: reference.farthest_point_sample(each.points, SIZE.num_group),
    },
    "128 nearest neighbors": {
        "fast": lambda each: knn(each.features.centers[None], each.points[None], SIZE.group_size),
        "plain": lambda each: reference.knn(each.features.centers, each.points, SIZE.group_size),
    },
    "alignment": {
        "fast": lambda each: align_to_patches([each.features], pack_clouds([each.xyz]), SIZE.xyz_grid),
        "plain": lambda each: plain_alignment(each.features, each.xyz),
    },
    "anomaly map": {
        "fast": lambda each: anomaly_maps([each.distances[None]], SIZE.img_size)[0],
        "plain": lambda each: reference.anomaly_map(each.distances, SIZE.img_size),
    },
}


@pytest.mark.parametrize("form", ["fast", "plain"])
@pytest.mark.parametrize("step", STEPS)
def test_step(benchmark: Any, inputs: Inputs, step: str, form: str) -> None:
    benchmark.group = step
    benchmark(STEPS[step][form], inputs)


@pytest.mark.benchmark(group="AU-PRO of 20 maps")
@pytest.mark.parametrize("num_thresholds", [None, 100])
def test_au_pro(benchmark: Any, num_thresholds: int | None) -> None:
    noise = np.random.default_rng(0).standard_normal((20, SIZE.img_size, SIZE.img_size))
    masks = np.zeros_like(noise, bool)
    masks[::2, 100:130, 80:120] = True
    maps = gaussian_filter(noise, (0, 4, 4)).astype(np.float32) + 0.1 * masks
    assert 0 <= benchmark(au_pro, masks, maps, 0.3, num_thresholds) <= 1

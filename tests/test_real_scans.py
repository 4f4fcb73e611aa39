"""Real scans with sensor noise, holes and depth jumps, from the file to patch features."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from feature_extractors.alignment import align_to_patches, pack_clouds, valid_pixels
from models import build_xyz_backbone
from models.point_transformer import PointBackbone
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, fit_border_plane, remove_plane
from utils.scans.organized_pc import read_organized_pc, resize_nearest, valid_mask

pytestmark = pytest.mark.slow

# Least and greatest fraction of points off the largest plane.
SCANS = {
    "milk_cartoon_all_small_clorox": (0.15, 0.2),  # few objects on a table
    "table_scene_mug_stereo_textured": (0.35, 0.45),  # a table and its background
    "office1": (0.8, 0.99),  # a room with several walls
}
SIZE, GRID = 224, 56
# The plane is searched in the whole image, because the border of these scans shows more than a plane. Candidates use
# few points, because the plane may be small; the tolerances are for a sensor at least a meter away.
WHOLE_IMAGE = CleaningRule(border=SIZE, fit_sample=8, fit_distance=0.01, plane_distance=0.02, least_support=0)


def measured_area(xyz: np.ndarray) -> np.ndarray:
    """Rows and columns from the first to the last measurement."""
    rows, columns = (np.flatnonzero(valid_mask(xyz).any(axis=axis)) for axis in (1, 0))
    return xyz[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def without_plane(xyz: np.ndarray, seed: int = 0) -> np.ndarray:
    plane, _ = fit_border_plane(xyz, np.random.default_rng(seed), WHOLE_IMAGE)
    return remove_plane(xyz, plane, WHOLE_IMAGE.plane_distance)


@pytest.fixture(scope="module")
def load(real_data: Path) -> Callable[[str], np.ndarray]:
    return cache(lambda name: measured_area(read_organized_pc(real_data / "scans" / "xyz" / f"{name}.tiff")))


@pytest.fixture(scope="module")
def load_small(load: Callable[[str], np.ndarray]) -> Callable[[str], Tensor]:
    """Cloud (3, SIZE, SIZE) without the largest plane."""

    @cache
    def prepare(name: str) -> Tensor:
        small = resize_nearest(load(name), SIZE).permute(1, 2, 0).numpy()
        return torch.from_numpy(without_plane(small)).permute(2, 0, 1).contiguous()

    return prepare


@pytest.fixture(scope="module")
def build(golden_weights: Path) -> Callable[[str], PointBackbone]:
    numbers = {"num_group": 512, "group_size": 64, "point_norm": "cloud", "point_ops": "auto"}
    return cache(lambda name: build_xyz_backbone(name, golden_weights, **numbers))


@pytest.mark.parametrize("name", SCANS)
def test_largest_plane_is_removed(load: Callable[[str], np.ndarray], name: str) -> None:
    """Every random seed removes the plane and changes nothing else."""
    least, most = SCANS[name]
    small = resize_nearest(load(name), SIZE).permute(1, 2, 0).numpy()
    results = [without_plane(small, seed) for seed in range(3)]
    for result in results:
        kept = valid_mask(result)
        assert least < kept.sum() / valid_mask(small).sum() < most
        assert np.array_equal(result[kept], small[kept])
        assert not result[~kept].any()


def test_cleaning_of_an_object_on_a_table(load: Callable[[str], np.ndarray]) -> None:
    """Cleaning with a plane distance for this sensor's noise leaves one carton."""
    xyz = load("milk_cartoon_all_small_clorox")
    gray = np.full(xyz.shape, 5, np.uint8)
    clean, image, *_ = clean_scan(xyz, gray, None, CleaningRule(plane_distance=0.01))
    kept = valid_mask(clean)
    assert clean.shape == (700, 700, 3)
    assert 5_000 < kept.sum() < 0.1 * valid_mask(xyz).sum()
    extent = np.ptp(clean[kept], axis=0)
    assert ((extent > 0.05) & (extent < 0.3)).all(), extent
    assert (image[kept] == 5).all()


@pytest.mark.parametrize("backbone", ["FPFH", "Point_MAE"])
@pytest.mark.parametrize("name", SCANS)
def test_patch_features(
    load_small: Callable[[str], Tensor], build: Callable[[str], PointBackbone], name: str, backbone: str
) -> None:
    xyz = load_small(name)
    valid = valid_pixels(xyz)
    points = xyz[:, valid].T.contiguous()
    assert 5_000 < len(points) < valid.numel()
    with torch.inference_mode():
        (patches,) = align_to_patches(build(backbone)([points]), pack_clouds([xyz]), GRID)
    assert patches.shape == (GRID**2, build(backbone).embed_dim)
    assert patches.isfinite().all()

    # Both poolings of the mask are nonzero in every patch with a point.
    share = F.adaptive_avg_pool2d(F.avg_pool2d(valid[None, None].float(), 3, 1), GRID).flatten()
    assert 10 < (share == 0).sum() < 0.9 * GRID**2
    assert (patches[share == 0] == 0).all()
    assert (patches[share > 0] != 0).any(dim=1).all()

    # Neighboring patches differ less than random pairs of patches.
    whole = (share > 0.999).view(GRID, GRID)
    left = (whole[:, :-1] & whole[:, 1:]).nonzero()
    index = left[:, 0] * GRID + left[:, 1]
    first, beside = patches[index], patches[index + 1]
    random_patches = beside[torch.randperm(len(beside), generator=torch.Generator().manual_seed(0))]
    near, far = ((first - other).norm(dim=1).mean() for other in (beside, random_patches))
    assert far > 0.05 * first.norm(dim=1).mean()
    assert near < 0.7 * far

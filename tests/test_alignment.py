"""Alignment of point features to patches: interpolation, feature plane and poolings against their plain form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from feature_extractors import reference
from feature_extractors.alignment import align_to_patches, pack_clouds, pooling_weights, valid_pixels
from models.point_transformer import PointFeatures

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# (size, grid): equal bins, overlapping bins (grid does not divide size), one bin, one window per bin, the paper's
SIZES = [(34, 8), (32, 8), (33, 7), (30, 11), (40, 1), (16, 14), (224, 56)]

POOLINGS = [pytest.param(False, id="plain"), pytest.param(True, id="masked")]


def made_up_cloud(size: int, share: float = 0.6, seed: int = 0) -> Tensor:
    """Bumpy surface half a meter away, 2 mm between pixels, with an empty border and holes, (3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    depth = 0.5 + 0.01 * torch.sin(row / 5) + 0.003 * torch.rand(size, size, generator=generator)
    xyz = torch.stack([0.002 * (column + 1), 0.002 * (row + 1), depth])
    border = (row < size // 6) | (column >= size - size // 5)
    holes = torch.rand(size, size, generator=generator) >= share
    return xyz.masked_fill(border | holes, 0.0)


def random_features(xyz: Tensor, groups: int, channels: int = 5, seed: int = 1) -> PointFeatures:
    """Random features at `groups` random points of the cloud."""
    generator = torch.Generator().manual_seed(seed)
    points = xyz[:, valid_pixels(xyz)].T
    centers = points[torch.randperm(len(points), generator=generator)[:groups]]
    return PointFeatures(torch.randn(groups, channels, generator=generator), centers)


def align(point_features: PointFeatures, xyz: Tensor, grid: int, **switches: Any) -> Tensor:
    """Patches (grid**2, C) of one sample."""
    clouds = pack_clouds([xyz.cpu()], point_features.features.device)
    return align_to_patches([point_features], clouds, grid, **switches)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", POOLINGS)
@pytest.mark.parametrize("exact_distances", [pytest.param(True, id="direct"), pytest.param(False, id="expanded")])
@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_patches_equal_the_plain_form(size: int, grid: int, exact_distances: bool, masked: bool, device: str) -> None:
    xyz = made_up_cloud(size).to(device)
    features, centers = random_features(xyz.cpu(), groups=20)
    features, centers = features.to(device), centers.to(device)
    valid = valid_pixels(xyz)
    patches = align(PointFeatures(features, centers), xyz, grid, exact_distances=exact_distances, masked=masked)
    at_points = reference.three_nn_interpolate(xyz[:, valid].T, centers, features, exact_distances)
    expected = reference.project_and_pool(at_points.double(), valid, grid, masked)
    assert patches.shape == (grid**2, 5)
    assert patches.dtype == torch.float32
    torch.testing.assert_close(patches, expected.float(), rtol=1e-4, atol=1e-5)
    background = (expected == 0).all(dim=1)
    assert (patches[background] == 0).all()  # exactly
    assert grid < 8 or 0 < background.sum() < grid**2


@pytest.mark.parametrize("masked", POOLINGS)
@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_features_of_every_point_equal_the_plain_form(size: int, grid: int, masked: bool) -> None:
    xyz = made_up_cloud(size)
    valid = valid_pixels(xyz)
    features = torch.randn(int(valid.sum()), 5, generator=torch.Generator().manual_seed(2))
    patches = align(PointFeatures(features, None), xyz, grid, masked=masked)
    expected = reference.project_and_pool(features.double(), valid, grid, masked)
    torch.testing.assert_close(patches, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [(34, 8), (33, 7), (224, 56)])
def test_patches_are_at_their_place(size: int, grid: int) -> None:
    """If each point's features are its pixel coordinates, each patch is the mean coordinate of its pixels."""
    xyz = torch.ones(3, size, size)
    coordinates = valid_pixels(xyz).nonzero().float()  # (N, 2) row, column
    patches = align(PointFeatures(coordinates, None), xyz, grid).view(grid, grid, 2)
    windows = size - 2  # window k of the first pooling lies around pixel k + 1
    middle = []
    for i in range(grid):
        start, stop = i * windows // grid, -(-(i + 1) * windows // grid)
        middle.append((start + stop - 1) / 2 + 1)
    expected = torch.tensor(middle)
    torch.testing.assert_close(patches[:, :, 0], expected[:, None].expand(grid, grid), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(patches[:, :, 1], expected[None, :].expand(grid, grid), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("masked", POOLINGS)
def test_interpolated_patches_are_at_their_place(masked: bool) -> None:
    """With a border and holes, pixel coordinates interpolated from centers stay within a patch of their place."""
    size, grid = 64, 16
    xyz = made_up_cloud(size)
    coordinates = valid_pixels(xyz).nonzero().float()
    centers = xyz[:, valid_pixels(xyz)].T
    patches = align(PointFeatures(coordinates, centers), xyz, grid, exact_distances=True, masked=masked)
    ones = align(PointFeatures(torch.ones_like(coordinates), centers), xyz, grid, exact_distances=True, masked=masked)
    seen = ones[:, 0] > 0
    place = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"), dim=-1).view(-1, 2)
    expected = place * (size / grid) + (size / grid - 1) / 2
    found = patches[seen] / ones[seen]
    assert seen.float().mean() > 0.5
    assert (found - expected[seen]).abs().max() <= size / grid  # holes shift the mean of a patch


def test_one_point_by_hand() -> None:
    """The patches of a single point, pixel (5, 9) of 16 x 16 in bins of 2 x 2 windows, equal hand-computed values.

    Plain: windows 3..5 by 7..9 of 14 contain it. Masked: windows 4..6 by 8..10 of 16.
    """
    xyz = torch.zeros(3, 16, 16)
    xyz[:, 5, 9] = 0.5
    at_point = PointFeatures(torch.tensor([[6.0, -12.0]]), None)

    plain = align(at_point, xyz, 7).view(7, 7, 2)
    share = torch.zeros(7, 7)
    share[1:3, 3:5] = torch.tensor([[1.0, 2.0], [2.0, 4.0]]) / 36  # bins 1 and 2 have one and two of these windows
    torch.testing.assert_close(plain, share[:, :, None] * torch.tensor([6.0, -12.0]))
    assert ((plain != 0).any(dim=2) == (share > 0)).all()

    masked = align(at_point, xyz, 8, masked=True).view(8, 8, 2)
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[2:4, 4:6] = True
    torch.testing.assert_close(masked, seen[:, :, None] * torch.tensor([6.0, -12.0]))  # mean of one pixel
    assert (masked[~seen] == 0).all()


def test_border_pixels_weigh_less_in_plain_pooling_only() -> None:
    """Both poolings keep a constant, but plain pooling has fewer windows over the outermost ring of pixels."""
    xyz = torch.ones(3, 18, 18)
    ones = torch.ones(18 * 18, 1)
    for masked in (False, True):
        patches = align(PointFeatures(ones, None), xyz, 4, masked=masked)
        torch.testing.assert_close(patches, torch.ones(16, 1))
    ring = torch.zeros(18, 18)
    ring[0], ring[-1], ring[:, 0], ring[:, -1] = 1, 1, 1, 1
    on_ring = PointFeatures(ring.view(-1, 1), None)
    corner = {masked: float(align(on_ring, xyz, 4, masked=masked)[0]) for masked in (False, True)}
    # Plain, 4 windows per bin: 11 of 12 pixels along an axis are inside the ring. Masked, 5 windows per bin (4.5
    # rounded up): pixel 0 is in two windows, which cover 14 pixels that are no padding.
    assert corner[False] == pytest.approx(1 - (11 / 12) ** 2)
    assert corner[True] == pytest.approx(1 - (12 / 14) ** 2)


def test_weights_of_a_patch_sum_to_one_or_to_its_valid_share() -> None:
    xyz = made_up_cloud(33)
    valid = valid_pixels(xyz)
    for masked in (False, True):
        (patch,), (weight,) = pooling_weights(pack_clouds([xyz]), 7, masked)
        assert patch.shape == weight.shape
        assert len(patch) == valid.sum()
        total = torch.zeros(49).index_add_(0, patch.flatten(), weight.flatten())
        expected = reference.project_and_pool(torch.ones(len(patch), 1), valid, 7, masked)[:, 0]
        torch.testing.assert_close(total, expected)
        assert set(total[total > 0].round(decimals=5).tolist()) == {1.0} or not masked


def test_exact_distances_change_the_patches_slightly() -> None:
    xyz = made_up_cloud(64)
    point_features = random_features(xyz, groups=40)
    exact = align(point_features, xyz, 16, exact_distances=True)
    expanded = align(point_features, xyz, 16)
    difference = float((exact - expanded).abs().max() / exact.abs().max())
    assert 1e-6 < difference < 1e-2


def test_a_pixel_is_valid_where_all_three_coordinates_are_nonzero_and_finite() -> None:
    xyz = torch.ones(3, 2, 3)
    xyz[2, 0, 1] = 0.0  # one zero is enough
    xyz[0, 1, 0] = float("nan")
    xyz[1, 1, 2] = float("inf")
    assert valid_pixels(xyz).tolist() == [[True, False, True], [False, True, False]]


def test_dtype_follows_the_features() -> None:
    xyz = made_up_cloud(32)
    features, centers = random_features(xyz, groups=10)
    patches = align(PointFeatures(features.double(), centers), xyz, 8)
    assert patches.dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the extension may be installed")
def test_the_chosen_point_search_is_used() -> None:
    xyz = made_up_cloud(32)
    with pytest.raises(ValueError, match="CUDA"):
        align(random_features(xyz, 10), xyz, 8, exact_distances=True, point_ops="extension")

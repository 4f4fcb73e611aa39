"""FPFH against direct calls of open3d, on a wavy sheet half a meter from the camera."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import build_xyz_backbone
from models.fpfh import FpfhBackbone


def sheet(side: int = 30, step: float = 0.002) -> Tensor:
    """Points `step` apart, so close that every neighborhood is filled, (side**2, 3) float32, meters."""
    x, y = torch.meshgrid(torch.arange(side) * step, torch.arange(side) * step, indexing="ij")
    z = 0.5 + 0.005 * torch.sin(x * 120) * torch.cos(y * 90)
    return torch.stack([x, y, z], dim=2).reshape(-1, 3)


def direct_fpfh(points: Tensor) -> NDArray:
    """FPFH from open3d, (N, 33); each of the three histograms sums to 200."""
    import open3d as o3d

    cloud = o3d.geometry.PointCloud()
    cloud.points = o3d.utility.Vector3dVector(points.double().numpy())
    cloud.estimate_normals(o3d.geometry.KDTreeSearchParamHybrid(radius=0.01, max_nn=30))
    cloud.orient_normals_towards_camera_location(np.zeros(3))
    return np.asarray(
        o3d.pipelines.registration.compute_fpfh_feature(
            cloud, o3d.geometry.KDTreeSearchParamHybrid(radius=0.02, max_nn=100)
        ).data
    ).T


@pytest.fixture(scope="module")
def features() -> Tensor:
    return FpfhBackbone()([sheet()])[0].features


def test_each_point_has_33_finite_features(features: Tensor) -> None:
    backbone = FpfhBackbone()
    assert backbone.embed_dim == 33
    assert features.shape == (900, 33)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert backbone([sheet()])[0].centers is None
    assert features.std(dim=0).max() > 0.01  # features differ between points


def test_features_are_a_tenth_of_open3d_minus_a_constant(features: Tensor) -> None:
    """Features are a tenth of open3d's histograms minus a constant, which does not change distances."""
    theirs = 0.1 * direct_fpfh(sheet())
    np.testing.assert_allclose(theirs.reshape(900, 3, 11).sum(axis=2), 20.0, atol=1e-5)
    np.testing.assert_allclose(features.double().numpy(), theirs - 20 / 11, atol=1e-5)


def test_histograms_are_centered_and_never_exactly_zero(features: Tensor) -> None:
    """No feature is exactly zero, because exact zeros mark patches without points."""
    torch.testing.assert_close(features.reshape(900, 3, 11).mean(dim=2), torch.zeros(900, 3), rtol=0, atol=1e-5)
    assert (direct_fpfh(sheet()) == 0).any()  # open3d has empty bins
    assert (features != 0).all()


def test_rows_are_in_the_order_of_the_points(features: Tensor) -> None:
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    shuffled = FpfhBackbone()([sheet()[order]])[0].features
    close = torch.isclose(shuffled, features[order], atol=1e-3).all(dim=1)
    assert close.float().mean() > 0.9  # ties decide which points a neighborhood of more than 100 keeps


def test_features_are_reproducible(features: Tensor) -> None:
    assert torch.equal(FpfhBackbone()([sheet()])[0].features, features)


def test_a_cloud_with_the_minimum_of_points_has_finite_features() -> None:
    backbone = FpfhBackbone()
    found = backbone([sheet()[: backbone.min_points]])[0].features
    assert found.shape == (backbone.min_points, 33)
    assert torch.isfinite(found).all()


def test_the_factory_needs_no_weights(tmp_path: Path) -> None:
    backbone = build_xyz_backbone(
        "FPFH", tmp_path, num_group=1024, group_size=128, point_norm="cloud", point_ops="auto"
    )
    assert isinstance(backbone, FpfhBackbone)
    assert not list(backbone.parameters())

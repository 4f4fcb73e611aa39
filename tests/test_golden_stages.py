"""Each stage from valid pixels to fusion patches against the recording of the original, on one sample.

test_dataset.py compares the sample itself.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from feature_extractors.alignment import align_to_patches, pack_clouds, valid_pixels
from models import build_feature_fusion, build_rgb_backbone, build_xyz_backbone
from models.point_ops import three_nn_interpolate, three_nn_weights_expanded
from models.point_transformer import PointFeatures, PointTransformer
from models.rgb_backbone import RgbBackbone
from utils.feature_store import resize_patches
from utils.records import Sample

pytestmark = pytest.mark.golden

POINT_BACKBONES = ("Point_MAE", "Point_Bert")
RECORDED_AS = {"running": "eval", "cloud": "bntrain"}  # name in the recording by --point_norm
XYZ_GRID = 56
TOLERANCE = 1e-3

Outputs = dict[str, Tensor]  # outputs of named submodules, without the batch axis


class PointRun(NamedTuple):
    """Features and intermediate outputs of one point transformer for one cloud."""

    features: PointFeatures
    outputs: Outputs


class RgbRun(NamedTuple):
    """Tokens and intermediate outputs of the vision transformer for one image."""

    tokens: Tensor  # (784, 768)
    outputs: Outputs


def assert_close(ours: ArrayLike, theirs: NDArray, tolerance: float = TOLERANCE) -> None:
    """Assert that each entry is within `tolerance` of the largest, and each row within `tolerance` of its norm."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    rows = np.linalg.norm((ours - theirs).reshape(len(ours), -1), axis=1)
    assert (rows <= tolerance * np.linalg.norm(theirs.reshape(len(theirs), -1), axis=1)).all()


def run_recording(module: nn.Module, taps: dict[str, nn.Module], *inputs: Tensor) -> tuple[object, Outputs]:
    """Run `module` and keep the outputs of the submodules `taps`."""
    outputs: Outputs = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = output[0] if output.ndim == 3 else output

        return hook

    handles = [tapped.register_forward_hook(keep(name)) for name, tapped in taps.items()]
    try:
        with torch.inference_mode():
            return module(*inputs), outputs
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, NDArray]:
    return dict(np.load(goldens / "stages_bagel_test_hole_000.npz"))


@pytest.fixture(scope="module")
def sample(golden_samples: dict[str, Sample]) -> Sample:
    return golden_samples["test/hole/000"]


@pytest.fixture(scope="module")
def run_points(golden_weights: Path, sample: Sample) -> Callable[[str, str], PointRun]:
    """Cached PointRun by --xyz_backbone_name and --point_norm."""

    @cache
    def run(name: str, point_norm: str) -> PointRun:
        module = build_xyz_backbone(
            name, golden_weights, num_group=1024, group_size=128, point_norm=point_norm, point_ops="auto"
        )
        assert isinstance(module, PointTransformer)
        taps: dict[str, nn.Module] = {
            "tokens": module.encoder,
            "pos": module.pos_embed,
            "reduce_dim": module.reduce_dim,
        }
        taps |= {f"block{i}": block for i, block in enumerate(module.blocks.blocks)}
        (found,), outputs = run_recording(module, taps, [valid_points(sample)])
        return PointRun(found, outputs)

    return run


@pytest.fixture(scope="module")
def running(run_points: Callable[[str, str], PointRun]) -> PointRun:
    """Point-MAE with running statistics, whose output the recorded later stages use."""
    return run_points("Point_MAE", "running")


@pytest.fixture(scope="module")
def xyz_patches(running: PointRun, sample: Sample) -> Tensor:
    return align_to_patches([running.features], pack_clouds([xyz_of(sample)]), XYZ_GRID)[0]


@pytest.fixture(scope="module")
def rgb_backbone(golden_weights: Path) -> RgbBackbone:
    module = build_rgb_backbone("vit_base_patch8_224_dino", golden_weights, 224)
    return module


@pytest.fixture(scope="module")
def rgb_run(rgb_backbone: RgbBackbone, sample: Sample) -> RgbRun:
    taps = {"patch_embed": rgb_backbone.model.patch_embed}
    taps |= {f"block{i}": block for i, block in enumerate(rgb_backbone.model.blocks)}
    assert sample.rgb is not None
    tokens, outputs = run_recording(rgb_backbone, taps, sample.rgb[None])
    assert isinstance(tokens, Tensor)
    return RgbRun(tokens[0], outputs)


def xyz_of(sample: Sample) -> Tensor:
    assert sample.xyz is not None
    return sample.xyz


def valid_points(sample: Sample) -> Tensor:
    """Valid points in row-major order of the pixels, (N, 3)."""
    return xyz_of(sample)[:, valid_pixels(xyz_of(sample))].T.contiguous()


# Point transformers


def test_valid_pixels(sample: Sample, recorded: dict[str, NDArray]) -> None:
    pixels = valid_pixels(xyz_of(sample)).flatten().nonzero()[:, 0]
    np.testing.assert_array_equal(pixels, recorded["nonzero_indices"])


@pytest.mark.parametrize("point_norm", RECORDED_AS)
@pytest.mark.parametrize("name", POINT_BACKBONES)
def test_point_features(
    name: str,
    point_norm: str,
    run_points: Callable[[str, str], PointRun],
    recorded: dict[str, NDArray],
) -> None:
    features = run_points(name, point_norm).features.features.T  # (1152, 1024), as recorded
    kind = RECORDED_AS[point_norm]
    assert_close(features[:, ::64], recorded[f"{name}_{kind}_feat_s"])
    np.testing.assert_allclose(features.norm(dim=0), recorded[f"{name}_{kind}_feat_norms"], rtol=TOLERANCE)


def test_point_norms_differ(run_points: Callable[[str, str], PointRun]) -> None:
    """Features of the two --point_norm values differ by more than the tolerance, so the recordings distinguish them."""
    for name in POINT_BACKBONES:
        ours = run_points(name, "running").features.features
        assert (ours - run_points(name, "cloud").features.features).norm() > 10 * TOLERANCE * ours.norm()


@pytest.mark.parametrize(
    ("name", "stage", "stride"),
    [
        *((name, "tokens", 16) for name in POINT_BACKBONES),
        *((name, "pos", 64) for name in POINT_BACKBONES),
        ("Point_Bert", "reduce_dim", 64),
        *((name, f"block{block}", 128) for name in POINT_BACKBONES for block in (0, 3, 7, 11)),
    ],
)
def test_point_stages(
    name: str,
    stage: str,
    stride: int,
    run_points: Callable[[str, str], PointRun],
    recorded: dict[str, NDArray],
) -> None:
    output = run_points(name, "running").outputs[stage]
    assert_close(output[::stride], recorded[f"{name}_eval_{stage}_s"])


def test_centers_are_the_recorded_points(running: PointRun, sample: Sample, recorded: dict[str, NDArray]) -> None:
    assert running.features.centers is not None
    assert torch.equal(running.features.centers, valid_points(sample)[torch.from_numpy(recorded["fps_idx"]).long()])


# Interpolation and pooling


def test_exact_interpolation(running: PointRun, sample: Sample, recorded: dict[str, NDArray]) -> None:
    features, centers = running.features
    assert centers is not None
    points = valid_points(sample)[torch.from_numpy(recorded["interp_cols"]).long()]
    interpolated = three_nn_interpolate(points[None], centers[None], features[None])[0]  # (79, 1152)
    assert_close(interpolated.T[::16], recorded["Point_MAE_eval_interp_exact64_s"])


def test_interpolation_by_expanded_squares(running: PointRun, sample: Sample, recorded: dict[str, NDArray]) -> None:
    features, centers = running.features
    assert centers is not None
    weight, index = three_nn_weights_expanded(valid_points(sample)[None], centers[None])
    interpolated = (features[index[0]] * weight[0, :, :, None]).sum(dim=1)  # (N, 1152)
    columns = torch.from_numpy(recorded["interp_cols"]).long()
    assert_close(interpolated[columns].T[::16], recorded["Point_MAE_eval_interp_s"])
    np.testing.assert_allclose(interpolated.norm(dim=1), recorded["Point_MAE_eval_interp_norms"], rtol=TOLERANCE)


def test_xyz_patches(xyz_patches: Tensor, recorded: dict[str, NDArray]) -> None:
    assert xyz_patches.shape == (XYZ_GRID**2, 1152)
    assert_close(xyz_patches[::25], recorded["xyz_patch_s"])
    assert_close(xyz_patches.norm(dim=1), recorded["xyz_patch_norms"])


def test_patches_without_a_point_are_exactly_zero(xyz_patches: Tensor, recorded: dict[str, NDArray]) -> None:
    background = recorded["xyz_patch_norms"] == 0
    assert background.any()
    np.testing.assert_array_equal((xyz_patches == 0).all(dim=1), background)


# Vision transformer


@pytest.mark.parametrize("stage", ["patch_embed", "block0", "block5", "block11"])
def test_rgb_stages(rgb_run: RgbRun, recorded: dict[str, NDArray], stage: str) -> None:
    assert_close(rgb_run.outputs[stage][::40], recorded[f"vit_{stage}_s"])


def test_rgb_patches(rgb_run: RgbRun, recorded: dict[str, NDArray]) -> None:
    assert rgb_run.tokens.shape == (784, 768)
    assert_close(rgb_run.tokens[::12], recorded["vit_s"])
    np.testing.assert_allclose(rgb_run.tokens.norm(dim=1), recorded["vit_norms"], rtol=TOLERANCE)


def test_rgb_patches_on_the_xyz_grid(rgb_run: RgbRun, recorded: dict[str, NDArray]) -> None:
    assert_close(resize_patches(rgb_run.tokens, XYZ_GRID)[::49], recorded["rgb_patch2_s"])


# Fusion


def test_fusion_patches(
    golden_weights: Path, xyz_patches: Tensor, rgb_run: RgbRun, recorded: dict[str, NDArray]
) -> None:
    module = build_feature_fusion(golden_weights / "uff.pth", xyz_dim=1152, rgb_dim=768)
    with torch.inference_mode():
        fused = module.fuse(xyz_patches, resize_patches(rgb_run.tokens, XYZ_GRID))
    assert fused.shape == (XYZ_GRID**2, 1920)
    assert_close(fused[::49], recorded["uff_patch_s"])
    np.testing.assert_allclose(fused.norm(dim=1), recorded["uff_patch_norms"], rtol=TOLERANCE)

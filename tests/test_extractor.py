"""Extraction of patch features: the networks that are built, their input, and refused samples."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Barrier

import pytest
import torch
from tiny_networks import (
    DOUBLE,
    GRID,
    RGB_DIM,
    RGB_GRID,
    SINGLE,
    SIZE,
    TRIPLE,
    XYZ_DIM,
    build,
    fit,
    made_up_samples,
    one_thread,  # noqa: F401 (a fixture)
    settings,
    stub_fusion,
    stub_rgb,
    stub_xyz,
)
from torch import Tensor, nn

from feature_extractors import extractor as extractor_module
from feature_extractors.alignment import align_to_patches, pack_clouds, valid_pixels
from feature_extractors.config import METHODS, Protocol
from feature_extractors.extractor import PatchExtractor, build_extractor
from models.point_transformer import PointBackbone, PointFeatures
from utils.errors import InputError
from utils.records import Sample


@pytest.mark.parametrize("given", [False, True], ids=["searched", "given files"])
@pytest.mark.parametrize(
    ("method_name", "use_uff"), [*((name, False) for name in METHODS), ("Fusion", True), (TRIPLE, True)]
)
def test_only_the_needed_networks_are_built(
    method_name: str, use_uff: bool, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: dict[str, tuple[object, ...]] = {}

    def building(kind: str, stub: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def build_one(*args: object, **numbers: object) -> nn.Module:
            built[kind] = (*args, numbers)
            return stub(*args, **numbers)

        return build_one

    stubs = {"rgb_backbone": stub_rgb, "xyz_backbone": stub_xyz, "feature_fusion": stub_fusion}
    for kind, stub in stubs.items():
        monkeypatch.setattr(extractor_module, f"build_{kind}", building(kind, stub))
    config = settings(method_name, use_uff=use_uff, point_norm="running", rgb_layers=(2, 5))
    files = {"rgb_checkpoint": Path("mine/rgb.pth"), "xyz_checkpoint": Path("mine/xyz.pth")} if given else {}
    extractor = build_extractor(config, Path("weights"), Path("folder/uff.pth"), **files)

    numbers = {"num_group": 24, "group_size": 12, "point_norm": "running", "point_ops": "auto"}
    numbers["checkpoint"] = files.get("xyz_checkpoint")
    expected: dict[str, tuple[object, ...]] = {}
    if method_name != "Point_MAE":
        rgb_checkpoint = files.get("rgb_checkpoint")
        expected["rgb_backbone"] = ("vit_base_patch8_224_dino", Path("weights"), SIZE, rgb_checkpoint, (2, 5), {})
    if method_name != "DINO":
        expected["xyz_backbone"] = ("Point_MAE", Path("weights"), numbers)
    if use_uff:
        expected["feature_fusion"] = (Path("folder/uff.pth"), {"xyz_dim": XYZ_DIM, "rgb_dim": RGB_DIM})
    assert built == expected
    for kind in stubs:
        network = getattr(extractor, kind)
        assert (network is not None) == (kind in expected)
        assert network is None or not network.training


@pytest.mark.parametrize("method_name", METHODS)
def test_features_have_the_banks_of_the_method(method_name: str) -> None:
    """Only the banks of the method have features, and an unused modality may be missing."""
    rgb, xyz = (kind in METHODS[method_name].modalities for kind in ("rgb", "xyz"))
    sample = made_up_samples("train")[0]
    sample = sample._replace(rgb=sample.rgb if rgb else None, xyz=sample.xyz if xyz else None)
    features = build(settings(method_name))(sample)
    assert (features.rgb.shape == (RGB_GRID**2, RGB_DIM)) if rgb else features.rgb is None
    assert (features.xyz.shape == (GRID**2, XYZ_DIM)) if xyz else features.xyz is None
    fused = "fusion" in METHODS[method_name].banks
    assert (features.fusion.shape == (GRID**2, XYZ_DIM + RGB_DIM)) if fused else features.fusion is None


def test_half_precision_rounds_only_the_weights_of_the_blocks() -> None:
    extractor = build(settings(DOUBLE, precision="bf16"))
    dtypes = {name: weight.dtype for name, weight in extractor.xyz_backbone.named_parameters() if weight.ndim > 1}
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert half == {name for name in dtypes if name.startswith("blocks.")} < set(dtypes)


def test_both_backbones_run_at_the_same_time() -> None:
    """Each backbone waits until the other has started."""
    extractor = build(settings(DOUBLE))
    samples = made_up_samples("train")[:2]
    expected = extractor.extract(samples)
    meeting = Barrier(2)

    def meet(network: nn.Module, _: object) -> None:
        meeting.wait(timeout=30)
        hooks[network].remove()  # nobody waits for the second cloud

    networks = (extractor.rgb_backbone, extractor.xyz_backbone)
    hooks = {network: network.register_forward_pre_hook(meet) for network in networks}
    found = extractor.extract(samples)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.rgb, theirs.rgb)
        assert torch.equal(ours.xyz, theirs.xyz)


def test_convolutions_of_the_rgb_backbone_are_not_rounded() -> None:
    extractor, seen = build(settings(DOUBLE)), []
    extractor.rgb_backbone.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    extractor(made_up_samples("train")[0])
    assert seen == [False]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_alignment_follows_the_protocol(exact: bool, masked: bool) -> None:
    sample = made_up_samples("train")[0]
    extractor = build(settings(SINGLE, protocol=Protocol(exact_distances=exact, masked_pooling=masked)))
    with torch.inference_mode():
        (point_features,) = extractor.xyz_backbone([sample.xyz[:, valid_pixels(sample.xyz)].T.contiguous()])
    cloud = [point_features], pack_clouds([sample.xyz]), GRID
    (expected,) = align_to_patches(*cloud, exact_distances=exact, masked=masked)
    (other,) = align_to_patches(*cloud, exact_distances=not exact, masked=masked)
    features = extractor(sample).xyz
    assert torch.equal(features, expected)
    assert not torch.equal(features, other)


def test_without_uff_fusion_patches_concatenate_xyz_and_rgb_of_the_same_place() -> None:
    features = build(settings("Fusion"))(made_up_samples("train")[0])
    for i in range(GRID):
        for j in range(GRID):
            patch = features.fusion[i * GRID + j]
            assert torch.equal(patch[:XYZ_DIM], features.xyz[i * GRID + j])
            torch.testing.assert_close(patch[XYZ_DIM:], features.rgb[i // 2 * RGB_GRID + j // 2])


def test_with_uff_fusion_patches_are_the_output_of_the_module() -> None:
    sample = made_up_samples("train")[0]
    plain = build(settings("Fusion"))(sample)
    extractor = build(settings("Fusion", use_uff=True))
    features = extractor(sample)
    assert torch.equal(features.xyz, plain.xyz)
    with torch.inference_mode():
        expected = extractor.feature_fusion.fuse(plain.fusion[:, :XYZ_DIM], plain.fusion[:, XYZ_DIM:])
    torch.testing.assert_close(features.fusion, expected)


def with_points(count: int) -> Sample:
    """Training sample with only its first `count` valid points."""
    sample = made_up_samples("train")[1]
    valid = (sample.xyz != 0).all(dim=0).flatten()
    kept = (valid & (valid.cumsum(dim=0) <= count)).view(SIZE, SIZE)
    return sample._replace(xyz=sample.xyz * kept)


@pytest.mark.parametrize("count", [0, 1, 23])
def test_a_sample_with_too_few_points_is_named(count: int) -> None:
    with pytest.raises(InputError) as error:
        build(settings(SINGLE))(with_points(count))
    message = str(error.value)
    assert f"train/good/001 has {count} valid points at 32x32, but Point_MAE needs at least 24" in message
    assert "--num_group" in message
    assert "\n" not in message


def test_a_sample_with_just_enough_points_is_accepted() -> None:
    assert torch.isfinite(build(settings(SINGLE))(with_points(24)).xyz).all()


def test_the_larger_of_groups_and_group_size_is_needed() -> None:
    with pytest.raises(InputError, match="needs at least 40"):
        build(settings(SINGLE, group_size=40))(with_points(39))


@pytest.mark.parametrize(("kind", "method_name"), [("rgb", "DINO"), ("xyz", "Point_MAE"), ("rgb", TRIPLE)])
def test_a_missing_modality_is_named(kind: str, method_name: str) -> None:
    sample = made_up_samples("train")[2]._replace(**{kind: None})
    with pytest.raises(InputError, match=rf"train/good/002 has no {kind} file, but {re.escape(method_name)} needs it"):
        build(settings(method_name))(sample)


class PointwiseStub(PointBackbone):
    """3D backbone with features for each point, like FPFH."""

    embed_dim = 3
    min_points = 4

    def forward(self, clouds: Sequence[Tensor]) -> list[PointFeatures]:
        return [PointFeatures(1 + points.sin(), None) for points in clouds]


def test_a_backbone_with_features_of_every_point_is_supported() -> None:
    config = settings(SINGLE)
    detector, _ = fit(config, PatchExtractor(config, None, PointwiseStub()))
    predictions = [detector.predict(sample) for sample in made_up_samples("test")]
    assert all(math.isfinite(prediction.score) for prediction in predictions)
    with pytest.raises(InputError, match=r"needs at least 4\. Repair the point cloud\.$"):  # it has no groups to lower
        detector.predict(with_points(3))

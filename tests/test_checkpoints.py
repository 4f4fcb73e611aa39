"""Published checkpoints are read bit for bit; every other file ends in a one-line error and runs no code."""

import argparse
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import build_extractor
from models import XYZ_BACKBONES, CheckpointFiles, build_feature_fusion, build_rgb_backbone, build_xyz_backbone
from models.checkpoints import (
    State,
    WithoutRandomWeights,
    feature_fusion_state,
    load_strict,
    point_transformer_state,
    rgb_state,
    weights_checksum,
)
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointTransformer
from models.rgb_backbone import RgbBackbone, load_weights
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

GROUPING = {"num_group": 8, "group_size": 4, "point_norm": "cloud", "point_ops": "auto"}


class TinyModel(nn.Module):
    """Module with two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)


class TouchesAFile:
    """Object that runs a shell command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def weights(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return TinyModel().state_dict()


def message_of(read: Callable[[], object], path: Path) -> str:
    """One-line message of the InputError, which names the file."""
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def small_point_transformer() -> PointTransformer:
    return PointTransformer(8, 4, width=24, depth=3, num_heads=2, encoder_dim=24)


# Published formats


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "file", "prefix", "ignored"),
    [
        (
            "Point_MAE",
            "pointmae_pretrain.pth",
            "MAE_encoder.",
            ("MAE_decoder.", "decoder_", "mask_token", "increase_dim."),
        ),
        (
            "Point_Bert",
            "Point-BERT.pth",
            "transformer_q.",
            ("transformer_k.", "dvae.", "transformer_q.cls_head.", "queue"),
        ),
    ],
)
def test_published_point_transformer_is_read_completely(
    golden_weights: Path, name: str, file: str, prefix: str, ignored: tuple[str, ...]
) -> None:
    module = build_xyz_backbone(name, golden_weights, **GROUPING)
    state = module.state_dict()
    published = read_checkpoint(golden_weights / file)["base_model"]
    for key, value in published.items():
        key = key.removeprefix("module.")
        if not key.startswith(ignored):
            assert torch.equal(state.pop(key.removeprefix(prefix)), value), key
    assert not state, "parameters that no key of the file set"
    assert not module.training


@pytest.mark.golden
def test_published_dino_is_read_completely(golden_weights: Path) -> None:
    backbone = build_rgb_backbone("vit_base_patch8_224_dino", golden_weights, 224)
    published = read_checkpoint(golden_weights / "dino_vitbase8_pretrain.pth")
    assert backbone.model.state_dict().keys() == published.keys()
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, published[key]), key
    assert not backbone.training


@pytest.mark.golden
def test_published_feature_fusion_is_read_completely(golden_weights: Path) -> None:
    path = golden_weights / "uff.pth"
    module = build_feature_fusion(path, xyz_dim=1152, rgb_dim=768)
    published = read_checkpoint(path)
    assert isinstance(published["args"], argparse.Namespace)  # saved beside the weights
    assert module.state_dict().keys() == published["model"].keys()
    for key, value in module.state_dict().items():
        assert torch.equal(value, published["model"][key]), key
    assert not module.training


@pytest.mark.golden
def test_files_of_other_models_are_refused(golden_weights: Path) -> None:
    mae, bert = golden_weights / "pointmae_pretrain.pth", golden_weights / "Point-BERT.pth"
    fusion = golden_weights / "uff.pth"
    assert "has no key that starts with 'MAE_encoder.'" in message_of(lambda: point_state("Point_MAE", bert), bert)
    assert "has no key that starts with 'transformer_q.'" in message_of(lambda: point_state("Point_Bert", mae), mae)
    message_of(lambda: point_state("Point_MAE", fusion), fusion)
    message_of(lambda: build_feature_fusion(mae, xyz_dim=1152, rgb_dim=768), mae)
    message_of(lambda: load_weights(RgbBackbone("vit_tiny_patch16_224", 32), fusion), fusion)
    widths = message_of(lambda: build_feature_fusion(fusion, xyz_dim=33, rgb_dim=768), fusion)
    assert "1152 (xyz) and 768 (rgb) wide, but the backbones give 33 and 768" in widths


# Prefixes and containers


@pytest.mark.parametrize("parallel", ["", "module."])
@pytest.mark.parametrize("container", ["base_model", None])
def test_point_mae_keys(tmp_path: Path, parallel: str, container: str | None) -> None:
    written = small_point_transformer().state_dict()
    state = {f"{parallel}MAE_encoder.{key}": value for key, value in written.items()}
    state[f"{parallel}MAE_decoder.blocks.0.norm1.weight"] = torch.ones(24)
    state[f"{parallel}mask_token"] = torch.ones(1, 1, 24)
    torch.save({container: state, "epoch": 300} if container else state, tmp_path / "file.pth")
    assert_read_back(written, point_state("Point_MAE", tmp_path / "file.pth"))


@pytest.mark.parametrize("parallel", ["", "module."])
def test_point_bert_keys(tmp_path: Path, parallel: str) -> None:
    written = small_point_transformer().state_dict()
    state = {f"{parallel}transformer_q.{key}": value for key, value in written.items()}
    state |= {f"{parallel}transformer_k.{key}": torch.zeros_like(value) for key, value in written.items()}
    state[f"{parallel}transformer_q.cls_head.0.weight"] = torch.ones(2, 2)
    state[f"{parallel}queue"] = torch.ones(4)
    torch.save({"base_model": state}, tmp_path / "file.pth")
    assert_read_back(written, point_state("Point_Bert", tmp_path / "file.pth"))


def point_state(name: str, path: Path) -> State:
    """Weights of a point transformer in a file, selected by its entry in XYZ_BACKBONES."""
    spec = XYZ_BACKBONES[name]
    return point_transformer_state(read_checkpoint(path), path, spec.prefix, spec.left_out)


def assert_read_back(written: State, read: State) -> None:
    torch.manual_seed(1)
    module = small_point_transformer()
    load_strict(module, read, "file.pth")
    for key, value in module.state_dict().items():
        assert torch.equal(value, written[key]), key


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("container", [None, "state_dict", "teacher"])
def test_rgb_keys(tmp_path: Path, prefix: str, container: str | None) -> None:
    written = weights()
    state = {f"{prefix}{key}": value for key, value in written.items()}
    torch.save({container: state, "epoch": 100} if container else state, tmp_path / "file.pth")
    found = rgb_state(read_checkpoint(tmp_path / "file.pth"), tmp_path / "file.pth")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], value) for key, value in written.items())


def test_the_teacher_is_preferred_to_the_student(tmp_path: Path) -> None:
    torch.save({"student": weights(1), "teacher": weights(0)}, tmp_path / "file.pth")
    found = rgb_state(read_checkpoint(tmp_path / "file.pth"), tmp_path / "file.pth")
    assert torch.equal(found["linear.weight"], weights(0)["linear.weight"])


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {}}, {"model": [1, 2]}, {"model": {"a": 1}}, {"model": {0: torch.ones(1)}}, [torch.ones(1)], 3],
    ids=["empty", "empty model", "list", "number in it", "keys that are numbers", "list of tensors", "number"],
)
def test_files_without_a_state_dict_are_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint-1.pth"
    torch.save(content, path)
    message = message_of(lambda: feature_fusion_state(read_checkpoint(path), path), path)
    assert "holds no state dict, flat or under 'model'" in message


# Objects saved beside the weights


def as_numpy_1(path: Path) -> None:
    """Rename NumPy's modules in the file to their names in NumPy 1, as in the published files."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray\nscalar" in content
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
            archive.writestr(entry, content)


@pytest.mark.parametrize("numpy_1", [False, True], ids=["NumPy 2", "NumPy 1"])
@pytest.mark.parametrize("code", ["f2", "f4", "f8", "i4", "i8", "u1", "?"])
def test_numpy_scalars_beside_the_weights_are_read(tmp_path: Path, code: str, numpy_1: bool) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model": weights(), "metrics": {"acc": np.dtype(code).type(1)}}, path)
    if numpy_1:
        as_numpy_1(path)
    read = read_checkpoint(path)
    assert read["metrics"]["acc"] == 1
    assert read["metrics"]["acc"].dtype == np.dtype(code)
    assert torch.equal(read["model"]["linear.weight"], weights()["linear.weight"])


@pytest.mark.parametrize("zipped", [False, True], ids=["old format", "zip"])
def test_namespaces_and_plain_containers_beside_the_weights_are_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "file.pth"
    beside = {"args": argparse.Namespace(lr=0.003, data_path="x"), "epoch": 2, "notes": ["a", (1.5, None, True)]}
    torch.save({"model": weights(), **beside}, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert {key: read[key] for key in beside} == beside
    assert torch.equal(read["model"]["linear.weight"], weights()["linear.weight"])


# Refused files


@pytest.mark.parametrize("zipped", [False, True], ids=["old format", "zip"])
@pytest.mark.parametrize("place", ["beside", "in a namespace", "in the weights", "whole"])
def test_a_malicious_file_runs_nothing(tmp_path: Path, place: str, zipped: bool) -> None:
    touched, path = tmp_path / "touched", tmp_path / "file.pth"
    evil = TouchesAFile(touched)
    content = {
        "beside": {"model": weights(), "extra": evil},
        "in a namespace": {"model": weights(), "args": argparse.Namespace(extra=evil)},
        "in the weights": {"model": {**weights(), "extra": evil}},
        "whole": evil,
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = message_of(lambda: read_checkpoint(path), path)
    assert f"it holds a {os.system.__module__}.system" in message
    assert not touched.exists()
    pickle.loads(pickle.dumps(evil))  # the object does run its command
    assert touched.exists()


def test_a_bare_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "file.pth"
    path.write_bytes(pickle.dumps(TouchesAFile(touched)))
    message_of(lambda: read_checkpoint(path), path)
    assert not touched.exists()


def test_pickled_modules_are_refused_without_advice_to_trust_them(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(TinyModel(), path)
    message = message_of(lambda: read_checkpoint(path), path)
    assert "TinyModel" in message
    assert "weights_only" not in message  # torch's own message explains how to disable the check
    assert "safe_globals" not in message


@pytest.mark.parametrize(
    "content", [b"", b"<html>\n404\n</html>\n", bytes(range(256)), b"PK\x03\x04"], ids=["empty", "html", "bytes", "zip"]
)
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert "Download it again" in message_of(lambda: read_checkpoint(path), path)


@pytest.mark.parametrize("zipped", [False, True], ids=["old format", "zip"])
def test_a_truncated_file_is_named(tmp_path: Path, zipped: bool) -> None:
    """A file truncated at any size is named, also in torch's old format, which DINO and Point-MAE are published in."""
    path = tmp_path / "file.pth"
    content = {"model": weights(), "args": argparse.Namespace(lr=0.1), "epoch": 1}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 300)):
        path.write_bytes(whole[:size])
        message_of(lambda: read_checkpoint(path), path)


@pytest.mark.parametrize("zipped", [False, True], ids=["old format", "zip"])
def test_a_file_with_flipped_bytes_is_read_or_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model": weights(), "args": argparse.Namespace(lr=0.1)}, path, _use_new_zipfile_serialization=zipped)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            feature_fusion_state(read_checkpoint(path), path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


# Strict loading


def renamed(state: State) -> State:
    return {("linear.kernel" if key == "linear.weight" else key): value for key, value in state.items()}


def shortened(state: State) -> State:
    return {key: value for key, value in state.items() if key != "linear.bias"}


def reshaped(state: State) -> State:
    return {**state, "linear.weight": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (renamed, ["missing: linear.weight", "left over: linear.kernel"]),
        (shortened, ["missing: linear.bias"]),
        (lambda state: {**state, "extra.weight": torch.ones(1)}, ["left over: extra.weight"]),
        (reshaped, ["of another shape: linear.weight (2, 4) for (2, 3)"]),
    ],
    ids=["renamed", "missing", "left over", "another shape"],
)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, damage: Callable[[State], State], expected: list[str]) -> None:
    path = tmp_path / "checkpoint-1.pth"
    torch.save({"model": damage(weights())}, path)
    module = TinyModel()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    message = message_of(lambda: load_strict(module, feature_fusion_state(read_checkpoint(path), path), path), path)
    assert message.startswith(f"{path} does not fit TinyModel: ")
    for words in expected:
        assert words in message
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), "a refused file must not be loaded in part"


def test_many_keys_are_counted_instead_of_listed() -> None:
    state = weights() | {f"extra{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(InputError, match="left over: extra0, extra1, extra2, extra3, extra4 and 4 more"):
        load_strict(TinyModel(), state, "file.pth")


@pytest.mark.parametrize(
    ("key", "replacement", "expected"),
    [
        ("pos_embed", None, "missing: pos_embed"),
        ("pos_embed", torch.ones(1, 100, 192), "pos_embed (1, 100, 192) for (1, 5, 192)"),
        ("pos_embed", torch.ones(192), "pos_embed (192,) for (1, 5, 192)"),
        ("pos_embed", torch.ones(1, 5, 64), "pos_embed (1, 5, 64) for (1, 5, 192)"),
        ("blocks.3.attn.qkv.weight", None, "missing: blocks.3.attn.qkv.weight"),
        ("norm.weight", torch.ones(64), "norm.weight (64,) for (192,)"),
        ("blocks.12.norm1.weight", torch.ones(192), "left over: blocks.12.norm1.weight"),
    ],
)
def test_vision_transformer_keys_that_do_not_fit_are_named(
    tmp_path: Path, key: str, replacement: Tensor | None, expected: str
) -> None:
    backbone = RgbBackbone("vit_tiny_patch16_224", 32)
    state = backbone.model.state_dict()
    if replacement is None:
        del state[key]
    else:
        state[key] = replacement
    path = tmp_path / "dino.pth"
    torch.save(state, path)
    assert expected in message_of(lambda: load_weights(backbone, path), path)


def test_feature_fusion_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, state = tmp_path / "checkpoint-1.pth", FeatureFusion(5, 3, head_dim=4).state_dict()
    for key, value, expected in (
        ("xyz_norm.weight", None, "'xyz_norm.weight' is missing"),
        ("rgb_mlp.fc2.bias", None, "missing: rgb_mlp.fc2.bias"),
        ("rgb_head.weight", torch.ones(4, 7), "rgb_head.weight (4, 7) for (4, 3)"),
    ):
        damaged = {name: tensor for name, tensor in state.items() if name != key}
        torch.save({"model": damaged if value is None else damaged | {key: value}}, path)
        assert expected in message_of(lambda: build_feature_fusion(path, xyz_dim=5, rgb_dim=3), path)


# Missing files


def test_the_first_existing_file_name_is_found(tmp_path: Path) -> None:
    files = CheckpointFiles(("a.pth", "b.pth"), "https://example.org")
    assert files.find(tmp_path) is None
    (tmp_path / "b.pth").touch()
    assert files.find(tmp_path) == tmp_path / "b.pth"
    (tmp_path / "a.pth").touch()
    assert files.find(tmp_path) == tmp_path / "a.pth"
    (tmp_path / "c.pth").mkdir()
    assert CheckpointFiles(("c.pth",), "").find(tmp_path) is None  # a folder is no file


def test_the_error_for_a_missing_file(tmp_path: Path) -> None:
    files = CheckpointFiles(("a.pth", "b.pth"), "https://example.org/weights")
    assert str(files) == "a.pth or b.pth, from https://example.org/weights"
    assert str(files.missing(tmp_path)) == (
        f"No checkpoint a.pth or b.pth in {tmp_path}. Download it from https://example.org/weights and put it there."
    )
    assert str(files.missing(tmp_path, ", and it is Sunday")) == (
        f"No checkpoint a.pth or b.pth in {tmp_path}, and it is Sunday. "
        "Download it from https://example.org/weights and put it there."
    )


@pytest.mark.parametrize("name", [name for name, spec in XYZ_BACKBONES.items() if spec.files.names])
@pytest.mark.parametrize("folder", ["checkpoints", "absent"])
def test_a_missing_file_names_file_folder_and_source(tmp_path: Path, name: str, folder: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    spec = XYZ_BACKBONES[name]
    message = message_of(lambda: build_xyz_backbone(name, tmp_path / folder, **GROUPING), tmp_path / folder)
    for words in (*spec.files.names, spec.files.source, "https://github.com/", "Download it"):
        assert words in message


def test_a_missing_fusion_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-9.pth"
    message = message_of(lambda: build_feature_fusion(path, xyz_dim=5, rgb_dim=3), path)
    assert "does not exist. Check the path or train it first." in message


def test_unknown_xyz_backbone_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--xyz_backbone_name 'PointNet' is unknown\. Choose one of Point_MAE, Point_Bert"
    ):
        build_xyz_backbone("PointNet", tmp_path, **GROUPING)


# Given files


def point_mae_file(path: Path) -> State:
    """Write a Point-MAE checkpoint with random weights, and return the weights."""
    torch.manual_seed(3)
    spec = XYZ_BACKBONES["Point_MAE"]
    state = PointTransformer(8, 4, **spec.settings).state_dict()
    torch.save({"base_model": {f"MAE_encoder.{key}": value for key, value in state.items()}}, path)
    return state


def test_a_given_xyz_checkpoint_is_preferred_to_the_folder(tmp_path: Path) -> None:
    """A given checkpoint may have any name, and the folder's own file is not read."""
    (tmp_path / "pointmae_pretrain.pth").write_text("not to be read")
    given = tmp_path / "elsewhere" / "mine.bin"
    given.parent.mkdir()
    written = point_mae_file(given)
    module = build_xyz_backbone("Point_MAE", tmp_path, **GROUPING, checkpoint=given)
    assert module.state_dict().keys() == written.keys()
    for key, value in module.state_dict().items():
        assert torch.equal(value, written[key]), key
    assert not module.training


@pytest.mark.parametrize("name", XYZ_BACKBONES)
def test_a_given_xyz_checkpoint_that_is_missing_or_unused_is_named(tmp_path: Path, name: str) -> None:
    given = tmp_path / "absent.pth"
    message = message_of(lambda: build_xyz_backbone(name, tmp_path, **GROUPING, checkpoint=given), given)
    if not XYZ_BACKBONES[name].files.names:
        assert message == f"{given} is not used, because {name} needs no weights. Leave it out."
    else:
        assert "does not exist" in message


# .safetensors


def test_safetensors_are_read_onto_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    read = read_checkpoint(path)
    assert read.keys() == weights().keys()
    for key, value in read.items():
        assert torch.equal(value, weights()[key]), key
        assert value.device.type == "cpu"


def test_truncated_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "cannot be read as a checkpoint" in message_of(lambda: read_checkpoint(path), path)


@pytest.mark.parametrize("content", [b"<html>\n404\n</html>\n", bytes(range(256))], ids=["html", "bytes"])
def test_files_that_are_no_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "Download it again" in message_of(lambda: read_checkpoint(path), path)


def test_no_random_weights_are_drawn_for_a_checkpoint(tmp_path: Path) -> None:
    """A network that is built without initial weights equals one with them after loading; buffers are set in both."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2))

    expected, before = build(), torch.get_rng_state()
    with WithoutRandomWeights():
        found = build()
    assert torch.equal(torch.get_rng_state(), before)
    parameters = {name for name, _ in found.named_parameters()}
    buffers = {name: value for name, value in found.state_dict().items() if name not in parameters}
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in buffers.items())
    load_strict(found, expected.state_dict(), tmp_path)
    assert weights_checksum(found) == weights_checksum(expected)


@pytest.mark.parametrize("name", ["absent.pth", "folder.pth"])
def test_missing_weights_are_found_before_random_ones_are_drawn(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    before = torch.get_rng_state()
    config = DetectorConfig("DINO+Point_MAE")
    for modality in ("rgb", "xyz"):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            if modality == "rgb":
                models.build_rgb_backbone(config.rgb_backbone_name, tmp_path, 224, tmp_path / name)
            else:
                build_extractor(config, tmp_path, None, xyz_checkpoint=tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)

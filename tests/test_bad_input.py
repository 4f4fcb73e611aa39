"""Bad input to main.py ends with one clear error and exit code 2, before the work starts wherever possible."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from main_runs import (
    PIP_BACKBONES,
    RGB_DIM,
    SIDE,
    SMALL,
    XYZ_DIM,
    bagels_fixture,  # noqa: F401 (a fixture)
    error_line,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    process,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    surface,
    write_bagels,
    write_cloud,
    write_image,
)

from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import PatchExtractor
from models import RGB_BACKBONES, XYZ_BACKBONES
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointTransformer
from runner import class_run, preparation


@pytest.fixture
def no_networks_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "build_extractor", lambda *_, **__: pytest.fail("networks built too early"))


@pytest.fixture
def no_class_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_run, "run_class", lambda *_, **__: pytest.fail("work started too early"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_smallest_dataset_is_accepted(bagels: Path, tmp_path: Path) -> None:
    """The unchanged dataset runs, so the refusals below are due to the damage that each test makes."""
    run = run_into(tmp_path / "out", "--method_name", "DINO+Point_MAE", "--dataset_path", bagels, *SMALL)
    assert [sample["path"] for sample in run.entry["samples"]] == ["test/good/000", "test/hole/000"]


def refusal_of_files(capsys: pytest.CaptureFixture[str], root: Path, *flags: object) -> str:
    """Error of a run on this dataset, which makes no results folder."""
    message = refusal(capsys, "--dataset_path", root, *SMALL, "--output_dir", root.parent / "out", *flags)
    assert not (root.parent / "out").exists()
    return message


@pytest.mark.usefixtures("no_networks_built")
@pytest.mark.parametrize(
    ("class_folder", "flags", "expected"),
    [
        ("data/bagel", ["--classes", "bagle"], ["'bagle'", "holds bagel", "--classes"]),
        ("elsewhere/bagel", [], ["data is not a folder", "Download MVTec 3D-AD", "--dataset_path"]),
        ("data/bracket", [], ["none of the mvtec3d classes, only bracket", "--classes"]),
        ("data/bagel", ["--dataset_type", "eyecandies"], ["none of the eyecandies classes, only bagel", "--classes"]),
    ],
)
def test_missing_classes_and_folders_are_refused(
    bagels: Path, capsys: pytest.CaptureFixture[str], class_folder: str, flags: list[str], expected: list[str]
) -> None:
    shutil.move(bagels / "bagel", bagels.parent / "kept")
    bagels.rmdir()
    shutil.move(bagels.parent / "kept", bagels.parent / class_folder)
    message = refusal_of_files(capsys, bagels, *flags)
    for words in expected:
        assert words in message


@pytest.mark.usefixtures("no_networks_built")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train/good/*/*", ["No training files in", "bagel/train/good", "Fill its folder rgb and xyz"]),
        ("test/*/*/*", ["No test files in", "bagel/test/good", "Fill its folder rgb and xyz"]),
        ("train/good/xyz/001.tiff", ["1 xyz files for 2 samples in", "bagel/train/good", "001.tiff is missing"]),
        ("test/hole/rgb/000.png", ["0 rgb files for 1 samples in", "bagel/test/hole", "000.png is missing"]),
        ("test/hole/gt/000.png", ["0 gt files for 1 samples in", "bagel/test/hole", "000.png is missing"]),
    ],
)
def test_missing_files_are_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], pattern: str, expected: list[str]
) -> None:
    for path in sorted((bagels / "bagel").glob(pattern)):
        path.unlink()
    message = refusal_of_files(capsys, bagels)
    for words in expected:
        assert words in message
    assert "Restore them" in message or "Fill its folder" in message


@pytest.mark.usefixtures("no_networks_built")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    shutil.rmtree(bagels / "bagel" / split)
    message = refusal_of_files(capsys, bagels)
    assert message.startswith("No training files in" if split == "train" else "No test samples in")
    assert f"bagel/{split}" in message


@pytest.mark.usefixtures("no_networks_built")
@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        ("train/good/rgb/000.png", cut, "is not a complete PNG"),
        ("test/good/rgb/000.png", lambda path: path.write_bytes(b""), "is not a complete PNG"),
        ("test/hole/gt/000.png", cut, "is not a complete PNG"),
        ("test/good/xyz/000.tiff", cut, "cut short"),
        ("test/good/xyz/000.tiff", lambda path: path.write_text("none"), "cannot be read as a tiff file"),
        ("train/good/xyz/001.tiff", lambda path: write_cloud(path, surface(0)[..., 2]), "array of 64 x 64, expected"),
        (
            "train/good/xyz/001.tiff",
            lambda path: write_cloud(path, np.ones((64, 64, 4), "f4")),
            "array of 64 x 64 x 4,",
        ),
        ("train/good/xyz/001.tiff", lambda path: write_cloud(path, np.ones((64, 64, 3), "u2")), "holds uint16 numbers"),
        ("train/good/rgb/001.png", lambda path: write_image(path, np.ones((64, 32, 3), "u1")), "64 x 32 pixels"),
        ("test/hole/rgb/000.png", lambda path: write_image(path, np.ones((80, 80, 3), "u1")), "80 x 80 pixels"),
        ("test/hole/gt/000.png", lambda path: write_image(path, np.eye(48, dtype="u1")), "000.png has 48 x 48"),
    ],
)
def test_bad_files_are_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], object], expected: str
) -> None:
    damage(bagels / "bagel" / file)
    message = refusal_of_files(capsys, bagels)
    assert str(bagels / "bagel" / file) in message
    assert expected in message
    assert any(fix in message for fix in ("Restore", "restore", "Copy it again", "Store", "store", "--intrinsics"))


def test_files_of_an_unused_modality_may_be_bad(bagels: Path, tmp_path: Path) -> None:
    for path in bagels.rglob("*.tiff"):
        cut(path)
    run_into(tmp_path / "out", "--method_name", "DINO", "--dataset_path", bagels, *SMALL)


def test_images_are_checked_if_predictions_are_saved(
    bagels: Path, no_networks_built: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(bagels / "bagel/test/good/rgb/000.png")
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL]
    assert "bagel/test/good/rgb/000.png" in refusal(capsys, *flags, "--save_preds")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method_name DINO+Point_MAE+Fusion --memory_bank single", "--memory_bank multiple"),
        ("--method_name DINO+Point_MAE --memory_bank single", "--memory_bank multiple"),
        ("--method_name DINO --memory_bank multiple", "--memory_bank single"),
        ("--method_name Fusion --memory_bank multiple", "--memory_bank single"),
        ("--method_name DINO+Point_MAE --use_uff", "--use_uff has no effect on DINO+Point_MAE"),
        ("--method_name DINO --use_uff", "--use_uff has no effect on DINO"),
        ("--method_name DINO --rm_zero_for_project", "--rm_zero_for_project is for the single xyz bank"),
        ("--method_name DINO+Point_MAE --rm_zero_for_project", "--rm_zero_for_project is for the single xyz bank"),
        ("--method_name Point_MAE --asy_memory_bank 3", "but Point_MAE has one. Use --max_sample"),
        ("--method_name DINO --save_feature", "DINO has only rgb. Use DINO+Point_MAE"),
        ("--method_name Point_MAE --save_feature", "Point_MAE has only xyz. Use DINO+Point_MAE"),
        ("--point_ops extension --device cpu", "--point_ops extension needs a GPU"),
        ("--point_ops triton --device cpu", "--point_ops triton needs a GPU"),
        ("--f_coreset 0", "--f_coreset is 0.0. Give a number from 1e-06 to 1.0."),
        ("--f_coreset 2", "--f_coreset is 2.0. Give a number from 1e-06 to 1.0."),
        ("--f_coreset nan", "--f_coreset is nan. Give a number from 1e-06 to 1.0."),
        ("--coreset_eps 0", "--coreset_eps is 0.0. Give a number from 0.001 to 0.999."),
        ("--coreset_eps 1", "--coreset_eps is 1.0. Give a number from 0.001 to 0.999."),
        ("--ocsvm_nu 0", "--ocsvm_nu is 0.0. Give a number from 0.0001 to 1.0."),
        ("--ocsvm_nu 1.5", "--ocsvm_nu is 1.5. Give a number from 0.0001 to 1.0."),
        ("--ocsvm_maxiter 0", "--ocsvm_maxiter is 0. Give a number from 1 to 1000000."),
        ("--max_sample 0", "--max_sample is 0. Give a number from 1 to 1000000."),
        ("--asy_memory_bank 0", "--asy_memory_bank is 0. Give a number from 1 to 1000000."),
        ("--num_workers -1", "--num_workers is -1. Give a number from 0 to 1024."),
        ("--num_group 2", "--num_group is 2. Give a number from 3 to 8192."),
        ("--group_size 0", "--group_size is 0. Give a number from 1 to 1024."),
        ("--seeds -1", "--seeds is -1. Give a number from 0 to"),
        ("--img_size 16", "--img_size is 16. Give at least 58 for"),
        ("--rgb_s_lambda nan", "--rgb_s_lambda is nan. Give a number from -1000000 to 1000000."),
        ("--device meta", "Give auto, cpu, cuda"),
        ("--device quantum", "--device 'quantum' is unknown. Give auto, cpu, cuda"),
        ("--device cuda:99", "There is no cuda:99, only"),
        ("--method_name PatchCore", "argument --method_name: invalid choice: 'PatchCore'"),
        ("--rgb_backbone_name resnet", "--rgb_backbone_name 'resnet' is unknown. Choose one of vit_base_patch8"),
        ("--rgb_backbone_name vit_small_patch8_224.none", "or the name of another network of timm"),
        ("--method_name DINO Point_MAE --memory_bank single --use_uff", "--use_uff has no effect on DINO"),
        ("--method_name DINO Point_MAE --asy_memory_bank 3", "but DINO has one. Use --max_sample"),
        ("--method_name DINO Fusion --rm_zero_for_project", "--rm_zero_for_project is for the single xyz bank"),
        ("--method_name Point_MAE DINO --memory_bank multiple", "Use --memory_bank single instead of multiple"),
        ("--method_name DINO PatchCore", "argument --method_name: invalid choice: 'PatchCore'"),
        ("--method_name", "argument --method_name: expected at least one argument"),
        ("--save_preds PatchCore", "argument --save_preds: invalid choice: 'PatchCore'"),
        ("--method_name DINO --xyz_checkpoint w.pth", "--xyz_checkpoint is not used: DINO has no xyz branch"),
        ("--method_name Point_MAE --rgb_checkpoint w.pth", "not used: Point_MAE has no rgb branch"),
        ("--method_name Point_MAE --rgb_layers 2", "--rgb_layers is not used: Point_MAE has no rgb branch"),
        ("--method_name DINO --rgb_layers 3 2", "--rgb_layers is 3 2. Give ascending numbers from 0."),
        ("--method_name DINO --rgb_layers 2 2", "--rgb_layers is 2 2. Give ascending numbers from 0."),
        ("--method_name DINO --rgb_layers -1 2", "--rgb_layers is -1. Give a number from 0 to 1000."),
        ("--xyz_backbone_name PointNet", "argument --xyz_backbone_name: invalid choice: 'PointNet'"),
        ("--memory_bank many", "argument --memory_bank: invalid choice: 'many'"),
        ("--protocol mine", "argument --protocol: invalid choice: 'mine'"),
        ("--precision fp8", "argument --precision: invalid choice: 'fp8'"),
        ("--img_size large", "argument --img_size: invalid int value: 'large'"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ],
)
def test_impossible_flags_are_refused_before_any_file_is_read(
    tmp_path: Path, no_networks_built: None, capsys: pytest.CaptureFixture[str], flags: str, expected: str
) -> None:
    assert expected in refusal(capsys, "--dataset_path", tmp_path / "nowhere", *flags.split())


@pytest.mark.parametrize("flag", ["--output_dir", "--save_feature_path"])
def test_a_folder_that_cannot_be_made_is_found_before_the_work_starts(
    bagels: Path, tmp_path: Path, no_networks_built: None, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    flags = ["--method_name", "DINO+Point_MAE", "--save_feature", "--dataset_path", bagels, *SMALL]
    folders = {"--output_dir": tmp_path / "out", "--save_feature_path": tmp_path / "lib"} | {flag: in_the_way / "new"}
    message = refusal(capsys, *flags, *(each for pair in folders.items() for each in pair))
    assert str(in_the_way / "new") in message
    assert f"Choose another {flag}." in message
    assert in_the_way.read_text() == "kept"


# Checkpoints


def backbone_flags(name: str) -> list[str]:
    """Flags of a run whose only network is this one."""
    if name in XYZ_BACKBONES:
        return ["--method_name", "Point_MAE", "--xyz_backbone_name", name]
    return ["--method_name", "DINO", "--rgb_backbone_name", name]


VIT, SMALL_VIT = "vit_base_patch8_224_dino", "vit_small_patch8_224_dino"
TINY_VIT = "test_vit.r160_in1k"  # timm's smallest, not in RGB_BACKBONES
FILES = {name: spec.files.names[0] for name, spec in (RGB_BACKBONES | XYZ_BACKBONES).items() if spec.files.names}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_checkpoint_names_file_folder_and_source(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags = ["--dataset_path", bagels, "--output_dir", tmp_path / "out", "--checkpoint_dir", tmp_path / "weights"]
    message = refusal(capsys, *backbone_flags(name), *flags)
    for file_name in (RGB_BACKBONES | XYZ_BACKBONES)[name].files.names:
        assert file_name in message
    assert f"in {tmp_path / 'weights'}" in message
    assert "Download it from https://" in message
    tried = "and timm's download failed (the weights of "
    assert (tried in message) == (name in RGB_BACKBONES)  # timm has no point transformers


def test_a_missing_checkpoint_of_another_vision_transformer_is_named(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method_name", "DINO", "--rgb_backbone_name", TINY_VIT, "--checkpoint_dir", tmp_path / "weights"]
    message = refusal(capsys, *flags, "--dataset_path", bagels)
    assert f"No checkpoint {TINY_VIT}.safetensors or {TINY_VIT}.pth or {TINY_VIT}.npz in {tmp_path}/weights" in message
    assert "timm's download failed (the weights of " in message
    assert f"Download it from https://huggingface.co/timm/{TINY_VIT}" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["crossvit_tiny_240"],
            "cannot be the RGB backbone at --img_size 224 (Only token or avg pooling is supported.)",
        ),
        (["halonet26t", "--img_size", 100], "cannot be the RGB backbone at --img_size 100 ("),
        (["pit_b_224"], "has layers 0 to 2 of strides 7, 14, 28, but none is of stride 8 or 16. Choose --rgb_layers"),
        (["test_resnet", "--rgb_layers", 5], "0 to 4 of strides 2, 4, 8, 16, 32, but --rgb_layers is 5"),
        (["test_vit", "--rgb_layers", 3, 6], "test_vit has layers 0 to 5, but --rgb_layers is 3 6"),
    ],
)
def test_a_network_that_does_not_take_the_flags_is_refused_before_its_weights_are_read(
    bagels: Path,
    tmp_path: Path,
    no_class_run: None,
    capsys: pytest.CaptureFixture[str],
    flags: list[object],
    expected: str,
) -> None:
    (tmp_path / f"{flags[0]}.pth").write_bytes(b"")
    flags = [
        "--method_name",
        "DINO",
        "--checkpoint_dir",
        tmp_path,
        "--dataset_path",
        bagels,
        "--rgb_backbone_name",
        *flags,
    ]
    assert expected in refusal(capsys, *flags)


@pytest.mark.parametrize(
    ("method", "flag", "expected"),
    [
        (
            "DINO",
            "--rgb_checkpoint",
            "the weights of efficientnet_lite0 come with pip",
        ),
        ("Point_MAE", "--xyz_checkpoint", "FPFH needs no weights"),
    ],
)
def test_a_checkpoint_for_a_backbone_without_checkpoint_is_refused(
    bagels: Path,
    tmp_path: Path,
    no_class_run: None,
    capsys: pytest.CaptureFixture[str],
    method: str,
    flag: str,
    expected: str,
) -> None:
    path = tmp_path / "mine.pth"
    torch.save({}, path)
    message = refusal(capsys, "--method_name", method, "--dataset_path", bagels, *SMALL, flag, path)
    assert message == f"{path} is not used, because {expected}. Leave it out."


@pytest.mark.parametrize(("flag", "name"), [("--rgb_checkpoint", TINY_VIT), ("--xyz_checkpoint", "Point_MAE")])
@pytest.mark.parametrize("kind", [None, "other dict"])
def test_a_given_checkpoint_that_is_missing_or_wrong_is_refused(
    bagels: Path,
    tmp_path: Path,
    no_class_run: None,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    name: str,
    kind: str | None,
) -> None:
    """No other file is used in place of a given checkpoint that is missing or wrong."""
    path = tmp_path / "mine.pth"
    if kind:
        write_wrong_file(kind, path, name)
    flags = [*backbone_flags(name), "--dataset_path", bagels, "--img_size", SIDE]
    message = refusal(capsys, *flags, flag, path)
    assert str(path) in message
    assert ("does not exist" in message) == (kind is None)


def other_models_state(name: str) -> dict[str, Any]:
    """Some keys of another model's checkpoint."""
    if name in RGB_BACKBONES:
        return {
            "cls_token": torch.zeros(1, 1, 192),
            "pos_embed": torch.zeros(1, 785, 192),
            "norm.weight": torch.ones(192),
        }
    return {"base_model": {"module.decoder.blocks.0.norm1.weight": torch.ones(384)}}


class Malicious:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def write_wrong_file(kind: str, path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save({"weight": torch.zeros(1000)}, path)
        cut(path)
    elif kind == "other model":
        torch.save(other_models_state(name), path)
    elif kind == "other dict":
        torch.save({"epoch": 3, "model": [torch.zeros(2)]}, path)
    elif kind == "malicious":
        torch.save({"base_model": {}, "model": Malicious(path.with_name("executed"))}, path)
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious(path.with_name("executed")), protocol=2))


@pytest.mark.parametrize(
    "kind", ["text", "empty", "truncated", "other model", "other dict", "malicious", "malicious pickle"]
)
@pytest.mark.parametrize("name", [SMALL_VIT, "Point_MAE", "Point_Bert", "UFF"])
def test_a_wrong_checkpoint_is_named(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    weights = tmp_path / "weights"
    path = weights / FILES.get(name, "checkpoint-0.pth")
    write_wrong_file(kind, path, name)
    uff = ["--method_name", "Fusion", "--use_uff", "--fusion_module_path", path, *PIP_BACKBONES]
    flags = uff if name == "UFF" else backbone_flags(name)
    message = refusal(
        capsys, *flags, "--dataset_path", bagels, "--checkpoint_dir", weights, "--output_dir", tmp_path / "out"
    )
    assert str(path) in message
    assert any(fix in message for fix in ("Download it again", "Check that", "another model's file", "fusion_pretrain"))
    assert not (weights / "executed").exists()
    if kind.startswith("malicious"):
        assert "is refused: it holds a posix.system" in message


def test_the_weights_of_a_smaller_network_are_refused_with_their_shapes(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ViT-S file in place of ViT-B has the same keys but other shapes."""
    small = {"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 785, 384), "norm.weight": torch.ones(384)}
    torch.save(small, tmp_path / FILES[VIT])
    message = refusal(capsys, *backbone_flags(VIT), "--dataset_path", bagels, "--checkpoint_dir", tmp_path)
    assert "cls_token (1, 1, 384) for (1, 1, 768)" in message
    assert "Check that the file belongs to the chosen backbone" in message


def test_img_size_must_be_a_multiple_of_the_patch(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, tmp_path / FILES[SMALL_VIT])
    flags = [*backbone_flags(SMALL_VIT), "--dataset_path", bagels, "--checkpoint_dir", tmp_path]
    message = refusal(capsys, *flags, "--img_size", 100)
    assert "--img_size 100 is not a multiple" in message
    assert "patch size 8" in message


def test_a_missing_uff_checkpoint_is_named(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint-7.pth"
    flags = ["--use_uff", "--fusion_module_path", path, "--dataset_path", bagels, *SMALL]
    message = refusal(capsys, *flags, "--output_dir", tmp_path / "out")
    assert f"Checkpoint {path} does not exist" in message
    assert "train it" in message


def test_a_uff_of_other_widths_is_refused_with_both_widths(
    bagels: Path, tmp_path: Path, no_class_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint-0.pth"
    torch.save({"model": FeatureFusion(48, RGB_DIM).state_dict()}, path)
    flags = ["--use_uff", "--fusion_module_path", path, "--dataset_path", bagels, *SMALL]
    message = refusal(capsys, *flags)
    assert f"{path} was trained on features 48 (xyz) and {RGB_DIM} (rgb) wide" in message
    assert f"give {XYZ_DIM} and {RGB_DIM}" in message
    assert "Train it on features of the same backbones" in message


# Bad clouds and images that are only found when they are read


def sparse(points: int) -> np.ndarray:
    """Cloud with `points` valid points."""
    xyz = surface(0)
    xyz.reshape(-1, 3)[points:] = 0
    return xyz


def corners() -> np.ndarray:
    """Cloud with three valid points, in corners of the image."""
    xyz = np.zeros_like(surface(0))
    for row, column in ((0, 0), (0, -1), (-1, 0)):
        xyz[row, column] = surface(0)[row, column]
    return xyz


@pytest.mark.parametrize("file", ["train/good/xyz/001.tiff", "test/hole/xyz/000.tiff"])
@pytest.mark.parametrize(
    ("xyz", "expected"),
    [
        (sparse(0), ["has no valid point", "Restore"]),
        (np.full((SIDE, SIDE, 3), np.nan, np.float32), ["has no valid point", "Restore"]),
        (corners(), ["has 3 valid points", "FPFH needs at least 4", "Repair the point cloud."]),
    ],
)
def test_a_cloud_with_too_few_points_is_named(
    bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, xyz: np.ndarray, expected: list[str]
) -> None:
    write_cloud(bagels / "bagel" / file, xyz)
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL, "--output_dir", tmp_path / "out"]
    message = refusal(capsys, *flags)
    assert "bagel" in message
    assert file in message or file.replace("xyz/", "").removesuffix(".tiff") in message
    for words in expected:
        assert words in message


def test_a_cloud_with_fewer_points_than_groups_is_named(
    bagels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cloud with 99 points is refused for 100 groups and accepted for 99, with a tiny network for Point-MAE."""

    def tiny(config: DetectorConfig, *_: object, **__: object) -> PatchExtractor:
        numbers = {"width": 12, "depth": 3, "num_heads": 2, "encoder_dim": 12}
        return PatchExtractor(config, None, PointTransformer(config.num_group, config.group_size, **numbers))

    monkeypatch.setattr(preparation, "build_extractor", tiny)
    write_cloud(bagels / "bagel/train/good/xyz/001.tiff", sparse(99))
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, "--img_size", SIDE, "--output_dir", tmp_path / "o"]
    message = refusal(capsys, *flags, "--num_group", 100, "--group_size", 8)
    assert message.startswith("bagel: ")
    assert "train/good/001 has 99 valid points" in message
    assert "Point_MAE needs at least 100" in message
    assert "--num_group" in message
    run_into(tmp_path / "out", *flags, "--num_group", 99, "--group_size", 8)


def test_damage_inside_an_image_is_named(bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage that only decoding finds, because header and end of the file are intact, is named."""
    path = bagels / "bagel/test/hole/rgb/000.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    flags = ["--method_name", "DINO", "--dataset_path", bagels, *SMALL, "--output_dir", tmp_path / "out"]
    assert f"{path} is not a complete PNG" in refusal(capsys, *flags)


@pytest.mark.slow
def test_nan_and_infinity_count_as_missing(tmp_path: Path) -> None:
    """Clouds with NaN or infinity give the scores of clouds with zeros there, not those of complete clouds."""
    hole = np.zeros((SIDE, SIDE), bool)
    hole[10:30, 20:50] = True
    scores = []
    for fill in ((0.0, 0.0, 0.0), (np.nan, np.nan, np.nan), (0.01, np.inf, 0.5), (0.01, 0.02, -np.inf), None):
        root = write_bagels(tmp_path / str(fill))
        for path in root.rglob("*.tiff"):
            xyz = tifffile.imread(path)
            if fill is not None:
                xyz[hole] = fill
            write_cloud(path, xyz)
        flags = ["--method_name", "Point_MAE", "--dataset_path", root, *SMALL, "--seeds", 0]
        scores.append(run_into(root / "out", *flags).scores)
    zeros, *missing, complete = scores
    assert missing == [zeros] * 3
    assert complete != zeros


# New processes


def test_a_call_without_a_dataset_tells_where_to_download_one(tmp_path: Path) -> None:
    done = process(tmp_path, ROOT / "main.py")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    message = error_line(done.stderr)
    assert "datasets/mvtec3d is not a folder. Download MVTec 3D-AD from https://www.mvtec.com" in message
    assert "--dataset_path" in message
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_during_a_run_is_the_last_line(bagels: Path, tmp_path: Path) -> None:
    write_cloud(bagels / "bagel/train/good/xyz/001.tiff", corners())
    done = process(tmp_path, ROOT / "main.py", "--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL)
    assert done.returncode == 2
    assert "bagel: train/good/001 has 3 valid points" in error_line(done.stderr)
    assert "main: bagel: 2 training, 0 validation and 2 test samples" in done.stderr

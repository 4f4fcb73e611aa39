"""The command line: what a run leaves, what each flag does, and how bad input ends."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from PIL import Image
from sklearn.metrics import roc_auc_score

import main
from dataset import AnomalyDataset, index_split
from feature_extractors import extractor as extractor_module
from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.extractor import PatchExtractor, build_extractor
from models import RGB_BACKBONES, XYZ_BACKBONES
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointTransformer
from utils.cloud_cleaning import CleaningRule
from utils.feature_store import PAIRINGS, PatchFileDataset, pair_rgb
from utils.preprocessing import Job, preprocess
from utils.synthetic import Plan, make_dataset
from utils.synthetic_parts import DEFECTS

Runner = Callable[..., "Run"]

PIP_BACKBONES = ["--rgb_backbone_name", "efficientnet_lite0", "--xyz_backbone_name", "FPFH"]
RGB_DIM, XYZ_DIM = 152, 33  # of these two
TABLES = ("image_rocauc_results.md", "pixel_rocauc_results.md", "aupro_results.md")
METRICS = ("image_rocauc", "pixel_rocauc", "au_pro")
LIMITS = ["0.3", "0.1", "0.05", "0.01"]
TRAIN, TEST_GOOD = 3, 2  # scans of a made-up class, beside one of each defect
TEST_PATHS = sorted([f"test/good/{i:03d}" for i in range(TEST_GOOD)] + [f"test/{defect}/000" for defect in DEFECTS])
PADDED = (300, 300)  # cleaning pads 224 pixels to a multiple of 100

# Flags of runs that tests share. The small picture is for speed.
DOUBLE = ("--method_name", "DINO+Point_MAE", "--img_size", 112)
TRIPLE = ("--method_name", "DINO+Point_MAE+Fusion", "--img_size", 112)
POINTS = ("--method_name", "Point_MAE", "--img_size", 112)
PROJECTED = ("--method_name", "DINO", "--img_size", 112, "--max_sample", 1)  # so few rows that the coreset projects


class Run(NamedTuple):
    """What a run of main.py left."""

    folder: Path
    stdout: str
    results: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """Of the only class."""
        (entry,) = self.results["classes"].values()
        return entry

    @property
    def scores(self) -> list[float]:
        return [sample["score"] for sample in self.entry["samples"]]

    @property
    def pixel_figures(self) -> list[float]:
        """What depends on the maps alone."""
        return [self.entry["pixel_rocauc"], self.entry["au_pro"], *self.entry["au_pro_exact"].values()]


def call(*flags: object) -> None:
    """The script, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *map(str, flags)])
        main.main()


def run_into(folder: Path, *flags: object) -> Run:
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        call(*flags, "--output_dir", folder)
    return Run(folder, stdout.getvalue(), json.loads((folder / "results.json").read_text()))


def table_rows(folder: Path, name: str) -> list[list[str]]:
    """The cells of all tables of a file, without the ruler lines."""
    lines = [line for line in (folder / name).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def link_files(source: Path, target: Path, without: Sequence[str] = ()) -> Path:
    """The files of a folder as links in another, but those in folders named in `without`."""
    for path in sorted(source.rglob("*.*")):
        if path.is_file() and path.parent.name not in without:
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return target


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cleaned scans of two kinds of made-up parts, one of which bears the name of a published class."""
    folder = tmp_path_factory.mktemp("parts")
    make_dataset(Plan(folder / "raw", ("gasket", "cookie"), TRAIN, 0, TEST_GOOD, 1, size=224))
    job = Job(folder / "raw", folder / "clean", CleaningRule(), keep_rgb=False, suffix=".preprocessing")
    assert not preprocess(job, workers=1).failed
    return folder / "clean"


@pytest.fixture(scope="module")
def base(parts: Path) -> list[object]:
    """Flags of every run on the gaskets."""
    return ["--dataset_path", parts, "--classes", "gasket", *PIP_BACKBONES, "--random_state", 0]


@pytest.fixture(scope="module")
def runs(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs on the gaskets by their flags, each done once."""
    done: dict[tuple[object, ...], Run] = {}

    def run(*flags: object) -> Run:
        if flags not in done:
            done[flags] = run_into(tmp_path_factory.mktemp("run"), *base, *flags)
        return done[flags]

    return run


@pytest.fixture(scope="module")
def uff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained UFF for the widths of the pip backbones."""
    path = tmp_path_factory.mktemp("uff") / "checkpoint-0.pth"
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, path)
    return path


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that default paths lie there, and nothing is written into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small networks only lose by being shared out, on a busy machine most of all; those of full size gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if "golden_weights" in request.fixturenames else 1)
    yield
    torch.set_num_threads(threads)


# What a run leaves


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_files_of_a_run(runs: Runner, method: str) -> None:
    run = runs("--method_name", method, "--memory_bank", METHODS[method].memory_bank)
    entry, results = run.entry, run.results
    assert files_below(run.folder) == sorted([*TABLES, "results.json"])

    assert list(results) == ["schema", "command", "args", "versions", "classes", "mean"]
    assert results["schema"] == 1
    assert results["command"][0] == "main.py"
    assert results["command"][-2:] == ["--output_dir", str(run.folder)]
    assert results["args"].items() >= {"method_name": method, "random_state": 0, "output_dir": str(run.folder)}.items()
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert list(results["classes"]) == ["gasket"]
    assert set(entry) == {*METRICS, "au_pro_exact", "samples", "seconds", "peak_memory_mb"}
    assert set(results["mean"]) == {*METRICS, "au_pro_exact"}
    assert list(entry["au_pro_exact"]) == list(results["mean"]["au_pro_exact"]) == LIMITS

    assert [sample["path"] for sample in entry["samples"]] == TEST_PATHS
    assert all(set(sample) == {"path", "label", "score"} for sample in entry["samples"])
    labels = [sample["label"] for sample in entry["samples"]]
    assert labels == [int(not path.startswith("test/good/")) for path in TEST_PATHS]
    assert len(set(run.scores)) == len(TEST_PATHS)
    assert entry["image_rocauc"] == pytest.approx(roc_auc_score(labels, run.scores))
    assert all(0 <= figure <= 1 for figure in run.pixel_figures)
    assert entry["pixel_rocauc"] > 0.6  # these parts are easy; chance is 0.5

    seconds = entry["seconds"]
    assert list(seconds) == ["extract", "coreset", "fuse", "score", "metrics"]
    idle = set() if METHODS[method].fusion == "svm" else {"fuse"}
    assert {stage for stage, spent in seconds.items() if spent == 0} == idle
    assert 100 < entry["peak_memory_mb"] < 1e5

    for name, key in zip(TABLES, METRICS, strict=True):
        header, first, *_ = table_rows(run.folder, name)
        assert header == ["Method", "gasket", "Mean"]
        assert first[0].startswith(method)
        assert first[1:] == [f"{entry[key]:.3f}"] * 2
    result, *tables = run.stdout.splitlines()
    assert result.startswith(
        f"gasket: I-AUROC {entry['image_rocauc']:.3f}, P-AUROC {entry['pixel_rocauc']:.3f}, AU-PRO "
    )
    assert [line for line in tables if line in ("I-AUROC", "P-AUROC", "AU-PRO")] == ["I-AUROC", "P-AUROC", "AU-PRO"]
    assert tables[-1] == f"written to {run.folder}/"


def test_methods_differ(runs: Runner) -> None:
    scores = {
        tuple(runs("--method_name", name, "--memory_bank", method.memory_bank).scores)
        for name, method in METHODS.items()
    }
    assert len(scores) == len(METHODS)


def test_several_classes_in_the_order_asked_for(runs: Runner) -> None:
    run = runs("--method_name", "DINO", "--classes", "gasket", "cookie")
    classes, mean = run.results["classes"], run.results["mean"]
    assert list(classes) == ["gasket", "cookie"]
    assert table_rows(run.folder, TABLES[0])[0] == ["Method", "gasket", "cookie", "Mean"]
    for key in METRICS:
        assert mean[key] == pytest.approx(np.mean([entry[key] for entry in classes.values()]), rel=1e-12)
    for limit in LIMITS:
        exact = [entry["au_pro_exact"][limit] for entry in classes.values()]
        assert mean["au_pro_exact"][limit] == pytest.approx(np.mean(exact), rel=1e-12)
    # A class does not depend on which others are run with it.
    alone = runs("--method_name", "DINO", "--memory_bank", "single").entry
    assert classes["gasket"]["samples"] == alone["samples"]
    assert classes["cookie"]["samples"] != alone["samples"]


@pytest.mark.parametrize(("dataset_type", "name"), [("mvtec3d", "cookie"), ("eyecandies", "Lollipop")])
def test_without_classes_all_of_the_dataset_type_are_run(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_type: str, name: str
) -> None:
    for link in ("cookie", "Lollipop", "gasket"):
        (tmp_path / link).symlink_to(parts / "cookie")
    asked = []

    def stop(name: str, *_: object) -> None:
        asked.append(name)
        raise SystemExit

    monkeypatch.setattr(main, "run_class", stop)
    flags = ["--method_name", "DINO", *PIP_BACKBONES, "--dataset_path", tmp_path, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        call(*flags, "--dataset_type", dataset_type)
    assert asked == [name]


def test_a_second_run_appends_a_second_table(base: list[object], tmp_path: Path) -> None:
    first = run_into(tmp_path, *base, *PROJECTED)
    kept = {name: (tmp_path / name).read_text() for name in TABLES}
    second = run_into(tmp_path, *base, *PROJECTED, "--classes", "cookie")
    for name in TABLES:
        text = (tmp_path / name).read_text()
        assert text.startswith(kept[name])
        assert text.count("\n## ") == 2
        assert text.count("--classes cookie") == 1
    assert list(first.results["classes"]) == ["gasket"]
    assert list(second.results["classes"]) == ["cookie"]  # of the last run alone


def test_saved_predictions_have_the_size_of_the_ground_truth(parts: Path, runs: Runner) -> None:
    run = runs("--method_name", "DINO+Point_MAE", "--save_preds")
    assert run.entry["samples"] == runs("--method_name", "DINO+Point_MAE", "--memory_bank", "multiple").entry["samples"]
    pictures = [f"pred_maps/gasket/{path.removeprefix('test/')}.png" for path in TEST_PATHS]
    maps = [f"anomaly_maps/gasket/{path}.tiff" for path in TEST_PATHS]
    assert files_below(run.folder) == sorted([*TABLES, "results.json", *pictures, *maps])

    planes = [tifffile.imread(run.folder / path) for path in maps]
    truth = [parts / "gasket" / Path(path).parent / "gt" / f"{Path(path).name}.png" for path in TEST_PATHS]
    masks = [np.asarray(Image.open(path)) > 0 for path in truth]
    for plane, mask in zip(planes, masks, strict=True):
        assert plane.dtype == np.float32
        assert plane.shape == mask.shape == PADDED
    # The figure of the run, computed at 224 pixels, comes out of the files too: each map is that of its scan.
    defective = np.concatenate(masks, axis=None)
    figure = roc_auc_score(defective, np.concatenate(planes, axis=None))
    assert figure == pytest.approx(run.entry["pixel_rocauc"], abs=0.01)
    assert abs(roc_auc_score(defective, np.concatenate(planes[::-1], axis=None)) - figure) > 0.02

    for path in pictures:
        with Image.open(run.folder / path) as image:
            assert image.format == "PNG"
            assert image.width > 4 * image.height  # photo, ground truth, two banks, fused, overlay
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_saved_features_are_those_of_the_training_samples(
    parts: Path, runs: Runner, tmp_path: Path, pairing: str
) -> None:
    folder = tmp_path / "patch_lib"
    flags = [*DOUBLE, "--max_sample", 2, "--save_feature", "--save_feature_path", folder]
    runs(*flags, *([] if pairing == "aligned" else ["--uff_pairing", pairing]))
    assert files_below(folder) == ["gasket/000.safetensors", "gasket/001.safetensors"]
    saved = PatchFileDataset(folder)
    assert saved.pairing == pairing
    assert (saved.xyz_dim, saved.rgb_dim) == (XYZ_DIM, RGB_DIM)
    assert (saved.files[0].xyz_backbone, saved.files[0].rgb_backbone) == ("FPFH", "efficientnet_lite0")

    names = {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH"}
    config = DetectorConfig("DINO+Point_MAE", img_size=112, **names)
    extract = build_extractor(config, tmp_path, tmp_path)
    modalities = config.method.modalities
    dataset = AnomalyDataset(index_split(parts / "gasket", "train", modalities), modalities, config.img_size)
    for i in range(2):
        features, (xyz, rgb) = extract(dataset[i]), saved[i]
        assert features.rgb is not None
        assert features.xyz is not None
        torch.testing.assert_close(xyz, features.xyz, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(rgb, pair_rgb(features.rgb, len(xyz), pairing), rtol=1e-3, atol=1e-6)
        assert torch.equal(xyz == 0, features.xyz == 0)


def test_rgb_method_reads_no_xyz_and_builds_no_3d_network(
    parts: Path, runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runs("--method_name", "DINO", "--memory_bank", "single")
    link_files(parts / "gasket", tmp_path / "rgb" / "gasket", without=["xyz"])
    monkeypatch.setattr(extractor_module, "build_xyz_backbone", lambda *_, **__: pytest.fail("3D network built"))
    run = runs("--method_name", "DINO", "--dataset_path", tmp_path / "rgb")
    assert run.entry["samples"] == expected.entry["samples"]


def test_xyz_method_reads_no_rgb_and_builds_no_rgb_network(
    parts: Path, runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_files(parts / "gasket", tmp_path / "xyz" / "gasket", without=["rgb"])
    monkeypatch.setattr(extractor_module, "build_rgb_backbone", lambda *_, **__: pytest.fail("RGB network built"))
    run = runs(*POINTS, "--dataset_path", tmp_path / "xyz", "--save_preds")
    assert run.entry["samples"] == runs(*POINTS).entry["samples"]
    for path in TEST_PATHS:  # of the size of the ground truth, without a photo
        assert tifffile.imread(run.folder / "anomaly_maps" / "gasket" / f"{path}.tiff").shape == PADDED
        assert (run.folder / "pred_maps" / "gasket" / f"{path.removeprefix('test/')}.png").is_file()


def test_max_sample_is_the_first_n_samples(parts: Path, runs: Runner, tmp_path: Path) -> None:
    link_files(parts / "gasket", tmp_path / "gasket")
    (tmp_path / "gasket/train/good/rgb" / f"{TRAIN - 1:03d}.png").unlink()
    (tmp_path / "gasket/train/good/xyz" / f"{TRAIN - 1:03d}.tiff").unlink()
    two = runs(*DOUBLE, "--max_sample", TRAIN - 1)
    assert two.scores == runs(*DOUBLE, "--dataset_path", tmp_path).scores
    assert two.scores != runs(*DOUBLE).scores
    assert runs(*DOUBLE, "--max_sample", TRAIN).scores == runs(*DOUBLE).scores


def test_finished_classes_are_kept_when_a_later_one_fails(
    parts: Path, runs: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link_files(parts / "gasket", tmp_path / "gasket")
    link_files(parts / "gasket", tmp_path / "torn")
    scan = tmp_path / "torn/test/dent/xyz/000.tiff"
    scan.unlink()
    tifffile.imwrite(scan, np.zeros((*PADDED, 3), np.float32), photometric="rgb")
    out = tmp_path / "out"
    flags = [*PIP_BACKBONES, *POINTS, "--dataset_path", tmp_path, "--classes", "gasket", "torn", "--output_dir", out]
    message = refusal(capsys, *flags, "--random_state", 0)
    assert str(scan) in message
    assert files_below(out) == ["results.json"]
    results = json.loads((out / "results.json").read_text())
    assert list(results["classes"]) == ["gasket"]
    assert results["classes"]["gasket"]["samples"] == runs(*POINTS).entry["samples"]
    assert results["mean"]["au_pro"] == results["classes"]["gasket"]["au_pro"]


def test_only_good_test_scans_leave_the_metrics_undefined(parts: Path, runs: Runner, tmp_path: Path) -> None:
    link_files(parts / "gasket/train", tmp_path / "gasket/train")
    link_files(parts / "gasket/test/good", tmp_path / "gasket/test/good", without=["gt"])
    run = runs(*PROJECTED, "--dataset_path", tmp_path)
    assert [sample["path"] for sample in run.entry["samples"]] == ["test/good/000", "test/good/001"]
    assert run.entry["image_rocauc"] is None
    assert run.results["mean"]["au_pro_exact"] == dict.fromkeys(LIMITS)
    assert table_rows(run.folder, TABLES[0])[1][1:] == ["n/a", "n/a"]


# What the flags do


def test_defaults_are_those_of_the_original() -> None:
    args = vars(main.parse_args([]))
    original = {
        "method_name": "DINO+Point_MAE+Fusion",
        "max_sample": 400,
        "rgb_backbone_name": "vit_base_patch8_224_dino",
        "xyz_backbone_name": "Point_MAE",
        "fusion_module_path": Path("checkpoints/checkpoint-0.pth"),
        "save_feature": False,
        "use_uff": False,
        "save_feature_path": Path("datasets/patch_lib"),
        "save_preds": False,
        "group_size": 128,
        "num_group": 1024,
        "random_state": None,
        "dataset_type": "mvtec3d",
        "dataset_path": Path("datasets/mvtec3d"),
        "img_size": 224,
        **dict.fromkeys(["xyz_s_lambda", "xyz_smap_lambda", "fusion_s_lambda", "fusion_smap_lambda"], 1.0),
        **dict.fromkeys(["rgb_s_lambda", "rgb_smap_lambda"], 0.1),
        "coreset_eps": 0.9,
        "f_coreset": 0.1,
        "asy_memory_bank": None,
        "ocsvm_nu": 0.5,
        "ocsvm_maxiter": 1000,
        "rm_zero_for_project": False,
    }
    added = {
        "memory_bank": None,  # "multiple" there, which its default method needs; so each method runs by its name alone
        "classes": None,
        "checkpoint_dir": Path("checkpoints"),
        "output_dir": Path("results"),
        "protocol": "reference",
        "point_norm": "cloud",
        "uff_pairing": "aligned",
        "device": "auto",
        "precision": "fp32",
        "point_ops": "auto",
        "num_workers": 2,
    }
    assert args == original | added
    assert main.detector_config(main.parse_args([])) == DetectorConfig()


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--memory_bank multiple", "memory_bank", "multiple"),
        ("--rgb_backbone_name vit_small_patch8_224_dino", "rgb_backbone_name", "vit_small_patch8_224_dino"),
        ("--xyz_backbone_name Point_Bert", "xyz_backbone_name", "Point_Bert"),
        ("--protocol corrected", "protocol", PROTOCOLS["corrected"]),
        ("--point_norm running", "point_norm", "running"),
        ("--point_ops extension", "point_ops", "extension"),
        ("--precision bf16", "precision", "bf16"),
        ("--method_name DINO", "method_name", "DINO"),
        ("--use_uff", "use_uff", True),
        ("--img_size 448", "img_size", 448),
        ("--f_coreset 0.2", "f_coreset", 0.2),
        ("--coreset_eps 0.5", "coreset_eps", 0.5),
        ("--random_state 7", "random_state", 7),
        ("--asy_memory_bank 3", "asy_memory_bank", 3),
        ("--method_name Point_MAE --rm_zero_for_project", "rm_zero_for_project", True),
        ("--ocsvm_nu 0.1", "ocsvm_nu", 0.1),
        ("--ocsvm_maxiter 10", "ocsvm_maxiter", 10),
        ("--group_size 64", "group_size", 64),
        ("--num_group 512", "num_group", 512),
        ("--xyz_s_lambda 2 --rgb_s_lambda 3 --fusion_s_lambda 4", "score_lambdas", (2.0, 3.0, 4.0)),
        ("--xyz_smap_lambda 2 --rgb_smap_lambda 3 --fusion_smap_lambda 4", "map_lambdas", (2.0, 3.0, 4.0)),
    ],
)
def test_flags_reach_the_detector(flags: str, field: str, value: object) -> None:
    config = main.detector_config(main.parse_args(flags.split()))
    assert getattr(config, field) == value
    assert getattr(DetectorConfig(), field) != value


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in vars(main.parse_args([])):
        assert f"--{name}" in text


@pytest.mark.parametrize(
    ("base_flags", "flags", "scores_change", "maps_change"),
    [
        (DOUBLE, ["--f_coreset", 0.02], True, True),
        (DOUBLE, ["--xyz_s_lambda", 3], True, False),
        (DOUBLE, ["--rgb_smap_lambda", 3], False, True),
        (DOUBLE, ["--img_size", 96], True, True),
        (POINTS, ["--rm_zero_for_project"], True, True),
        (PROJECTED, ["--random_state", 1], True, True),
        (DOUBLE, ["--num_workers", 0], False, False),
        (DOUBLE, ["--device", "cpu"], False, False),
    ],
)
def test_a_flag_changes_what_it_is_for(
    runs: Runner, base_flags: tuple[object, ...], flags: list[object], scores_change: bool, maps_change: bool
) -> None:
    without, given = runs(*base_flags), runs(*base_flags, *flags)
    assert (given.scores != without.scores) == scores_change
    assert (given.pixel_figures != without.pixel_figures) == maps_change


@pytest.mark.parametrize("flags", [TRIPLE, PROJECTED])
def test_the_same_random_state_gives_the_same_scores(
    base: list[object], runs: Runner, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    again = run_into(tmp_path, *base, *flags)
    assert again.entry["samples"] == runs(*flags).entry["samples"]
    assert again.pixel_figures == runs(*flags).pixel_figures


def test_bf16_changes_scores_slightly(runs: Runner) -> None:
    full, half = (np.array(runs(*PROJECTED, *flags).scores) for flags in ([], ["--precision", "bf16"]))
    assert (full != half).all()
    assert float(np.median(np.abs(half / full - 1))) < 0.02


def test_corrected_protocol_changes_scores_and_puts_the_exact_au_pro_first(runs: Runner) -> None:
    reference, corrected = runs(*DOUBLE), runs(*DOUBLE, "--protocol", "corrected")
    assert corrected.scores != reference.scores
    for run, first, second in (
        (reference, "limit 0.3, 100 thresholds", "limit 0.3, exact curve"),
        (corrected, "limit 0.3, exact curve", "limit 0.3, 100 thresholds"),
    ):
        figures = {
            "limit 0.3, 100 thresholds": run.entry["au_pro"],
            "limit 0.3, exact curve": run.entry["au_pro_exact"]["0.3"],
        }
        rows = table_rows(run.folder, "aupro_results.md")
        assert rows[1] == [f"DINO+Point_MAE, {first}", *[f"{figures[first]:.3f}"] * 2]
        assert rows[2][0] == f"DINO+Point_MAE, {second}"
        assert f"AU-PRO {figures[first]:.3f} ({first})" in run.stdout.splitlines()[0]
        assert figures[first] != figures[second]


def test_a_fusion_bank_without_uff_says_so(runs: Runner, uff: Path) -> None:
    plain, fused = runs(*TRIPLE), runs(*TRIPLE, "--use_uff", "--fusion_module_path", uff)
    note = "Without --use_uff the fusion bank holds the concatenated features, unfused"
    assert plain.stdout.count(note) == len(TABLES)
    assert note not in fused.stdout
    for name in TABLES:
        assert (plain.folder / name).read_text().count(note) == 1
        assert note not in (fused.folder / name).read_text()
        assert note not in (runs(*DOUBLE).folder / name).read_text()
    assert fused.scores != plain.scores


# Bad input: one clear sentence, exit code 2, before the work starts where it can be known


def refusal(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The sentence that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    assert stop.value.code == 2
    return sentence(capsys.readouterr().err)


def sentence(stderr: str) -> str:
    """The one line of an error, which is the last of stderr."""
    lines = stderr.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:], stderr
    assert "Traceback" not in stderr
    assert lines[-1].startswith("main.py: error: "), stderr
    assert len(lines[-1]) < 600
    return lines[-1].removeprefix("main.py: error: ")


SIDE = 64  # pixels of the smallest scans
SMALL = [*PIP_BACKBONES, "--img_size", SIDE]


def surface(seed: int) -> np.ndarray:
    """A bumpy surface (SIDE, SIDE, 3) float32, metres, a point per millimetre, seen from half a metre."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] * 0.001 + 0.001
    z = 0.5 + 0.002 * np.sin(x * 300 + seed) * np.cos(y * 200) + rng.normal(0, 1e-4, x.shape)
    return np.stack([x, y, z], axis=-1).astype(np.float32)


def write_cloud(path: Path, xyz: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, xyz, photometric="rgb" if xyz.ndim == 3 and xyz.shape[2] == 3 else "minisblack")


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_bagels(root: Path) -> Path:
    """The smallest dataset: two training scans, a good and a defective test scan, SIDE pixels a side."""
    for seed, scan in enumerate(["train/good/000", "train/good/001", "test/good/000", "test/hole/000"]):
        folder, stem = (root / "bagel" / scan).parent, Path(scan).name
        write_cloud(folder / "xyz" / f"{stem}.tiff", surface(seed))
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        write_picture(folder / "rgb" / f"{stem}.png", noise)
    write_picture(root / "bagel/test/hole/gt/000.png", np.pad(np.full((16, 16), 255, np.uint8), 24))
    return root


@pytest.fixture
def bagels(tmp_path: Path) -> Path:
    return write_bagels(tmp_path / "data")


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "build_extractor", lambda *_: pytest.fail("networks built before the input was checked"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "run_class", lambda *_: pytest.fail("work begun before the networks were there"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_smallest_dataset_is_sound(bagels: Path, tmp_path: Path) -> None:
    """So that the refusals below are for what each test breaks."""
    run = run_into(tmp_path / "out", "--method_name", "DINO+Point_MAE", "--dataset_path", bagels, *SMALL)
    assert [sample["path"] for sample in run.entry["samples"]] == ["test/good/000", "test/hole/000"]


def refusal_of_files(capsys: pytest.CaptureFixture[str], root: Path, *flags: object) -> str:
    """The sentence on damaged bagels; no folder has been made for results."""
    message = refusal(capsys, "--dataset_path", root, *SMALL, "--output_dir", root.parent / "out", *flags)
    assert not (root.parent / "out").exists()
    return message


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize(
    ("class_folder", "flags", "told"),
    [
        ("data/bagel", ["--classes", "bagle"], ["'bagle'", "holds bagel", "--classes"]),
        ("elsewhere/bagel", [], ["data is not a folder", "download MVTec 3D-AD", "--dataset_path"]),
        ("data/bracket", [], ["none of the mvtec3d classes but bracket", "--classes"]),
        ("data/bagel", ["--dataset_type", "eyecandies"], ["none of the eyecandies classes but bagel", "--classes"]),
    ],
)
def test_classes_and_folders_that_are_not_there(
    bagels: Path, capsys: pytest.CaptureFixture[str], class_folder: str, flags: list[str], told: list[str]
) -> None:
    shutil.move(bagels / "bagel", bagels.parent / "kept")
    bagels.rmdir()
    shutil.move(bagels.parent / "kept", bagels.parent / class_folder)
    message = refusal_of_files(capsys, bagels, *flags)
    for words in told:
        assert words in message


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("train/good/*/*", ["no training files in", "bagel/train/good", "fill its folder rgb and xyz"]),
        ("test/*/*/*", ["no test files in", "bagel/test/good", "fill its folder rgb and xyz"]),
        ("train/good/xyz/001.tiff", ["1 xyz files for 2 rgb files in", "bagel/train/good", "001.tiff is missing"]),
        ("test/hole/rgb/000.png", ["0 rgb files for 1 xyz files in", "bagel/test/hole", "000.png is missing"]),
        ("test/hole/gt/000.png", ["0 gt files for 1 defective scans in", "bagel/test/hole", "000.png is missing"]),
    ],
)
def test_missing_files_are_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], pattern: str, told: list[str]
) -> None:
    for path in sorted((bagels / "bagel").glob(pattern)):
        path.unlink()
    message = refusal_of_files(capsys, bagels)
    for words in told:
        assert words in message
    assert "restore what" in message or "fill its folder" in message


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    shutil.rmtree(bagels / "bagel" / split)
    message = refusal_of_files(capsys, bagels)
    assert message.startswith("no training files in" if split == "train" else "no test scans in")
    assert f"bagel/{split}" in message


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("train/good/rgb/000.png", cut, "is no complete PNG"),
        ("test/good/rgb/000.png", lambda path: path.write_bytes(b""), "is no complete PNG"),
        ("test/hole/gt/000.png", cut, "is no complete PNG"),
        ("test/good/xyz/000.tiff", cut, "cut short"),
        ("test/good/xyz/000.tiff", lambda path: path.write_text("none"), "cannot be read as a tiff file"),
        ("train/good/xyz/001.tiff", lambda path: write_cloud(path, surface(0)[..., 2]), "array of 64 x 64, expected"),
        (
            "train/good/xyz/001.tiff",
            lambda path: write_cloud(path, np.ones((64, 64, 4), "f4")),
            "array of 64 x 64 x 4,",
        ),
        ("train/good/xyz/001.tiff", lambda path: write_cloud(path, np.ones((64, 64, 3), "u2")), "holds uint16 numbers"),
        ("train/good/rgb/001.png", lambda path: write_picture(path, np.ones((64, 32, 3), "u1")), "64 x 32 pixels"),
        ("test/hole/rgb/000.png", lambda path: write_picture(path, np.ones((80, 80, 3), "u1")), "80 x 80 pixels"),
        ("test/hole/gt/000.png", lambda path: write_picture(path, np.eye(48, dtype="u1")), "000.png 48 x 48"),
    ],
)
def test_bad_files_are_found_before_the_work_starts(
    bagels: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], object], told: str
) -> None:
    damage(bagels / "bagel" / file)
    message = refusal_of_files(capsys, bagels)
    assert str(bagels / "bagel" / file) in message
    assert told in message
    assert any(mend in message for mend in ("restore", "copy it again", "store"))


def test_files_of_a_modality_that_is_not_needed_may_be_bad(bagels: Path, tmp_path: Path) -> None:
    for path in bagels.rglob("*.tiff"):
        cut(path)
    run_into(tmp_path / "out", "--method_name", "DINO", "--dataset_path", bagels, *SMALL)


def test_pictures_to_be_shown_are_checked_as_well(
    bagels: Path, no_networks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(bagels / "bagel/test/good/rgb/000.png")
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL]
    assert "bagel/test/good/rgb/000.png" in refusal(capsys, *flags, "--save_preds")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--method_name DINO+Point_MAE+Fusion --memory_bank single", "--memory_bank multiple"),
        ("--method_name DINO+Point_MAE --memory_bank single", "--memory_bank multiple"),
        ("--method_name DINO --memory_bank multiple", "--memory_bank single"),
        ("--method_name Fusion --memory_bank multiple", "--memory_bank single"),
        ("--method_name DINO+Point_MAE --use_uff", "--use_uff has no effect on DINO+Point_MAE"),
        ("--method_name DINO --use_uff", "--use_uff has no effect on DINO"),
        ("--method_name DINO --rm_zero_for_project", "--rm_zero_for_project is for the single xyz bank"),
        ("--method_name DINO+Point_MAE --rm_zero_for_project", "--rm_zero_for_project is for the single xyz bank"),
        ("--method_name Point_MAE --asy_memory_bank 3", "but Point_MAE has one bank: use --max_sample"),
        ("--method_name DINO --save_feature", "DINO extracts only rgb: use DINO+Point_MAE"),
        ("--method_name Point_MAE --save_feature", "Point_MAE extracts only xyz: use DINO+Point_MAE"),
        ("--point_ops extension --device cpu", "--point_ops extension needs a GPU"),
        ("--f_coreset 0", "f_coreset is 0.0, expected above 0 and at most 1"),
        ("--f_coreset 2", "f_coreset is 2.0, expected above 0 and at most 1"),
        ("--f_coreset nan", "f_coreset is nan, expected above 0 and at most 1"),
        ("--coreset_eps 0", "coreset_eps is 0.0, expected between 0 and 1"),
        ("--coreset_eps 1", "coreset_eps is 1.0, expected between 0 and 1"),
        ("--ocsvm_nu 0", "ocsvm_nu is 0.0, expected above 0 and at most 1"),
        ("--ocsvm_nu 1.5", "ocsvm_nu is 1.5, expected above 0 and at most 1"),
        ("--ocsvm_maxiter 0", "ocsvm_maxiter is 0, expected at least 1"),
        ("--max_sample 0", "max_sample is 0, expected at least 1"),
        ("--asy_memory_bank 0", "asy_memory_bank is 0, expected at least 1"),
        ("--num_workers -1", "num_workers is -1, expected 0 or more"),
        ("--num_group 2", "num_group is 2, expected at least 3"),
        ("--group_size 0", "group_size is 0, expected at least 1"),
        ("--random_state -1", "random_state is -1, expected between 0 and"),
        ("--img_size 16", "img_size is 16, expected at least 58"),
        ("--rgb_s_lambda nan", "rgb is nan, expected a finite number"),
        ("--device meta", "give auto, cpu, cuda"),
        ("--device quantum", "unknown device 'quantum': give auto, cpu, cuda"),
        ("--device cuda:99", "cuda:99 was asked for"),
        ("--method_name PatchCore", "argument --method_name: invalid choice: 'PatchCore'"),
        ("--rgb_backbone_name resnet", "argument --rgb_backbone_name: invalid choice: 'resnet'"),
        ("--xyz_backbone_name PointNet", "argument --xyz_backbone_name: invalid choice: 'PointNet'"),
        ("--memory_bank many", "argument --memory_bank: invalid choice: 'many'"),
        ("--protocol mine", "argument --protocol: invalid choice: 'mine'"),
        ("--precision fp8", "argument --precision: invalid choice: 'fp8'"),
        ("--img_size large", "argument --img_size: invalid int value: 'large'"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ],
)
def test_impossible_flags_are_refused_before_any_file_is_read(
    tmp_path: Path, no_networks: None, capsys: pytest.CaptureFixture[str], flags: str, told: str
) -> None:
    assert told in refusal(capsys, "--dataset_path", tmp_path / "nowhere", *flags.split())


@pytest.mark.parametrize("flag", ["--output_dir", "--save_feature_path"])
def test_a_folder_that_cannot_be_made_is_found_before_the_work_starts(
    bagels: Path, tmp_path: Path, no_networks: None, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    flags = ["--method_name", "DINO+Point_MAE", "--save_feature", "--dataset_path", bagels, *SMALL]
    folders = {"--output_dir": tmp_path / "out", "--save_feature_path": tmp_path / "lib"} | {flag: in_the_way / "new"}
    message = refusal(capsys, *flags, *(each for pair in folders.items() for each in pair))
    assert str(in_the_way / "new") in message
    assert f"choose another {flag}" in message
    assert in_the_way.read_text() == "kept"


# Checkpoints


def backbone_flags(name: str) -> list[str]:
    """Flags of a run whose only network is this one."""
    if name in RGB_BACKBONES:
        return ["--method_name", "DINO", "--rgb_backbone_name", name]
    return ["--method_name", "Point_MAE", "--xyz_backbone_name", name]


VIT, SMALL_VIT = "vit_base_patch8_224_dino", "vit_small_patch8_224_dino"
FILES = {name: spec.files.names[0] for name, spec in (RGB_BACKBONES | XYZ_BACKBONES).items() if spec is not None}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_checkpoint_names_file_folder_and_source(
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags = ["--dataset_path", bagels, "--output_dir", tmp_path / "out", "--checkpoint_dir", tmp_path / "weights"]
    message = refusal(capsys, *backbone_flags(name), *flags)
    assert FILES[name] in message
    assert f"in {tmp_path / 'weights'}" in message
    assert "download it from https://" in message


def other_models_state(name: str) -> dict[str, Any]:
    """Some keys of a file that is not the backbone's."""
    if name in RGB_BACKBONES:
        return {
            "cls_token": torch.zeros(1, 1, 192),
            "pos_embed": torch.zeros(1, 785, 192),
            "norm.weight": torch.ones(192),
        }
    return {"base_model": {"module.decoder.blocks.0.norm1.weight": torch.ones(384)}}


class Malicious:
    """Makes a file when it is unpickled."""

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
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str], name: str, kind: str
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
    assert any(
        mend in message for mend in ("download it again", "check that", "another model's file", "fusion_pretrain")
    )
    assert not (weights / "executed").exists()
    if kind.startswith("malicious"):
        assert "is refused: it holds a posix.system" in message


def test_the_weights_of_a_smaller_network_are_told_by_their_shapes(
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ViT-S file under the name of ViT-B: the same keys."""
    small = {"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 785, 384), "norm.weight": torch.ones(384)}
    torch.save(small, tmp_path / FILES[VIT])
    message = refusal(capsys, *backbone_flags(VIT), "--dataset_path", bagels, "--checkpoint_dir", tmp_path)
    assert "cls_token (1, 1, 384) for (1, 1, 768)" in message
    assert "check that the file belongs to the chosen backbone" in message


def test_img_size_must_be_a_multiple_of_the_patch(
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, tmp_path / FILES[SMALL_VIT])
    flags = [*backbone_flags(SMALL_VIT), "--dataset_path", bagels, "--checkpoint_dir", tmp_path]
    message = refusal(capsys, *flags, "--img_size", 100)
    assert "img_size 100 is no multiple" in message
    assert "patch size 8" in message


def test_a_missing_uff_is_named(
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint-7.pth"
    flags = ["--use_uff", "--fusion_module_path", path, "--dataset_path", bagels, *SMALL]
    message = refusal(capsys, *flags, "--output_dir", tmp_path / "out")
    assert f"checkpoint {path} does not exist" in message
    assert "train it" in message


def test_a_uff_of_other_widths_is_told_by_both(
    bagels: Path, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint-0.pth"
    torch.save({"model": FeatureFusion(48, RGB_DIM).state_dict()}, path)
    flags = ["--use_uff", "--fusion_module_path", path, "--dataset_path", bagels, *SMALL]
    message = refusal(capsys, *flags)
    assert f"{path} was trained on features 48 (xyz) and {RGB_DIM} (rgb) wide" in message
    assert f"give {XYZ_DIM} and {RGB_DIM}" in message
    assert "train it on features of the same backbones" in message


# Bad scans that only show when they are read


def sparse(points: int) -> np.ndarray:
    """A cloud with so many valid points."""
    xyz = surface(0)
    xyz.reshape(-1, 3)[points:] = 0
    return xyz


@pytest.mark.parametrize("scan", ["train/good/xyz/001.tiff", "test/hole/xyz/000.tiff"])
@pytest.mark.parametrize(
    ("xyz", "told"),
    [
        (sparse(0), ["has no valid point", "restore"]),
        (np.full((SIDE, SIDE, 3), np.nan, np.float32), ["has no valid point", "restore"]),
        (sparse(3), ["has 3 valid points", "FPFH needs at least 4", "mend the scan"]),
    ],
)
def test_a_scan_with_too_few_points_is_named(
    bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scan: str, xyz: np.ndarray, told: list[str]
) -> None:
    write_cloud(bagels / "bagel" / scan, xyz)
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL, "--output_dir", tmp_path / "out"]
    message = refusal(capsys, *flags)
    assert message.startswith("bagel: ")
    assert scan in message or scan.replace("xyz/", "").removesuffix(".tiff") in message
    for words in told:
        assert words in message


def test_fewer_points_than_groups(
    bagels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a point transformer of three narrow layers in place of Point-MAE."""

    def tiny(config: DetectorConfig, *_: object) -> PatchExtractor:
        numbers = {"width": 12, "depth": 3, "num_heads": 2, "encoder_dim": 12}
        return PatchExtractor(config, None, PointTransformer(config.num_group, config.group_size, **numbers))

    monkeypatch.setattr(main, "build_extractor", tiny)
    write_cloud(bagels / "bagel/train/good/xyz/001.tiff", sparse(99))
    flags = ["--method_name", "Point_MAE", "--dataset_path", bagels, "--img_size", SIDE, "--output_dir", tmp_path / "o"]
    message = refusal(capsys, *flags, "--num_group", 100, "--group_size", 8)
    assert message.startswith("bagel: ")
    assert "train/good/001 has 99 valid points" in message
    assert "Point_MAE needs at least 100" in message
    assert "--num_group" in message
    run_into(tmp_path / "out", *flags, "--num_group", 99, "--group_size", 8)


def test_damage_inside_a_picture_is_named(bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Header and end are sound, so that only decoding finds it."""
    path = bagels / "bagel/test/hole/rgb/000.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    flags = ["--method_name", "DINO", "--dataset_path", bagels, *SMALL, "--output_dir", tmp_path / "out"]
    assert f"{path} is no complete PNG" in refusal(capsys, *flags)


def test_nan_and_infinity_count_as_missing(tmp_path: Path) -> None:
    """A run with them equals the run with zeros there, and not the run on whole scans."""
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
        flags = ["--method_name", "Point_MAE", "--dataset_path", root, *SMALL, "--random_state", 0]
        scores.append(run_into(root / "out", *flags).scores)
    zeros, *missing, whole = scores
    assert missing == [zeros] * 3
    assert whole != zeros


# Real processes


def process(cwd: Path, *command: object) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)  # type: ignore[arg-type]


def test_a_first_call_without_data_says_what_to_do(tmp_path: Path) -> None:
    done = process(tmp_path, ROOT / "main.py")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    message = sentence(done.stderr)
    assert "datasets/mvtec3d is not a folder: download MVTec 3D-AD from https://www.mvtec.com" in message
    assert "--dataset_path" in message
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_mid_run_is_the_last_line(bagels: Path, tmp_path: Path) -> None:
    write_cloud(bagels / "bagel/train/good/xyz/001.tiff", sparse(0))
    done = process(tmp_path, ROOT / "main.py", "--method_name", "Point_MAE", "--dataset_path", bagels, *SMALL)
    assert done.returncode == 2
    assert "bagel/train/good/xyz/001.tiff has no valid point" in sentence(done.stderr)
    assert "main: bagel: 2 training and 2 test samples" in done.stderr


@pytest.mark.slow
def test_the_three_steps_of_the_readme(parts: Path, tmp_path: Path) -> None:
    """With their default paths, in a folder of their own, on the class of the made-up parts that is a published one."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/mvtec3d").symlink_to(parts)
    banks = ["--memory_bank", "multiple", *PIP_BACKBONES]
    script = ROOT / "main.py"
    double = ["--method_name", "DINO+Point_MAE", "--save_feature", "--save_feature_path", "datasets/patch_lib"]
    first = process(tmp_path, script, *double, *banks)
    assert first.returncode == 0, first.stderr
    assert files_below(tmp_path / "datasets/patch_lib") == [f"cookie/{i:03d}.safetensors" for i in range(TRAIN)]

    with socket.socket() as probe:  # the launcher's usual port may be taken
        probe.bind(("localhost", 0))
        launcher = ["torch.distributed.launch", "--nproc_per_node=1", f"--master_port={probe.getsockname()[1]}"]
    sizes = ["--accum_iter", 1, "--lr", 0.003, "--batch_size", 1]
    paths = ["--data_path", "datasets/patch_lib", "--output_dir", "checkpoints"]
    second = process(tmp_path, "-m", *launcher, ROOT / "fusion_pretrain.py", *sizes, *paths)
    assert second.returncode == 0, second.stderr

    triple = [
        "--method_name",
        "DINO+Point_MAE+Fusion",
        "--use_uff",
        "--fusion_module_path",
        "checkpoints/checkpoint-2.pth",
    ]
    third = process(tmp_path, script, *triple, *banks)
    assert third.returncode == 0, third.stderr
    assert "Without --use_uff" not in third.stdout
    for step in (first, third):
        assert [line for line in step.stdout.splitlines() if line in ("I-AUROC", "P-AUROC", "AU-PRO")] == [
            *("I-AUROC", "P-AUROC", "AU-PRO")
        ]
        assert step.stdout.rstrip().endswith("written to results/")
    for name, key in zip(TABLES, METRICS, strict=True):
        rows = [row for row in table_rows(tmp_path / "results", name) if "exact" not in row[0]]
        assert [row[0].split(",")[0] for row in rows] == ["Method", "DINO+Point_MAE", "Method", "DINO+Point_MAE+Fusion"]
        results = json.loads((tmp_path / "results/results.json").read_text())
        assert rows[3][1] == f"{results['classes']['cookie'][key]:.3f}"
        assert results["classes"]["cookie"]["pixel_rocauc"] > 0.6


# Real pictures and recorded runs


def assert_finite(run: Run) -> None:
    assert np.isfinite(run.scores).all()
    assert all(0 <= figure <= 1 for figure in (run.entry["image_rocauc"], *run.pixel_figures))


@pytest.mark.slow
def test_real_pictures(shared: Path, tmp_path: Path) -> None:
    """The tires of MVTec 3D-AD, of which only the pictures are here."""
    flags = ["--method_name", "DINO", "--rgb_backbone_name", "efficientnet_lite0", "--random_state", 0]
    run = run_into(tmp_path, *flags, "--dataset_path", shared / "mvtec3d_tire_rgb", "--save_preds")
    assert list(run.results["classes"]) == ["tire"]
    labels = [sample["label"] for sample in run.entry["samples"]]
    assert len(labels) == 39
    assert_finite(run)
    assert run.entry["pixel_rocauc"] > 0.7
    assert len(files_below(tmp_path / "anomaly_maps")) == len(files_below(tmp_path / "pred_maps")) == 39


@pytest.mark.slow
def test_real_pictures_through_the_vision_transformer(shared: Path, golden_weights: Path, tmp_path: Path) -> None:
    for folder in sorted((shared / "mvtec3d_tire_rgb/tire").glob("*/*")):
        for path in sorted(path for stem in ("rgb", "gt") for path in (folder / stem).glob("*.png")):
            kept = sorted(each.name for each in path.parent.iterdir())[: 2 if folder.parent.name == "train" else 1]
            if path.name in kept:
                link = tmp_path / "data" / path.relative_to(shared / "mvtec3d_tire_rgb")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    flags = ["--method_name", "DINO", "--rgb_backbone_name", "vit_base_patch8_224_dino", "--max_sample", 2]
    run = run_into(tmp_path / "out", *flags, "--checkpoint_dir", golden_weights, "--dataset_path", tmp_path / "data")
    assert len(run.scores) == 5
    assert_finite(run)


@pytest.mark.golden
@pytest.mark.slow
def test_recorded_run_from_the_command_line(goldens: Path, golden_weights: Path, tmp_path: Path) -> None:
    flags = ["--method_name", "DINO+Point_MAE", "--protocol", "reference", "--random_state", 0, "--classes", "bagel"]
    run = run_into(tmp_path, *flags, "--checkpoint_dir", golden_weights, "--dataset_path", goldens / "data")
    meta = json.loads((goldens / "runs_meta.json").read_text())["bn/DINO+Point_MAE/bagel"]
    for key in METRICS:
        assert run.entry[key] == pytest.approx(meta["metrics"][key], abs=1e-3), key
        assert run.results["mean"][key] == run.entry[key]
    recorded = np.load(goldens / "run_bn_DINO+Point_MAE_bagel.npz")
    paths = [path.removeprefix("bagel/").removesuffix(".png").replace("/rgb/", "/") for path in meta["test_paths"]]
    expected = dict(zip(paths, recorded["image_preds"].tolist(), strict=True))
    assert {sample["path"]: sample["score"] for sample in run.entry["samples"]} == pytest.approx(expected, rel=1e-3)
    assert [sample["label"] for sample in run.entry["samples"]] == [
        int(label) for _, label in sorted(zip(paths, recorded["image_labels"].tolist(), strict=True))
    ]

"""Command line of main.py: the output files of a run and the effect of each flag."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from cleaning_runs import config_for
from conftest import ROOT, GoldenFeatures
from main_runs import (
    METRICS,
    PIP_BACKBONES,
    RGB_DIM,
    SMALL,
    TABLES,
    WRITTEN,
    XYZ_DIM,
    Run,
    bagels_fixture,  # noqa: F401 (a fixture)
    call,
    files_below,
    link_files,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    process,
    read_run,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    surface,
    table_rows,
    write_cloud,
)
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_golden_runs import SVM_TOLERANCE

from dataset import AnomalyDataset, index_split
from feature_extractors import extractor as extractor_module
from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.training_features import TrainingFeatures
from models.feature_fusion import FeatureFusion
from runner import class_run
from runner.settings import detector_configs, make_parser
from utils.feature_store import PatchFileDataset, pair_rgb
from utils.precision import choose_precision
from utils.preprocessing import preprocess
from utils.records import Sample
from utils.synthetic import Plan, make_dataset
from utils.synthetic_data.defects import DEFECTS

Runner = Callable[..., Run]

LIMITS = ["0.3", "0.1", "0.05", "0.01"]
DECISIONS = ("f1", "f1_threshold", "precision", "recall", "false_alarm_rate", "threshold", "latency")
TRAIN, TEST_GOOD = 3, 2  # samples of a synthetic class, next to one per defect
TEST_PATHS = sorted([f"test/good/{i:03d}" for i in range(TEST_GOOD)] + [f"test/{defect}/000" for defect in DEFECTS])
PADDED = (300, 300)  # cleaning pads 224 pixels to a multiple of 100

# Flags of runs shared by several tests
DOUBLE = ("--method_name", "DINO+Point_MAE")
TRIPLE = ("--method_name", "DINO+Point_MAE+Fusion")
POINTS = ("--method_name", "Point_MAE")
PROJECTED = ("--method_name", "DINO", "--max_sample", 1)  # so few rows that the coreset projects


@pytest.fixture(scope="module")
def clean_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cleaned classes of synthetic objects; one has the name of a published class."""
    folder = tmp_path_factory.mktemp("clean_data")
    make_dataset(Plan(folder / "raw", ("gasket", "cookie"), TRAIN, 0, TEST_GOOD, 1, size=224))
    assert not preprocess(config_for(folder / "raw", folder / "clean")).failed
    return folder / "clean"


@pytest.fixture(scope="module")
def base(clean_data: Path) -> list[object]:
    """Flags of every run on the gasket class, with a small image size for speed."""
    return ["--dataset_path", clean_data, "--classes", "gasket", *PIP_BACKBONES, "--seeds", 0, "--img_size", 112]


@pytest.fixture(scope="module")
def runs(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs on the gasket class, cached by their flags."""
    done: dict[tuple[object, ...], Run] = {}

    def run(*flags: object) -> Run:
        if flags not in done:
            done[flags] = run_into(tmp_path_factory.mktemp("run"), *base, *flags)
        return done[flags]

    return run


@pytest.fixture(scope="module")
def uff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of an untrained UFF for the widths of the backbones from packages."""
    path = tmp_path_factory.mktemp("uff") / "checkpoint-0.pth"
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, path)
    return path


# Output files


@pytest.mark.parametrize("method", METHODS)
def test_output_files_of_every_method(runs: Runner, method: str) -> None:
    run = runs("--method_name", method, "--memory_bank", METHODS[method].memory_bank)
    entry, results = run.entry, run.results
    assert files_below(run.folder) == sorted([*WRITTEN, "results.json", "report.html", "classes/gasket.json"])

    assert list(results) == ["schema", "command", "args", "versions", "commit", "machine", "classes", "mean"]
    assert results["schema"] == 2
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["command"][0] == "main.py"
    assert results["command"][-2:] == ["--output_dir", str(run.folder)]
    assert results["args"].items() >= {"method_name": method, "random_state": 0, "output_dir": str(run.folder)}.items()
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert list(results["classes"]) == ["gasket"]
    assert set(entry) == {*METRICS, "au_pro_exact", *DECISIONS, "samples", "seconds", "peak_memory_mb", "split"}
    assert set(results["mean"]) == {*METRICS, "au_pro_exact"}
    assert list(entry["au_pro_exact"]) == list(results["mean"]["au_pro_exact"]) == LIMITS

    assert [sample["path"] for sample in entry["samples"]] == TEST_PATHS
    assert all(set(sample) == {"path", "label", "score", "severity"} for sample in entry["samples"])
    labels = [sample["label"] for sample in entry["samples"]]
    assert labels == [int(not path.startswith("test/good/")) for path in TEST_PATHS]
    assert len(set(run.scores)) == len(TEST_PATHS)
    assert entry["image_rocauc"] == pytest.approx(roc_auc_score(labels, run.scores))
    assert all(0 <= figure <= 1 for figure in run.pixel_figures)
    assert entry["pixel_rocauc"] > 0.6  # these samples are easy; chance is 0.5

    seconds = entry["seconds"]
    assert list(seconds) == ["extract", "coreset", "fuse", "calibrate", "score", "metrics"]
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


def test_classes_keep_the_order_of_the_flag(runs: Runner) -> None:
    run = runs("--method_name", "DINO", "--classes", "gasket", "cookie")
    classes, mean = run.results["classes"], run.results["mean"]
    assert list(classes) == ["gasket", "cookie"]
    assert table_rows(run.folder, TABLES[0])[0] == ["Method", "gasket", "cookie", "Mean"]
    for key in METRICS:
        assert mean[key] == pytest.approx(np.mean([entry[key] for entry in classes.values()]), rel=1e-12)
    for limit in LIMITS:
        exact = [entry["au_pro_exact"][limit] for entry in classes.values()]
        assert mean["au_pro_exact"][limit] == pytest.approx(np.mean(exact), rel=1e-12)
    # The results of a class do not depend on the other classes.
    alone = runs("--method_name", "DINO", "--memory_bank", "single").entry
    assert classes["gasket"]["samples"] == alone["samples"]
    assert classes["cookie"]["samples"] != alone["samples"]


@pytest.mark.parametrize(("dataset_type", "name"), [("mvtec3d", "cookie"), ("eyecandies", "Lollipop")])
def test_default_classes_are_those_of_the_dataset_type(
    clean_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_type: str, name: str
) -> None:
    for link in ("cookie", "Lollipop", "gasket"):
        (tmp_path / link).symlink_to(clean_data / "cookie")
    classes = []

    def stop(name: str, *_: object) -> None:
        classes.append(name)
        raise SystemExit

    monkeypatch.setattr(class_run, "run_class", stop)
    flags = ["--method_name", "DINO", *PIP_BACKBONES, "--dataset_path", tmp_path, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        call(*flags, "--dataset_type", dataset_type)
    assert classes == [name]


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
    assert list(second.results["classes"]) == ["cookie"]  # of the last run only


def test_saved_predictions_have_the_size_of_the_ground_truth(clean_data: Path, runs: Runner) -> None:
    run = runs("--method_name", "DINO+Point_MAE", "--save_preds")
    assert run.entry["samples"] == runs("--method_name", "DINO+Point_MAE", "--memory_bank", "multiple").entry["samples"]
    images = [f"pred_maps/gasket/{path.removeprefix('test/')}.png" for path in TEST_PATHS]
    maps = [f"anomaly_maps/gasket/{path}.tiff" for path in TEST_PATHS]
    assert files_below(run.folder) == sorted(
        [*WRITTEN, "results.json", "report.html", "classes/gasket.json", *images, *maps]
    )

    planes = [tifffile.imread(run.folder / path) for path in maps]
    truth = [clean_data / "gasket" / Path(path).parent / "gt" / f"{Path(path).name}.png" for path in TEST_PATHS]
    masks = [np.asarray(Image.open(path)) > 0 for path in truth]
    for plane, mask in zip(planes, masks, strict=True):
        assert plane.dtype == np.float32
        assert plane.shape == mask.shape == PADDED
    # The files reproduce the P-AUROC of the run (computed at 112 pixels), so each map belongs to its sample.
    defective = np.concatenate(masks, axis=None)
    figure = roc_auc_score(defective, np.concatenate(planes, axis=None))
    assert figure == pytest.approx(run.entry["pixel_rocauc"], abs=0.01)
    assert abs(roc_auc_score(defective, np.concatenate(planes[::-1], axis=None)) - figure) > 0.02

    for path in images:
        with Image.open(run.folder / path) as image:
            assert image.format == "PNG"
            assert image.width > 4 * image.height  # image, outlines, two banks, fused
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.parametrize(("pairing", "dtype"), [("aligned", "fp16"), ("reference", "fp16"), ("aligned", "fp32")])
def test_saved_features_match_the_training_samples(
    clean_data: Path, runs: Runner, tmp_path: Path, pairing: str, dtype: str
) -> None:
    folder = tmp_path / "patch_lib"
    flags = [*DOUBLE, "--max_sample", 2, "--save_feature", "--save_feature_path", folder]
    if (pairing, dtype) != ("aligned", "fp16"):  # the defaults
        flags += ["--uff_pairing", pairing, "--feature_dtype", dtype]
    runs(*flags)
    assert files_below(folder) == ["gasket/000.safetensors", "gasket/001.safetensors"]
    saved = PatchFileDataset(folder)
    assert saved.pairing == pairing
    assert (saved.xyz_dim, saved.rgb_dim) == (XYZ_DIM, RGB_DIM)
    assert (saved.files[0].xyz_backbone, saved.files[0].rgb_backbone) == ("FPFH", "efficientnet_lite0")

    names = {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH"}
    config = DetectorConfig("DINO+Point_MAE", img_size=112, **names)
    extract = build_extractor(config, tmp_path, tmp_path)
    modalities = config.method.modalities
    dataset = AnomalyDataset(index_split(clean_data / "gasket", "train", modalities), modalities, config.img_size)
    for i in range(2):
        features, (xyz, rgb, _) = extract(dataset[i]), saved[i]
        assert features.rgb is not None
        assert features.xyz is not None
        paired = pair_rgb(features.rgb, len(xyz), pairing)
        torch.testing.assert_close(xyz, features.xyz, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(rgb, paired, rtol=1e-3, atol=1e-6)
        assert torch.equal(xyz, features.xyz) == torch.equal(rgb, paired) == (dtype == "fp32")
        assert torch.equal(xyz == 0, features.xyz == 0)


def test_rgb_method_reads_no_xyz_and_builds_no_3d_network(
    clean_data: Path, runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runs("--method_name", "DINO", "--memory_bank", "single")
    link_files(clean_data / "gasket", tmp_path / "rgb" / "gasket", without=["xyz"])
    monkeypatch.setattr(extractor_module, "build_xyz_backbone", lambda *_, **__: pytest.fail("3D network built"))
    run = runs("--method_name", "DINO", "--dataset_path", tmp_path / "rgb")
    assert run.entry["samples"] == expected.entry["samples"]


def test_xyz_method_reads_no_rgb_and_builds_no_rgb_network(
    clean_data: Path, runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_files(clean_data / "gasket", tmp_path / "xyz" / "gasket", without=["rgb"])
    monkeypatch.setattr(extractor_module, "build_rgb_backbone", lambda *_, **__: pytest.fail("RGB network built"))
    run = runs(*POINTS, "--dataset_path", tmp_path / "xyz", "--save_preds")
    assert run.entry["samples"] == runs(*POINTS).entry["samples"]
    for path in TEST_PATHS:  # same size as the ground truth, without an image
        assert tifffile.imread(run.folder / "anomaly_maps" / "gasket" / f"{path}.tiff").shape == PADDED
        assert (run.folder / "pred_maps" / "gasket" / f"{path.removeprefix('test/')}.png").is_file()


def test_max_sample_uses_the_first_n_samples(clean_data: Path, runs: Runner, tmp_path: Path) -> None:
    link_files(clean_data / "gasket", tmp_path / "gasket")
    (tmp_path / "gasket/train/good/rgb" / f"{TRAIN - 1:03d}.png").unlink()
    (tmp_path / "gasket/train/good/xyz" / f"{TRAIN - 1:03d}.tiff").unlink()
    two = runs(*DOUBLE, "--max_sample", TRAIN - 1)
    assert two.scores == runs(*DOUBLE, "--dataset_path", tmp_path).scores
    assert two.scores != runs(*DOUBLE).scores
    assert runs(*DOUBLE, "--max_sample", TRAIN).scores == runs(*DOUBLE).scores


def test_finished_classes_are_kept_when_a_later_one_fails(
    clean_data: Path, runs: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link_files(clean_data / "gasket", tmp_path / "gasket")
    link_files(clean_data / "gasket", tmp_path / "damaged")
    cloud = tmp_path / "damaged/test/dent/xyz/000.tiff"
    cloud.unlink()
    tifffile.imwrite(cloud, np.zeros((*PADDED, 3), np.float32), photometric="rgb")
    out = tmp_path / "out"
    flags = [*PIP_BACKBONES, *POINTS, "--dataset_path", tmp_path, "--classes", "gasket", "damaged", "--output_dir", out]
    message = refusal(capsys, *flags, "--seeds", 0, "--img_size", 112)
    assert str(cloud) in message
    assert files_below(out) == ["classes/gasket.json", "report.html", "results.csv", "results.json"]
    assert ": gasket</h1>" in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results["classes"]) == ["gasket"]
    assert results["classes"]["gasket"]["samples"] == runs(*POINTS).entry["samples"]
    assert results["mean"]["au_pro"] == results["classes"]["gasket"]["au_pro"]


def test_metrics_are_undefined_without_defective_samples(clean_data: Path, runs: Runner, tmp_path: Path) -> None:
    link_files(clean_data / "gasket/train", tmp_path / "gasket/train")
    link_files(clean_data / "gasket/test/good", tmp_path / "gasket/test/good", without=["gt"])
    run = runs(*PROJECTED, "--dataset_path", tmp_path)
    assert [sample["path"] for sample in run.entry["samples"]] == ["test/good/000", "test/good/001"]
    assert run.entry["image_rocauc"] is None
    assert run.results["mean"]["au_pro_exact"] == dict.fromkeys(LIMITS)
    assert table_rows(run.folder, TABLES[0])[1][1:] == ["n/a", "n/a"]


# Flags


def test_defaults_match_the_original() -> None:
    args = vars(make_parser().parse_args([]))
    original = {
        "method_name": ["DINO+Point_MAE+Fusion"],  # a single name in the original
        "max_sample": 400,
        "rgb_backbone_name": "vit_base_patch8_224_dino",
        "xyz_backbone_name": "Point_MAE",
        "fusion_module_path": Path("checkpoints/checkpoint-0.pth"),
        "save_feature": False,
        "use_uff": False,
        "save_feature_path": Path("datasets/patch_lib"),
        "save_preds": None,  # False in the original; here also names of methods
        "group_size": 128,
        "num_group": 1024,
        "seeds": None,  # random_state in the original
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
        "memory_bank": None,  # "multiple" in the original; None picks the bank mode of the method
        "classes": None,
        "few_shot": None,
        "checkpoint_dir": Path("checkpoints"),
        "rgb_layers": None,
        "rgb_checkpoint": None,
        "xyz_checkpoint": None,
        "list_backbones": False,
        "inspect_dataset": False,
        "output_dir": Path("results"),
        "report_parts": 24,
        "xyz_unit": "m",
        "missing_value": None,
        "max_megapixels": 64,
        "load_detector": None,
        "save_detector": None,
        "detector_dtype": "fp32",
        "target_fpr": 0.01,
        "protocol": "reference",
        "point_norm": "cloud",
        "uff_pairing": "aligned",
        "feature_dtype": "fp16",
        "device": "auto",
        "precision": "fp32",
        "point_ops": "auto",
        "memory_budget": None,
        "train_feature_dtype": "fp32",
        "num_workers": 2,
        "parallel": "auto",
        "resume": False,
    }
    assert args == original | added
    assert detector_configs(make_parser().parse_args([])) == {"DINO+Point_MAE+Fusion": DetectorConfig()}


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--memory_bank multiple", "memory_bank", "multiple"),
        ("--rgb_backbone_name vit_small_patch8_224_dino", "rgb_backbone_name", "vit_small_patch8_224_dino"),
        ("--rgb_backbone_name test_vit.r160_in1k", "rgb_backbone_name", "test_vit.r160_in1k"),
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
        ("--seeds 7", "random_state", 7),
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
    (config,) = detector_configs(make_parser().parse_args(flags.split())).values()
    assert getattr(config, field) == value
    assert getattr(DetectorConfig(), field) != value


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in vars(make_parser().parse_args([])):
        assert f"--{name}" in text


@pytest.mark.parametrize(
    ("base_flags", "flags", "scores_change", "maps_change"),
    [
        (DOUBLE, ["--f_coreset", 0.02], True, True),
        (DOUBLE, ["--xyz_s_lambda", 3], True, False),
        (DOUBLE, ["--rgb_smap_lambda", 3], False, True),
        (DOUBLE, ["--img_size", 96], True, True),
        (POINTS, ["--rm_zero_for_project"], True, True),
        (PROJECTED, ["--seeds", 1], True, True),
        (DOUBLE, ["--train_feature_dtype", "fp16"], True, True),
        (DOUBLE, ["--memory_budget", 1e-6], False, False),
        (DOUBLE, ["--num_workers", 0], False, False),
        (DOUBLE, ["--device", "cpu"], False, False),
    ],
)
def test_flags_change_scores_or_maps(
    runs: Runner, base_flags: tuple[object, ...], flags: list[object], scores_change: bool, maps_change: bool
) -> None:
    without, given = runs(*base_flags), runs(*base_flags, *flags)
    assert (given.scores != without.scores) == scores_change
    assert (given.pixel_figures != without.pixel_figures) == maps_change


@pytest.mark.parametrize("flags", [pytest.param(TRIPLE, marks=pytest.mark.slow), DOUBLE, PROJECTED])
def test_the_same_seed_gives_the_same_scores(
    base: list[object], runs: Runner, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    again = run_into(tmp_path, *base, *flags)
    assert again.entry["samples"] == runs(*flags).entry["samples"]
    assert again.pixel_figures == runs(*flags).pixel_figures


def test_bf16_changes_scores_slightly(runs: Runner) -> None:
    full, half = (np.array(runs(*PROJECTED, *flags).scores) for flags in ([], ["--precision", "bf16"]))
    assert (full != half).all()
    assert float(np.median(np.abs(half / full - 1))) < 0.03  # 0.023 with torch 2.8


def test_precision_auto_equals_the_named_choice(runs: Runner) -> None:
    chosen = choose_precision("auto", torch.device("cpu"))
    auto, named = (runs(*PROJECTED, "--precision", each).scores for each in ("auto", chosen))
    assert auto == named


def test_memory_budget_moves_training_features_to_disk(
    base: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[bool] = []
    fit = class_run.fit_detector

    def spy(config: DetectorConfig, extractor: object, features: TrainingFeatures, *rest: object) -> object:
        on_disk.append(features.on_disk)
        return fit(config, extractor, features, *rest)

    monkeypatch.setattr(class_run, "fit_detector", spy)
    for i, flags in enumerate(([], ["--memory_budget", 1e-6])):
        run_into(tmp_path / str(i), *base, *DOUBLE, *flags)
    assert on_disk == [False, True]


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_invalid_memory_budget_is_refused(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    assert f"--memory_budget is {float(budget)}. Give a number from 1e-06 to 1000000." in refusal(
        capsys, "--method_name", "DINO", f"--memory_budget={budget}"
    )


def test_corrected_protocol_changes_scores_and_lists_exact_au_pro_first(runs: Runner) -> None:
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


def test_fusion_bank_without_uff_is_noted(runs: Runner, uff: Path) -> None:
    plain, fused = runs(*TRIPLE), runs(*TRIPLE, "--use_uff", "--fusion_module_path", uff)
    note = "Without --use_uff the fusion bank holds concatenated features"
    assert plain.stdout.count(note) == len(TABLES)
    assert note not in fused.stdout
    for name in TABLES:
        assert (plain.folder / name).read_text().count(note) == 1
        assert note not in (fused.folder / name).read_text()
        assert note not in (runs(*DOUBLE).folder / name).read_text()
    assert fused.scores != plain.scores


# Separate processes


def test_torchrun_matches_a_single_process(bagels: Path, tmp_path: Path) -> None:
    """Results are bit-equal, because one process extracts and scores each sample. See test_main_ranks for more."""
    for i in range(2, 5):  # a batch is four samples, so the fifth goes to the second process
        for folder in ("train/good", "test/good"):
            write_cloud(bagels / f"bagel/{folder}/xyz/{i:03d}.tiff", surface(10 * i + len(folder)))
            shutil.copy(bagels / "bagel/train/good/rgb/001.png", bagels / f"bagel/{folder}/rgb/{i:03d}.png")
    flags = ["--method_name", "DINO+Point_MAE", *SMALL, "--dataset_path", bagels, "--seeds", 0]
    alone = run_into(tmp_path / "alone", *flags)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = process(tmp_path, "-m", *launcher, ROOT / "main.py", *flags, "--output_dir", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    shared = read_run(tmp_path / "shared", done.stdout)
    assert shared.entry["samples"] == alone.entry["samples"]
    assert shared.pixel_figures == alone.pixel_figures
    assert done.stdout.count("bagel: I-AUROC") == 1


@pytest.mark.slow
def test_three_steps_of_the_readme(clean_data: Path, tmp_path: Path) -> None:
    """The steps work with their default paths in an empty folder, on the synthetic class with a published name."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/mvtec3d").symlink_to(clean_data)
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


# Real images and recorded runs


def assert_finite(run: Run) -> None:
    assert np.isfinite(run.scores).all()
    assert all(0 <= figure <= 1 for figure in (run.entry["image_rocauc"], *run.pixel_figures))


@pytest.mark.slow
def test_real_images(real_data: Path, tmp_path: Path) -> None:
    """RGB images of the tires of MVTec 3D-AD; their clouds are not in the test data."""
    flags = ["--method_name", "DINO", "--rgb_backbone_name", "efficientnet_lite0", "--seeds", 0]
    run = run_into(tmp_path, *flags, "--dataset_path", real_data / "mvtec3d_tire_rgb", "--save_preds")
    assert list(run.results["classes"]) == ["tire"]
    labels = [sample["label"] for sample in run.entry["samples"]]
    assert len(labels) == 39
    assert_finite(run)
    assert run.entry["pixel_rocauc"] > 0.7
    assert len(files_below(tmp_path / "anomaly_maps")) == len(files_below(tmp_path / "pred_maps")) == 39


@pytest.mark.slow
def test_real_images_through_the_vision_transformer(real_data: Path, golden_weights: Path, tmp_path: Path) -> None:
    for folder in sorted((real_data / "mvtec3d_tire_rgb/tire").glob("*/*")):
        for path in sorted(path for stem in ("rgb", "gt") for path in (folder / stem).glob("*.png")):
            kept = sorted(each.name for each in path.parent.iterdir())[: 2 if folder.parent.name == "train" else 1]
            if path.name in kept:
                link = tmp_path / "data" / path.relative_to(real_data / "mvtec3d_tire_rgb")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    flags = ["--method_name", "DINO", "--rgb_backbone_name", "vit_base_patch8_224_dino", "--max_sample", 2]
    run = run_into(tmp_path / "out", *flags, "--checkpoint_dir", golden_weights, "--dataset_path", tmp_path / "data")
    assert len(run.scores) == 5
    assert_finite(run)


@pytest.mark.golden
def test_recorded_runs_from_the_command_line(
    goldens: Path,
    golden_weights: Path,
    golden_samples: dict[str, Sample],
    golden_features: GoldenFeatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """main.py on recorded features instead of networks; test_golden_runs covers the other methods."""
    features = {path: golden_features(path) for path in golden_samples}
    monkeypatch.setattr(PatchExtractor, "extract", lambda self, samples: [features[s.path] for s in samples])
    methods = ("DINO", "DINO+Point_MAE")
    call("--method_name", *methods, *golden_flags(goldens, golden_weights), "--output_dir", tmp_path)
    for method in methods:
        assert_recorded(json.loads((tmp_path / method / "results.json").read_text()), method, goldens)


@pytest.mark.golden
@pytest.mark.slow
def test_recorded_run_from_files_to_results(goldens: Path, golden_weights: Path, tmp_path: Path) -> None:
    run = run_into(tmp_path, "--method_name", "DINO+Point_MAE", *golden_flags(goldens, golden_weights))
    assert_recorded(run.results, "DINO+Point_MAE", goldens)


def golden_flags(goldens: Path, weights: Path) -> list[object]:
    paths = ["--dataset_path", goldens / "data", "--checkpoint_dir", weights]
    return [*paths, "--classes", "bagel", "--protocol", "reference", "--seeds", 0]


def assert_recorded(results: dict[str, Any], method: str, goldens: Path) -> None:
    """Metrics and image scores equal the recorded ones within the tolerances of test_golden_runs."""
    meta = json.loads((goldens / "runs_meta.json").read_text())[f"bn_{method}"]
    recorded = np.load(goldens / f"run_bn_{method}.npz")
    entry = results["classes"]["bagel"]
    for key in METRICS:
        assert entry[key] == pytest.approx(meta["metrics"][key], abs=1e-3), (method, key)
        assert results["mean"][key] == entry[key]
    paths = [path.removeprefix("bagel/").removesuffix(".png").replace("/rgb/", "/") for path in meta["test_paths"]]
    scores = {sample["path"]: sample["score"] for sample in entry["samples"]}
    tolerance = SVM_TOLERANCE if METHODS[method].fusion == "svm" else 1e-3
    expected = dict(zip(paths, recorded["image_preds"].tolist(), strict=True))
    assert scores == pytest.approx(expected, rel=tolerance), method
    labels = dict(zip(paths, recorded["image_labels"].tolist(), strict=True))
    assert {sample["path"]: sample["label"] for sample in entry["samples"]} == labels

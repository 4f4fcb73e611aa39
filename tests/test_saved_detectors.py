"""main.py --save_detector and --load_detector: repeated evaluation in a new process, and refused flags."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from detector_files import seal
from main_runs import (
    RGB_DIM,
    SIDE,
    SMALL,
    XYZ_DIM,
    Run,
    call,
    files_below,
    no_download,  # noqa: F401 (a fixture)
    printed,
    process,
    read_run,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    surface,
    write_bagels,
    write_cloud,
    write_image,
)
from safetensors.torch import save_file
from tiny_networks import one_thread  # noqa: F401 (a fixture, of the module's runs too)

from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.detector_record import read_saved
from feature_extractors.extractor import PatchExtractor
from models.feature_fusion import FeatureFusion
from models.rgb_backbone import RgbBackbone
from runner import class_run, preparation
from runner.saved_detectors import FITTING_FLAGS, THRESHOLD_FLAGS
from runner.settings import applied_flags, detector_configs, make_parser

TINY_VIT = "test_vit.r160_in1k"  # the smallest model of timm
SAMPLES = ("test/good/000", "test/hole/000")
VALIDATION = 3
# Keys of a class in results.json that a second evaluation reproduces.
REPRODUCED = (
    "image_rocauc", "pixel_rocauc", "au_pro", "au_pro_exact", "f1", "f1_threshold", "precision", "recall",
    "false_alarm_rate", "threshold", "samples",
)  # fmt: skip
# Predictions of a detector in a process that did not fit it.
PREDICT = """
import json, sys
import torch
from dataset import AnomalyDataset, index_split
from feature_extractors.persistence import load_detector

torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    detector = load_detector(folder, "cpu")
    modalities = detector.config.method.modalities
    for sample in AnomalyDataset(index_split(sys.argv[1], "test", modalities), modalities, detector.config.img_size):
        prediction = detector.predict(sample)
        found.setdefault(folder, {})[sample.path] = prediction.score, prediction.anomaly_map.tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bagels with a validation split, and the same samples without it as cookies."""
    root = write_bagels(tmp_path_factory.mktemp("data"))
    shutil.copytree(root / "bagel", root / "cookie")
    for i in range(VALIDATION):
        noise = np.random.default_rng(50 + i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        write_cloud(root / f"bagel/validation/good/xyz/{i:03d}.tiff", surface(50 + i))
        write_image(root / f"bagel/validation/good/rgb/{i:03d}.png", noise)
    return root


@pytest.fixture(scope="module")
def base(data: Path) -> list[object]:
    """Flags of every fitting run."""
    return ["--dataset_path", data, *SMALL, "--seeds", 0]


@pytest.fixture(scope="module")
def single(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Run of one method on both classes, and the folder of its detectors."""
    folder = tmp_path_factory.mktemp("single")
    flags = ["--method_name", "DINO+Point_MAE", "--save_detector", folder / "detectors"]
    return run_into(folder / "fitted", *base, *flags), folder / "detectors"


@pytest.fixture(scope="module")
def every(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Output folder of a run of all methods on the bagels with a UFF, and the folder of its detectors."""
    folder = tmp_path_factory.mktemp("every")
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, folder / "uff.pth")
    flags = ["--method_name", *METHODS, "--use_uff", "--fusion_module_path", folder / "uff.pth", "--classes", "bagel"]
    call(*base, *flags, "--save_preds", "--save_detector", folder / "detectors", "--output_dir", folder / "fitted")
    (folder / "uff.pth").unlink()
    return folder / "fitted", folder / "detectors"


def scores_of(run: Run, name: str) -> list[float]:
    return [sample["score"] for sample in run.results["classes"][name]["samples"]]


# Fit, save, load


def test_files_of_saved_detectors(single: tuple[Run, Path], every: tuple[Path, Path]) -> None:
    files = ("config.json", "state.safetensors")
    assert files_below(single[1]) == [f"{name}/{file}" for name in ("bagel", "cookie") for file in files]
    assert files_below(every[1]) == sorted(f"{method}/bagel/{file}" for method in METHODS for file in files)


@pytest.mark.slow
def test_new_process_predicts_the_same(data: Path, every: tuple[Path, Path], tmp_path: Path) -> None:
    """Image scores agree within 1e-6, maps within one level of the 8-bit blur.

    Prediction runs one image at a time and the evaluation four, so products round differently. A value near
    a level boundary may then be truncated to the neighboring level.
    """
    fitted, detectors = every
    folders = {str(detectors / method / "bagel"): method for method in METHODS}
    done = process(ROOT, "-W", "ignore", "-c", PREDICT, data / "bagel", *folders)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(folders)
    for folder, method in folders.items():
        run = read_run(fitted / method, "")
        assert [sample["path"] for sample in run.entry["samples"]] == list(found[folder]) == list(SAMPLES)
        for sample in run.entry["samples"]:
            score, plane = found[folder][sample["path"]]
            assert score == pytest.approx(sample["score"], rel=1e-6)
            written = tifffile.imread(run.folder / f"anomaly_maps/bagel/{sample['path']}.tiff")
            assert np.array(plane).shape == written.shape == (SIDE, SIDE)
            difference = np.abs(np.array(plane) - written)
            assert (difference > 1e-6 * np.abs(written)).mean() < 0.01
            # A level is a 255th of the maximum before the blur, which is above that of the map.
            assert difference.max() < 2 * np.abs(written).max() / 255


def test_loaded_detectors_give_the_results_of_the_fitting_run(
    data: Path, single: tuple[Run, Path], tmp_path: Path
) -> None:
    fitted, detectors = single
    loaded = run_into(tmp_path / "out", "--dataset_path", data, "--load_detector", detectors)
    assert list(loaded.results["classes"]) == ["bagel", "cookie"]
    for name, entry in fitted.results["classes"].items():
        again = loaded.results["classes"][name]
        assert list(again) == list(entry)
        assert {key: again[key] for key in REPRODUCED} == {key: entry[key] for key in REPRODUCED}
        assert again["seconds"]["coreset"] == again["seconds"]["fuse"] == again["seconds"]["calibrate"] == 0
        assert again["seconds"]["extract"] > 0
    assert loaded.results["mean"] == fitted.results["mean"]
    *lines, places = fitted.stdout.splitlines()
    assert loaded.stdout.splitlines()[:-1] == lines
    assert places.endswith(f", detectors to {detectors}/")


def test_arguments_of_an_evaluation_describe_the_detectors(
    data: Path, single: tuple[Run, Path], tmp_path: Path
) -> None:
    fitted, detectors = single
    flags = ["--dataset_path", data, "--load_detector", detectors, "--classes", "bagel"]
    args = run_into(tmp_path / "out", *flags).results["args"]
    before = fitted.results["args"]
    config = read_saved(detectors / "bagel").record.config
    assert list(args) == list(before)
    for name in applied_flags(config):
        assert args[name] == before[name], name
    assert args["img_size"] == SIDE
    assert all(args[name] is None for name in FITTING_FLAGS if name != "seeds")
    assert args["load_detector"] == str(detectors)
    assert args["classes"] == ["bagel"]


def test_loaded_methods_share_features(
    data: Path, every: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All saved methods or the named ones run, with the UFF from the detectors."""
    fitted, detectors = every
    seen: list[str] = []
    prepare = PatchExtractor.prepare
    monkeypatch.setattr(
        PatchExtractor, "prepare", lambda self, batch: seen.extend(s.path for s in batch) or prepare(self, batch)
    )
    for names in ([], ["DINO", "Point_MAE"], ["Fusion"]):
        out = tmp_path / ("all" if not names else names[0])
        flags = ["--method_name", *names] if names else []
        seen.clear()
        printed("--dataset_path", data, "--classes", "bagel", "--load_detector", detectors, *flags, "--output_dir", out)
        assert seen == list(SAMPLES)
        for method in names or METHODS:
            mine = read_run(out / method if len(names) != 1 else out, "")
            theirs = read_run(fitted / method, "")
            assert {key: mine.entry[key] for key in REPRODUCED} == {key: theirs.entry[key] for key in REPRODUCED}
            assert mine.results["args"]["method_name"] == method
            assert mine.results["args"]["use_uff"] == ("fusion" in METHODS[method].banks)


def test_evaluation_fits_nothing_and_writes_only_results(
    data: Path, single: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_run, "fit_class", lambda *_: pytest.fail("fitted"))
    link = tmp_path / "data/bagel"
    link.mkdir(parents=True)
    (link / "test").symlink_to(data / "bagel/test")  # training samples are not needed
    before = {path: path.read_bytes() for path in single[1].rglob("*.*")}
    run = run_into(tmp_path / "out", "--dataset_path", tmp_path / "data", "--load_detector", single[1], "--save_preds")
    assert {path: path.read_bytes() for path in single[1].rglob("*.*")} == before
    assert (run.folder / "anomaly_maps/bagel/test/hole/000.tiff").is_file()
    assert (run.folder / "pred_maps/bagel/hole/000.png").is_file()


def test_clouds_are_compared_with_those_of_the_fit(
    data: Path, single: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "bagel/test", tmp_path / "data/bagel/test")
    for path in tmp_path.rglob("*.tiff"):
        tifffile.imwrite(path, 10 * tifffile.imread(path), photometric="rgb")
    flags = ["--dataset_path", tmp_path / "data", "--load_detector", single[1], "--output_dir", tmp_path / "out"]
    assert "those of its class 0." in refusal(capsys, *flags)


def test_precision_can_be_changed_when_loading(data: Path, single: tuple[Run, Path], tmp_path: Path) -> None:
    fitted, detectors = single
    flags = ["--dataset_path", data, "--classes", "bagel", "--load_detector", detectors, "--point_ops", "torch"]
    same = run_into(tmp_path / "same", *flags)
    low = run_into(tmp_path / "low", *flags, "--precision", "bf16")
    assert same.entry["samples"] == fitted.results["classes"]["bagel"]["samples"]
    assert (same.results["args"]["precision"], same.results["args"]["point_ops"]) == ("fp32", "torch")
    assert low.entry["samples"] != same.entry["samples"]
    assert low.results["args"]["precision"] == "bf16"


# Flags of fitting


def test_detector_dtype_changes_the_file_size(base: list[object], tmp_path: Path) -> None:
    flags = [*base, "--classes", "bagel", "--method_name", "DINO", "--save_detector"]
    sizes = {}
    for dtype in ("fp32", "fp16"):
        call(*flags, tmp_path / dtype, "--detector_dtype", dtype)
        assert read_saved(tmp_path / dtype / "bagel").record.dtype == dtype
        sizes[dtype] = (tmp_path / dtype / "bagel/state.safetensors").stat().st_size
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@pytest.mark.slow
def test_thresholds_are_calibrated_on_rounded_banks(base: list[object], data: Path, tmp_path: Path) -> None:
    flags = ["--classes", "bagel", "--method_name", "DINO+Point_MAE"]
    exact = run_into(tmp_path / "exact", *base, *flags)
    fitted = run_into(
        tmp_path / "fitted", *base, *flags, "--save_detector", tmp_path / "it", "--detector_dtype", "fp16"
    )
    loaded = run_into(
        tmp_path / "loaded", "--dataset_path", data, "--classes", "bagel", "--load_detector", tmp_path / "it"
    )
    assert {key: loaded.entry[key] for key in REPRODUCED} == {key: fitted.entry[key] for key in REPRODUCED}
    assert fitted.entry["threshold"]["pixel"] != exact.entry["threshold"]["pixel"]
    assert fitted.entry["threshold"]["pixel"] == pytest.approx(exact.entry["threshold"]["pixel"], rel=1e-2)


def test_damaged_validation_sample_is_refused_before_fitting(
    capsys: pytest.CaptureFixture[str], base: list[object], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of detectors is not made."""
    monkeypatch.setattr(class_run, "fit_detector", lambda *_: pytest.fail("fitted"))
    shutil.copytree(data / "bagel", tmp_path / "data/bagel")
    write_cloud(tmp_path / "data/bagel/validation/good/xyz/001.tiff", np.zeros((SIDE, SIDE, 3), np.float32))
    flags = [*base, "--dataset_path", tmp_path / "data", "--method_name", "DINO", "Point_MAE"]
    message = refusal(capsys, *flags, "--save_detector", tmp_path / "it")
    assert "bagel/validation/good/xyz/001.tiff has no valid point" in message
    assert not (tmp_path / "it").exists()


def test_thresholds_use_the_validation_split_if_present(
    single: tuple[Run, Path], base: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, detectors = single
    threshold = {name: entry["threshold"] for name, entry in run.results["classes"].items()}
    assert (threshold["bagel"]["source"], threshold["bagel"]["parts"]) == ("validation", VALIDATION)
    assert (threshold["cookie"]["source"], threshold["cookie"]["parts"]) == ("training", 2)
    assert scores_of(run, "bagel") == scores_of(run, "cookie")
    assert threshold["bagel"]["image"] > threshold["cookie"]["image"]  # the banks hold the training samples
    assert threshold["bagel"]["pixel"] > threshold["cookie"]["pixel"]
    assert threshold["bagel"]["target_fpr"] == 0.01
    for name, each in threshold.items():
        saved = read_saved(detectors / name).record.thresholds
        assert saved is not None
        assert {key: value for key, value in vars(saved).items() if key != "typical"} == each
        figures = run.results["classes"][name]
        scores = {sample["label"]: sample["score"] for sample in figures["samples"]}
        assert [each["severity"] for each in figures["samples"]] == list(map(saved.severity, scores.values()))
        assert figures["recall"] == float(scores[1] > each["image"])
        assert figures["false_alarm_rate"] == float(scores[0] > each["image"])

    caplog.clear()
    run_into(tmp_path / "out", *base, "--method_name", "DINO", "--classes", "bagel")
    assert "no validation/good" not in caplog.text
    run_into(tmp_path / "out", *base, "--method_name", "DINO", "--classes", "cookie")
    assert "has no validation/good, so thresholds are calibrated on the training samples" in caplog.text


def test_target_fpr_changes_the_thresholds(single: tuple[Run, Path], base: list[object], tmp_path: Path) -> None:
    run = run_into(tmp_path, *base, "--method_name", "DINO+Point_MAE", "--classes", "bagel", "--target_fpr", 0.5)
    threshold, before = run.entry["threshold"], single[0].results["classes"]["bagel"]["threshold"]
    assert threshold["target_fpr"] == 0.5
    assert threshold["image"] < before["image"]
    assert threshold["pixel"] < before["pixel"]
    assert scores_of(run, "bagel") == scores_of(single[0], "bagel")


def test_latency_covers_the_test_samples(single: tuple[Run, Path]) -> None:
    for entry in single[0].results["classes"].values():
        latency = entry["latency"]
        assert list(latency) == ["p50", "p95", "p99"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert latency["p50"] * len(SAMPLES) <= entry["seconds"]["extract"] + entry["seconds"]["score"]


# Refused flags and folders


@pytest.mark.parametrize("rate", ["0", "1", "-0.5", "nan"])
def test_invalid_target_fpr_is_refused(capsys: pytest.CaptureFixture[str], rate: str) -> None:
    message = refusal(capsys, "--method_name", "DINO", f"--target_fpr={rate}")
    assert f"--target_fpr is {float(rate)}. Give a number from 1e-06 to 0.999999." in message


@pytest.mark.parametrize("name", [name for name in FITTING_FLAGS if name not in THRESHOLD_FLAGS])
def test_fitting_flags_are_refused_with_load_detector(
    capsys: pytest.CaptureFixture[str], single: tuple[Run, Path], data: Path, name: str
) -> None:
    values = {
        "max_sample": [400], "few_shot": [2], "seeds": [0], "detector_dtype": ["fp32"], "save_feature": [],
        "feature_dtype": ["fp16"], "uff_pairing": ["aligned"], "memory_budget": [1], "train_feature_dtype": ["fp32"],
    }  # fmt: skip
    flags = ["--dataset_path", data, "--load_detector", single[1], f"--{name}", *values.get(name, ["there"])]
    assert refusal(capsys, *flags) == f"--{name} has no effect with --load_detector. Leave it out."


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        (["--method_name", "DINO"], "DINO+Point_MAE"),
        (["--method_name", "DINO+Point_MAE", "DINO"], "DINO+Point_MAE"),
        (["--rgb_backbone_name", "vit_base_patch8_224_dino"], "efficientnet_lite0"),
        (["--xyz_backbone_name", "Point_MAE"], "FPFH"),
        (["--memory_bank", "single"], "multiple"),
        (["--protocol", "corrected"], "reference"),
        (["--img_size", 224], str(SIDE)),
        (["--f_coreset", 0.2], "0.1"),
        (["--rgb_s_lambda", 0.2], "0.1"),
        (["--use_uff"], "False"),
        (["--point_norm", "running"], "cloud"),
    ],
)
def test_contradicting_flags_are_refused(
    capsys: pytest.CaptureFixture[str], single: tuple[Run, Path], data: Path, flags: list[object], saved: str
) -> None:
    message = refusal(capsys, "--dataset_path", data, "--load_detector", single[1], *flags)
    assert message.startswith(f"{' '.join(map(str, flags))} ")
    assert f"contradicts {single[1]}, whose detectors" in message
    assert f" {saved}. Leave it out" in message


def test_agreeing_flags_are_accepted(data: Path, single: tuple[Run, Path], tmp_path: Path) -> None:
    flags: list[object] = ["--method_name", "DINO+Point_MAE", "--memory_bank", "multiple", "--protocol", "reference"]
    flags += ["--dataset_path", data, *SMALL, "--load_detector", single[1], "--f_coreset", 0.1]
    run = run_into(tmp_path / "out", *flags)
    assert run.results["classes"]["bagel"]["samples"] == single[0].results["classes"]["bagel"]["samples"]


@pytest.fixture
def detectors(single: tuple[Run, Path], tmp_path: Path) -> Path:
    """Copy of saved detectors, which tests may damage."""
    return Path(shutil.copytree(single[1], tmp_path / "detectors"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "config.json").read_text())
    change(record)
    seal(record)
    (folder / "config.json").write_text(json.dumps(record))


def test_class_without_a_detector_is_refused(
    capsys: pytest.CaptureFixture[str], data: Path, detectors: Path, tmp_path: Path
) -> None:
    shutil.rmtree(detectors / "cookie")
    flags = ["--dataset_path", data, "--load_detector", detectors, "--output_dir", tmp_path / "out"]
    assert refusal(capsys, *flags) == (
        f"{detectors} holds no detector of cookie, neither in cookie nor in <method>/cookie. Fit one with "
        "--save_detector, or name fitted classes with --classes."
    )
    assert not (tmp_path / "out").exists()
    assert list(run_into(tmp_path / "out", *flags, "--classes", "bagel").results["classes"]) == ["bagel"]


def test_detector_of_another_class_is_refused(capsys: pytest.CaptureFixture[str], data: Path, detectors: Path) -> None:
    shutil.rmtree(detectors / "cookie")
    (detectors / "bagel").rename(detectors / "cookie")
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors, "--classes", "cookie")
    assert message.startswith(f"{detectors}/cookie holds a detector of class 'bagel' by DINO+Point_MAE. Move it back")


def test_detector_in_the_folder_of_another_method_is_refused(
    capsys: pytest.CaptureFixture[str], data: Path, every: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(every[1] / "DINO", tmp_path / "mixed/Point_MAE")
    message = refusal(capsys, "--dataset_path", data, "--load_detector", tmp_path / "mixed", "--classes", "bagel")
    assert "Point_MAE/bagel holds a detector of class 'bagel' by DINO. Move it back" in message


def test_classes_with_different_settings_are_refused(
    capsys: pytest.CaptureFixture[str], data: Path, detectors: Path
) -> None:
    change_config(detectors / "cookie", lambda record: record["config"].update(f_coreset=0.3, ocsvm_nu=0.2))
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors)
    assert message == (
        f"{detectors}/bagel and {detectors}/cookie were fitted with different f_coreset, ocsvm_nu. Evaluate them in "
        "separate runs."
    )


def test_methods_with_different_settings_are_refused(
    capsys: pytest.CaptureFixture[str], data: Path, every: tuple[Path, Path], tmp_path: Path
) -> None:
    for method in ("DINO", "Point_MAE"):
        shutil.copytree(every[1] / method, tmp_path / "it" / method)
    change_config(tmp_path / "it/Point_MAE/bagel", lambda record: record["config"].update(f_coreset=0.3))
    message = refusal(capsys, "--dataset_path", data, "--load_detector", tmp_path / "it", "--classes", "bagel")
    assert "it/DINO/bagel and " in message
    assert "it/Point_MAE/bagel were fitted with different f_coreset. Evaluate them in separate runs" in message


def test_classes_with_different_methods_are_refused(
    capsys: pytest.CaptureFixture[str], data: Path, every: tuple[Path, Path], tmp_path: Path
) -> None:
    it = tmp_path / "it"
    for folder in ("DINO/bagel", "Point_MAE/bagel", "DINO/cookie"):
        shutil.copytree(every[1] / Path(folder).parent / "bagel", it / folder)
    change_config(it / "DINO/cookie", lambda record: record.update(class_name="cookie"))
    flags = ["--dataset_path", data, "--load_detector", it, "--output_dir", tmp_path / "out"]
    assert refusal(capsys, *flags) == (
        "The detectors of bagel are by DINO and Point_MAE, those of cookie by DINO. Name common methods with "
        "--method_name, or fewer classes with --classes."
    )
    assert list(run_into(tmp_path / "out", *flags, "--method_name", "DINO").results["classes"]) == ["bagel", "cookie"]
    message = refusal(capsys, *flags, "--method_name", "Point_MAE")
    assert f"--method_name Point_MAE contradicts {it}, whose detectors of cookie are by DINO. Leave it out" in message


def test_detector_in_two_places_is_refused(
    capsys: pytest.CaptureFixture[str], data: Path, every: tuple[Path, Path], detectors: Path, tmp_path: Path
) -> None:
    """Each class is checked by its files, so an empty folder of a method is allowed."""
    (detectors / "DINO/bagel").mkdir(parents=True)
    flags = ["--dataset_path", data, "--load_detector", detectors, "--output_dir", tmp_path / "out"]
    assert list(run_into(tmp_path / "out", *flags).results["classes"]) == ["bagel", "cookie"]
    shutil.copytree(every[1] / "DINO/bagel", detectors / "DINO/bagel", dirs_exist_ok=True)
    assert refusal(capsys, *flags) == (
        f"{detectors}/bagel and {detectors}/DINO/bagel both hold a detector of bagel. Move away the ones "
        "you do not want."
    )
    assert list(run_into(tmp_path / "out", *flags, "--classes", "cookie").results["classes"]) == ["cookie"]


@pytest.mark.parametrize(
    ("methods", "there"), [(["DINO", "Point_MAE"], "bagel"), (["DINO"], "Fusion/bagel"), (["DINO", "Fusion"], "Fusion")]
)
def test_detectors_of_another_layout_are_refused_before_fitting(
    capsys: pytest.CaptureFixture[str],
    base: list[object],
    detectors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: list[str],
    there: str,
) -> None:
    monkeypatch.setattr(preparation, "build_extractor", lambda *_, **__: pytest.fail("work started"))
    shutil.copytree(detectors / "bagel", tmp_path / "it" / there)
    before = files_below(tmp_path / "it")
    flags = ["--classes", "bagel", "--save_detector", tmp_path / "it", "--output_dir", tmp_path / "out"]
    message = refusal(capsys, *base, "--method_name", *methods, *flags)
    assert message.startswith(f"{tmp_path}/it/{there} holds a detector from a run of ")
    assert "could not tell from this run's. Move it away" in message
    assert files_below(tmp_path / "it") == before
    assert not (tmp_path / "out").exists()


def test_class_may_have_the_name_of_a_method(base: list[object], data: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    for name in ("Fusion", "bagel"):
        shutil.copytree(data / "cookie", data_dir / name)
    flags = ["--dataset_path", data_dir, "--classes", "Fusion", "bagel"]
    fitted = run_into(tmp_path / "out", *base, *flags, "--method_name", "DINO", "--save_detector", tmp_path / "it")
    loaded = run_into(tmp_path / "again", *flags, "--load_detector", tmp_path / "it")
    for name in ("Fusion", "bagel"):
        assert scores_of(loaded, name) == scores_of(fitted, name)


def test_interrupted_save_is_reported(capsys: pytest.CaptureFixture[str], data: Path, detectors: Path) -> None:
    (detectors / "cookie").rename(detectors / ".cookie.old")
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors)
    assert f"Saving it was interrupted. Rename {detectors}/.cookie.old to cookie" in message


def test_wrong_folder_is_refused_with_a_hint(capsys: pytest.CaptureFixture[str], data: Path, detectors: Path) -> None:
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors / "bagel")
    assert message == f"{detectors}/bagel is a detector itself. Give the folder above it, {detectors}."
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors / "more")
    assert message == f"{detectors}/more is not a folder. Give the one that --save_detector named."


def test_detector_dtype_without_save_detector_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--detector_dtype", "fp16")
    assert message == "--detector_dtype only applies to --save_detector. Give both, or leave it out."


@pytest.mark.parametrize(
    ("saved", "output"), [("it", "it"), ("it", "it/bagel"), ("out/it", "out"), ("out/../it", "it")]
)
def test_detectors_and_results_need_separate_folders(
    capsys: pytest.CaptureFixture[str], base: list[object], tmp_path: Path, saved: str, output: str
) -> None:
    message = refusal(capsys, *base, "--save_detector", saved, "--output_dir", output)
    assert message.startswith(
        f"--save_detector {saved} and --output_dir {output} are the same folder, or one is inside"
    )
    assert not list(tmp_path.iterdir())


def test_named_memory_bank_is_compatible_with_the_default(data: Path, detectors: Path, tmp_path: Path) -> None:
    change_config(detectors / "cookie", lambda record: record["config"].update(memory_bank="multiple"))
    run = run_into(tmp_path / "out", "--dataset_path", data, "--load_detector", detectors)
    assert list(run.results["classes"]) == ["bagel", "cookie"]


def test_backbone_is_identified_by_its_weights(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    """The same weights in another file format are accepted; other weights in the same file are refused."""
    torch.manual_seed(0)
    weights = RgbBackbone(TINY_VIT, SIDE).model.state_dict()
    torch.save(weights, tmp_path / "first.pth")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "second.safetensors")
    backbone = ["--rgb_backbone_name", TINY_VIT, "--img_size", SIDE, "--rgb_checkpoint"]
    flags = ["--dataset_path", data, "--classes", "bagel"]
    keep = ["--method_name", "DINO", "--save_detector", tmp_path / "detectors", "--seeds", 0]
    fitted = run_into(tmp_path / "fitted", *flags, *keep, *backbone, tmp_path / "first.pth")
    flags += ["--load_detector", tmp_path / "detectors", "--rgb_checkpoint"]
    loaded = run_into(tmp_path / "loaded", *flags, tmp_path / "second.safetensors")
    assert loaded.entry["samples"] == fitted.entry["samples"]

    next(iter(weights.values())).add_(1e-3)
    torch.save(weights, tmp_path / "first.pth")
    message = refusal(capsys, *flags, tmp_path / "first.pth")
    assert f"{tmp_path}/detectors/bagel was fitted with other weights of {TINY_VIT} (SHA-256 " in message
    assert "Give its file as --rgb_checkpoint, or fit the detector again" in message
    message = refusal(capsys, *flags[:-1])
    assert f"No checkpoint {TINY_VIT}.safetensors" in message


def test_damaged_detector_is_refused(capsys: pytest.CaptureFixture[str], data: Path, detectors: Path) -> None:
    path = detectors / "cookie/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(capsys, "--dataset_path", data, "--load_detector", detectors, "--classes", "cookie")
    assert f"{path} is damaged or of another detector" in message


def test_foreign_files_in_a_detector_folder_are_refused_before_fitting(
    capsys: pytest.CaptureFixture[str], base: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "build_extractor", lambda *_, **__: pytest.fail("work started"))
    (tmp_path / "mine/bagel").mkdir(parents=True)
    (tmp_path / "mine/bagel/image.png").write_text("mine")
    message = refusal(capsys, *base, "--method_name", "DINO", "--save_detector", tmp_path / "mine")
    assert f"{tmp_path}/mine/bagel is not a detector and holds image.png" in message
    assert (tmp_path / "mine/bagel/image.png").read_text() == "mine"


# Command line


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_round_trip_of_applied_flags(protocol: str) -> None:
    line = [
        "--method_name",
        "DINO+Point_MAE",
        "--asy_memory_bank",
        "3",
        "--rgb_s_lambda",
        "2",
        "--fusion_smap_lambda",
        "3",
    ]
    args = make_parser().parse_args([*line, "--protocol", protocol])
    (config,) = detector_configs(args).values()
    flags = applied_flags(config)
    assert flags.keys() - vars(args).keys() == {"random_state"}  # of one of --seeds
    again = make_parser().parse_args([])
    vars(again).update(flags | {"method_name": [flags["method_name"]]})
    assert detector_configs(again) == {"DINO+Point_MAE": config}


def test_unnamed_protocol_is_called_custom() -> None:
    mixed = DetectorConfig(protocol=replace(PROTOCOLS["reference"], float_blur=True))
    assert applied_flags(mixed)["protocol"] == "custom"

"""Prediction of new samples: agreement with main.py, output files, and errors of single samples."""

import csv
import gc
import io
import json
import re
import shutil
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from main_runs import call as call_main
from main_runs import read_run, write_cloud, write_image
from PIL import Image
from predict_runs import (
    METHODS,
    SIDE,
    Fitted,
    fitted_fixture,  # noqa: F401 (a fixture)
    flags_for,
    lines_of,
    run,
    stubs_fixture,  # noqa: F401 (a fixture)
    write_samples,
)
from tiny_networks import one_thread  # noqa: F401 (a fixture)

import predict
from dataset import AnomalyDataset, index_split, make_sample
from feature_extractors.detector import Detector
from feature_extractors.persistence import load_detector, save_detector
from runner import prediction
from runner.prediction import LoadedSample, Outcome, PredictionWriter, SampleReader, predict_samples
from utils import preprocessing
from utils.choices import CLEANING_FLAGS
from utils.cleaning.cloud_cleaning import CleaningRule, crop_padding, pad_to_square
from utils.errors import InputError
from utils.records import CloudForm, PatchFeatures, Prediction, SampleFiles
from utils.reporting.visualization import GAP, PANEL, resize_map
from utils.scans.organized_pc import read_organized_pc, write_organized_pc
from utils.synthetic_data.scanner import make_scan

BOTH = frozenset({"rgb", "xyz"})
KEYS = ["schema", "name", "rgb", "xyz", "stamp"]
RESULTS = ["score", "severity", "anomalous", "threshold", "seconds", "map", "overlay"]


def refusal(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The sentence that the script ends with."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["predict.py", *map(str, flags)])
        predict.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("predict.py: error: ")
    assert [line for line in lines if "error: " in line] == lines[-1:]
    return lines[-1]


# Predictions of a sample


@pytest.mark.parametrize("method", METHODS)
def test_predictions_match_the_evaluation(fitted: Fitted, tmp_path: Path, method: str) -> None:
    reference = fitted.runs[method]
    for sample in reference.entry["samples"]:
        folder = fitted.data / Path(sample["path"]).parent
        flags = flags_for(fitted, folder, tmp_path, method)
        if method == "DINO":
            flags = flags[:-2]
        assert run(*flags) == 0
        (line,) = lines_of(tmp_path)
        assert line["score"] == pytest.approx(sample["score"], rel=1e-6)
        expected = tifffile.imread(reference.folder / "anomaly_maps/bagel" / f"{sample['path']}.tiff")
        found = tifffile.imread(line["map"])
        assert found.dtype == np.float32 and found.shape == (SIDE, SIDE)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        threshold = reference.entry["threshold"]["image"]
        assert line["threshold"] == threshold
        assert line["anomalous"] == (line["score"] > threshold)
        assert (line["severity"] > 1) == line["anomalous"]


def test_a_detector_remembers_the_form_of_raw_clouds(fitted: Fitted, tmp_path: Path) -> None:
    shutil.copytree(fitted.data, tmp_path / "data/bagel")
    for path in tmp_path.rglob("xyz/*"):
        millimeters = 1000 * read_organized_pc(path)
        millimeters[:8, :12] = -9999
        write_organized_pc(path, millimeters)
    flags = ["--dataset_path", tmp_path / "data", "--classes", "bagel", "--img_size", SIDE, "--num_group", 24]
    flags += ["--group_size", 12, "--f_coreset", 0.05, "--seeds", 0, "--device", "cpu"]
    flags += ["--xyz_unit", "mm", "--missing_value", -9999, "--save_detector", tmp_path / "it"]
    call_main("--method_name", "Point_MAE", *flags, "--output_dir", tmp_path / "results")
    sample = read_run(tmp_path / "results", "").entry["samples"][0]
    clouds = tmp_path / "data/bagel" / Path(sample["path"]).parent / "xyz"
    flags = ["--detector", tmp_path / "it/bagel", "--xyz", clouds, "--device", "cpu"]
    assert run(*flags, "--output_dir", tmp_path / "a") == 0
    assert lines_of(tmp_path / "a")[0]["score"] == pytest.approx(sample["score"], rel=1e-6)
    assert run(*flags, "--output_dir", tmp_path / "b", "--xyz_unit", "m") == 1
    assert "Give --xyz_unit mm" in lines_of(tmp_path / "b")[0]["error"]


def test_prediction_from_arrays_in_python(fitted: Fitted) -> None:
    detector = load_detector(fitted.detectors["DINO+Point_MAE"], "cpu")
    sample = fitted.runs["DINO+Point_MAE"].entry["samples"][1]
    folder = fitted.data / Path(sample["path"]).parent
    rgb = np.asarray(Image.open(folder / "rgb/000.png").convert("RGB"))
    xyz = tifffile.imread(folder / "xyz/000.tiff")
    prediction = detector.predict(make_sample("sample", rgb, xyz, detector.config.img_size))
    assert prediction.score == pytest.approx(sample["score"], rel=1e-6)
    assert prediction.anomaly_map.shape == (SIDE, SIDE)


def docs_snippet(name: str) -> str:
    """The Python snippet of docs/PREDICT.md that uses a name."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/PREDICT.md").read_text(), flags=re.DOTALL)
    return next(each for each in snippets if name in each)


@pytest.mark.parametrize("camera_frame", [True, False])
def test_prediction_snippet_of_the_docs(
    fitted: Fitted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    camera_frame: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    detector = load_detector(fitted.detectors["DINO+Point_MAE"], "cpu")
    detector.clouds = replace(detector.clouds, camera_frame=camera_frame)
    save_detector(detector, "detectors/bagel")
    Path("station").mkdir()
    for number in (1, 2):
        shutil.copy(fitted.data / "test/hole/rgb/000.png", f"station/part_00{number}.png")
        xyz = read_organized_pc(fitted.data / "test/hole/xyz/000.tiff")
        write_cloud(Path(f"station/part_00{number}.tiff"), xyz if camera_frame else xyz * np.float32([1, -1, -1]))
    exec(compile(docs_snippet("make_sample"), "docs/PREDICT.md", "exec"), {})
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[::4]]
    assert len(scores) == 2 and scores[0] == scores[1]
    if camera_frame:
        expected = fitted.runs["DINO+Point_MAE"].entry["samples"][1]["score"]
        assert scores[0] == pytest.approx(expected, rel=1e-4)


def test_file_formats_agree(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 4)
    xyz = read_organized_pc(samples_dir / "xyz/000.tiff")
    for i in range(4):
        (samples_dir / f"xyz/{i:03d}.tiff").unlink()
        shutil.copy(fitted.data / "train/good/rgb/000.png", samples_dir / f"rgb/{i:03d}.png")
    write_organized_pc(samples_dir / "xyz/000.tif", xyz)
    np.save(samples_dir / "xyz/001.npy", np.where(xyz == 0, np.nan, xyz).astype(np.float64))
    fields = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
    header = f"VERSION 0.7\n{fields}WIDTH {SIDE}\nHEIGHT {SIDE}\nPOINTS {SIDE**2}\nDATA binary\n"
    (samples_dir / "xyz/002.pcd").write_bytes(header.encode() + xyz.tobytes())
    properties = "property float x\nproperty float y\nproperty float z\nend_header\n"
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {SIDE**2}\n{properties}"
    (samples_dir / "xyz/003.ply").write_bytes(header.encode() + xyz.tobytes())
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--batch_size", 1) == 0
    assert len({line["score"] for line in lines_of(tmp_path / "out")}) == 1


def test_depth_image_equals_its_cloud(fitted: Fitted, tmp_path: Path) -> None:
    depth = np.random.default_rng(0).integers(4900, 5100, (SIDE, SIDE)).astype(np.uint16)
    write_image(tmp_path / "depth.png", depth)
    camera = {"fx": 500.0, "fy": 500.0, "cx": 32.0, "cy": 31.5, "depth_scale": 0.0001}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    z = depth * 0.0001
    v, u = np.indices(z.shape)
    x = np.where(u == 32, 1e-6, (u - 32.0) * z / 500.0)
    np.save(tmp_path / "depth.npy", np.stack([x, (v - 31.5) * z / 500.0, z], axis=-1).astype(np.float32))
    flags = ["--detector", fitted.detectors["Point_MAE"], "--device", "cpu", "--output_dir", tmp_path / "out"]
    scores = []
    for name, more in (("depth.png", ["--intrinsics", tmp_path / "camera.json"]), ("depth.npy", [])):
        assert run(*flags, "--xyz", tmp_path / name, *more) == 0
        scores += [line["score"] for line in lines_of(tmp_path / "out")]
    assert scores[0] == scores[1]


def test_millimeters_are_refused_or_converted(fitted: Fitted, tmp_path: Path) -> None:
    xyz = read_organized_pc(fitted.data / "test/hole/xyz/000.tiff")
    np.save(tmp_path / "000.npy", xyz * 1000)
    flags = ["--detector", fitted.detectors["Point_MAE"], "--device", "cpu", "--output_dir", tmp_path / "out"]
    flags += ["--xyz", tmp_path / "000.npy"]
    assert run(*flags) == 1
    assert "--xyz_unit mm" in lines_of(tmp_path / "out")[0]["error"]
    assert run(*flags, "--xyz_unit", "mm") == 0
    expected = fitted.runs["Point_MAE"].entry["samples"][1]["score"]
    assert lines_of(tmp_path / "out")[0]["score"] == pytest.approx(expected, rel=1e-3)


def test_batch_size_and_workers_do_not_change_scores(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples")
    found = []
    for size, workers in ((1, 0), (2, 3), (9, 1)):
        flags = [*flags_for(fitted, samples_dir, tmp_path / "out"), "--batch_size", size, "--num_workers", workers]
        assert run(*flags, "--no_images") == 0
        lines = lines_of(tmp_path / "out")
        assert [line["name"] for line in lines] == [f"{i:03d}" for i in range(5)]
        found.append([line["score"] for line in lines])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


# Output of a run


def test_output_of_a_run(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    out = tmp_path / "out"
    assert run(*flags_for(fitted, samples_dir, out)) == 0
    names = ["000.tiff", "000_overlay.png", "001.tiff", "001_overlay.png", "predictions.csv", "predictions.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    for line in lines_of(out):
        assert list(line) == [*KEYS, *RESULTS] and line["schema"] == 2
        assert Path(line["rgb"]) == samples_dir / f"rgb/{line['name']}.png"
        assert Path(line["xyz"]) == samples_dir / f"xyz/{line['name']}.tiff"
        assert Path(line["map"]) == out / f"{line['name']}.tiff"
        assert Path(line["overlay"]) == out / f"{line['name']}_overlay.png"
        assert 0 < line["seconds"] < 60
    *printed, summary = capsys.readouterr().out.splitlines()
    assert [each.split()[0] for each in printed] == ["000", "001"]
    decisions = ["anomalous" if line["anomalous"] else "good" for line in lines_of(out)]
    assert len({each.index(decision) for each, decision in zip(printed, decisions, strict=True)}) == 1
    count = decisions.count("anomalous")
    assert summary.startswith("2 samples predicted in ") and f"{count} anomalous, {2 - count} good" in summary
    assert str(out / "predictions.jsonl") in summary


def test_no_images_writes_predictions_only(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--no_images") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.jsonl"]
    assert [(line["map"], line["overlay"]) for line in lines_of(tmp_path / "out")] == [(None, None)] * 2


def test_append_keeps_earlier_predictions(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    flags = [*flags_for(fitted, samples_dir, tmp_path / "out"), "--no_images"]
    for more, expected in (([], 2), ([], 2), (["--append"], 4)):
        assert run(*flags, *more) == 0
        assert len(lines_of(tmp_path / "out")) == expected


def test_append_removes_an_incomplete_line(fitted: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    flags = [*flags_for(fitted, samples_dir, tmp_path / "out"), "--no_images", "--append"]
    assert run(*flags) == 0
    with (tmp_path / "out/predictions.jsonl").open("a") as lines:
        lines.write('{"name": "001", "sco')
    assert "incomplete line" not in caplog.text
    assert run(*flags) == 0
    assert [line["name"] for line in lines_of(tmp_path / "out")] == ["000", "000"]
    assert "predictions.jsonl ends in an incomplete line" in caplog.text


def test_predictions_are_written_before_the_next_batch(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples_dir, seen = write_samples(fitted, tmp_path / "samples"), []
    plain = prediction._predict_batch

    def predict_batch(*arguments: Any) -> list[Outcome]:
        seen.append(len(lines_of(tmp_path / "out")))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(prediction, "_predict_batch", predict_batch)
    with pytest.raises(KeyboardInterrupt):
        run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--batch_size", 1)
    assert seen == [0, 1, 2, 3]
    assert [line["name"] for line in lines_of(tmp_path / "out")] == ["000", "001", "002"]


def test_maps_have_the_size_of_the_cloud(fitted: Fitted, tmp_path: Path) -> None:
    """The overlay shows the image, which may have more pixels."""
    folder = fitted.data / "test/hole"
    xyz = read_organized_pc(folder / "xyz/000.tiff")[:48]
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    write_cloud(tmp_path / "xyz/a.tiff", xyz)
    write_image(tmp_path / "rgb/a.png", image)
    assert run(*flags_for(fitted, tmp_path, tmp_path / "out")) == 0
    assert tifffile.imread(tmp_path / "out/a.tiff").shape == (48, 64)
    with Image.open(tmp_path / "out/a_overlay.png") as overlay:
        assert overlay.width == GAP + 3 * (PANEL + GAP)  # image, outlines, map
    assert run(*flags_for(fitted, tmp_path, tmp_path / "out", "DINO")[:-2]) == 0
    assert tifffile.imread(tmp_path / "out/a.tiff").shape == (96, 128)


def test_detector_without_thresholds(
    fitted: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load_detector(fitted.detectors["DINO"], "cpu")
    detector.thresholds = None
    save_detector(detector, tmp_path / "plain", class_name="bagel")
    folder = fitted.data / "test/hole/rgb"
    flags = ["--detector", tmp_path / "plain", "--rgb", folder, "--output_dir", tmp_path / "out", "--device", "cpu"]
    assert run(*flags) == 0
    (line,) = lines_of(tmp_path / "out")
    assert (line["severity"], line["anomalous"], line["threshold"]) == (None, None, None)
    assert "has no thresholds" in caplog.text
    printed = capsys.readouterr().out
    assert "no threshold" in printed and "anomalous" not in printed
    assert (tmp_path / "out/000_overlay.png").is_file()
    for more in (["--fail_on_anomaly"], ["--target_fpr", 0.1], ["--image_threshold", 1], ["--pixel_threshold", 1]):
        with pytest.raises(InputError, match=r"plain has no thresholds\. Leave out flags"):
            run(*flags, *more)


def test_image_of_an_xyz_detector_is_only_drawn(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    flags = flags_for(fitted, samples_dir, tmp_path / "out", "Point_MAE")
    assert run(*flags) == 0
    with_image = lines_of(tmp_path / "out")[0]
    overlay = (tmp_path / "out/000_overlay.png").read_bytes()
    assert run(*flags[:-4], *flags[-2:]) == 0
    without = lines_of(tmp_path / "out")[0]
    assert with_image["score"] == without["score"] and without["rgb"] is None
    assert overlay != (tmp_path / "out/000_overlay.png").read_bytes()


@pytest.mark.parametrize("more", [[], ["--append"]])
def test_table_of_predictions(fitted: Fitted, tmp_path: Path, more: list[str]) -> None:
    """predictions.csv has the fields of predictions.jsonl, also after an interrupted run."""
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    (samples_dir / "xyz/001.tiff").unlink()
    flags = flags_for(fitted, samples_dir, tmp_path / "out")
    assert run(*flags) == 1
    (tmp_path / "out/predictions.csv").write_text("cut sho")
    assert run(*flags, *more) == 1
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = lines_of(tmp_path / "out")
    assert len(rows) == len(lines) == 2 + 2 * len(more)
    assert list(rows[0]) == [*KEYS, *RESULTS, "error"]
    for row, line in zip(rows, lines, strict=True):
        cells = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in line.items()}
        assert row == {name: "" if cells.get(name) is None else str(cells[name]) for name in row}


def test_exit_code_of_an_anomaly(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    flags = [*flags_for(fitted, samples_dir, tmp_path / "out"), "--no_images", "--fail_on_anomaly"]
    for threshold, expected in ((1e-20, 3), (1e20, 0)):
        assert run(*flags, "--image_threshold", threshold) == expected
    (samples_dir / "xyz/001.tiff").unlink()
    assert run(*flags, "--image_threshold", 1e-20) == 1


# Thresholds of one run


def test_thresholds_of_one_run(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    flags = flags_for(fitted, samples_dir, tmp_path / "out")
    detector = load_detector(fitted.detectors["DINO+Point_MAE"], "cpu")
    assert detector.thresholds is not None and detector.calibration is not None
    old, half = detector.thresholds, detector.calibration.thresholds(0.5)
    for more, image, pixel in (
        (["--target_fpr", 0.5], half.image, half.pixel),
        (["--image_threshold", 123.0], 123.0, old.pixel),
        (["--pixel_threshold", 45.0, "--target_fpr", 0.5], half.image, 45.0),
    ):
        capsys.readouterr()
        assert run(*flags, *more) == 0
        (line,) = lines_of(tmp_path / "out")
        assert line["threshold"] == image and line["anomalous"] == (line["score"] > image)
        assert line["severity"] == replace(old, image=image).severity(line["score"])
        expected = f"image threshold {old.image:.6g}, now {image:.6g}; pixel threshold {old.pixel:.6g}, now {pixel:.6g}"
        assert capsys.readouterr().out.startswith(expected)
    assert caplog.text == ""
    assert run(*flags, "--target_fpr", 0.01) == 0
    assert "a false-alarm rate of 0.01 needs 99 good samples" in caplog.text
    capsys.readouterr()
    assert run(*flags) == 0
    assert lines_of(tmp_path / "out")[0]["threshold"] == old.image
    assert "now" not in capsys.readouterr().out


def test_a_missing_severity_is_explained(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags_for(fitted, write_samples(fitted, tmp_path / "samples", 1), tmp_path / "out"), "--no_images"]
    assert run(*flags, "--image_threshold", 1e-29) == 0
    assert lines_of(tmp_path / "out")[0]["severity"] is None
    assert "(no severity: the threshold is not above the median score" in capsys.readouterr().out


# Errors of single samples


def spoil(samples_dir: Path) -> dict[str, str]:
    """Damage eight of ten samples; return the expected error of each."""
    cloud, image = samples_dir / "xyz", samples_dir / "rgb"
    (cloud / "001.tiff").write_bytes((cloud / "001.tiff").read_bytes()[:5000])
    (image / "002.png").write_bytes((image / "002.png").read_bytes()[:5000])
    write_cloud(cloud / "003.tiff", np.zeros((SIDE, SIDE, 3), np.float32))
    write_cloud(cloud / "004.tiff", read_organized_pc(cloud / "000.tiff")[: SIDE // 2])
    sparse = np.zeros((SIDE, SIDE, 3), np.float32)
    sparse[:3, :3] = 0.4
    write_cloud(cloud / "005.tiff", sparse)
    write_cloud(cloud / "006.tiff", np.ones((SIDE, SIDE), np.float32))
    (image / "007.png").unlink()
    (cloud / "008.tiff").unlink()
    return {
        "001": "cut short",
        "002": "not a complete PNG, JPEG",
        "003": "no valid point",
        "004": f"{SIDE} x {SIDE} pixels (H x W), but its cloud {SIDE // 2} x {SIDE}",
        "005": "9 valid points",
        "006": "expected H x W x 3",
        "007": "has no image",
        "008": "has no cloud",
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_damaged_samples_do_not_stop_the_others(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 10)
    faults = spoil(samples_dir)
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--batch_size", batch_size) == 1
    lines = {line["name"]: line for line in lines_of(tmp_path / "out")}
    assert sorted(lines) == [f"{i:03d}" for i in range(10)]
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("predict.py: ")]
    assert len(errors) == len(faults)
    for name, expected in faults.items():
        assert list(lines[name]) == [*KEYS, "error"]
        assert expected in lines[name]["error"], lines[name]
        assert "\n" not in lines[name]["error"]
        (sentence,) = [line for line in errors if line.startswith(f"predict.py: {name} could not be predicted: ")]
        assert lines[name]["error"] in sentence
        assert not (tmp_path / f"out/{name}.tiff").exists()
    assert lines["007"]["rgb"] is None and lines["008"]["xyz"] is None
    assert "2 samples predicted" in captured.out and "8 could not be predicted" in captured.out
    alone = write_samples(fitted, tmp_path / "alone", 1)
    assert run(*flags_for(fitted, alone, tmp_path / "out_alone")) == 0
    assert lines["000"]["score"] == pytest.approx(lines_of(tmp_path / "out_alone")[0]["score"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("damaged", ["score", "map"])
def test_score_or_map_that_is_not_finite(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, batch_size: int
) -> None:
    plain, calls = Detector.predict_features, []

    def predict_features(self: Detector, features: Sequence[PatchFeatures]) -> list[Prediction]:
        predictions = plain(self, features)
        for number, each in enumerate(predictions, len(calls)):
            if number == 1 and damaged == "score":
                predictions[number - len(calls)] = each._replace(score=float("nan"))
            elif number == 1:
                plane = torch.full_like(each.anomaly_map, torch.inf)
                predictions[number - len(calls)] = each._replace(anomaly_map=plane)
        calls.extend(predictions)
        return predictions

    monkeypatch.setattr(Detector, "predict_features", predict_features)
    samples_dir = write_samples(fitted, tmp_path / "samples", 3)
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--batch_size", batch_size) == 1
    lines = lines_of(tmp_path / "out")
    assert [line["name"] for line in lines if "score" in line] == ["000", "002"]
    assert "001.tiff gives a score or a map that is not finite" in lines[1]["error"]


def test_huge_coordinate_does_not_stop_other_samples(fitted: Fitted, tmp_path: Path) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 2)
    xyz = read_organized_pc(samples_dir / "xyz/000.tiff")
    xyz[tuple(np.argwhere(xyz[..., 2])[0])] = 2e19
    write_cloud(samples_dir / "xyz/000.tiff", xyz)
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out")) == 1
    first, second = lines_of(tmp_path / "out")
    assert "000.tiff reach 2e+19 m" in first["error"] and "score" in second


def test_name_outside_the_encoding_of_the_terminal(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(fitted.data / "train/good/rgb/000.png", tmp_path / "größe.png")
    flags = ["--detector", fitted.detectors["DINO"], "--rgb", tmp_path / "größe.png", "--device", "cpu"]
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags), "--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        predict.main()
    assert stop.value.code == 0
    assert stdout.getvalue().startswith(rb"gr\xf6\xdfe  ")


def test_no_sample_could_be_predicted(fitted: Fitted, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    flags = ["--detector", fitted.detectors["DINO"], "--rgb", tmp_path / "a.png", "--output_dir", tmp_path / "out"]
    assert run(*flags, "--device", "cpu") == 1
    assert list(lines_of(tmp_path / "out")[0]) == [*KEYS, "error"]


def test_invalid_flags_are_refused(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    both, rgb = fitted.detectors["DINO+Point_MAE"], fitted.detectors["DINO"]
    image, cloud, camera = ["--rgb", samples_dir / "rgb"], ["--xyz", samples_dir / "xyz"], tmp_path / "camera.json"
    camera.write_text('{"fx": 1, "fy": 1, "cx": 1, "cy": 1, "depth_scale": 0.001}')
    for flags, expected in (
        (["--detector", both], ["--rgb", "--xyz"]),
        (["--detector", both, *image], ["uses xyz files", "--xyz"]),
        (["--detector", both, *cloud], ["uses rgb files", "--rgb"]),
        (["--detector", rgb, *image, *cloud], ["--xyz is not used"]),
        (["--detector", tmp_path / "absent", *image], ["absent"]),
        (["--detector", rgb, *image, "--batch_size", 0], ["--batch_size is 0. Give a number from 1 to 1024."]),
        (["--detector", rgb, *image, "--num_workers", -1], ["--num_workers is -1. Give a number from 0 to 1024."]),
        (["--detector", rgb, *image, "--keep_rgb"], ["--preprocess"]),
        (["--detector", rgb, *image, "--preprocess"], ["--xyz"]),
        (["--detector", both, *image, *cloud, "--intrinsics", tmp_path / "none.json"], ["none.json is missing"]),
        (["--detector", rgb, *image, "--intrinsics", camera], ["--intrinsics only applies to --xyz"]),
        (["--detector", rgb, *image, "--xyz_unit", "mm"], ["--xyz_unit only applies to --xyz"]),
        (["--detector", both, *image, *cloud, "--intrinsics", camera], ["--intrinsics only applies to depth images"]),
        (
            ["--detector", both, *image, "--xyz", samples_dir / "rgb", "--intrinsics", camera, "--xyz_unit", "mm"],
            ["--xyz_unit does not apply to depth images"],
        ),
        (["--detector", rgb, "--rgb", ""], ["--rgb '' names no file"]),
        (["--detector", rgb, "--rgb", tmp_path / "none"], ["none"]),
        (["--detector", rgb, *image, "--device", "tpu"], ["tpu"]),
    ):
        message = refusal(capsys, *flags, "--output_dir", tmp_path / "out")
        assert all(text in message for text in expected), message
        assert not (tmp_path / "out").exists()


def test_output_never_replaces_input_clouds(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    before = (samples_dir / "xyz/000.tiff").read_bytes()
    flags = flags_for(fitted, samples_dir, samples_dir / "rgb/../xyz")
    assert "Choose another" in refusal(capsys, *flags)
    assert (samples_dir / "xyz/000.tiff").read_bytes() == before


@pytest.mark.parametrize("links", [True, False])
def test_output_never_replaces_clouds_behind_links_or_unused_ones(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], links: bool
) -> None:
    samples_dir, folder = write_samples(fitted, tmp_path / "samples", 1), "xyz"
    if links:
        folder = "links"
        (samples_dir / folder).mkdir()
        (samples_dir / folder / "000.tiff").symlink_to(samples_dir / "xyz/000.tiff")
    before = (samples_dir / "xyz/000.tiff").read_bytes()
    flags = flags_for(fitted, samples_dir, samples_dir / folder, "DINO")[:-2]
    assert "Choose another" in refusal(capsys, *flags)
    if links:
        flags = flags_for(fitted, samples_dir, samples_dir / folder)[:-2]
        assert "Choose another" in refusal(capsys, *flags, "--xyz", samples_dir / folder)
    assert (samples_dir / "xyz/000.tiff").read_bytes() == before
    assert [path.name for path in (samples_dir / folder).iterdir()] == ["000.tiff"]


def test_predictions_file_that_cannot_be_written(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples_dir = write_samples(fitted, tmp_path / "samples", 1)
    (tmp_path / "out/predictions.jsonl").mkdir(parents=True)
    message = refusal(capsys, *flags_for(fitted, samples_dir, tmp_path / "out"))
    assert "predictions.jsonl cannot be written" in message


# Raw scans


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw scans of one class, higher than wide, in the layout of a dataset."""
    root = tmp_path_factory.mktemp("raw")
    for i, path in enumerate(("train/good/000", "test/good/000", "test/good/001")):
        scan = make_scan("cookie", path, 224, seed=i)
        folder, stem = (root / "samples/cookie" / path).parent, Path(path).name
        write_organized_pc(folder / f"xyz/{stem}.tiff", scan.xyz[:, 8:212])
        write_image(folder / f"rgb/{stem}.png", np.ascontiguousarray(scan.rgb[:, 8:212]))
    return root / "samples"


@pytest.mark.parametrize("flags", [[], ["--keep_rgb"]])
def test_cleaning_equals_preprocessing(raw: Path, tmp_path: Path, flags: list[str]) -> None:
    assert preprocessing.main([str(raw), "--output_dir", str(tmp_path / "clean"), "--workers", "1", *flags]) == 0
    cleaned = AnomalyDataset(index_split(tmp_path / "clean/cookie", "test", BOTH), BOTH, SIDE)
    good = raw / "cookie/test/good"
    files = [SampleFiles(f"00{i}", good / f"rgb/00{i}.png", good / f"xyz/00{i}.tiff") for i in range(2)]
    reader = SampleReader(files, BOTH, SIDE, cleaning=CleaningRule(keep_rgb=bool(flags)))
    for expected, loaded in zip(cleaned, reader, strict=True):
        assert loaded.sample is not None, loaded.problem
        assert torch.equal(loaded.sample.rgb, expected.rgb) and torch.equal(loaded.sample.xyz, expected.xyz)  # type: ignore[arg-type]
        assert loaded.size == (224, 204) and loaded.side == 300
    (alone,) = SampleReader([files[0]._replace(rgb=None)], frozenset({"xyz"}), SIDE, cleaning=CleaningRule())
    assert torch.equal(alone.sample.xyz, cleaned[0].xyz)  # type: ignore[union-attr, arg-type]
    (lacking,) = SampleReader([files[0]._replace(rgb=None)], BOTH, SIDE, cleaning=CleaningRule())
    assert lacking.sample is not None and lacking.sample.rgb is None  # refused by the extractor, not predicted as black


def test_maps_of_cleaned_scans_align_with_the_raw_pixels(fitted: Fitted, raw: Path, tmp_path: Path) -> None:
    good = raw / "cookie/test/good"
    flags = [*flags_for(fitted, good, tmp_path), "--preprocess"]
    assert run(*flags) == 0
    detector = load_detector(fitted.detectors["DINO+Point_MAE"], "cpu")
    files = SampleFiles("000", good / "rgb/000.png", good / "xyz/000.tiff")
    loaded = SampleReader([files], BOTH, SIDE, cleaning=CleaningRule())[0]
    assert loaded.sample is not None
    whole = resize_map(detector.predict(loaded.sample).anomaly_map.numpy(), (300, 300))
    found = tifffile.imread(tmp_path / "000.tiff")
    np.testing.assert_allclose(found, whole[38 : 38 + 224, 48 : 48 + 204], rtol=1e-4)
    assert (tmp_path / "000_overlay.png").is_file()


@pytest.mark.parametrize("size", [(5, 9), (7, 4), (100, 99), (100, 100)])
def test_crop_padding_undoes_padding(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 2))
    np.testing.assert_array_equal(crop_padding(pad_to_square(image, 100), size), image)


def cleaned_detector(fitted: Fitted, folder: Path, method: str = "DINO+Point_MAE", **flags: bool) -> Path:
    """Save a copy of a detector whose training samples count as cleaned."""
    detector = load_detector(fitted.detectors[method], "cpu")
    detector.cleaned = dict.fromkeys(CLEANING_FLAGS, False) | flags
    save_detector(detector, folder / "cleaned", class_name="bagel")
    return folder / "cleaned"


def scores_of(*flags: object) -> list[float]:
    """Scores of a run with these flags; the last one is --output_dir."""
    assert run(*flags) == 0
    return [line["score"] for line in lines_of(Path(str(flags[-1])))]


@pytest.mark.parametrize("keep_rgb", [False, True])
def test_a_detector_of_cleaned_samples_cleans_new_ones(
    fitted: Fitted, raw: Path, tmp_path: Path, keep_rgb: bool
) -> None:
    plain = flags_for(fitted, raw / "cookie/test/good", tmp_path)
    files = [*plain[4:], "--output_dir", tmp_path]
    cleaned = ["--detector", cleaned_detector(fitted, tmp_path / "detector", keep_rgb=keep_rgb), *files]
    expected = scores_of(*plain[:2], "--preprocess", *["--keep_rgb"] * keep_rgb, *files)
    assert scores_of(*cleaned) == expected != scores_of(*plain[:2], *files)


@pytest.mark.parametrize("flag", [[], ["--preprocess"]])
def test_clean_clouds_are_not_cleaned_again(
    fitted: Fitted, raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, flag: list[str]
) -> None:
    assert preprocessing.main([str(raw), "--output_dir", str(tmp_path / "clean"), "--workers", "1"]) == 0
    plain = flags_for(fitted, tmp_path / "clean/cookie/test/good", tmp_path)
    files = [*plain[4:], "--output_dir", tmp_path / "out"]
    cleaned = ["--detector", cleaned_detector(fitted, tmp_path / "detector"), *flag, *files]
    assert scores_of(*cleaned) == scores_of(*plain[:2], *files)
    assert caplog.text.count("so it is used as a clean cloud. If it is raw, give --preprocess --empty_margins.") == 1


def test_a_table_is_an_error_without_cleaning(fitted: Fitted, raw: Path, tmp_path: Path) -> None:
    plain = flags_for(fitted, raw / "cookie/test/good", tmp_path)
    assert run(*plain, "--no_images") == 0  # a detector whose training samples were not cleaned
    flags = ["--detector", cleaned_detector(fitted, tmp_path / "detector"), *plain[2:], "--no-preprocess"]
    assert run(*flags) == 1
    for line in lines_of(tmp_path):
        assert f"{line['xyz']} shows the table" in line["error"] and "Leave out --no-preprocess" in line["error"]


def test_masked_images_need_clouds(
    fitted: Fitted, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = raw / "cookie/test/good"
    flags = ["--detector", cleaned_detector(fitted, tmp_path, "DINO"), "--device", "cpu", "--rgb", good / "rgb"]
    flags += ["--output_dir", tmp_path / "out"]
    message = refusal(capsys, *flags)
    assert "was fitted on images that were cleaned with their clouds. Give --xyz as well, or --no-preprocess" in message
    assert run(*flags, "--xyz", good / "xyz") == 0
    with_cloud = [line["score"] for line in lines_of(tmp_path / "out")]
    assert run(*flags, "--no-preprocess") == 0
    assert with_cloud != [line["score"] for line in lines_of(tmp_path / "out")]


def test_distance_of_the_class_is_that_of_cleaned_clouds(tmp_path: Path) -> None:
    v, u = np.mgrid[:60, :60] * 1e-3 + 0.01
    z = np.where((abs(v - 0.04) < 0.01) & (abs(u - 0.04) < 0.01), 0.3, 1.8 + v / 10)
    write_organized_pc(tmp_path / "part.tiff", np.stack([u, v, z], axis=-1))  # a part in front of a wall
    for distance, expected in ((0.3, ""), (3.0, "those of its class 3 m")):
        files = SampleFiles("part", xyz=tmp_path / "part.tiff", form=CloudForm(distance=distance))
        loaded = SampleReader([files], frozenset({"xyz"}), SIDE, cleaning=CleaningRule())[0]
        assert (loaded.problem == "") == (expected == "") and expected in loaded.problem


def test_failed_cleaning(fitted: Fitted, raw: Path, tmp_path: Path) -> None:
    samples_dir = tmp_path / "samples"
    shutil.copytree(raw / "cookie/test/good", samples_dir)
    v, u = np.indices((224, 204)) / 1000
    write_organized_pc(samples_dir / "xyz/000.tiff", np.stack([u, v, np.full(u.shape, 0.4)], axis=-1))  # a bare wall
    with Image.open(samples_dir / "rgb/001.png") as image:
        larger = image.resize((408, 448))
    larger.save(samples_dir / "rgb/001.png")
    assert run(*flags_for(fitted, samples_dir, tmp_path / "out"), "--preprocess") == 1
    first, second = lines_of(tmp_path / "out")
    assert "000.tiff cannot be cleaned: " in first["error"]
    assert "Map the image to the pixels of the cloud." in second["error"]


# Memory


class Fixed:
    """Replacement for a fitted detector that computes nothing."""

    class extractor:
        device = torch.device("cpu")

        @staticmethod
        def prepare(samples: Sequence[object]) -> int:
            return len(samples)

        @staticmethod
        def extract_prepared(count: int) -> list[None]:
            return [None] * count

    def predict_features(self, features: list[None]) -> list[Prediction]:
        return [Prediction(0.5, torch.rand(SIDE, SIDE), {}, {}) for _ in features]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(fitted: Fitted, tmp_path: Path) -> None:
    """Memory is freed without garbage collection, which is rare in a process that holds networks."""
    folder = fitted.data / "test/hole"
    files = [SampleFiles(f"{i:04d}", folder / "rgb/000.png", folder / "xyz/000.tiff") for i in range(300)]
    writer = PredictionWriter(tmp_path, None, images=True)
    held: list[int] = []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for i, outcome in enumerate(predict_samples(Fixed(), SampleReader(files, BOTH, SIDE), 4, 2)):  # type: ignore[arg-type]
            assert outcome.prediction is not None
            writer.add(outcome)
            if i % 100 == 99:
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        gc.enable()
    assert len(lines_of(tmp_path)) == 300
    sample_bytes = SIDE * SIDE * (3 * 4 * 2 + 3)  # tensors and the image
    growth_per_sample = (held[-1] - held[0]) / 200  # a few kB until garbage collection
    assert growth_per_sample < sample_bytes / 8


def test_reading_ahead_is_bounded(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fitted.data / "test/hole"
    files = [SampleFiles(f"{i:04d}", folder / "rgb/000.png", folder / "xyz/000.tiff") for i in range(40)]
    read: list[str] = []
    plain = SampleReader.__getitem__

    def counted(self: SampleReader, index: int) -> LoadedSample:
        read.append(self.files[index].path)
        return plain(self, index)

    monkeypatch.setattr(SampleReader, "__getitem__", counted)
    outcomes = predict_samples(Fixed(), SampleReader(files, BOTH, SIDE), 2, 2)  # type: ignore[arg-type]
    for done in range(1, 11):
        next(outcomes)
        assert len(read) <= done + 1 + 2 * 2 + 1
    outcomes.close()  # type: ignore[attr-defined]


def test_errors_of_the_program_are_not_hidden(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a defect of the program")

    monkeypatch.setattr(Detector, "predict_features", fail)
    folder = fitted.data / "test/hole/rgb"
    with pytest.raises(RuntimeError, match="defect of the program"):
        run("--detector", fitted.detectors["DINO"], "--rgb", folder, "--output_dir", folder / "out", "--device", "cpu")


def test_sample_reader_returns_errors_of_files(tmp_path: Path) -> None:
    (loaded,) = SampleReader([SampleFiles("a", tmp_path / "a.png")], frozenset({"rgb"}), SIDE)
    assert loaded.sample is None and "a.png is missing" in loaded.problem
    with pytest.raises(InputError):
        PredictionWriter(tmp_path / "absent", None, images=False)

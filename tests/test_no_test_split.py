"""main.py on classes without a test split: the fit, loaded detectors, and the report of good samples."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from main_runs import (
    METRICS,
    SMALL,
    Run,
    no_download,  # noqa: F401 (a fixture)
    printed,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    table_rows,
    write_bagels,
)
from report_pages import samples_of
from tiny_networks import one_thread  # noqa: F401 (a fixture, of the module's runs too)

from feature_extractors.detector_record import read_saved

CLASSES = ("tested", "validated", "new")
NOTHING = "no test split, so I-AUROC, P-AUROC, AU-PRO, precision, recall and false-alarm rate cannot be measured"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class with a test split, one with a validation split instead, and one with training samples alone."""
    root = write_bagels(tmp_path_factory.mktemp("data"))
    (root / "bagel").rename(root / "tested")
    for name in CLASSES[1:]:
        shutil.copytree(root / "tested/train", root / name / "train")
    shutil.copytree(root / "tested/test/good", root / "validated/validation/good")
    return root


@pytest.fixture(scope="module")
def base(data: Path) -> list[object]:
    return ["--dataset_path", data, *SMALL, "--seeds", 0, "--method_name", "DINO"]


@pytest.fixture(scope="module")
def fitted(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run on all classes; its detectors are in the folder "detectors" beside the results."""
    folder = tmp_path_factory.mktemp("fitted")
    return run_into(folder / "out", *base, "--classes", *CLASSES, "--save_detector", folder / "detectors")


def test_metrics_without_a_test_split_are_null_and_left_out_of_the_means(fitted: Run) -> None:
    entries = fitted.results["classes"]
    assert [entries[name]["split"] for name in CLASSES] == ["test", "validation", "train"]
    for name in CLASSES[1:]:
        figures = entries[name]
        for key in (*METRICS, "f1", "f1_threshold", "precision", "recall", "false_alarm_rate"):
            assert figures[key] is None, (name, key)
        assert set(figures["au_pro_exact"].values()) == {None}
        assert figures["threshold"]["image"] > 0
    assert fitted.results["mean"] == {key: entries["tested"][key] for key in (*METRICS, "au_pro_exact")}
    for row in table_rows(fitted.folder, "image_rocauc_results.md")[1:]:
        assert row[2:4] == ["n/a", "n/a"]
        assert row[1] == row[4]


def test_good_samples_stand_in_for_test_samples(fitted: Run) -> None:
    entries = fitted.results["classes"]
    assert "validated: not tested; 1 good sample of the validation split, no severity" in fitted.stdout
    assert "new: not tested; 2 good samples of the train split, severity -1.00 to 1.00" in fitted.stdout
    paths = {name: [sample["path"] for sample in entries[name]["samples"]] for name in CLASSES}
    assert paths["validated"] == ["validation/good/000"]
    assert paths["new"] == ["train/good/000", "train/good/001"]
    assert {sample["label"] for name in CLASSES[1:] for sample in entries[name]["samples"]} == {0}
    validated, tested = entries["validated"]["samples"][0], entries["tested"]["samples"][0]
    assert validated["score"] == pytest.approx(tested["score"], rel=1e-5)  # the same files, in another batch
    # The thresholds are the largest scores of the same samples.
    for name in CLASSES[1:]:
        assert max(sample["score"] for sample in entries[name]["samples"]) == entries[name]["threshold"]["image"]


def test_the_report_shows_the_good_samples(fitted: Run) -> None:
    page = (fitted.folder / "report.html").read_text()
    shown = [(sample["class"], sample["path"], sample["outcome"]) for sample in samples_of(page)]
    assert ("validated", "validation/good/000", "correct pass") in shown
    assert ("new", "train/good/001", "correct pass") in shown
    assert page.count("There is no test split") == 2


@pytest.mark.parametrize("name", CLASSES[1:])
def test_loaded_detectors_score_the_same_good_samples(
    fitted: Run, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    detectors = fitted.folder.parent / "detectors"
    assert read_saved(detectors / name).record.calibration is not None
    with caplog.at_level(logging.WARNING):
        run = run_into(tmp_path, "--dataset_path", data, "--classes", name, "--load_detector", detectors)
    for key in ("split", "samples", "threshold", *METRICS):
        assert run.entry[key] == fitted.results["classes"][name][key]
    assert [text for text in caplog.messages if "split" in text] == [
        f"{name} has {NOTHING}. The report shows good samples instead"
    ]


def test_what_is_missing_is_said_once_a_run(
    base: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        flags = ["--method_name", "DINO", "DINO+Point_MAE", "--classes", *CLASSES, "--output_dir", tmp_path]
        printed(*base, *flags, "--save_preds", "DINO")
    assert [text for text in caplog.messages if "show the table" not in text] == [
        f"validated, new have {NOTHING}. The report shows good samples instead",
        "tested, new have no validation/good, so thresholds are calibrated on the training samples. These score low; "
        "expect more false alarms than --target_fpr",
        "a false-alarm rate of 0.01 needs 99 good samples, but there are 2 of tested, 1 of validated, 2 of new, which "
        "allow 0.5. The image threshold is their largest score",
    ]
    assert (tmp_path / "DINO/anomaly_maps/validated/validation/good/000.tiff").is_file()
    assert (tmp_path / "DINO/pred_maps/new/train/good/001.png").is_file()


def name_as_published(folder: Path) -> list[object]:
    folder.rename(folder.with_name("cookie"))
    return []


def empty_test(folder: Path) -> list[object]:
    (folder / "test").mkdir()
    return ["--classes", folder.name]


def empty_defect(folder: Path) -> list[object]:
    (folder / "test/hole/rgb").mkdir(parents=True)
    return ["--classes", folder.name]


def broken_link(folder: Path) -> list[object]:
    (folder / "test").symlink_to("nowhere")
    return ["--classes", folder.name]


@pytest.mark.parametrize("change", [name_as_published, empty_test, empty_defect, broken_link])
def test_only_a_chosen_class_may_lack_the_test_folder(
    base: list[object], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[..., list]
) -> None:
    shutil.copytree(data / "new", tmp_path / "data/new")
    flags = change(tmp_path / "data/new")
    message = refusal(capsys, *base, "--dataset_path", tmp_path / "data", *flags)
    assert message.startswith("No test ")


def test_a_class_may_lack_the_test_folder_in_a_dataset_check(data: Path) -> None:
    rows = [line.split()[:2] for line in printed("--inspect_dataset", "--dataset_path", data).splitlines()]
    assert [row for row in rows if row[:1] == ["new"]] == [["new", "train"], ["new", "validation"]]
    assert ["tested", "test"] in rows


def test_resuming_keeps_a_class_without_a_test_split(base: list[object], tmp_path: Path) -> None:
    first = run_into(tmp_path, *base, "--classes", "new")
    assert not [*tmp_path.glob("*_results.md"), *tmp_path.glob("*.tex")], "no class was tested"
    assert "AUROC" not in first.stdout
    finished = tmp_path / "classes/new.json"
    before = finished.stat().st_mtime_ns
    again = run_into(tmp_path, *base, "--classes", "new", "--resume")
    assert again.entry == first.entry
    assert finished.stat().st_mtime_ns == before
    assert json.loads(finished.read_text())["report"]["entry"]["split"] == "train"

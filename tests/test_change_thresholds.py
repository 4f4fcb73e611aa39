"""main.py --load_detector --target_fpr --save_detector: new thresholds from the stored calibration alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from detector_files import seal
from main_runs import (
    SMALL,
    call,
    files_below,
    no_download,  # noqa: F401 (a fixture)
    printed,
    process,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    write_bagels,
)
from tiny_networks import one_thread  # noqa: F401 (a fixture, of the module's runs too)

from feature_extractors.detector_record import read_saved
from feature_extractors.thresholds import Calibration

METHODS = ("DINO", "Point_MAE")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_bagels(tmp_path_factory.mktemp("data"))
    shutil.copytree(root / "bagel", root / "cookie")
    return root


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the detectors of two classes in "one", by one method, and in "two", by two methods."""
    folder = tmp_path_factory.mktemp("fitted")
    for name, methods in (("one", METHODS[:1]), ("two", METHODS)):
        flags = ["--method_name", *methods, "--save_detector", folder / name, "--output_dir", folder / "out"]
        call("--dataset_path", data, *SMALL, "--seeds", 0, *flags)
    return folder


def change(detectors: Path, target: Path, *flags: object, rate: float = 0.7) -> list[list[str]]:
    """Change the thresholds; return the words of the printed lines."""
    changed = ["--load_detector", detectors, "--target_fpr", rate, "--save_detector", target]
    return [line.split() for line in printed(*changed, *flags).splitlines()]


@pytest.mark.parametrize("layout", ["one", "two"])
def test_only_the_thresholds_change(fitted: Path, tmp_path: Path, layout: str) -> None:
    lines = change(fitted / layout, tmp_path / "new")
    assert files_below(tmp_path / "new") == files_below(fitted / layout)
    rows = iter(lines[1:])
    methods = METHODS if layout == "two" else METHODS[:1]
    for name, method in ((name, method) for name in ("bagel", "cookie") for method in methods):
        place = f"{method}/{name}" if layout == "two" else name
        old, new = (
            json.loads((root / place / "config.json").read_text()) for root in (fitted / layout, tmp_path / "new")
        )
        assert {key for key in old if old[key] != new[key]} - {"written"} == {"thresholds", "config_sha256"}
        states = [root / place / "state.safetensors" for root in (fitted / layout, tmp_path / "new")]
        assert states[0].read_bytes() == states[1].read_bytes()
        calibration = read_saved(fitted / layout / place).record.calibration
        assert isinstance(calibration, Calibration)
        assert read_saved(tmp_path / "new" / place).record.thresholds == calibration.thresholds(0.7)
        pairs = [(old["thresholds"][key], new["thresholds"][key]) for key in ("target_fpr", "image", "pixel")]
        assert pairs[1][0] > pairs[1][1] and pairs[2][0] > pairs[2][1]
        texts = [word for pair in pairs for word in (f"{pair[0]:.4g}", "->", f"{pair[1]:.4g}")]
        assert next(rows) == [name, method, *texts]
    assert lines[-1] == ["written", "to", f"{tmp_path}/new/"]


def test_new_thresholds_decide_in_an_evaluation(fitted: Path, data: Path, tmp_path: Path) -> None:
    change(fitted / "one", tmp_path / "new")
    runs = [
        run_into(tmp_path / name, "--dataset_path", data, "--load_detector", detectors)
        for name, detectors in (("before", fitted / "one"), ("after", tmp_path / "new"))
    ]
    before, after = (run.results["classes"]["cookie"] for run in runs)
    assert [each["score"] for each in before["samples"]] == [each["score"] for each in after["samples"]]
    assert (before["threshold"]["target_fpr"], after["threshold"]["target_fpr"]) == (0.01, 0.7)
    assert after["threshold"]["image"] < before["threshold"]["image"]


def test_the_rate_of_the_fit_gives_its_thresholds(fitted: Path, tmp_path: Path) -> None:
    change(fitted / "one", tmp_path / "new", rate=0.01)
    old, new = (read_saved(root / "bagel").record.thresholds for root in (fitted / "one", tmp_path / "new"))
    assert old == new


def test_classes_and_methods_can_be_chosen(fitted: Path, tmp_path: Path) -> None:
    lines = change(fitted / "two", tmp_path / "new", "--classes", "cookie", "--method_name", "Point_MAE")
    assert [line[:2] for line in lines[1:-1]] == [["cookie", "Point_MAE"]]
    assert {Path(path).parent for path in files_below(tmp_path / "new")} == {Path("Point_MAE/cookie")}


def test_detectors_can_be_changed_in_place(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "one", tmp_path / "it")
    change(tmp_path / "it", tmp_path / "it")
    assert files_below(tmp_path / "it") == files_below(fitted / "one")
    thresholds = read_saved(tmp_path / "it/bagel").record.thresholds
    assert thresholds is not None and thresholds.target_fpr == 0.7


def test_neither_torch_nor_the_dataset_is_needed(fitted: Path, tmp_path: Path) -> None:
    code = "import sys, main; main.main(sys.argv[1:]); print('torch' in sys.modules)"
    flags = ["--load_detector", fitted / "one", "--target_fpr", 0.3, "--save_detector", tmp_path / "new"]
    result = process(ROOT, "-c", code, *flags)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "False")
    assert "a false-alarm rate of 0.3 needs 3 good samples, but there are 2 of bagel, 2 of cookie" in result.stderr


def no_calibration(folder: Path) -> None:
    path = folder / "bagel/config.json"
    record = json.loads(path.read_text()) | {"calibration": None, "thresholds": None}
    seal(record)
    path.write_text(json.dumps(record))


def cut(folder: Path) -> None:
    path = folder / "bagel/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_calibration, "bagel has no calibration. Fit it again with main.py --save_detector."),
        (cut, "state.safetensors is damaged or of another detector: it does not match config.json. Restore"),
    ],
)
def test_a_detector_that_cannot_be_changed_is_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], problem: str
) -> None:
    shutil.copytree(fitted / "one", tmp_path / "it")
    damage(tmp_path / "it")
    flags = ["--load_detector", tmp_path / "it", "--target_fpr", 0.2, "--save_detector", tmp_path / "new"]
    assert problem in refusal(capsys, *flags)
    assert not files_below(tmp_path / "new")


def test_wrong_flags_are_refused(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = ["--load_detector", fitted / "one"], ["--load_detector", fitted / "two"]
    rate, target = ["--target_fpr", 0.2], ["--save_detector", tmp_path / "new"]
    (tmp_path / "mine/bagel").mkdir(parents=True)
    (tmp_path / "mine/bagel/image.png").touch()
    (tmp_path / "file").touch()
    shutil.copytree(fitted / "one", tmp_path / "other")
    cases: list[tuple[list[object], str]] = [
        ([*one, *rate], "--target_fpr and --save_detector only work together. Give both."),
        ([*one, *target], "--target_fpr and --save_detector only work together. Give both."),
        ([*one, *rate, *target, "--max_sample", 3], "--max_sample has no effect on a change of thresholds. Leave it"),
        ([*one, *rate, *target, "--classes", "tire"], "holds no detector of tire, only of bagel, cookie."),
        ([*one, *rate, *target, "--classes", "../one/bagel"], "holds no detector of ../one/bagel, only of"),
        (["--load_detector", tmp_path / "mine", *rate, *target], "mine holds no detector. Give the folder that"),
        (["--load_detector", fitted / "one/bagel", *rate, *target], "one/bagel is a detector itself. Give the folder"),
        ([*one, *rate, *target, "--method_name", "Fusion"], "--method_name Fusion contradicts"),
        ([*one, *rate, "--save_detector", tmp_path / "mine"], "bagel is not a detector and holds image.png."),
        ([*one, *rate, "--save_detector", tmp_path / "file"], "file cannot be made or written (File exists)."),
        ([*one, *rate, "--save_detector", fitted / "two"], "holds a detector from a run of several methods, which"),
        ([*two, *rate, "--save_detector", tmp_path / "other"], "holds a detector from a run of one method, which"),
        ([*one, *rate, "--save_detector", fitted / "one/bagel"], "one/bagel is a detector itself. Give the folder"),
    ]
    before = files_below(tmp_path)
    for flags, problem in cases:
        assert problem in refusal(capsys, *flags), flags
    assert files_below(tmp_path) == before

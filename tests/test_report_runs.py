"""report.html of main.py: the files it shows, the number of samples and its folder."""

from pathlib import Path

import pytest
from main_runs import (
    SMALL,
    bagels_fixture,  # noqa: F401 (a fixture)
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    printed,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
)
from report_pages import read_page, samples_of


def shown(folder: Path) -> list[dict]:
    return samples_of((folder / "report.html").read_text())


def run_report(folder: Path, bagels: Path, *flags: object) -> list[dict]:
    run_into(folder, *SMALL, "--dataset_path", bagels, "--seeds", 0, *flags)
    return shown(folder)


def test_report_matches_results_json(bagels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_into(out, *SMALL, "--dataset_path", bagels, "--method_name", "DINO+Point_MAE")
    page = (out / "report.html").read_text()
    assert {sample["path"]: sample["score"] for sample in samples_of(page)} == {
        sample["path"]: sample["score"] for sample in run.entry["samples"]
    }
    text = read_page(page).text
    assert f"{run.entry['threshold']['image']:.4g}" in text
    assert "2 good samples of the training split" in text
    assert "Backbones: rgb efficientnet_lite0, xyz FPFH. Protocol: reference." in text
    assert "calibrate" in text.lower()


@pytest.mark.parametrize(
    ("flags", "view", "cloud"),
    [
        (["--method_name", "DINO"], "image", None),
        (["--method_name", "Point_MAE"], "depth", False),
        (["--method_name", "Point_MAE", "--save_preds"], "image", True),
        (["--method_name", "DINO+Point_MAE"], "image", True),
    ],
)
def test_report_shows_the_files_that_the_run_reads(
    bagels: Path, tmp_path: Path, flags: list[str], view: str, cloud: bool | None
) -> None:
    for sample in run_report(tmp_path / "out", bagels, *flags):
        assert sample["view"]["name"] == view
        assert (sample["cloud"] and sample["cloud"]["colored"]) == cloud


def test_reports_of_several_methods_show_the_same_files(bagels: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--dataset_path", bagels, "--method_name", "DINO", "Point_MAE", "--output_dir", tmp_path / "out"]
    printed(*flags)
    for method in ("DINO", "Point_MAE"):
        samples = shown(tmp_path / "out" / method)
        assert {sample["view"]["name"] for sample in samples} == {"image"}
        assert all(sample["cloud"] for sample in samples)
        assert f'<p class="kicker">{method} · ' in (tmp_path / "out" / method / "report.html").read_text()


def test_number_of_shown_samples(bagels: Path, tmp_path: Path) -> None:
    assert len(run_report(tmp_path / "all", bagels, "--method_name", "DINO")) == 2
    assert len(run_report(tmp_path / "one", bagels, "--method_name", "DINO", "--report_parts", 1)) == 1
    assert run_report(tmp_path / "none", bagels, "--method_name", "DINO", "--report_parts", 0) == []
    assert "1 of the 2 samples of bagel" in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.parametrize("name", ["report.html", "classes/bagel.json"])
def test_folder_at_the_path_of_a_file_is_refused(
    bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "out" / name
    path.mkdir(parents=True)
    message = refusal(capsys, *SMALL, "--dataset_path", bagels, "--output_dir", tmp_path / "out")
    assert f"{path} is not a file. Move it away, or choose another --output_dir." in message
    assert list((tmp_path / "out").rglob("*.*")) == [path]


def test_negative_number_of_samples_is_refused(bagels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *SMALL, "--dataset_path", bagels, "--report_parts", -1)
    assert "report_parts is -1" in message

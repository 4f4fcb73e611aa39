"""Preprocessing of whole datasets: repeated runs, and runs killed at every step."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import ALL, call_script, config_for, contents, run_killed_at, run_script, write_dataset, write_scan
from PIL import Image

from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.errors import InputError
from utils.preprocessing import find_scans, main, preprocess
from utils.scans.files import locked
from utils.scans.organized_pc import read_organized_pc, valid_mask, write_organized_pc


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "parts")


def test_output_equals_clean_scan(dataset: Path, tmp_path: Path) -> None:
    before = contents(dataset)
    out = tmp_path / "out"
    summary = preprocess(config_for(dataset, out))
    assert (summary.done, summary.skipped, summary.failed) == (ALL, [], {})
    assert contents(dataset) == before
    assert sorted(contents(out)) == sorted([*before, "preprocessing.json"])
    for name in ALL:
        folder, stem = name.rsplit("/", 1)
        gt = dataset / folder / "gt" / f"{stem}.png"
        xyz, rgb, padded, _ = clean_scan(
            read_organized_pc(dataset / folder / "xyz" / f"{stem}.tiff"),
            np.asarray(Image.open(dataset / folder / "rgb" / f"{stem}.png")),
            np.asarray(Image.open(gt)) if gt.is_file() else None,
            CleaningRule(),
        )
        assert np.array_equal(read_organized_pc(out / folder / "xyz" / f"{stem}.tiff"), xyz)
        assert valid_mask(xyz).sum() == 14 * 16
        assert np.array_equal(np.asarray(Image.open(out / folder / "rgb" / f"{stem}.png")), rgb)
        if padded is not None:
            assert np.array_equal(np.asarray(Image.open(out / folder / "gt" / f"{stem}.png")), padded)
    preprocess(config_for(dataset))
    assert contents(dataset) == contents(out)  # the result in place is the same, including the manifest


def test_second_run_does_nothing(dataset: Path) -> None:
    preprocess(config_for(dataset))
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*.*") if p.name != "preprocessing.json"}
    summary = preprocess(config_for(dataset))
    assert (summary.done, summary.skipped, summary.failed) == ([], ALL, {})
    assert before == {p: p.stat().st_mtime_ns for p in dataset.rglob("*.*") if p.name != "preprocessing.json"}


def test_new_scans_are_added_to_finished_ones(dataset: Path) -> None:
    preprocess(config_for(dataset))
    write_scan(dataset / "dowel" / "train" / "good", "000", 5, with_gt=False)
    summary = preprocess(config_for(dataset))
    assert (summary.done, summary.skipped) == (["dowel/train/good/000"], ALL)
    assert len(json.loads((dataset / "preprocessing.json").read_text())["scans"]) == 4


def test_keep_rgb_only_pads_the_image(dataset: Path) -> None:
    image = np.asarray(Image.open(dataset / "bagel/test/hole/rgb/000.png"))
    preprocess(config_for(dataset, keep_rgb=True))
    padded = np.asarray(Image.open(dataset / "bagel/test/hole/rgb/000.png"))
    assert np.array_equal(padded[30:70, 28:72], image)
    assert padded.sum() == image.sum()


def test_changed_settings_are_refused(dataset: Path) -> None:
    preprocess(config_for(dataset))
    before = contents(dataset)
    with pytest.raises(
        InputError, match=r"keep_rgb not given \(now True\)\. Use the old settings, give another output"
    ):
        preprocess(config_for(dataset, keep_rgb=True))
    other = replace(config_for(dataset, dry_run=True), rule=CleaningRule(cluster_eps=0.005))
    with pytest.raises(InputError, match=r"cluster_eps 0.006 \(now 0.005\)"):
        preprocess(other)
    assert contents(dataset) == before


def test_dry_run_writes_nothing_and_finds_faults(dataset: Path, tmp_path: Path) -> None:
    Image.new("RGB", (44, 41)).save(dataset / "bagel/train/good/rgb/000.png")
    tiff = dataset / "bagel/train/good/xyz/001.tiff"
    tiff.write_bytes(tiff.read_bytes()[:-1000])
    before = contents(tmp_path)
    for output in (None, tmp_path / "out"):
        summary = preprocess(config_for(dataset, output, dry_run=True))
        assert summary.done == ALL[:1]
        assert summary.failed[ALL[1]].startswith("The image is 41 x 44 (H x W), but the point cloud 40 x 44. ")
        assert "cut short" in summary.failed[ALL[2]]
    assert contents(tmp_path) == before


def test_ground_truth_is_required_only_for_defective_scans(dataset: Path) -> None:
    for stem in ("000", "001"):
        write_scan(dataset / "bagel/test/good", stem, 7, with_gt=True)
    write_scan(dataset / "bagel/test/hole", "001", 8, with_gt=True)
    (dataset / "bagel/test/good/gt/001.png").unlink()
    (dataset / "bagel/test/hole/gt/001.png").unlink()
    scans, failed = find_scans(dataset)
    good = ["bagel/test/good/000", "bagel/test/good/001"]
    assert [scan.name for scan in scans] == [*good, *ALL]
    assert [tuple(scan.sources) for scan in scans[:2]] == [("xyz", "rgb", "gt"), ("xyz", "rgb")]
    assert list(failed) == ["bagel/test/hole/001"]
    assert "gt/001.png. Restore" in failed["bagel/test/hole/001"]
    (dataset / "bagel/test/hole/gt/000.png").unlink()
    scans, failed = find_scans(dataset)
    assert [scan.name for scan in scans] == [*good, *ALL[1:]]
    assert list(failed) == ["bagel/test/hole/000", "bagel/test/hole/001"]
    assert preprocess(config_for(dataset)).done == [*good, *ALL[1:]]
    assert preprocess(config_for(dataset)).skipped == [*good, *ALL[1:]]


def test_hidden_folders_are_skipped(dataset: Path) -> None:
    shutil.copytree(dataset / "bagel", dataset / ".Trash")
    assert [scan.name for scan in find_scans(dataset)[0]] == ALL


def test_cleaned_dataset_without_manifest_is_not_cleaned_again(dataset: Path) -> None:
    preprocess(config_for(dataset))
    (dataset / "preprocessing.json").unlink()
    before = contents(dataset)
    summary = preprocess(config_for(dataset))
    assert list(summary.failed) == ALL
    assert all("was cleaned before" in reason for reason in summary.failed.values())
    (dataset / "preprocessing.json").unlink()
    assert contents(dataset) == before


def test_cleaned_object_at_the_border_is_doubtful_and_refused_if_strict(tmp_path: Path) -> None:
    """A rod of 2 cm radius lies on a table across the whole view of 300 x 300 pixels."""
    y, x = (np.mgrid[:300, :300] - 149.5) * 1e-3
    height = np.where(np.abs(y) < 0.02, 0.02 + np.sqrt((0.02**2 - y**2).clip(0)), 0)
    folder = tmp_path / "parts/rod/train/good"
    write_organized_pc(folder / "xyz/000.tiff", np.stack([x, y, 0.5 - height], 2).astype(np.float32))
    (folder / "rgb").mkdir()
    Image.new("RGB", (300, 300), "red").save(folder / "rgb/000.png")
    assert preprocess(config_for(tmp_path / "parts")).done == ["rod/train/good/000"]
    (tmp_path / "parts/preprocessing.json").unlink()
    before = contents(folder)
    assert valid_mask(read_organized_pc(folder / "xyz/000.tiff"))[:, 0].any()
    config = config_for(tmp_path / "parts", dry_run=True)
    assert (
        "pixels of the image border have a measurement, expected 25%"
        in preprocess(config).doubtful["rod/train/good/000"]
    )
    failed = preprocess(replace(config, rule=CleaningRule(strict=True), dry_run=False)).failed
    assert "If the scan was cleaned before, use the original" in failed["rod/train/good/000"]
    assert contents(folder) == before


def test_restored_originals_are_cleaned_again_and_foreign_files_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "originals")
    preprocess(config_for(dataset))
    cleaned = contents(dataset)
    folder = Path("bagel/train/good")
    for name in ("xyz/000.tiff", "rgb/000.png"):
        shutil.copy(tmp_path / "originals" / folder / name, dataset / folder / name)
    Image.new("RGB", (100, 100)).save(dataset / folder / "rgb/001.png")
    summary = preprocess(config_for(dataset))
    assert (summary.done, summary.skipped) == ([ALL[1]], [ALL[0]])
    assert "changed after preprocessing" in summary.failed[ALL[2]]
    after = contents(dataset)
    assert [name for name in cleaned if cleaned[name] != after[name]] == [str(folder / "rgb/001.png")]


def test_invalid_arguments_and_folders_exit_with_2(dataset: Path, tmp_path: Path) -> None:
    for args, message in [
        ([tmp_path / "none"], "none is not a folder. Give the folder that holds the classes of the dataset."),
        ([dataset / "bagel"], "Give the folder that holds the classes"),
        ([dataset, "--workers", "0"], "--workers is 0. Give a number from 1 to 1024."),
        ([dataset, "--output_dir", dataset / "bagel/test/hole/rgb/000.png"], "cannot be made"),
    ]:
        result = call_script(main, *args)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr.splitlines()[-1]
    assert run_script("preprocessing", tmp_path / "none").returncode == 2


def test_second_run_on_a_locked_folder_is_refused(dataset: Path) -> None:
    with locked(dataset, "folder"), pytest.raises(InputError, match="Another run is writing to"):
        preprocess(config_for(dataset))
    assert preprocess(config_for(dataset)).done == ALL


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 1, "settings": {}}'])
def test_damaged_manifest_is_refused(dataset: Path, content: str) -> None:
    (dataset / "preprocessing.json").write_text(content)
    before = contents(dataset)
    with pytest.raises(InputError, match=r"preprocessing.json is (damaged|from a newer)|was preprocessed with"):
        preprocess(config_for(dataset))
    assert contents(dataset) == before


# The empty manifest; two files per scan (three for the first) written and renamed; the final manifest.
RENAMES = 1 + 6 + 4 + 4 + 1


@pytest.mark.parametrize("rename", range(1, RENAMES + 2))
def test_run_killed_at_any_rename_is_continued(dataset: Path, tmp_path: Path, rename: int) -> None:
    preprocess(config_for(dataset, tmp_path / "expected"))
    original = contents(dataset)
    expected = contents(tmp_path / "expected")
    killed = rename <= RENAMES
    assert run_killed_at(rename, "preprocessing", dataset) == (-signal.SIGKILL if killed else 0)
    for name, data in contents(dataset).items():  # every file with the name of a scan is complete
        if Path(name).suffix in (".png", ".tiff") and not Path(name).name.startswith("."):
            assert data in (original[name], expected[name])
    half_done = contents(dataset)
    planned = preprocess(config_for(dataset, dry_run=True))
    assert contents(dataset) == half_done
    summary = preprocess(config_for(dataset))
    assert planned == summary
    assert sorted(summary.done + summary.skipped) == ALL
    assert not summary.failed
    assert contents(dataset) == expected


def test_truncated_journal_line_is_ignored(dataset: Path, tmp_path: Path) -> None:
    preprocess(config_for(dataset, tmp_path / "expected"))
    assert (
        run_killed_at(5, "preprocessing", dataset) == -signal.SIGKILL
    )  # the first journal line is written, nothing renamed
    journal = dataset / "preprocessing.journal"
    journal.write_text(journal.read_text()[:-20])
    assert preprocess(config_for(dataset)).done == ALL
    assert contents(dataset) == contents(tmp_path / "expected")


def test_a_half_written_scan_without_its_temporary_files_is_refused_until_restored(
    dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "originals")
    preprocess(config_for(dataset, tmp_path / "expected"))
    assert run_killed_at(6, "preprocessing", dataset) == -signal.SIGKILL  # xyz renamed, rgb and gt not
    for path in dataset.rglob("*.preprocessing"):
        path.unlink()
    for _ in range(2):
        assert list(preprocess(config_for(dataset)).failed) == ALL[:1]
    shutil.copy(tmp_path / "originals/bagel/test/hole/xyz/000.tiff", dataset / "bagel/test/hole/xyz/000.tiff")
    assert preprocess(config_for(dataset)).done == ALL[:1]
    assert contents(dataset) == contents(tmp_path / "expected")


@pytest.mark.golden
def test_recorded_scans_cleaned_by_two_processes(goldens: Path, tmp_path: Path) -> None:
    shutil.copytree(goldens / "raw", tmp_path / "parts")
    result = run_script("preprocessing", tmp_path / "parts", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "done 1, skipped 0 (done before), failed 0" in result.stdout
    names = [name for name in contents(goldens / "raw") if name.endswith((".png", ".tiff"))]
    assert len(names) == 3
    for name in names:
        ours, original = tmp_path / "parts" / name, goldens / "data" / name
        if name.endswith(".tiff"):
            assert np.array_equal(read_organized_pc(ours), read_organized_pc(original))
        else:
            assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(original)))


def test_damaged_scan_does_not_stop_the_processes(dataset: Path, tmp_path: Path) -> None:
    (dataset / "bagel/train/good/rgb/000.png").write_bytes(b"not an image")
    result = run_script("preprocessing", dataset, "--workers", 2, "--output_dir", tmp_path / "out")
    assert result.returncode == 1
    assert "done 2, skipped 0 (done before), failed 1" in result.stdout
    assert not list((tmp_path / "out").rglob("*.preprocessing"))


def test_dataset_cleaned_in_place_is_not_cleaned_into_another_folder(dataset: Path, tmp_path: Path) -> None:
    preprocess(config_for(dataset))
    before = contents(dataset)
    with pytest.raises(InputError, match=r"preprocessed already .*Give the folder of the original scans"):
        preprocess(config_for(dataset, tmp_path / "again"))
    assert contents(dataset) == before
    assert not (tmp_path / "again").exists()


def test_link_to_the_dataset_as_output_means_in_place(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dataset)
    for done in ("done 3, skipped 0", "done 0, skipped 3"):
        result = call_script(main, dataset, "--output_dir", tmp_path / "link", "--workers", 1)
        assert (result.returncode, result.stdout.split(" (")[0]) == (0, done)

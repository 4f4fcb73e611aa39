"""utils/preprocessing.py: whole datasets, faults of single scans, and runs killed at every step."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from utils.cloud_cleaning import CleaningRule, clean_scan
from utils.errors import InputError
from utils.organized_pc import read_organized_pc, valid_mask
from utils.preprocessing import Job, find_scans, main, preprocess
from utils.preprocessing_progress import locked

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "utils" / "preprocessing.py"


def write_scan(folder: Path, stem: str, seed: int, with_gt: bool) -> None:
    """A tilted table with a box on it, 40 x 44 pixels, 1 mm from pixel to pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :44] * 1e-3
    z = 0.5 + 0.05 * x + rng.normal(0, 2e-4, x.shape)
    z[14:28, 14:30] -= 0.02
    for name in ("xyz", "rgb", "gt")[: 3 if with_gt else 2]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", np.stack([x + 0.01, y + 0.01, z], 2).astype(np.float32))
    photo = rng.integers(1, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(photo).save(folder / "rgb" / f"{stem}.png")
    if with_gt:
        Image.fromarray((photo[..., 0] > 128).astype(np.uint8) * 255).save(folder / "gt" / f"{stem}.png")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "parts"
    write_scan(root / "bagel" / "test" / "hole", "000", 0, with_gt=True)
    write_scan(root / "bagel" / "train" / "good", "000", 1, with_gt=False)
    write_scan(root / "bagel" / "train" / "good", "001", 2, with_gt=False)
    return root


ALL = ["bagel/test/hole/000", "bagel/train/good/000", "bagel/train/good/001"]


def job_for(source: Path, output: Path | None = None, keep_rgb: bool = False) -> Job:
    return Job(source, output or source, CleaningRule(), keep_rgb, ".1.preprocessing")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run_script(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_writes_what_clean_scan_makes_of_each_scan_and_only_that(dataset: Path, tmp_path: Path) -> None:
    before = contents(dataset)
    out = tmp_path / "out"
    summary = preprocess(job_for(dataset, out), workers=1)
    assert (summary.done, summary.skipped, summary.failed) == (ALL, [], {})
    assert contents(dataset) == before
    assert sorted(contents(out)) == sorted([*before, "preprocessing.json"])
    for name in ALL:
        folder, stem = name.rsplit("/", 1)
        gt = dataset / folder / "gt" / f"{stem}.png"
        xyz, rgb, padded = clean_scan(
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
    preprocess(job_for(dataset), workers=1)
    assert contents(dataset) == contents(out)  # in place the same, manifest included


def test_a_second_run_does_nothing(dataset: Path) -> None:
    preprocess(job_for(dataset), workers=1)
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*.*") if p.name != "preprocessing.json"}
    summary = preprocess(job_for(dataset), workers=1)
    assert (summary.done, summary.skipped, summary.failed) == ([], ALL, {})
    assert before == {p: p.stat().st_mtime_ns for p in dataset.rglob("*.*") if p.name != "preprocessing.json"}


def test_new_scans_are_added_to_those_done(dataset: Path) -> None:
    preprocess(job_for(dataset), workers=1)
    write_scan(dataset / "dowel" / "train" / "good", "000", 5, with_gt=False)
    summary = preprocess(job_for(dataset), workers=1)
    assert (summary.done, summary.skipped) == (["dowel/train/good/000"], ALL)
    assert len(json.loads((dataset / "preprocessing.json").read_text())["scans"]) == 4


def test_keep_rgb_only_pads_the_photograph(dataset: Path) -> None:
    photo = np.asarray(Image.open(dataset / "bagel/test/hole/rgb/000.png"))
    preprocess(job_for(dataset, keep_rgb=True), workers=1)
    padded = np.asarray(Image.open(dataset / "bagel/test/hole/rgb/000.png"))
    assert np.array_equal(padded[30:70, 28:72], photo)
    assert padded.sum() == photo.sum()


def test_changed_parameters_are_refused(dataset: Path) -> None:
    preprocess(job_for(dataset), workers=1)
    before = contents(dataset)
    with pytest.raises(InputError, match=r"keep_rgb False \(now True\): keep to that, give another output folder"):
        preprocess(job_for(dataset, keep_rgb=True), workers=1)
    other = job_for(dataset)._replace(rule=CleaningRule(cluster_eps=0.005))
    with pytest.raises(InputError, match=r"cluster_eps 0.006 \(now 0.005\)"):
        preprocess(other, workers=1, dry_run=True)
    assert contents(dataset) == before


def test_dry_run_writes_nothing_and_finds_what_headers_tell(dataset: Path, tmp_path: Path) -> None:
    Image.new("RGB", (44, 41)).save(dataset / "bagel/train/good/rgb/000.png")
    tiff = dataset / "bagel/train/good/xyz/001.tiff"
    tiff.write_bytes(tiff.read_bytes()[:-1000])
    before = contents(tmp_path)
    for output in (None, tmp_path / "out"):
        summary = preprocess(job_for(dataset, output), workers=1, dry_run=True)
        assert summary.done == ALL[:1]
        assert "is 41 x 44, its xyz file 40 x 44" in summary.failed[ALL[1]]
        assert "cut short" in summary.failed[ALL[2]]
    assert contents(tmp_path) == before


def test_faulty_scans_are_named_and_left_as_they_are_and_the_others_done(
    dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    good = dataset / "bagel" / "train" / "good"
    for seed, stem in enumerate(["002", "003", "004", "005"]):
        write_scan(good, stem, seed, with_gt=False)
    (good / "rgb" / "002.png").unlink()
    (good / "rgb" / "003.png").write_bytes(b"not an image")
    (good / "xyz" / "004.tiff").write_bytes((good / "xyz" / "004.tiff").read_bytes()[:900])
    tifffile.imwrite(good / "xyz" / "005.tiff", np.zeros((40, 44, 3), np.float32))
    before = contents(good)
    assert main([str(dataset), "--workers", "1"]) == 1
    output = capsys.readouterr().out
    assert "done 3, skipped 0 (done before), failed 4" in output
    reasons = {
        "002": "002.png missing",
        "003": "is no complete PNG or JPEG picture",
        "004": "cut short",
        "005": "none of the 1760 pixels",
    }
    for stem, reason in reasons.items():
        assert any(f"good/{stem}: " in line and reason in line for line in output.splitlines())
    after = contents(good)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] == after[name]} == {n for n in before if Path(n).stem in reasons}

    write_scan(good, "002", 0, with_gt=False)  # mended: only the mended one is done
    assert main([str(dataset), "--workers", "1"]) == 1
    assert "done 1, skipped 3 (done before), failed 3" in capsys.readouterr().out


def test_ground_truth_is_needed_where_its_folder_is(dataset: Path) -> None:
    (dataset / "bagel/test/hole/gt/000.png").unlink()
    scans, failed = find_scans(dataset)
    assert [scan.name for scan in scans] == ALL[1:]
    assert "gt/000.png missing" in failed[ALL[0]]


def test_an_already_cleaned_dataset_without_manifest_is_not_cleaned_twice(dataset: Path) -> None:
    preprocess(job_for(dataset), workers=1)
    (dataset / "preprocessing.json").unlink()
    before = contents(dataset)
    summary = preprocess(job_for(dataset), workers=1)
    assert list(summary.failed) == ALL
    assert all("was cleaned before" in reason for reason in summary.failed.values())
    (dataset / "preprocessing.json").unlink()
    assert contents(dataset) == before


def test_restored_originals_are_done_again_and_foreign_files_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "originals")
    preprocess(job_for(dataset), workers=1)
    cleaned = contents(dataset)
    folder = Path("bagel/train/good")
    for name in ("xyz/000.tiff", "rgb/000.png"):
        shutil.copy(tmp_path / "originals" / folder / name, dataset / folder / name)
    Image.new("RGB", (100, 100)).save(dataset / folder / "rgb/001.png")
    summary = preprocess(job_for(dataset), workers=1)
    assert (summary.done, summary.skipped) == ([ALL[1]], [ALL[0]])
    assert "changed after preprocessing" in summary.failed[ALL[2]]
    after = contents(dataset)
    assert [name for name in cleaned if cleaned[name] != after[name]] == [str(folder / "rgb/001.png")]


def test_bad_arguments_and_folders_exit_with_2(dataset: Path, tmp_path: Path) -> None:
    for args, message in [
        ([tmp_path / "none"], "is not a folder"),
        ([dataset / "bagel"], "give the folder that holds the classes"),
        ([dataset, "--workers", "0"], "expected at least 1"),
        ([dataset, "--output_dir", dataset / "bagel/test/hole/rgb/000.png"], "cannot be made"),
    ]:
        result = run_script(*args, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr.splitlines()[-1]


def test_two_runs_on_one_folder_do_not_meet(dataset: Path) -> None:
    with locked(dataset), pytest.raises(InputError, match="another run is preprocessing"):
        preprocess(job_for(dataset), workers=1)
    assert preprocess(job_for(dataset), workers=1).done == ALL


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 1, "settings": {}}'])
def test_a_damaged_manifest_is_refused(dataset: Path, content: str) -> None:
    (dataset / "preprocessing.json").write_text(content)
    before = contents(dataset)
    with pytest.raises(InputError, match=r"preprocessing.json .*is damaged|was preprocessed with"):
        preprocess(job_for(dataset), workers=1)
    assert contents(dataset) == before


KILL = """
import os, signal, sys
from pathlib import Path
count, replace = int(sys.argv.pop(1)), Path.replace
def replace_or_die(self, target):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = replace_or_die
from utils.preprocessing import main
sys.exit(main([*sys.argv[1:], "--workers", "1"]))
"""


def run_killed_at(rename: int, *args: object) -> int:
    """Run the script in a process that is killed in place of its n-th rename (kill -9: no clean-up whatever)."""
    return subprocess.run([sys.executable, "-c", KILL, str(rename), *map(str, args)], cwd=ROOT).returncode


# 1: the empty manifest; per scan one within the writing of the tiff, then xyz, rgb (and gt for the first scan).
RENAMES = 1 + 4 + 3 + 3 + 1


@pytest.mark.parametrize("rename", range(1, RENAMES + 2))
def test_a_run_killed_at_any_rename_is_continued(dataset: Path, tmp_path: Path, rename: int) -> None:
    preprocess(job_for(dataset, tmp_path / "expected"), workers=1)
    original = contents(dataset)
    expected = contents(tmp_path / "expected")
    killed = rename <= RENAMES
    assert run_killed_at(rename, dataset) == (-signal.SIGKILL if killed else 0)
    for name, data in contents(dataset).items():  # whatever bears the name of a scan is whole: original or cleaned
        if Path(name).suffix in (".png", ".tiff") and not Path(name).name.startswith("."):
            assert data in (original[name], expected[name])
    summary = preprocess(job_for(dataset), workers=1)
    assert sorted(summary.done + summary.skipped) == ALL
    assert not summary.failed
    assert contents(dataset) == expected


def test_a_journal_line_cut_short_counts_for_nothing(dataset: Path, tmp_path: Path) -> None:
    preprocess(job_for(dataset, tmp_path / "expected"), workers=1)
    assert run_killed_at(3, dataset) == -signal.SIGKILL  # the first journal line is written, nothing renamed
    journal = dataset / "preprocessing.journal"
    journal.write_text(journal.read_text()[:-20])
    assert preprocess(job_for(dataset), workers=1).done == ALL
    assert contents(dataset) == contents(tmp_path / "expected")


def test_a_half_written_scan_without_its_temporary_files_is_refused_until_restored(
    dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "originals")
    preprocess(job_for(dataset, tmp_path / "expected"), workers=1)
    assert run_killed_at(4, dataset) == -signal.SIGKILL  # xyz renamed, rgb and gt not
    for path in dataset.rglob("*.preprocessing"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(InputError, match=r"hole/000 was left half written.*hole/xyz/000.tiff.*hole/rgb/000.png"):
            preprocess(job_for(dataset), workers=1)
    shutil.copy(tmp_path / "originals/bagel/test/hole/xyz/000.tiff", dataset / "bagel/test/hole/xyz/000.tiff")
    assert preprocess(job_for(dataset), workers=1).done == ALL
    assert contents(dataset) == contents(tmp_path / "expected")


@pytest.mark.golden
def test_script_reproduces_the_cleaned_scans_of_the_original_in_two_processes(goldens: Path, tmp_path: Path) -> None:
    shutil.copytree(goldens / "raw", tmp_path / "parts")
    result = run_script("parts", "--workers", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "done 5, skipped 0 (done before), failed 0" in result.stdout
    names = [name for name in contents(goldens / "raw") if name.endswith((".png", ".tiff"))]
    assert len(names) == 13
    for name in names:
        ours, original = tmp_path / "parts" / name, goldens / "data" / name
        if name.endswith(".tiff"):
            assert np.array_equal(read_organized_pc(ours), read_organized_pc(original))
        else:
            assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(original)))


def test_processes_survive_a_faulty_scan(dataset: Path, tmp_path: Path) -> None:
    (dataset / "bagel/train/good/rgb/000.png").write_bytes(b"not an image")
    result = run_script(dataset, "--workers", 2, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "done 2, skipped 0 (done before), failed 1" in result.stdout
    assert not list((tmp_path / "out").rglob("*.preprocessing"))


def test_what_was_cleaned_in_place_is_not_cleaned_again_elsewhere(dataset: Path, tmp_path: Path) -> None:
    preprocess(job_for(dataset), workers=1)
    before = contents(dataset)
    with pytest.raises(InputError, match=r"preprocessed already .*cleaning them twice ruins them"):
        preprocess(job_for(dataset, tmp_path / "again"), workers=1)
    assert contents(dataset) == before
    assert not (tmp_path / "again").exists()

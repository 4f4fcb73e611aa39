"""Dataset check: --inspect_dataset, warnings about raw scans, and the preview of cleaning."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import call_script, config_for
from main_runs import printed, refusal
from PIL import Image

from dataset import index_split
from runner import preparation
from runner.dataset_check import (
    check_split,
    cleaning_of,
    print_dataset_check,
    warn_of_raw_scans,
    warn_of_unfinished_scans,
)
from runner.settings import make_parser
from utils import preprocessing
from utils.choices import CLEANING_FLAGS
from utils.cleaning.cloud_cleaning import CleaningRule, CleanScan, clean_scan, shows_table
from utils.cleaning.journal import MANIFEST
from utils.cleaning.preview import Pair, write_preview
from utils.errors import InputError
from utils.scans.organized_pc import read_organized_pc, write_organized_pc
from utils.synthetic import Plan, make_dataset
from utils.synthetic_data.scanner import make_scan

BOTH = frozenset({"rgb", "xyz"})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw scans of two classes, 224 pixels a side."""
    root = tmp_path_factory.mktemp("raw") / "my parts"
    make_dataset(Plan(root, ("cookie", "gasket"), train=2, validation=0, test_good=1, test_defective=1, size=224))
    return root


@pytest.fixture(scope="module")
def cleaned(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cleaned") / "parts"
    assert preprocessing.main([str(raw), "--output_dir", str(root), "--workers", "1"]) == 0
    return root


def test_a_table_is_recognized_by_its_border() -> None:
    scan = make_scan("bracket", "train/good/000", 224, seed=3)
    rule = CleaningRule()
    assert shows_table(scan.xyz, rule)
    assert not shows_table(clean_scan(scan.xyz, scan.rgb, None, rule)[0], rule)
    assert not shows_table(np.zeros_like(scan.xyz), rule)
    rough = np.random.default_rng(0).uniform(0.3, 0.9, scan.xyz.shape).astype(np.float32)
    assert not shows_table(rough, rule)
    sparse = scan.xyz * (np.random.default_rng(0).random(scan.xyz.shape[:2]) < 0.2)[..., None]
    assert not shows_table(sparse.astype(np.float32), rule)


def test_the_report_of_a_split(raw: Path, cleaned: Path) -> None:
    for root, raw_count in ((raw, 7), (cleaned, 0)):
        report = check_split(root / "cookie", "test", BOTH, num_workers=2)
        assert (report.class_name, report.split, report.samples, report.defective) == ("cookie", "test", 7, 6)
        assert (report.raw, report.problems) == (raw_count, ())
        clouds = [read_organized_pc(path) for path in (root / "cookie" / "test").rglob("*.tiff")]
        assert report.sizes == (clouds[0].shape[:2],)
        shares = [float((cloud != 0).all(axis=2).mean()) for cloud in clouds]
        assert report.valid == pytest.approx((min(shares), max(shares)))
        depths = [cloud[..., 2][cloud[..., 2] != 0] for cloud in clouds]
        assert report.depth == pytest.approx((min(map(np.min, depths)), max(map(np.max, depths))))
    absent = check_split(raw / "cookie", "validation", BOTH, num_workers=0)
    assert (absent.samples, absent.problems) == (0, ())
    for split, count in (("train", 2), ("test", 7)):
        without_clouds = check_split(raw / "cookie", split, frozenset({"rgb"}), num_workers=0)
        assert (without_clouds.samples, without_clouds.sizes) == (count, ((224, 224),))
        assert (without_clouds.valid, without_clouds.depth, without_clouds.problems) == (None, None, ())


def wall(side: int, distance: float = 0.4) -> np.ndarray:
    """Cloud (side, side, 3) of a wall, in the unit of its distance."""
    v, u = np.indices((side, side)) + 0.5
    return np.stack([u / side, v / side, np.ones((side, side))], axis=-1).astype(np.float32) * np.float32(distance)


def test_every_problem_is_collected(tmp_path: Path) -> None:
    folder = tmp_path / "parts" / "cookie" / "train" / "good"
    for name in ("000", "001", "002", "003"):
        write_organized_pc(folder / "xyz" / f"{name}.tiff", wall(8))
        (folder / "rgb").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "rgb" / f"{name}.png")
    write_organized_pc(folder / "xyz" / "001.tiff", np.zeros((8, 8, 3), np.float32))
    (folder / "rgb" / "002.png").write_bytes((folder / "rgb" / "002.png").read_bytes()[:60])
    Image.new("RGB", (9, 8)).save(folder / "rgb" / "003.png")
    report = check_split(tmp_path / "parts" / "cookie", "train", BOTH, num_workers=2)
    assert report.samples == 4
    assert len(report.problems) == 3
    for problem, words in zip(report.problems, ("001.tiff has no valid point", "002.png", "003.png"), strict=True):
        assert words in problem
    flags = ["--inspect_dataset", "--dataset_path", str(tmp_path / "parts"), "--classes", "cookie"]
    with pytest.raises(SystemExit) as stop:
        printed(*flags)
    assert stop.value.code == 1
    assert "No test samples" in check_split(tmp_path / "parts" / "cookie", "test", BOTH, 0).problems[0]


def test_a_missing_file_hides_no_other_problem(tmp_path: Path) -> None:
    test = tmp_path / "parts/cookie/test"
    for name in ("good/000", "good/001", "hole/000", "hole/001", "hole/002"):
        folder, stem = test / name.split("/")[0], name.split("/")[1]
        write_organized_pc(folder / f"xyz/{stem}.tiff", wall(8))
        for modality in ("rgb", "gt"):
            (folder / modality).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / modality / f"{stem}.png")
    (test / "good/rgb/001.png").unlink()
    (test / "hole/gt/000.png").unlink()
    Image.new("RGB", (8, 8)).save(test / "hole/rgb/001.jpg")
    (test / "hole/rgb/002.png").write_bytes(b"no picture")
    (test / "crack").mkdir()
    report = check_split(tmp_path / "parts/cookie", "test", BOTH, num_workers=0)
    assert (report.samples, report.defective, report.sizes) == (2, 1, ((8, 8),))
    expected = (
        "No test files in",
        "001.png is missing",
        "001.jpg and 001.png are two",
        "000.png is missing",
        "002.png is no",
    )
    assert len(report.problems) == len(expected)
    for problem, words in zip(report.problems, expected, strict=True):
        assert words in problem
    with pytest.raises(InputError, match="No test files in"):
        index_split(tmp_path / "parts/cookie", "test", BOTH)


def test_every_class_folder_is_checked(cleaned: Path, tmp_path: Path) -> None:
    for name in ("cookie", "bracket_7"):
        (tmp_path / "parts" / name).parent.mkdir(exist_ok=True)
        shutil.copytree(cleaned / "gasket", tmp_path / "parts" / name)
    shutil.copytree(cleaned / "gasket", tmp_path / "parts/.Trash")
    (tmp_path / "parts/notes/old").mkdir(parents=True)
    text = printed("--inspect_dataset", "--dataset_path", tmp_path / "parts")
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["bracket_7"] * 3 + ["cookie"] * 3


def test_image_sizes_are_checked_against_the_ground_truth(tmp_path: Path) -> None:
    good, hole = (tmp_path / "parts" / name for name in ("test/good", "test/hole"))
    for path, size in [
        (good / "rgb/000.png", (8, 6)),
        (good / "rgb/001.jpg", (9, 6)),
        (hole / "rgb/000.png", (8, 6)),
        (hole / "gt/000.png", (8, 5)),
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(path)
    report = check_split(tmp_path / "parts", "test", frozenset({"rgb"}), num_workers=0)
    assert report.sizes == ((6, 8), (6, 9))
    assert len(report.problems) == 1
    assert "hole/rgb/000.png has 6 x 8 pixels" in report.problems[0]


def test_inspect_dataset_prints_a_row_for_each_class_and_split(raw: Path, cleaned: Path) -> None:
    text = printed("--inspect_dataset", "--dataset_path", cleaned, "--classes", "cookie", "gasket")
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][:5] == ["cookie", "train", "2", "0", "300x300"]
    assert [line[:2] for line in lines[1:]] == [
        [name, split] for name in ("cookie", "gasket") for split in ("train", "validation", "test")
    ]
    assert "not cleaned" not in text
    text = printed("--inspect_dataset", "--dataset_path", cleaned, "--classes", "cookie", "--method_name", "DINO")
    assert text.splitlines()[1].split() == ["cookie", "train", "2", "0", "300x300", "0"]  # size of the images
    text = printed("--inspect_dataset", "--dataset_path", raw, "--classes", "gasket")
    assert "not 7" in text
    assert f"python utils/preprocessing.py '{raw}'" in text


def test_a_dataset_without_clouds_is_checked_as_rgb_only(cleaned: Path, tmp_path: Path) -> None:
    """Unless --method_name asks for clouds, or one class has some."""
    root = tmp_path / "parts"
    for path in sorted(cleaned.rglob("*.png")):
        (root / path.relative_to(cleaned)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(cleaned))
    flags = ["--inspect_dataset", "--dataset_path", root]
    first, _, *rows = printed(*flags).splitlines()
    assert first == f"{root} has no xyz folders: checked as RGB only, for --method_name DINO"
    assert rows[0].split() == ["cookie", "train", "2", "0", "300x300", "0"]
    for change in (["--method_name", "Point_MAE"], []):
        if not change:
            shutil.copytree(cleaned / "gasket/train/good/xyz", root / "gasket/train/good/xyz")
        with pytest.raises(SystemExit) as stop:
            printed(*flags, *change)
        assert stop.value.code == 1


def test_a_missing_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not a folder" in refusal(capsys, "--inspect_dataset", "--dataset_path", tmp_path / "nowhere")


def test_raw_scans_give_a_warning(raw: Path, cleaned: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_raw_scans([index_split(cleaned / "cookie", "train", BOTH)])
        assert not caplog.records
        warn_of_raw_scans(index_split(raw / name, "train", BOTH)[:1] for name in ("cookie", "gasket"))
    assert len(caplog.records) == 1
    assert "2 of 2 checked clouds show the table under the object" in caplog.text


@pytest.mark.parametrize("position", [0, 5, 10])
def test_a_raw_scan_among_cleaned_ones_gives_a_warning(
    raw: Path, cleaned: Path, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    scans = index_split(cleaned / "cookie", "train", BOTH)[:1] * 11
    scans[position] = index_split(raw / "cookie", "test", BOTH)[0]
    with caplog.at_level(logging.WARNING):
        warn_of_raw_scans([scans])
    assert f"1 of 5 checked clouds show the table under the object, in {raw}/cookie/test/bump/xyz. " in caplog.text
    assert f"Clean the scans first: python utils/preprocessing.py '{raw}'" in caplog.text
    warn_of_raw_scans([])


def test_cleaning_of_the_training_samples(raw: Path, cleaned: Path, tmp_path: Path) -> None:
    """From the manifest, else from the border of the clouds."""
    default = dict.fromkeys(CLEANING_FLAGS, False)
    assert cleaning_of(raw, "cookie", index_split(raw / "cookie", "train", BOTH)) is None
    copy = tmp_path / "cleaned"
    shutil.copytree(cleaned, copy)
    samples = index_split(copy / "cookie", "train", BOTH)
    assert cleaning_of(copy, "cookie", samples) == default
    manifest = json.loads((copy / MANIFEST).read_text())
    for settings, expected in (({"keep_rgb": True}, default | {"keep_rgb": True}), ({"converter": "eyecandies"}, None)):
        changed = manifest | {"settings": manifest["settings"] | settings}
        (copy / MANIFEST).write_text(json.dumps(changed))
        assert cleaning_of(copy, "cookie", samples) == expected
    (copy / MANIFEST).unlink()
    assert cleaning_of(copy, "cookie", samples) == default
    assert cleaning_of(copy, "cookie", [each._replace(xyz=None) for each in samples]) is None


def test_scans_that_preprocessing_left_out_give_a_warning(
    cleaned: Path, raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "parts"
    shutil.copytree(raw, root)
    index = {name: index_split(root / name, "train", BOTH) for name in ("cookie", "gasket")}
    warn_of_unfinished_scans(root, index)  # no preprocessing.json yet
    for name in ("cookie", "gasket"):
        shutil.copytree(cleaned / name, root / name, dirs_exist_ok=True)
    record = json.loads((cleaned / "preprocessing.json").read_text())
    (root / "preprocessing.json").write_text(json.dumps(record))
    warn_of_unfinished_scans(root, index)
    assert not caplog.records
    shutil.copy(raw / "gasket/train/good/xyz/001.tiff", root / "gasket/train/good/xyz/001.tiff")  # of another size
    del record["scans"]["cookie/train/good/000"]
    (root / "preprocessing.json").write_text(json.dumps(record))
    warn_of_unfinished_scans(root, index)
    assert f"2 of 4 samples of {root} were not preprocessed like the others" in caplog.text
    assert "(cookie/train/good/000, gasket/train/good/001). Run" in caplog.text
    assert caplog.text.count(": python utils/preprocessing.py") == 1
    record["settings"] = {"converter": "eyecandies"}
    (root / "preprocessing.json").write_text(json.dumps(record))
    warn_of_unfinished_scans(root, index)
    assert ": python utils/preprocess_eyecandies.py" in caplog.text


def test_a_run_checks_both_splits_and_the_preprocessing_record(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(raw, tmp_path / "parts")
    (tmp_path / "parts/preprocessing.json").write_text('{"schema": 1, "settings": {}, "scans": {"a/train/good/0": {}}}')

    def stop(*_: object, **__: object) -> None:
        raise InputError("far enough")

    monkeypatch.setattr(preparation, "build_extractor", stop)
    flags = ("--dataset_path", tmp_path / "parts", "--classes", "cookie", "--output_dir", tmp_path / "out")
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):
        printed(*flags, "--method_name", "DINO+Point_MAE")
    for split in ("train", "test"):
        assert f"cookie/{split}/" in "".join(text for text in caplog.messages if "show the table" in text)
    assert "9 of 9 samples of " in caplog.text


def test_the_preview_shows_each_class_before_and_after(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: dict[str, Pair] = {}
    monkeypatch.setattr(
        preprocessing, "write_preview", lambda path, pairs: (shown.update(pairs), write_preview(path, pairs))
    )
    before = {path: path.read_bytes() for path in raw.rglob("*.*")}
    assert preprocessing.main([str(raw), "--dry_run", "--preview", str(tmp_path / "sheet.png")]) == 0
    assert {path: path.read_bytes() for path in raw.rglob("*.*")} == before
    assert list(shown) == ["cookie/test/bump/000", "gasket/test/bump/000"]
    for name, pair in shown.items():
        folder, _, stem = name.rpartition("/")
        np.testing.assert_array_equal(pair.xyz, read_organized_pc(raw / folder / "xyz" / f"{stem}.tiff"))
        assert pair.clean is not None
        assert 0 < (pair.clean.xyz != 0).sum() < (pair.xyz != 0).sum()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 20
    assert "before and after" in capsys.readouterr().out


def test_the_preview_shows_refused_scans_and_lists_unreadable_ones(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "parts"
    shutil.copytree(raw, root)
    (root / "cookie/test/bump/rgb/000.png").write_bytes(b"no picture")
    for path in (root / "gasket").rglob("*.tiff"):
        write_organized_pc(path, np.zeros((224, 224, 3), np.float32))
    shown: dict[str, Pair] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "write_preview", lambda _, pairs: shown.update(pairs))
        preprocessing.main([str(root), "--dry_run", "--preview", str(tmp_path / "sheet.png")])
    assert [name.split("/")[0] for name in shown] == ["cookie"] + ["gasket"] * 4
    assert min(shown) > "cookie/test/bump/000"
    assert ["has no valid point" in pair.reason and pair.clean is None for pair in shown.values()] == [False] + [
        True
    ] * 4
    assert all(pair.xyz.max() < 1 for pair in shown.values())  # also refused clouds are in meters
    failed = [line for line in capsys.readouterr().out.splitlines() if "cookie/test/bump/000: " in line]
    assert len(failed) == 1 and "000.png is not a complete PNG" in failed[0]

    for path in root.rglob("*/rgb/*.png"):
        path.write_bytes(b"no picture")
    problem = call_script(preprocessing.main, root, "--preview", tmp_path / "sheet.png").stderr
    assert re.search(r"--preview cannot show any scan of .*: all are cleaned already, or cannot be read", problem)
    assert not (root / "preprocessing.json").exists()


FIRST_BYTES = {
    "sheet.png": b"\x89PNG",
    "sheet.PNG": b"\x89PNG",
    "new/sheet.jpg": b"\xff\xd8",
    "sheet.jpeg": b"\xff\xd8",
    "sheet.pdf": b"%PDF",
    "sheet.svg": b"<?xml",
    "sheet.webp": b"RIFF",
}


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_the_preview_has_the_format_of_its_file_name(tmp_path: Path, name: str) -> None:
    scan = make_scan("bracket", "train/good/000", 64, seed=3)
    preprocessing.parse_args([str(tmp_path), "--preview", str(tmp_path / name)])
    clean = CleanScan(scan.xyz, scan.rgb, None)
    refused = Pair(scan.rgb, np.zeros_like(scan.xyz), None, "No table.")
    write_preview(tmp_path / name, {"a": Pair(scan.rgb, scan.xyz, clean), "b": refused})
    assert (tmp_path / name).read_bytes().startswith(FIRST_BYTES[name])
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


@pytest.mark.parametrize(
    "name, message",
    [
        ("sheet.txt", r"--preview .*sheet.txt names no image. End it in one of .png, .jpg, .*, .webp"),
        ("sheet", "names no image"),
        ("file/sheet.png", r"file cannot be made or written \(File exists\)\. Choose another --preview"),
        ("folder.png", "folder.png names no image"),
    ],
)
def test_a_preview_that_cannot_be_written_is_refused_before_anything_is_cleaned(
    raw: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    result = call_script(preprocessing.main, raw, "--output_dir", tmp_path / "out", "--preview", tmp_path / name)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_damaged_manifest_is_refused(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    shutil.copytree(raw, root)
    (root / "preprocessing.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessing\.json is damaged"):
        print_dataset_check(make_parser().parse_args(["--dataset_path", str(root), "--inspect_dataset"]))


def test_the_preview_needs_a_scan_that_is_not_cleaned(cleaned: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    shutil.copytree(cleaned, root)
    config = config_for(root)
    with pytest.raises(InputError, match="all are cleaned already"):
        preprocessing.preview(config, tmp_path / "sheet.png")

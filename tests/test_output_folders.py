"""Folders of results: one run at a time, nothing in the way, no temporary files of killed runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cleaning_runs import call_script, write_dataset
from conftest import ROOT
from main_runs import SMALL, TABLES, call, no_download, one_thread, write_bagels  # noqa: F401 (fixtures)
from uff_runs import assert_equal_training, log_of, run_main, write_samples

import fusion_pretrain
import main
import predict
from utils import convert, preprocess_eyecandies, preprocessing
from utils.errors import InputError
from utils.scans import files
from utils.scans.files import atomic_path, locked

UFF = ["--batch_size", "1", "--accum_iter", "3", "--epochs", "2", "--lr", "0.01", "--num_workers", "0"]
UFF += ["--val_fraction", "0.3", "--save_steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a dataset, its detector, patch files, raw scans, and empty files named as in Eyecandies."""
    root = tmp_path_factory.mktemp("inputs")
    write_bagels(root / "data")
    write_samples(root / "patches", 7)
    write_dataset(root / "raw")
    data = root / "candies/Confetto/train/data"
    data.mkdir(parents=True)
    for name in ("depth.png", "info_depth.yaml", "pose.txt", "image_4.png"):
        (data / f"000_{name}").touch()
    call(*main_flags(root), "--output_dir", root / "fitted", "--save_detector", root / "detectors")
    return root


def main_flags(inputs: Path) -> list[object]:
    flags = ["--dataset_path", inputs / "data", "--classes", "bagel", "--method_name", "DINO+Point_MAE", *SMALL]
    return [*flags, "--seeds", 0, "--num_workers", 0, "--report_parts", 0, "--device", "cpu"]


# Every script that writes results: its main function, and its flags for the folders of inputs and of results.
SCRIPTS: dict[str, tuple[Callable[..., int | None], Callable[[Path, Path], list[object]]]] = {
    "main.py": (main.main, lambda i, out: [*main_flags(i), "--output_dir", out, "--save_preds"]),
    "detectors": (
        main.main,
        lambda i, out: [*main_flags(i), "--output_dir", out.parent / "results", "--save_detector", out],
    ),
    "features": (
        main.main,
        lambda i, out: [*main_flags(i), "--output_dir", out.parent / "results", *FEATURES, out],
    ),
    "predict.py": (predict.main, lambda i, out: [*predict_flags(i), "--output_dir", out]),
    "fusion_pretrain.py": (
        fusion_pretrain.main,
        lambda i, out: ["--data_path", i / "patches", "--output_dir", out, *UFF],
    ),
    "preprocessing.py": (preprocessing.main, lambda i, out: [i / "raw", "--output_dir", out, "--workers", 1]),
    "convert.py": (
        convert.main,
        lambda i, out: [i / "data/bagel/train/good/xyz", "--rgb", i / "data/bagel/train/good/rgb", "--output", out],
    ),
    "preprocess_eyecandies.py": (
        preprocess_eyecandies.main,
        lambda i, out: ["--dataset_path", i / "candies", "--target_dir", out, "--workers", 1],
    ),
}
FEATURES = ["--save_feature", "--save_feature_path"]


def predict_flags(inputs: Path) -> list[object]:
    samples = inputs / "data/bagel/test/hole"
    return ["--detector", inputs / "detectors/bagel", "--rgb", samples / "rgb", "--xyz", samples / "xyz"]


OUT = "train/out"  # convert.py wants the folder of a split


def start(name: str, inputs: Path, out: Path, *flags: object) -> "subprocess.CompletedProcess[str]":
    function, flags_for = SCRIPTS[name]
    return call_script(function, *flags_for(inputs, out), *flags)


@pytest.mark.parametrize("name", SCRIPTS)
def test_second_run_is_refused(inputs: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / OUT
    out.mkdir(parents=True)
    with locked(out, "folder"):
        run = start(name, inputs, out)
    assert run.returncode == 2
    assert f"error: Another run is writing to {out}. Wait for it, or choose another " in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(out.iterdir())


# A temporary file that the run of a script removes, in each folder that it writes to.
LEFT = {
    "main.py": [".report.m3dm.tmp.html", "classes/.x.m3dm.tmp.json", "anomaly_maps/bagel/test/hole/.x.m3dm.tmp.tiff"],
    "detectors": [".bagel.m3dm.tmp/config.json", ".rope.m3dm.tmp/config.json"],
    "features": [".x.m3dm.tmp.safetensors", "bagel/.x.m3dm.tmp.safetensors"],
    "predict.py": [".000.m3dm.tmp.tiff"],
    "fusion_pretrain.py": [".checkpoint-7.m3dm.tmp.pth"],
    "preprocessing.py": [".preprocessing.m3dm.tmp.json", "bagel/test/hole/gt/.x.m3dm.tmp.png"],
    "convert.py": ["xyz/.x.m3dm.tmp.tiff", "rgb/.x.m3dm.tmp.png"],
    "preprocess_eyecandies.py": ["Confetto/train/good/rgb/.x.m3dm.tmp.png"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_temporary_files_of_killed_runs_are_removed(inputs: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / OUT
    for each in (*LEFT[name], "mine/.x.m3dm.tmp.png", ".mine.tmp.png"):
        (out / each).parent.mkdir(parents=True, exist_ok=True)
        (out / each).write_text("")
    run = start(name, inputs, out)
    assert "Traceback" not in run.stderr
    hidden = sorted(str(path.relative_to(out)) for path in out.rglob("*") if "/." in str(path.relative_to(out.parent)))
    assert hidden == [".mine.tmp.png", "mine/.x.m3dm.tmp.png"]


# Script, path in the way, and whether it is a folder.
IN_THE_WAY = [
    ("main.py", "results.json", True),
    ("main.py", "report.html", True),
    ("main.py", "aupro_results.md", True),
    ("main.py", "classes/bagel.json", True),
    ("main.py", "classes", False),
    ("main.py", "anomaly_maps/bagel/test/hole/000.tiff", True),
    ("main.py", "anomaly_maps", False),
    ("main.py", "pred_maps/bagel/good", False),
    ("detectors", "bagel", False),
    ("features", "bagel", False),
    ("features", "bagel/000.safetensors", True),
    ("predict.py", "predictions.jsonl", True),
    ("predict.py", "000_overlay.png", True),
    ("fusion_pretrain.py", "log.txt", True),
    ("fusion_pretrain.py", "checkpoint-1.pth", True),
    ("fusion_pretrain.py", "checkpoint-last.pth", True),
    ("preprocessing.py", "bagel/test/hole/gt", False),
    ("convert.py", "xyz", False),
    ("convert.py", "rgb/000.png", True),
    ("preprocess_eyecandies.py", "Confetto/train", False),
]


@pytest.mark.parametrize(("name", "path", "is_folder"), IN_THE_WAY)
def test_obstacles_are_found_before_the_work_starts(
    inputs: Path, tmp_path: Path, name: str, path: str, is_folder: bool
) -> None:
    place = tmp_path / OUT / path
    (place if is_folder else place.parent).mkdir(parents=True)
    if not is_folder:
        place.write_text("")
    run = start(name, inputs, tmp_path / OUT)
    assert run.returncode == 2
    assert re.search(f"error: .*{re.escape(str(place))} .*[.] (Move|Choose|Save)", run.stderr), run.stderr
    assert "Traceback" not in run.stderr
    assert not [each for each in (tmp_path / OUT).rglob("*") if each.is_file() and each.stat().st_size]


def test_broken_link_in_the_way_is_found_before_the_work_starts(inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "out/classes"
    place.parent.mkdir()
    place.symlink_to(tmp_path / "not mounted")
    run = start("main.py", inputs, place.parent)
    assert run.returncode == 2
    assert f"error: {place} is not a folder. Move it away, or choose another --output_dir." in run.stderr


def test_prediction_without_images_ignores_their_names(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out/000.tiff").mkdir(parents=True)
    run = start("predict.py", inputs, tmp_path / "out", "--no_images")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out/predictions.jsonl").read_text()


@pytest.mark.parametrize("link", [False, True])
def test_one_folder_of_several_flags_is_locked_once(inputs: Path, tmp_path: Path, link: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    features = tmp_path / "features" if link else out
    if link:
        features.symlink_to(out)
    run = start("main.py", inputs, out, *FEATURES, features)
    assert run.returncode == 0, run.stderr
    assert list((out / "bagel").glob("*.safetensors"))
    with locked(out, "folder"):
        run = start("main.py", inputs, tmp_path / "other", *FEATURES, features)
    assert f"error: Another run is writing to {features}. Wait for it, or choose another --save_feature" in run.stderr


def test_good_samples_in_two_folders_are_refused(inputs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(inputs / "data/bagel", tmp_path / "data/bagel")
    shutil.copytree(data / "train/good", data / "train/ok")
    run = start("features", inputs, tmp_path / "out", "--dataset_path", tmp_path / "data")
    assert run.returncode == 2
    assert "train/good and" in run.stderr and "train/ok both hold good samples. Move these into one" in run.stderr


def test_pipe_in_the_way_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(InputError, match=r"log\.txt is not a file\."):
        locked(tmp_path, "--output_dir", [tmp_path / "log.txt"]).__enter__()


# The lock


def test_lock_ends_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path, "--output_dir"), pytest.raises(InputError, match="Another run"):
            locked(tmp_path, "--output_dir").__enter__()


def test_lock_ends_with_its_process_although_a_worker_lives_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from utils.scans.files import locked\n"
        "with locked(Path(sys.argv[1]), 'folder'):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True)\n"  # by the worker, which has closed its copy of the lock
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        with pytest.raises(InputError, match="Another run"):
            locked(tmp_path, "--output_dir").__enter__()
        process.kill()
        process.wait()
        with locked(tmp_path, "--output_dir"):
            os.kill(worker, signal.SIGKILL)  # fails if the worker has ended


def test_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    (tmp_path / ".x.m3dm.tmp.png").write_text("")
    with locked(tmp_path, "--output_dir"):
        assert not list(tmp_path.iterdir())


def test_next_run_replaces_the_temporary_file_of_a_killed_one(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "000.png") as temporary:
        temporary.write_text("whole")
    temporary.write_text("cut short")  # as a killed process leaves it
    with atomic_path(tmp_path / "000.png") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["000.png"]


# Runs that are killed between two files


class KilledError(Exception):
    """The process was killed."""


@contextmanager
def killed_at_rename(number: int) -> Iterator[None]:
    """End the block instead of its rename with this number, counted from 1."""
    renames, replace = 0, Path.replace

    def count(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == number:
            raise KilledError
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", count)
        yield


def test_uff_training_killed_between_two_files_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected = run_main(inputs / "patches", tmp_path / "expected", base=UFF)
    number, killed = 1, True
    while killed:
        out = tmp_path / f"killed_{number}"
        try:
            with killed_at_rename(number):
                run_main(inputs / "patches", out, base=UFF)
            killed = False
        except KilledError:
            last = out / "checkpoint-last.pth"
            run_main(inputs / "patches", out, *(["--resume", last] if last.exists() else []), base=UFF)
        assert log_of(out) == log_of(expected), number
        for path in expected.glob("*.pth"):
            assert_equal_training(out / path.name, path)
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir()), number
        number += 1
    assert number > 10


def test_new_training_in_a_used_folder_keeps_its_log(inputs: Path, tmp_path: Path) -> None:
    out = run_main(inputs / "patches", tmp_path, base=UFF)
    first = log_of(out)
    run_main(inputs / "patches", out, "--seed", 1, base=UFF)
    assert log_of(out)[:2] == first
    assert len(log_of(out)) == 4


def test_tables_are_not_doubled_by_a_resumed_run(inputs: Path, tmp_path: Path) -> None:
    flags = [*main_flags(inputs), "--output_dir", tmp_path / "out"]
    call(*flags)
    expected = [without_heading(tmp_path / "out" / name) for name in TABLES]
    for number in range(1, len(TABLES) + 1):
        renames = len(TABLES) - number  # that are made before the kill
        for name in TABLES[renames:]:
            (tmp_path / "out" / name).unlink()
        call(*flags, "--resume")
        assert [without_heading(tmp_path / "out" / name) for name in TABLES] == expected
    call(*flags)
    assert [text.count("## ") for text in ((tmp_path / "out" / name).read_text() for name in TABLES)] == [2, 2, 2]


def without_heading(path: Path) -> str:
    """Text of a file of tables without the lines of date and command."""
    return re.sub(r"^(## |    main\.py ).*", r"\1", path.read_text(), flags=re.MULTILINE)


def test_detector_killed_during_saving_is_saved_by_the_resumed_run(inputs: Path, tmp_path: Path) -> None:
    out, detectors = tmp_path / "out", tmp_path / "detectors"
    shutil.copytree(inputs / "detectors/bagel", detectors / ".bagel.old")
    (detectors / ".bagel.m3dm.tmp").mkdir()
    call(*main_flags(inputs), "--output_dir", out, "--save_detector", detectors, "--resume")
    assert sorted(path.name for path in detectors.iterdir()) == ["bagel"]

"""Reproduction of the paper's tables: checks, steps, and a whole run that is interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cleaning_runs import call_script, write_scan
from conftest import ROOT
from main_runs import write_bagels

from feature_extractors.config import METHODS
from runner import reproduce
from runner.reproduce import check_input, make_steps, parse_args
from utils import preprocessing
from utils.errors import InputError
from utils.reporting.steps import LOG, Step
from utils.scans.files import locked

PIP = ["--", "--classes", "bagel", "--rgb_backbone_name", "efficientnet_lite0", "--xyz_backbone_name", "FPFH"]


def write_raw(root: Path, train: int = 2) -> Path:
    """Write raw scans of a bagel: good training samples, and two good and two defective test samples."""
    for seed in range(train):
        write_scan(root / "bagel/train/good", f"{seed:03d}", seed, with_gt=False)
    for seed in (0, 1):
        write_scan(root / "bagel/test/good", f"{seed:03d}", 100 + seed, with_gt=False)
        write_scan(root / "bagel/test/hole", f"{seed:03d}", 200 + seed, with_gt=True)
    return root


def steps_of(dataset: Path, *flags: object) -> dict[str, Step]:
    steps = make_steps(parse_args(["--dataset_path", str(dataset), *map(str, flags)]))
    return {step.name: step for step in steps}


def flag(command: Sequence[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_everything_that_is_missing_is_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_raw(tmp_path / "data")
    (data / "bagel/test/hole/xyz/001.tiff").unlink()
    flags = ["--dataset_path", str(data), "--checkpoint_dir", str(tmp_path)]
    with pytest.raises(InputError, match="the 4 problems are listed above"):
        check_input(parse_args(flags))
    classes, sample, dino, point_mae = capsys.readouterr().err.splitlines()
    assert "lacks the classes cable_gland, carrot, cookie, dowel, foam, peach, potato, rope, tire." in classes
    assert "001.tiff is missing" in sample
    assert "dino_vitbase8_pretrain.pth" in dino
    assert "pointmae_pretrain.pth" in point_mae


def test_missing_dataset_and_split_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "candies/Confetto/train/data").mkdir(parents=True)
    candies = ["--dataset_type", "eyecandies", "--", "--classes", "Confetto", *PIP[3:]]
    for folder, flags, problem in (
        (tmp_path / "nothing", PIP, "nothing is not a folder."),
        (tmp_path / "candies", candies, "Confetto/test_public/data is missing."),
    ):
        with pytest.raises(InputError, match="the problem is listed above"):
            check_input(parse_args(["--dataset_path", str(folder), *flags]))
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line


def test_flags_of_main_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, problem in (
        (["--output_dir", "x"], "--output_dir is set by this script. Remove it from the flags after the two hyphens."),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--img_size", "2"], "--img_size is 2."),
    ):
        done = call_script(reproduce.main, "--dataset_path", tmp_path, "--", *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert problem in done.stderr


def test_the_steps_of_a_raw_dataset(tmp_path: Path) -> None:
    data, out = write_raw(tmp_path / "data"), tmp_path / "out"
    steps = steps_of(data, "--output_dir", out, "--seeds", 0, 1, *PIP, "--device", "cpu")
    assert list(steps) == ["cleaning", "dataset check", "methods without UFF", "UFF training", "methods with UFF"]
    cleaning, check, without_uff, uff, with_uff = (step.command for step in steps.values())
    assert cleaning[1:] == [str(ROOT / "utils/preprocessing.py"), str(data), "--output_dir", str(out / "data")]
    for command in (check, without_uff, with_uff):
        assert flag(command, "--dataset_path") == str(out / "data")
        assert flag(command, "--xyz_backbone_name") == "FPFH"
    assert flag(without_uff, "--save_feature_path") == flag(uff, "--data_path") == str(out / "patch_lib")
    assert flag(with_uff, "--fusion_module_path") == str(out / "uff/checkpoint-2.pth")
    assert (flag(uff, "--batch_size"), flag(uff, "--accum_iter"), flag(uff, "--lr")) == ("16", "16", "0.003")
    assert flag(uff, "--device") == "cpu"
    assert [step.total for step in steps.values()] == [6, 1, 8, 3, 4]


def test_all_methods_run_once(tmp_path: Path) -> None:
    steps = steps_of(write_raw(tmp_path / "data"), *PIP)
    named = [
        word
        for step in (steps["methods without UFF"], steps["methods with UFF"])
        for word in step.command[step.command.index("--method_name") + 1 : step.command.index("--output_dir")]
    ]
    assert sorted(named) == sorted(METHODS)


def clean(raw: Path, *flags: object) -> None:
    """Clean raw scans, by default in place."""
    assert call_script(preprocessing.main, raw, "--workers", 1, *flags).returncode == 0


def test_a_cleaned_dataset_is_used_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "cleaned"
    clean(write_raw(tmp_path / "data"), "--output_dir", data)
    (data / "preprocessing.json").unlink()  # as if another program had cleaned it
    steps = steps_of(data, *PIP)
    assert next(iter(steps)) == "dataset check"
    assert flag(steps["methods without UFF"].command, "--dataset_path") == str(data)


def test_a_cleaning_in_place_that_was_begun_is_finished(tmp_path: Path) -> None:
    data = write_raw(tmp_path / "data")
    clean(data)
    steps = steps_of(data, *PIP)
    assert steps["cleaning"].command[2:] == [str(data)]
    assert flag(steps["methods without UFF"].command, "--dataset_path") == str(data)


def test_eyecandies_as_published_are_converted(tmp_path: Path) -> None:
    data, out = tmp_path / "candies", tmp_path / "out"
    for split, number in (("train", "000"), ("train", "001"), ("test_public", "00")):
        folder = data / "Confetto" / split / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}_depth.png").touch()
    flags = ["--dataset_type", "eyecandies", "--output_dir", out, "--", "--classes", "Confetto", *PIP[3:]]
    conversion, check, *_ = steps_of(data, *flags).values()
    assert conversion.command[1] == str(ROOT / "utils/preprocess_eyecandies.py")
    assert (flag(conversion.command, "--target_dir"), conversion.total) == (str(out / "data"), 3)
    assert flag(check.command, "--dataset_path") == str(out / "data")
    (data / "Confetto/train").rename(data / "Confetto/raw")
    assert next(iter(steps_of(data, *flags))) == "dataset check"


def test_unfinished_uff_training_is_continued(tmp_path: Path) -> None:
    data, folder = write_bagels(tmp_path / "data"), tmp_path / "out/uff"
    folder.mkdir(parents=True)
    for written, resumed in ((), False), (("checkpoint-last.pth",), True), (("checkpoint-2.pth",), False):
        for name in written:
            (folder / name).touch()
        command = steps_of(data, "--output_dir", tmp_path / "out", *PIP)["UFF training"].command
        assert ("--resume" in command) == resumed


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    data, out = write_bagels(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    with locked(out, "folder"):
        done = call_script(reproduce.main, "--dataset_path", data, "--output_dir", out, *PIP)
    assert done.returncode == 2
    assert f"Another run is writing to {out}. Wait for it, or choose another --output_dir." in done.stderr


# A whole run

SMALL = ["--img_size", "64", "--num_group", "32", "--group_size", "8", "--f_coreset", "0.02", "--num_workers", "0"]
SMALL += ["--report_parts", "0", "--device", "cpu"]


def start(cwd: Path, weights: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "runner.reproduce", "--dataset_path", cwd / "data", "--checkpoint_dir", weights]
    command += ["--seeds", "0", "1", "--output_dir", cwd / "out", "--", "--classes", "bagel", *SMALL, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_an_interrupted_run_continues_and_writes_the_tables(golden_weights: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "data", train=16)
    log = tmp_path / "out" / LOG
    run = start(tmp_path, golden_weights)
    while run.poll() is None and not list((tmp_path / "out/patch_lib/bagel").glob("*.safetensors")):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate()
    assert run.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "reproduce.py: interrupted. Run the same command to continue."

    run = start(tmp_path, golden_weights)
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr + log.read_text()
    commands = re.findall(r"^\$ \S+ (\S+)", log.read_text(), flags=re.MULTILINE)
    names = ["preprocessing.py", "main.py", "main.py", "main.py", "fusion_pretrain.py", "main.py"]
    assert [Path(command).name for command in commands] == names
    assert "step 3 of 5, methods without UFF" in stderr
    cells = re.findall(r"^DINO\+Point_MAE\+Fusion +ours +(.*)$", stdout, flags=re.MULTILINE)
    assert len(cells) == 3
    for seed, value in zip((0, 1), cells, strict=False):
        path = tmp_path / f"out/results_with_uff/seed_{seed}/DINO+Point_MAE+Fusion/results.json"
        assert json.loads(path.read_text())["args"]["use_uff"]
        assert "±" in value
    assert (tmp_path / "out/paper.html").read_text().count("<table>") == 3
    assert "| DINO+Point_MAE+Fusion | ours | " in (tmp_path / "out/paper.md").read_text()

    run = start(tmp_path, golden_weights)
    assert run.communicate()[0] == stdout
    run = start(tmp_path, golden_weights, "--f_coreset", "0.1")
    assert "was begun with f_coreset 0.02, now 0.1." in run.communicate()[1]

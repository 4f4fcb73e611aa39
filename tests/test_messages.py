"""Messages of the scripts: --quiet, --log_file, warnings that are not repeated, and progress without a terminal."""

import json
import logging
import os
import re
import select
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from main_runs import (
    SMALL,
    bagels_fixture,  # noqa: F401 (a fixture)
    call,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    run_in_tmp_path,  # noqa: F401 (a fixture)
)

from utils import preprocessing
from utils.command_line import Parser
from utils.errors import InputError
from utils.reporting import progress
from utils.reporting.messages import exit_on_error, show, start_messages, warn_once
from utils.reporting.progress import progress_bar
from utils.synthetic import Plan, make_dataset

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
DISK_FULL = Path("/dev/full")


@exit_on_error()
def script(argv: Sequence[str]) -> None:
    """Script that shows and logs what its flags name."""
    parser = Parser("Test.")
    parser.add_argument("--steps", nargs="*", default=())
    steps = parser.parse_args(argv).steps
    start_messages("%(message)s")
    show("a line")
    logging.getLogger("script").info("an info")
    logging.getLogger("script").warning("a \x1b[31mwarning")
    for step in steps:
        if step == "refuse":
            raise InputError("It is refused. Fix it.")
        if step == "crash":
            raise KeyError("the crash")
        warn_once("step", "key", f"{step} came first")
        logging.getLogger("script").info("the same")


def lines_of(path: Path) -> list[str]:
    """Lines of a log file without their date and time, which all have."""
    lines = path.read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    return [line[len("2026-01-01 00:00:00 ") :] for line in lines]


@pytest.fixture(autouse=True)
def name_of_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])


def test_quiet_leaves_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, out, err in (
        ([], "a line\n", ["an info", r"a \x1b[31mwarning", "script.py: error: It is refused. Fix it."]),
        (["--quiet"], "", [r"a \x1b[31mwarning", "script.py: error: It is refused. Fix it."]),
    ):
        with pytest.raises(SystemExit):
            script([*flags, "--steps", "refuse"])
        printed = capsys.readouterr()
        assert (printed.out, printed.err.splitlines()) == (out, err)


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_the_log_file_has_every_message(tmp_path: Path, flags: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            script([*flags, "--log_file", str(tmp_path / "new/run.log"), "--steps", "refuse"])
    expected = [
        *("INFO a line", "INFO an info", r"WARNING a \x1b[31mwarning"),
        "ERROR script.py: error: It is refused. Fix it.",
    ]
    assert lines_of(tmp_path / "new/run.log") == 2 * expected  # the second run appends


def test_the_log_file_has_errors_of_the_flags(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        preprocessing.main(["nowhere", "--preview", "sheet.txt", "--log_file", str(tmp_path / "run.log")])
    (line,) = lines_of(tmp_path / "run.log")
    assert line.startswith("ERROR script.py: error: --preview sheet.txt names no image.")


def test_the_log_file_has_the_traceback_of_a_crash(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        script(["--log_file", str(tmp_path / "run.log"), "--steps", "crash"])
    assert lines_of(tmp_path / "run.log")[-1] == "ERROR KeyError: 'the crash'"


def test_nothing_is_logged_after_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(["--quiet", "--log_file", str(tmp_path / "run.log")])
    before = (tmp_path / "run.log").read_text()
    show("later")
    logging.getLogger("script").warning("later")
    assert (tmp_path / "run.log").read_text() == before
    assert capsys.readouterr().out == "later\n"


def test_the_same_message_comes_once_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for first, second in (("one", "two"), ("three", "four")):
        script(["--steps", first, second])
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "first" in line] == [f"{first} came first"]
        assert lines.count("the same") == 1


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script(["--log_file", str(tmp_path)])
    assert stop.value.code == 2
    assert f"script.py: error: --log_file {tmp_path} cannot be written (Is a directory)." in capsys.readouterr().err


@pytest.mark.skipif(not DISK_FULL.exists(), reason="this system has no /dev/full")
def test_a_run_goes_on_without_a_log_file_on_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    script(["--log_file", str(DISK_FULL)])
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    assert printed.err.splitlines()[0] == (
        "warning: /dev/full cannot be written (No space left on device). Free disk space and run the same command "
        "again. The run continues without it."
    )


def test_a_quiet_run_of_main_logs_its_results(bagels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset_path", bagels, *SMALL, "--method_name", "DINO", "Point_MAE", "--output_dir", tmp_path / "out"]
    call(*flags, "--quiet", "--log_file", tmp_path / "run.log")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[0] for line in printed.err.splitlines()] == [
        *("runner.class_files", "feature_extractors.thresholds", "runner.dataset_check"),
    ]
    lines = lines_of(tmp_path / "run.log")
    for start in ("INFO bagel, DINO: I-AUROC ", "INFO bagel, Point_MAE: I-AUROC ", f"INFO written to {tmp_path}/out/"):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert len([line for line in lines if "good samples, but there are 2 of bagel" in line]) == 1
    assert not {"quiet", "log_file"} & json.loads((tmp_path / "out/DINO/results.json").read_text())["args"].keys()


def test_a_quiet_preprocessing_names_failed_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "parts"
    make_dataset(Plan(root, ("gasket",), train=2, validation=0, test_good=0, test_defective=0, size=224))
    (root / "gasket/train/good/rgb/000.png").write_bytes(b"no picture")
    capsys.readouterr()
    flags = [str(root), "--workers", "2", "--quiet", "--log_file", str(tmp_path / "run.log")]
    assert preprocessing.main(flags) == 1
    (failed,) = capsys.readouterr().out.splitlines()
    assert "gasket/train/good/000: " in failed
    lines = lines_of(tmp_path / "run.log")
    assert lines[-2:] == ["INFO done 1, skipped 0 (done before), failed 1", f"ERROR {failed}"]


# Progress


def test_progress_without_a_terminal_is_a_line_every_so_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.2)
    with caplog.at_level(logging.INFO):
        bar = progress_bar(range(14), total=14, desc="test", unit="sample")
        for _ in bar:
            time.sleep(0.05)
            bar.set_postfix(loss="0.5", refresh=False)
    assert 2 <= len(caplog.messages) <= 4
    for text in caplog.messages:
        assert re.fullmatch(r"test: \d+ of 14 samples, 00:00 elapsed, 00:0\d left: loss=0\.5", text)
    assert capsys.readouterr() == ("", "")


def test_short_loops_log_no_progress(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), progress_bar(total=3, desc="test") as bar:
        for _ in range(3):
            bar.update()
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")


def test_progress_without_a_total(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(progress_bar(iter("ab"), unit="file")) == ["a", "b"]
    assert caplog.messages[-1] == "2 files, 00:00 elapsed"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_bar_unless_it_is_quiet(quiet: bool) -> None:
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    with os.fdopen(writer, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        show_bar(["--quiet"] if quiet else [])
        readable, _, _ = select.select([reader], [], [], 0.5)
        text = os.read(reader, 10_000).decode() if readable else ""
    os.close(reader)
    assert ("test: " in text) == (not quiet)


@exit_on_error()
def show_bar(argv: Sequence[str]) -> None:
    Parser("Test.").parse_args(argv)
    assert list(progress_bar(np.arange(3), desc="test")) == [0, 1, 2]

"""Steps of a long run: order, log, record, failures and interruptions."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.reporting import steps
from utils.reporting.steps import LOG, RECORD, Step, run_steps


def step(name: str, program: str = "", folder: Path = Path(), pattern: str = "*", total: int = 1) -> Step:
    return Step(name, 50, [sys.executable, "-c", program], folder, pattern, total)


def log_of(folder: Path) -> list[str]:
    """Output of the steps, without the lines that name commands."""
    return [line for line in (folder / LOG).read_text().splitlines() if not line.startswith("$ ")]


def test_steps_run_in_order_and_only_once(tmp_path: Path) -> None:
    first, second = step("first", "print(1)"), step("second", "print(2)")
    run_steps([first], tmp_path, {"seeds": [0]})
    run_steps([first, second], tmp_path, {"seeds": [0]})
    run_steps([first, second], tmp_path, {"seeds": [0]})
    assert log_of(tmp_path) == ["1", "2"]
    assert f"$ {sys.executable} -c 'print(1)'" in (tmp_path / LOG).read_text()


def test_a_failed_step_is_reported_and_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = "print('a.png is blue'); raise SystemExit(3)"
    with pytest.raises(InputError, match=r"The step second ended with exit code 3; .*log.txt has its whole output[.] "):
        run_steps([step("first", "print(1)"), step("second", program)], tmp_path, {})
    assert capsys.readouterr().err.splitlines() == ["  a.png is blue"]
    run_steps([step("first", "print(1)"), step("second", "print(2)")], tmp_path, {})
    assert log_of(tmp_path) == ["1", "a.png is blue", "2"]


def test_the_end_of_a_long_output_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        run_steps([step("only", "print(*range(100), '\\x1b[2J', sep='\\n'); raise SystemExit(1)")], tmp_path, {})
    shown = capsys.readouterr().err.splitlines()
    assert (len(shown), shown[-2:]) == (10, ["  99", r"  \x1b[2J"])


def test_other_settings_are_refused(tmp_path: Path) -> None:
    run_steps([step("only")], tmp_path, {"seeds": [0], "path": tmp_path})
    run_steps([step("only")], tmp_path, {"seeds": [0], "path": tmp_path})
    with pytest.raises(InputError, match=r"was begun with seeds \[0\], now \[0, 1\]\. Use the same flags, or choose"):
        run_steps([step("only")], tmp_path, {"seeds": [0, 1], "path": tmp_path})


def test_an_interruption_reaches_the_process_once_and_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which is ignored in the background of a shell
        "try:\n    pathlib.Path('started').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.3); print('ended')\n"
    )

    def interrupt(process: "subprocess.Popen[bytes]", *_: object) -> int:
        while not Path("started").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_steps([step("only", program)], tmp_path, {})
    assert log_of(tmp_path)[-1] == "ended"
    assert '"finished": []' in (tmp_path / RECORD).read_text()


def test_the_finished_share_counts_files(tmp_path: Path) -> None:
    counted = step("only", folder=tmp_path / "out", pattern="*/classes/*.json", total=4)
    assert counted.finished() == 0
    for number, share in enumerate((0.25, 0.5, 0.75, 1, 1)):
        path = tmp_path / f"out/DINO/classes/{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (path.parent / "notes.txt").touch()
        assert counted.finished() == share

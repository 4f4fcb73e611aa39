"""Prediction of new samples as they arrive: in watched folders, and as lines of a stream."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from main_runs import SMALL, process, write_bagels
from predict_runs import (
    Fitted,
    fitted_fixture,  # noqa: F401 (a fixture)
    flags_for,
    lines_of,
    run,
    stubs_fixture,  # noqa: F401 (a fixture)
    write_samples,
)
from tiny_networks import one_thread  # noqa: F401 (a fixture)

from runner import watching
from runner.prediction import PredictionWriter
from runner.watching import StopSignals, WatchedFiles
from utils.errors import InputError
from utils.records import SampleFiles
from utils.scans.sample_files import FoundSamples, stamp_of


class Steps:
    """Clock of the watching loop. Each pause takes one second and starts with the next step; the last one stops it."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps, self.now = list(steps), time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 1
        (self.steps.pop(0) if self.steps else stop)()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def nothing() -> None:
    pass


def watch(fitted: Fitted, folder: Path, *steps: Callable[[], object], more: tuple[object, ...] = ()) -> list[Any]:
    """Watch folder/rgb and folder/xyz during these steps; return the lines of folder/out."""
    flags = [*flags_for(fitted, folder, folder / "out"), "--watch", "--no_images", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "time", Steps(*steps))
        assert run(*flags) == 0
    return lines_of(folder / "out")


def put(fitted: Fitted, folder: Path, stem: str, *kinds: str) -> None:
    """Copy the files of a good sample; only those of `kinds` if there are any."""
    for kind, suffix in (("rgb", ".png"), ("xyz", ".tiff")):
        if kind in kinds or not kinds:
            shutil.copy(fitted.data / f"train/good/{kind}/000{suffix}", folder / kind / f"{stem}{suffix}")


# Watched folders


def test_each_sample_is_predicted_once(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_samples(fitted, tmp_path, 1)

    def overwrite() -> None:
        put(fitted, folder, "000", "rgb")

    steps = [nothing, nothing, lambda: put(fitted, folder, "001"), nothing, nothing, overwrite, nothing, nothing]
    lines = watch(fitted, folder, *steps)
    assert [line["name"] for line in lines] == ["000", "001", "000"]
    assert len({line["stamp"] for line in lines}) == 3
    captured = capsys.readouterr()
    assert f"predict.py: ready, watching {folder}/rgb and {folder}/xyz" in captured.err
    assert captured.out.splitlines()[-1].startswith("3 samples predicted in ")


def test_files_may_come_into_empty_folders(fitted: Fitted, tmp_path: Path) -> None:
    for kind in ("rgb", "xyz"):
        (tmp_path / kind).mkdir()
    assert len(watch(fitted, tmp_path, lambda: put(fitted, tmp_path, "a"), nothing, nothing)) == 1


def test_a_file_that_is_still_copied_waits(fitted: Fitted, tmp_path: Path) -> None:
    folder = write_samples(fitted, tmp_path, 1)
    content = (folder / "xyz/000.tiff").read_bytes()
    (folder / "xyz/000.tiff").write_bytes(content[:100])

    def grow() -> None:
        path = folder / "xyz/000.tiff"
        path.write_bytes(content[: path.stat().st_size + len(content) // 4])

    lines = watch(fitted, folder, *[grow] * 5, nothing, nothing, nothing, more=("--settle", 2))
    assert len(lines) == 1 and "score" in lines[0]


def test_a_file_that_changes_before_its_turn_settles_again(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_samples(fitted, tmp_path, 2)
    content, add = (folder / "xyz/001.tiff").read_bytes(), PredictionWriter.add

    def add_and_copy(self: PredictionWriter, *arguments: Any) -> dict[str, Any]:
        (folder / "xyz/001.tiff").write_bytes(content[:100])
        return add(self, *arguments)

    def finish() -> None:
        (folder / "xyz/001.tiff").write_bytes(content)
        monkeypatch.setattr(PredictionWriter, "add", add)

    monkeypatch.setattr(PredictionWriter, "add", add_and_copy)
    more = ("--batch_size", 1, "--num_workers", 0)
    lines = watch(fitted, folder, nothing, finish, nothing, nothing, more=more)
    assert [(line["name"], "score" in line) for line in lines] == [("000", True), ("001", True)]


def test_a_file_without_partner_is_reported_once_and_predicted_later(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_samples(fitted, tmp_path, 1)
    put(fitted, folder, "001", "rgb")
    late = [*[nothing] * 8, lambda: put(fitted, folder, "001", "xyz"), nothing, nothing]
    lines = watch(fitted, folder, *late, more=("--partner_timeout", 5))
    assert [(line["name"], "score" in line) for line in lines] == [("000", True), ("001", False), ("001", True)]
    assert lines[1]["error"].startswith(f"{folder}/rgb/001.png has no cloud of the same stem")
    assert capsys.readouterr().err.count("001 could not be predicted") == 1


def test_a_bad_file_is_reported_and_left(fitted: Fitted, tmp_path: Path) -> None:
    folder = write_samples(fitted, tmp_path, 2)
    (folder / "xyz/000.tiff").write_bytes(b"nothing")
    lines = watch(fitted, folder, *[nothing] * 4)
    assert [(line["name"], "score" in line) for line in lines] == [("000", False), ("001", True)]


def test_a_restart_with_append_predicts_the_rest(fitted: Fitted, tmp_path: Path) -> None:
    folder = write_samples(fitted, tmp_path, 2)
    (folder / "xyz/000.tiff").write_bytes(b"nothing")
    watch(fitted, folder, nothing, nothing)
    with (folder / "out/predictions.jsonl").open("a") as lines:
        lines.write('{"name": "002", "sco')  # the run was killed here
    put(fitted, folder, "002")
    names = [line["name"] for line in watch(fitted, folder, nothing, nothing, more=("--append",))]
    assert names == ["000", "001", "002"]
    assert len(watch(fitted, folder, nothing, nothing)) == 3  # from the start without --append


def test_stop_between_two_samples(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain = write_samples(fitted, tmp_path, 3), PredictionWriter.add

    def add(self: PredictionWriter, *arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *arguments)

    monkeypatch.setattr(PredictionWriter, "add", add)
    lines = watch(fitted, folder, nothing, nothing)
    assert [line["name"] for line in lines] == ["000"] and "score" in lines[0]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_stops_at_once() -> None:
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_predictions_are_never_watched(fitted: Fitted, tmp_path: Path) -> None:
    folder = write_samples(fitted, tmp_path, 1)
    images, clouds = ["--rgb", f"{folder}/**/*.png"], ["--xyz", f"{folder}/**/*.tiff", "--partner_timeout", 0]
    for method, patterns in (("DINO", images), ("DINO+Point_MAE", images + clouds)):
        flags = ["--detector", fitted.detectors[method], "--device", "cpu", "--settle", 0, "--watch"]
        with pytest.raises(InputError, match=r"out/000\S* is in --output_dir"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(watching, "time", Steps(nothing, nothing, nothing))
            run(*flags, *patterns, "--output_dir", folder / "out")
        shutil.rmtree(folder / "out")


def test_what_cannot_be_watched_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    write_samples(fitted, tmp_path, 1)
    detector, rgb, out = fitted.detectors["DINO"], ("--rgb", tmp_path / "rgb"), ("--output_dir", tmp_path / "out")
    odd = (tmp_path / "xyz").rename(tmp_path / "line [1]")
    for flags, expected in (
        (["--watch", "--rgb", tmp_path / "none"], "none' does not exist. Create the folder"),
        (["--watch", *rgb, "--output_dir", tmp_path / "rgb"], "is --output_dir, so its maps would be watched too"),
        (["--watch", "--rgb", odd, "--output_dir", odd], "is --output_dir, so its maps would be watched too"),
        (["--watch", "--stdin"], "Leave out --rgb, --xyz and --watch"),
        (["--stdin", *rgb], "Leave out --rgb, --xyz and --watch"),
        (["--watch", *rgb, "--fail_on_anomaly"], "--fail_on_anomaly has no effect with --watch"),
    ):
        with pytest.raises(InputError, match=expected):
            run("--detector", detector, *out, *flags)
    assert not (tmp_path / "out").exists()


def test_memory_of_the_watched_files_does_not_grow(tmp_path: Path) -> None:
    """Only existing samples are remembered. A folder without any may be on an unavailable share, and forgets none."""
    files = [SampleFiles(str(i), tmp_path / f"{i}.png") for i in range(3)]
    found: list[FoundSamples] = []
    watched = WatchedFiles(lambda: found[0], settle=0, partner_timeout=0)
    found[:] = [FoundSamples(files[:2], [])]
    assert watched.due(0).samples == files[:2]
    watched.done |= {stamp_of(each) for each in files[:2]}
    for away in (FoundSamples([], []), FoundSamples([], [(files[0], "has no cloud")])):
        found[:] = [away]
        assert watched.due(1).samples == [] and len(watched.done) == 2
    found[:] = [FoundSamples(files[1:], [])]
    assert watched.due(2).samples == files[2:] and watched.done == {stamp_of(files[1])}


def test_an_unreadable_folder_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    def look() -> FoundSamples:
        raise PermissionError("images")

    watched = WatchedFiles(look, 1, 60)
    watched.done.add("a")
    for now in range(3):
        assert watched.due(now) == FoundSamples([], [])
    assert watched.done == {"a"}
    assert caplog.text.count("the watched files cannot be listed (images). Trying again") == 1


# Lines of a stream


def ask(fitted: Fitted, folder: Path, *lines: object, more: tuple[object, ...] = ()) -> list[dict[str, Any]]:
    """Send lines to --stdin, objects as JSON; return the answers."""
    flags = ["--detector", fitted.detectors["DINO+Point_MAE"], "--device", "cpu", "--output_dir", folder / "out"]
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    answers = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(texts))))
        patch.setattr(sys, "stdout", answers)
        assert run(*flags, "--stdin", *more) == 0
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_answers_are_the_lines_of_predictions(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_samples(fitted, tmp_path, 2)
    paths = {i: (f"{folder}/rgb/00{i}.png", f"{folder}/xyz/00{i}.tiff") for i in (1, 0)}
    requests = [{"name": f"part {i}", "rgb": rgb, "xyz": xyz} for i, (rgb, xyz) in paths.items()]
    answers = ask(fitted, folder, *requests)
    assert [each["name"] for each in answers] == ["part 1", "part 0"]
    assert answers == lines_of(folder / "out")
    assert (folder / "out/part 1.tiff").is_file() and (folder / "out/part 0_overlay.png").is_file()
    errors = capsys.readouterr().err
    assert "predict.py: ready, reading stdin" in errors and "2 samples predicted" in errors
    assert run(*flags_for(fitted, folder, folder / "again"), "--batch_size", 1) == 0
    assert [each["score"] for each in lines_of(folder / "again")] == [each["score"] for each in answers[::-1]]


def test_bad_lines_are_answered_and_the_loop_goes_on(fitted: Fitted, tmp_path: Path) -> None:
    folder = write_samples(fitted, tmp_path, 1)
    rgb, xyz = f"{folder}/rgb/000.png", f"{folder}/xyz/000.tiff"
    cases: list[tuple[object, str | None, str]] = [
        (b"no JSON", None, "The line is not a request"),
        (b"", None, "The line is not a request"),
        (b"[" * 10**5, None, "The line is not a request"),
        (b'{"name": "\xff"}', None, "The line is not a request"),
        ([1], None, "Expected `object`"),
        ({"rgb": 1}, None, "Expected `str | null`, got `int`"),
        ({"nmae": "a", "rgb": rgb}, None, "unknown field `nmae`"),
        ({"name": "a"}, "a", 'neither "rgb" nor "xyz"'),
        ({"name": "a", "rgb": rgb}, "a", "has no xyz file"),
        ({"name": "../a", "rgb": rgb, "xyz": xyz}, "../a", "not a file name"),
        ({"name": "a" * 300, "rgb": rgb, "xyz": xyz}, "a" * 300, "not a file name"),
        ({"name": "a", "rgb": "\0", "xyz": xyz}, "a", "NUL"),
        ({"name": "a", "rgb": f"{folder}/rgb", "xyz": xyz}, "a", "cannot be read (Is a directory)"),
        ({"rgb": f"{folder}/none.png", "xyz": xyz}, "none", "none.png is missing"),
        ({"rgb": f"{folder}/out/000.png", "xyz": xyz}, "000", "is in --output_dir"),
    ]
    answers = ask(fitted, folder, *(line for line, _, _ in cases), {"rgb": rgb, "xyz": xyz}, more=("--no_images",))
    assert len(answers) == len(cases) + 1
    for answer, (_, name, expected) in zip(answers, cases, strict=False):
        assert answer["name"] == name and expected in answer["error"], answer
    assert answers[-1]["name"] == "000" and "score" in answers[-1]


def test_stop_while_waiting_for_a_line() -> None:
    with StopSignals() as signals:
        assert signals.wait_for(lambda: (stop(), time.sleep(1))) is None
        assert signals.requested
        assert signals.wait_for(lambda: "a line") is None


# The script itself


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with predict.py, samples, and a detector of networks that need no download."""
    folder = tmp_path_factory.mktemp("at_work")
    write_bagels(folder / "data")
    (folder / "predict.py").symlink_to(ROOT / "predict.py")
    (folder / "station").mkdir()
    for number in (1, 2, 3):
        for kind, suffix in (("rgb", ".png"), ("xyz", ".tiff")):
            shutil.copy(
                folder / f"data/bagel/test/good/{kind}/000{suffix}", folder / f"station/part_00{number}{suffix}"
            )
    flags = ["--dataset_path", folder / "data", "--classes", "bagel", "--method_name", "DINO", *SMALL]
    done = process(folder, ROOT / "main.py", *flags, "--device", "cpu", "--save_detector", folder / "detectors")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_driver_of_the_docs(at_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(at_work)
    page = (ROOT / "docs/PREDICT.md").read_text()
    (snippet,) = (each for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "subprocess" in each)
    exec(compile(snippet, "docs/PREDICT.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"part_001 (\([-.\d]+, (True|False)\)\n)part_002 \1", printed)  # the same files


@pytest.mark.slow
def test_signals_end_a_watching_process(at_work: Path) -> None:
    """SIGTERM and Ctrl-C end it cleanly, and after SIGKILL the next run continues."""
    command = [sys.executable, "predict.py", "--detector", "detectors/bagel", "--rgb", "new", "--watch", "--append"]
    (at_work / "new").mkdir()
    for number, (sent, code) in enumerate(((signal.SIGTERM, 0), (signal.SIGKILL, -9), (signal.SIGINT, 0)), 1):
        flags = ["--settle", "0.3", "--device", "cpu", "--output_dir", "watched"]
        with subprocess.Popen(
            [*command, *flags], cwd=at_work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as started:
            assert started.stdout is not None and started.stderr is not None
            while not started.stderr.readline().startswith("predict.py: ready, watching new"):
                assert started.poll() is None
            shutil.copy(at_work / f"station/part_00{number}.png", at_work / "new")
            assert started.stdout.readline().startswith(f"part_00{number} ")
            started.send_signal(sent)
            assert started.wait(60) == code
        assert [line["name"] for line in lines_of(at_work / "watched")] == [f"part_00{i + 1}" for i in range(number)]
    assert not list((at_work / "watched").glob(".*"))

"""UFF training resumed after a flag, a signal or a kill ends like an uninterrupted run."""

import argparse
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from uff_runs import SMALL, assert_equal_training, finish, launch, log_of, read, run_main, write_samples

from runner import pretraining
from runner.pretrain_config import Progress
from runner.training import Step, Trainer

# Seven files give updates of 3, 3 and 1 batches, so six updates in two epochs.
SEVEN = ["--batch_size", "1", "--accum_iter", "3", "--save_steps", "1"]
UPDATES = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as in the subprocesses, for bit-equal results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("patch_lib"), 7)


@pytest.fixture(scope="module")
def uninterrupted(lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted run with a copy of checkpoint-last.pth after each update as after-<updates>.pth."""
    out = tmp_path_factory.mktemp("uninterrupted")
    save = pretraining.save_checkpoint

    def keep(path: Path, model: object, optimizer: object, progress: Progress, args: object) -> None:
        save(path, model, optimizer, progress, args)
        aside = out / f"after-{progress.updates}.pth"
        if path.name == "checkpoint-last.pth" and not aside.exists():  # the first of two at the end of an epoch
            shutil.copy(path, aside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "save_checkpoint", keep)
        return run_main(lib, out, *SEVEN)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("updates", range(1, UPDATES))
def test_resume_from_any_update(lib: Path, uninterrupted: Path, tmp_path: Path, updates: int, num_workers: int) -> None:
    written = uninterrupted / f"after-{updates}.pth"
    assert read(written)["progress"]["updates"] == updates
    out = run_main(lib, tmp_path, *SEVEN, "--resume", written, "--num_workers", num_workers)
    assert_equal_training(out / "checkpoint-last.pth", uninterrupted / "checkpoint-last.pth")
    assert_equal_training(out / "checkpoint-1.pth", uninterrupted / "checkpoint-1.pth")
    assert log_of(out)[-1] == log_of(uninterrupted)[-1]


def test_resume_from_the_checkpoint_of_an_epoch(lib: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = run_main(lib, tmp_path, *SEVEN, "--resume", uninterrupted / "checkpoint-0.pth")
    assert not (out / "checkpoint-0.pth").exists()
    assert_equal_training(out / "checkpoint-1.pth", uninterrupted / "checkpoint-1.pth")
    assert log_of(out) == log_of(uninterrupted)[1:]


@contextmanager
def stop_after(updates: int) -> Iterator[None]:
    """Request a stop after a number of updates."""
    made = 0
    train = Trainer.train_epoch

    def counted(trainer: Trainer) -> Iterator[Step]:
        nonlocal made
        for step in train(trainer):
            made += step.grad_norm is not None
            yield step

    def requested() -> bool:
        return made >= updates

    @contextmanager
    def requests() -> Iterator[object]:
        yield requested

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "stop_requests", requests)
        patch.setattr(Trainer, "train_epoch", counted)
        yield


# Flags, and their number of updates in two epochs.
LENGTHS = {"": 6, "--drop_last_group": 4, "--val_fraction 0.3": 4, "--max_steps 5": 5}


@pytest.mark.parametrize(
    ("flags", "updates"), [(flags, updates) for flags, total in LENGTHS.items() for updates in range(1, total)]
)
def test_resume_after_a_stop_at_any_update(lib: Path, tmp_path: Path, flags: str, updates: int) -> None:
    """Weights, optimizer and log equal those of an uninterrupted run without --save_steps."""
    base = [*SEVEN[:4], *flags.split()]
    expected = run_main(lib, tmp_path / "expected", *base)
    assert read(expected / "checkpoint-last.pth")["progress"]["updates"] == LENGTHS[flags]
    with stop_after(updates), pytest.raises(SystemExit) as stop:
        run_main(lib, tmp_path / "out", *base)
    assert stop.value.code == 130
    out = run_main(lib, tmp_path / "out", *base, "--resume", tmp_path / "out" / "checkpoint-last.pth")
    assert_equal_training(out / "checkpoint-last.pth", expected / "checkpoint-last.pth")
    assert_equal_training(out / "checkpoint-best.pth", expected / "checkpoint-best.pth")
    assert log_of(out) == log_of(expected)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_finished_run_continues_with_more_max_steps(lib: Path, tmp_path: Path, steps: int) -> None:
    """Only the length is compared, because max_steps changes the schedule."""
    out = run_main(lib, tmp_path / "out", *SEVEN, "--max_steps", steps)
    run_main(lib, out, *SEVEN, "--max_steps", "5", "--resume", out / "checkpoint-last.pth")
    assert read(out / "checkpoint-last.pth")["progress"]["updates"] == 5


def test_stop_after_the_last_update_loses_nothing(lib: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The run may end as finished or as stopped."""
    last = tmp_path / "checkpoint-last.pth"
    with stop_after(UPDATES), suppress(SystemExit):
        run_main(lib, tmp_path, *SEVEN)
    assert read(last)["progress"]["updates"] == UPDATES
    if read(last)["progress"]["epoch"] < 2:
        run_main(lib, tmp_path, *SEVEN, "--resume", last)
    assert_equal_training(last, uninterrupted / "checkpoint-last.pth")
    assert log_of(tmp_path) == log_of(uninterrupted)


# Refused resumes


@pytest.mark.parametrize(
    ("flag", "value", "other"),
    [
        ("--batch_size", "1", "2"),
        ("--accum_iter", "3", "2"),
        ("--seed", "0", "1"),
        ("--val_fraction", "0.0", "0.3"),
    ],
)
@pytest.mark.parametrize("updates", [1, 4])
def test_resume_with_other_flags_is_refused(
    lib: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    other: str,
    updates: int,
) -> None:
    written = uninterrupted / f"after-{updates}.pth"
    with pytest.raises(SystemExit) as stop:
        run_main(lib, tmp_path, *SEVEN, flag, other, "--resume", written)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {written} was written with {flag} {value}, not {other}. Resume with the flags" in line
    assert not (tmp_path / "log.txt").exists()


def test_resume_may_change_epochs_and_learning_rate(lib: Path, uninterrupted: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "3", "--lr", "0.02", "--resume", str(uninterrupted / "after-4.pth")]
    assert [entry["updates"] for entry in log_of(run_main(lib, tmp_path, *SEVEN, *flags))] == [6, 9]


@pytest.mark.parametrize("flags", [["--epochs", "1"], ["--max_steps", "3"]])
def test_resume_of_a_finished_training_is_refused(
    lib: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lib, tmp_path, *SEVEN, *flags, "--resume", uninterrupted / "checkpoint-0.pth")
    assert stop.value.code == 2
    assert "Nothing is left to train after 1 epochs and 3 updates" in capsys.readouterr().err.splitlines()[-1]


def test_checkpoint_of_the_original_resumes_after_its_epoch(lib: Path, uninterrupted: Path, tmp_path: Path) -> None:
    original = read(uninterrupted / "checkpoint-0.pth")
    original["args"] = argparse.Namespace(batch_size=99)
    del original["progress"], original["rng"]
    torch.save(original, tmp_path / "checkpoint-0.pth")
    out = run_main(lib, tmp_path / "out", *SEVEN, "--resume", tmp_path / "checkpoint-0.pth")
    ours, known = read(out / "checkpoint-1.pth"), read(uninterrupted / "checkpoint-1.pth")
    assert all(torch.equal(value, ours["model"][name]) for name, value in known["model"].items())
    assert [entry["epoch"] for entry in log_of(out)] == [1]


# Signals to real processes

LONG = [*SMALL, "--batch_size", "1", "--accum_iter", "1", "--epochs", "3", "--save_steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("many"), 60)


@pytest.fixture(scope="module")
def long_run(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_main(many, tmp_path_factory.mktemp("uninterrupted"), base=LONG)


def interrupt(process: "subprocess.Popen[str]", written: Path, number: signal.Signals) -> None:
    """Send a signal as soon as the first checkpoint exists."""
    deadline = time.monotonic() + 60
    while not written.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_signal_within_an_epoch_loses_nothing(
    many: Path, long_run: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    last = tmp_path / "checkpoint-last.pth"
    workers = ["--num_workers", "1"] if number == signal.SIGKILL else []
    process = launch("fusion_pretrain.py", *LONG, *workers, "--data_path", many, "--output_dir", tmp_path)
    interrupt(process, last, number)
    (stderr,) = finish(process, code=code)
    progress = read(last)["progress"]
    assert progress["epoch"] < 3
    assert progress["batch"] not in (0, 60), "the epoch ended before the signal"
    if code == 130:
        assert f"Stopped. Continue with --resume {last}" in stderr
        assert "Traceback" not in stderr
    run_main(many, tmp_path, "--resume", last, base=LONG)
    assert_equal_training(last, long_run / "checkpoint-last.pth")
    assert log_of(tmp_path) == log_of(long_run)

"""Preprocessing on full disks and in read-only folders, and its workers when the main process is killed."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import tifffile
from cleaning_runs import ALL, ROOT, config_for, contents, run_script, write_dataset
from PIL import Image

from utils.cleaning import journal, scan_processing
from utils.cleaning.journal import FileRecord, Journal, Record, Scan
from utils.errors import InputError, problem_of
from utils.preprocessing import preprocess


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "parts")


# Disks and folders


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of 340 kB, with room for the originals and two of three cleaned scans."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=340k", "tmpfs", disk]
    if os.getuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_full_disk_loses_nothing_and_the_next_run_continues(small_disk: Path, tmp_path: Path) -> None:
    root = write_dataset(small_disk / "parts")
    preprocess(config_for(root, tmp_path / "expected"))
    original, expected = contents(root), contents(tmp_path / "expected")
    result = run_script("preprocessing", root, "--workers", 2)
    assert result.returncode in (1, 2)  # 2 if no journal line can be written
    assert "). Free disk space and run the same command again." in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    found = contents(root)
    assert all(found[name] in (original[name], expected[name]) for name in original)
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert run_script("preprocessing", root, "--workers", 2).returncode == 0
    assert contents(root) == expected


def test_disk_without_room_for_the_manifest_is_refused_at_the_start(small_disk: Path, tmp_path: Path) -> None:
    root = write_dataset(small_disk / "parts")
    preprocess(config_for(root, tmp_path / "expected"))
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    before = contents(root)
    result = run_script("preprocessing", root, "--workers", 1)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert f"{root}/preprocessing.json cannot be written (No space left on device). Free disk space" in result.stderr
    assert contents(root) == before
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert run_script("preprocessing", root, "--workers", 1).returncode == 0
    assert contents(root) == contents(tmp_path / "expected")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, partly: bool = False) -> None:
    """Let the n-th call of a function find the disk full, with `partly` after it has written."""
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def maybe(*args: object, **kwargs: object) -> object:
        if next(calls) != call:
            return function(*args, **kwargs)
        if partly:
            function(*args, **kwargs)
        return no_space()

    monkeypatch.setattr(owner, name, maybe)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(
    "owner, function, call, file",
    [
        (tifffile, "imwrite", 1, "bagel/test/hole/xyz/000.tiff"),
        (Image.Image, "save", 2, "bagel/test/hole/gt/000.png"),
        (scan_processing.os, "fsync", 3, "bagel/test/hole/rgb/000.png"),
    ],
)
def test_failed_write_fails_one_scan(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    function: str,
    call: int,
    file: str,
    partly: bool,
) -> None:
    """Calls are counted for the first scan; the first fsync is of the manifest, the second of the cloud."""
    preprocess(config_for(dataset, tmp_path / "expected"))
    original, expected = contents(dataset), contents(tmp_path / "expected")
    with monkeypatch.context() as patch:
        fail_once(patch, owner, function, call, partly)
        summary = preprocess(config_for(dataset))
    reason = "cannot be written (No space left on device). Free disk space and run the same command again."
    failed = {name: text.replace(".preprocessing ", " ") for name, text in summary.failed.items()}
    assert (summary.done, failed) == (ALL[1:], {ALL[0]: f"{dataset / file} {reason}"})
    found = contents(dataset)
    assert found.keys() == expected.keys()
    assert all(found[name] == original[name] for name in original if "hole" in name)
    summary = preprocess(config_for(dataset))
    assert (summary.done, summary.skipped) == (ALL[:1], ALL[1:])
    assert contents(dataset) == expected


@pytest.mark.parametrize("damage", ["one byte", "cut short"])
@pytest.mark.parametrize("file", ["bagel/test/hole/xyz/000.tiff", "bagel/test/hole/rgb/000.png"])
def test_a_file_that_reads_back_differently_does_not_replace_its_original(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: str
) -> None:
    before, fsync = contents(dataset), os.fsync

    def damage_and_flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == dataset / f"{file}.preprocessing":
            data = bytearray(path.read_bytes())
            data[len(data.rstrip(b"\0")) - 20] ^= 1  # in the last pixels that are not 0
            path.write_bytes(data[:-5] if damage == "cut short" else data)
        fsync(descriptor)

    monkeypatch.setattr(scan_processing.os, "fsync", damage_and_flush)
    summary = preprocess(config_for(dataset))
    reason = f"The new {dataset / file} reads back differently from what was written. Check the disk and run"
    assert (summary.done, [*summary.failed]) == (ALL[1:], ALL[:1])
    assert summary.failed[ALL[0]].startswith(reason)
    after = contents(dataset)
    assert {name for name in before if "hole" in name} == {name for name in after if "hole" in name}
    assert all(after[name] == before[name] for name in before if "hole" in name)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("call, file", [(5, "preprocessing.journal"), (12, "preprocessing.json")])
def test_failed_journal_write_stops_the_run_and_the_next_continues(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, file: str, partly: bool
) -> None:
    """Calls of fsync: the manifest, four for the first scan, three for each other scan, the manifest."""
    preprocess(config_for(dataset, tmp_path / "expected"))
    with monkeypatch.context() as patch:
        fail_once(patch, journal.os, "fsync", call, partly)
        with pytest.raises(InputError, match=f"{file} cannot be written .* Free disk space and run the same command"):
            preprocess(config_for(dataset))
    assert (dataset / "preprocessing.journal").is_file()
    summary = preprocess(config_for(dataset))
    assert sorted(summary.done + summary.skipped) == ALL
    assert contents(dataset) == contents(tmp_path / "expected")


def test_journal_line_truncated_by_a_full_disk_is_ignored(dataset: Path, tmp_path: Path) -> None:
    preprocess(config_for(dataset, tmp_path / "expected"))
    output, limits = Journal(dataset, config_for(dataset).journal().settings), resource.getrlimit(resource.RLIMIT_FSIZE)
    output.save()
    record = FileRecord("0" * 64, "1" * 64, 1, 1, ())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match=r"preprocessing.journal cannot be written \(File too large\)"):
            output.commit(Scan(ALL[0], {}), {"xyz": record})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (dataset / "preprocessing.journal").stat().st_size == 100
    assert preprocess(config_for(dataset)).done == ALL
    assert contents(dataset) == contents(tmp_path / "expected")


def test_failed_rename_stops_the_run_and_the_next_continues(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(config_for(dataset, tmp_path / "expected"))
    with monkeypatch.context() as patch:
        fail_once(patch, Path, "replace", 6)  # the manifest, three files written, xyz in place, rgb in place
        with pytest.raises(InputError, match="Free disk space and run the same command again"):
            preprocess(config_for(dataset))
    assert preprocess(config_for(dataset)).done == ALL[1:]
    assert contents(dataset) == contents(tmp_path / "expected")


UNPRIVILEGED = """
import os, sys
import scipy.spatial
from PIL import Image
from utils.preprocessing import main
Image.preinit()
if os.getuid() == 0:  # after the imports, because only root may be able to read the checkout
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.argv[0] = "preprocessing.py"
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "locked, output, message",
    [
        (None, "parts", ""),
        (None, "new/out", ""),
        ("parts", "parts", "{locked}/preprocessing.json cannot be written (Permission denied). Allow access to it"),
        ("out", "out", "{locked}/preprocessing.json cannot be written (Permission denied). Allow access to it"),
        (
            "above",
            "above/out",
            "{locked}/out cannot be made or written (Permission denied). Choose another output folder",
        ),
    ],
)
def test_read_only_folder_is_reported_in_one_line(locked: str | None, output: str, message: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folders
        root = Path(folder)
        write_dataset(root / "parts")
        for name in ("out", "above"):
            (root / name).mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        before = contents(root)
        if locked:
            (root / locked).chmod(0o555)
        command = [sys.executable, "-c", UNPRIVILEGED, str(root / "parts"), "--output_dir", str(root / output)]
        result = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
        if locked:
            (root / locked).chmod(0o777)
            assert (result.returncode, result.stdout) == (2, "")
            expected = message.format(locked=root / locked)
            assert result.stderr.startswith(f"preprocessing.py: error: {expected}")
            assert result.stderr.count("\n") == 1
            assert contents(root) == before
        else:
            assert (result.returncode, "done 3" in result.stdout) == (0, True), result.stderr


# Killed worker or main process


def kill_own_process(scan: Scan) -> Record:
    """Finish the scans a, b and c; wait in d until e kills its worker."""
    if scan.name == "e":
        os.kill(os.getpid(), signal.SIGKILL)
    if scan.name == "d":
        time.sleep(60)
    return {}


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence() -> None:
    outcomes, scans = [], [Scan(name, {}) for name in "abcdefgh"]
    with pytest.raises(BrokenProcessPool) as caught:
        outcomes.extend(scan_processing.process_all(scans, kill_own_process, workers=2))
    assert str(problem_of(caught.value)).startswith("A worker process was killed, perhaps for lack of memory.")
    assert sorted(scan.name for scan, _ in outcomes) == ["a", "b", "c"]


def test_name_too_long_for_temporary_files_fails_one_scan_in_a_dry_run_too(dataset: Path) -> None:
    for path in dataset.glob("bagel/train/good/*/000.*"):
        path.rename(path.with_stem("0" * 249))
    predicted = preprocess(config_for(dataset, dry_run=True))
    assert preprocess(config_for(dataset)) == predicted
    assert len(predicted.done) == 2
    assert list(predicted.failed.values()) == ["Its name has more than 220 bytes. Rename its files."]


@pytest.mark.parametrize("flag", ["--dry_run", "--keep_rgb"])
def test_closed_output_pipe_ends_without_a_traceback(dataset: Path, flag: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "utils" / "preprocessing.py", dataset, "--workers", "1", flag]
    result = subprocess.run(list(map(str, command)), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 141
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
    assert preprocess(config_for(dataset, keep_rgb=True)).skipped == ([] if flag == "--dry_run" else ALL)


def children(process: int) -> list[int]:
    """Running child processes of a process, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # the process has ended
            continue
        if int(parent) == process and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_main_process(dataset: Path, tmp_path: Path) -> None:
    folder = dataset / "bagel" / "train" / "good"
    for number in range(2, 60):
        for name in ("xyz/000.tiff", "rgb/000.png"):
            shutil.copy(folder / name, folder / name.replace("000", f"{number:03d}"))
    command = [sys.executable, ROOT / "utils" / "preprocessing.py", dataset, "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = dataset / "preprocessing.journal"
    while process.poll() is None and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.01)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
    summary = preprocess(config_for(dataset))
    assert summary.skipped and not summary.failed
    assert not list(dataset.rglob("*.preprocessing"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_ctrl_c_while_workers_start_is_one_sentence(dataset: Path) -> None:
    command = [sys.executable, str(ROOT / "utils" / "preprocessing.py"), str(dataset), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(children(process.pid)) < 3 and process.poll() is None:  # two workers and the resource tracker
        time.sleep(0.01)
    time.sleep(0.2)  # they import modules now
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("preprocessing.py: interrupted. Run the same command to continue.\n")
    assert "Traceback" not in stderr

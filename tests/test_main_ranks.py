"""main.py in several processes, as torchrun starts it: the results of one, errors told once, and runs gone on with."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from main_runs import (
    METRICS,
    RGB_DIM,
    SIDE,
    SMALL,
    TABLES,
    XYZ_DIM,
    call,
    files_below,
    link_files,
    no_download,  # noqa: F401 (a fixture)
    printed,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    surface,
    table_rows,
    write_cloud,
    write_image,
)
from PIL import Image
from report_pages import read_page, samples_of
from safetensors.torch import load_file
from tiny_networks import one_thread  # noqa: F401 (a fixture, of the module's runs too)

from feature_extractors.persistence import load_detector
from models.feature_fusion import FeatureFusion
from runner import class_run

pytestmark = pytest.mark.slow

# Scans of each class: training, validation, good and defective test scans. Pictures go through their network by four,
# and four are never divided: of bagels all processes have some, of cookies and dowels some have none.
SCANS = {"dowel": (1, 1, 1, 1), "cookie": (5, 0, 4, 2), "bagel": (9, 2, 4, 4)}
METHODS = ("DINO", "DINO+Point_MAE+Fusion")
DECISIONS = ("f1", "f1_threshold", "precision", "recall", "false_alarm_rate")
COLLECTIVE_TIMEOUT = 120  # seconds for a run that takes ten; one that hangs would wait for hours
NO_MEMORY = ["--memory_budget", 1e-6]  # GB, so that training features go to the disk
# By which flags how many processes give the results of one.
WAYS: dict[str, tuple[int, list[object]]] = {
    "2, samples": (2, ["--parallel", "samples"]),
    "3, samples": (3, ["--parallel", "samples"]),
    "2, classes": (2, ["--parallel", "classes"]),
    "3, classes, nothing to resume": (3, ["--parallel", "classes", "--resume"]),
}


class Left(NamedTuple):
    """What a run left."""

    folder: Path  # holds out, detectors and patches
    stdout: str
    stderr: str = ""

    def entries(self, method: str) -> dict[str, Any]:
        return results_of(self.folder / "out" / method)["classes"]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def write_scan(folder: Path, stem: str, seed: int, defective: bool) -> None:
    """A bumpy surface below a border without measurements; a defect is a dent in it and a bright spot."""
    xyz, spot = surface(seed), (slice(24, 40), slice(20 + seed % 8, 36 + seed % 8))
    photo = np.random.default_rng(seed).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    if defective:
        xyz[(*spot, 2)] += 0.004
        photo[spot] = 255
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[spot] = 255
        write_image(folder / "gt" / f"{stem}.png", mask)
    xyz[: SIDE // 8] = 0
    write_cloud(folder / "xyz" / f"{stem}.tiff", xyz)
    write_image(folder / "rgb" / f"{stem}.png", photo)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of SCANS."""
    root = tmp_path_factory.mktemp("data")
    for number, (name, counts) in enumerate(SCANS.items()):
        for kind, count in zip(("train/good", "validation/good", "test/good", "test/hole"), counts, strict=True):
            for i in range(count):
                seed = 1000 * number + 100 * len(kind) + i
                write_scan(root / name / kind, f"{i:03d}", seed, defective=kind == "test/hole")
    return root


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of every run that fits, all in the order of SCANS."""
    uff = tmp_path_factory.mktemp("uff") / "uff.pth"
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, uff)
    flags = ["--method_name", *METHODS, "--use_uff", "--fusion_module_path", uff, "--random_state", 0, *SMALL]
    return [*flags, "--f_coreset", 0.06, "--dataset_path", data, "--classes", *SCANS]


def outputs(folder: Path) -> list[object]:
    """The flags for everything that a run can leave."""
    flags = ["--output_dir", folder / "out", "--report_parts", 3, "--save_detector", folder / "detectors"]
    return [*flags, "--save_preds", METHODS[1], "--save_feature", "--save_feature_path", folder / "patches"]


def launch(processes: int, *flags: object, meeting: Sequence[str] = ("--standalone",)) -> "subprocess.Popen[str]":
    """The script under its launcher, on a thread each and without a network."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "main.py"), *map(str, flags)],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What a run said on stdout and stderr, once it has ended."""
    try:
        return process.communicate(timeout=COLLECTIVE_TIMEOUT)
    finally:
        process.kill()  # one that hangs: its workers end with it


def run_ranks(processes: int, *flags: object) -> tuple[str, str]:
    process = launch(processes, *flags)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    return stdout, stderr


def refusal_of_ranks(processes: int, *flags: object) -> str:
    """The sentence that a run ends with, before it has a result."""
    process = launch(processes, *flags)
    stdout, stderr = finish(process)
    assert process.returncode not in (0, None), stderr
    assert stdout == ""
    return sentence_of_ranks(stderr)


def sentence_of_ranks(stderr: str) -> str:
    """The error of one process; of the others the launcher or the backend may report that they have lost it."""
    sentences = [line.partition("main.py: error: ")[2] for line in stderr.splitlines() if "main.py: error: " in line]
    assert len(sentences) == 1, stderr
    return sentences[0]


@pytest.fixture(scope="module")
def alone(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return Left(folder, printed(*base, *outputs(folder)))


class Shared(NamedTuple):
    """A run of several processes."""

    way: str
    left: Left


@pytest.fixture(scope="module", params=WAYS)
def several(request: pytest.FixtureRequest, base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("several")
    processes, flags = WAYS[request.param]
    return Shared(request.param, Left(folder, *run_ranks(processes, *base, *flags, *outputs(folder))))


def assert_same_classes(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Entries of results.json are equal, in the order of the classes, but for the rounding of sums."""
    assert list(ours) == list(expected)
    for name, known in expected.items():
        entry = ours[name]
        assert set(entry) == set(known)
        for key in ("path", "label"):
            assert [sample[key] for sample in entry["samples"]] == [sample[key] for sample in known["samples"]]
        for key, tolerance in (("score", {"rel": 1e-5}), ("normalised", {"abs": 1e-4})):
            scores = [sample[key] for sample in known["samples"]]
            assert [sample[key] for sample in entry["samples"]] == pytest.approx(scores, **tolerance), (name, key)
        for key, value in known["threshold"].items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            assert entry["threshold"][key] == close, (name, key)
        for key in (*METRICS, *DECISIONS):
            assert entry[key] == pytest.approx(known[key], rel=1e-5), (name, key)
        assert entry["au_pro_exact"] == pytest.approx(known["au_pro_exact"], rel=1e-5), name
        assert list(entry["seconds"]) == list(known["seconds"])


# The same as one process


def test_the_run_of_one_process_tells_parts_apart(alone: Left) -> None:
    """Else equal results would say little."""
    for method in METHODS:
        for name, entry in alone.entries(method).items():
            scores = [sample["score"] for sample in entry["samples"]]
            assert len(set(scores)) == len(scores) == sum(SCANS[name][2:])
            assert min(scores) > 0
    assert alone.entries("DINO")["bagel"]["samples"] != alone.entries(METHODS[1])["bagel"]["samples"]
    sources = {name: entry["threshold"]["source"] for name, entry in alone.entries("DINO").items()}
    assert sources == {"dowel": "validation", "cookie": "training", "bagel": "validation"}


def test_several_processes_have_the_results_of_one(several: Shared, alone: Left) -> None:
    for method in METHODS:
        assert_same_classes(several.left.entries(method), alone.entries(method))
        ours, expected = (results_of(left.folder / "out" / method) for left in (several.left, alone))
        assert list(ours) == list(expected)
        assert ours["mean"].pop("au_pro_exact") == pytest.approx(expected["mean"].pop("au_pro_exact"), rel=1e-5)
        assert ours["mean"] == pytest.approx(expected["mean"], rel=1e-5)
        own = ("output_dir", "save_detector", "save_feature_path", "parallel", "memory_budget", "resume")
        assert {key: value for key, value in ours["args"].items() if key not in own} == {
            key: value for key, value in expected["args"].items() if key not in own
        }


def test_they_leave_the_same_files(several: Shared, alone: Left) -> None:
    assert files_below(several.left.folder) == files_below(alone.folder)
    assert all_files_are_whole(several.left.folder)


def test_each_result_is_printed_once(several: Shared, alone: Left) -> None:
    """By the first process, with figures, and then the tables; those of one class at a time also in their order."""
    lines, expected = ([line for line in left.stdout.splitlines() if line] for left in (several.left, alone))
    assert lines[-1] == f"written to {several.left.folder / 'out'}/"
    results = len(SCANS) * len(METHODS)
    assert [line.split(":")[0] for line in expected[:results]] == [f"{name}, {m}" for name in SCANS for m in METHODS]
    assert sorted(lines[:results]) == sorted(expected[:results])
    assert lines[results:-1] == expected[results:-1]
    if "classes" not in several.way:
        assert lines[:results] == expected[:results]


def test_tables_have_the_classes_in_the_order_of_one_process(several: Shared, alone: Left) -> None:
    for name in TABLES:
        rows = table_rows(several.left.folder / "out", name)
        assert rows[0] == ["Method", *SCANS, "Mean"]
        assert rows == table_rows(alone.folder / "out", name)


def test_the_log_says_how_the_classes_are_divided(several: Shared) -> None:
    processes, _ = WAYS[several.way]
    at_once = f"{processes} classes" if "classes" in several.way else "1 class"
    assert several.left.stderr.count(f"{processes} processes, {at_once} at a time\n") == 1
    assert "Traceback" not in several.left.stderr


def test_what_other_processes_warn_of_is_said_once(several: Shared) -> None:
    """Cookies have no validation scans, and all classes too few for the false-alarm rate that is asked for."""
    assert several.left.stderr.count("no validation/good, so thresholds") == 1
    count = several.left.stderr.count("a false-alarm rate of 0.01 needs 99")  # by each method, or of all together
    assert len(SCANS) <= count <= len(SCANS) * len(METHODS)


def test_anomaly_maps_are_those_of_one_process(several: Shared, alone: Left) -> None:
    maps = [path for path in files_below(alone.folder) if "/anomaly_maps/" in path]
    assert len(maps) == sum(good + defective for _, _, good, defective in SCANS.values())
    for path in maps:
        ours, expected = (tifffile.imread(left.folder / path) for left in (several.left, alone))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.ptp(expected), err_msg=path)


def test_reports_show_the_same_parts(several: Shared, alone: Left) -> None:
    for method in METHODS:
        pages = [(left.folder / "out" / method / "report.html").read_text() for left in (several.left, alone)]
        assert_same_page(*pages)


def test_saved_detectors_have_the_same_banks(several: Shared, alone: Left) -> None:
    for method in METHODS:
        for name in SCANS:
            ours, expected = (
                load_file(left.folder / "detectors" / method / name / "state.safetensors")
                for left in (several.left, alone)
            )
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                tolerance = 1e-5 if key.startswith("decision_fusion") else 1e-6
                torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=1e-6, msg=f"{method} {name} {key}")


def test_saved_detectors_load(several: Shared, alone: Left) -> None:
    for name in SCANS:
        ours, expected = (
            load_detector(left.folder / "detectors" / METHODS[-1] / name, "cpu") for left in (several.left, alone)
        )
        assert list(ours.banks) == ["xyz", "rgb", "fusion"]
        assert [len(bank) for bank in ours.banks.values()] == [len(bank) for bank in expected.banks.values()]
        assert ours.thresholds is not None


def test_patch_files_are_those_of_one_process(several: Shared, alone: Left) -> None:
    files = files_below(alone.folder / "patches")
    assert files == sorted(f"{name}/{i:03d}.safetensors" for name, (train, *_) in SCANS.items() for i in range(train))
    for file in files:
        ours, expected = (load_file(left.folder / "patches" / file) for left in (several.left, alone))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], value) for key, value in expected.items()), file


def test_the_seconds_of_a_stage_are_those_of_who_worked(several: Shared, alone: Left) -> None:
    """The first process reads no dowel where the samples are shared; the time that another one takes is told too."""
    for method in METHODS:
        for name, known in alone.entries(method).items():
            entry = several.left.entries(method)[name]
            idle = [stage for stage, spent in known["seconds"].items() if spent > 0 and entry["seconds"][stage] == 0]
            assert idle == [], (method, name)
            assert entry["latency"]["p50"] * len(entry["samples"]) < 3 * (
                entry["seconds"]["extract"] + entry["seconds"]["score"]
            )


def test_processes_share_the_evaluation_of_saved_detectors(alone: Left, data: Path, tmp_path: Path) -> None:
    flags = ["--dataset_path", data, "--classes", *SCANS, "--load_detector", alone.folder / "detectors"]
    stdout, stderr = run_ranks(2, *flags, "--output_dir", tmp_path / "out")
    # Bagels have as many test parts as cookies and dowels together, so that it ends sooner class by class.
    assert stderr.count("2 processes, 2 classes at a time\n") == 1
    for method in METHODS:
        loaded = results_of(tmp_path / "out" / method)["classes"]
        assert_same_classes(loaded, fitted_before(alone.entries(method)))
        assert all(entry["seconds"]["coreset"] == 0 for entry in loaded.values())
    assert sorted(stdout.splitlines()[:-1]) == sorted(alone.stdout.splitlines()[:-1])


def fitted_before(entries: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation of saved detectors says: fitting took no time."""
    stages = dict.fromkeys(("coreset", "fuse", "calibrate"), 0.0)
    return {name: entry | {"seconds": entry["seconds"] | stages} for name, entry in entries.items()}


def test_backbones_are_listed_once() -> None:
    stdout, _ = run_ranks(2, "--list_backbones")
    assert len([line for line in stdout.splitlines() if line.startswith("name ")]) == 1
    assert stdout.count("Any other timm vision transformer works") == 1
    assert len(re.findall("^vit_base_patch8_224_dino ", stdout, re.MULTILINE)) == 1


# Errors


def test_a_missing_dataset_is_told_once(tmp_path: Path) -> None:
    flags = [*SMALL, "--output_dir", tmp_path / "out", "--dataset_path", tmp_path / "nowhere"]
    message = refusal_of_ranks(2, *flags)
    assert message.startswith(f"{tmp_path / 'nowhere'} is not a folder. Download MVTec 3D-AD")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parallel", "both"], "argument --parallel: invalid choice: 'both'"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--device", "abacus"], "--device 'abacus' is unknown. Give auto, cpu, cuda"),
    ],
)
def test_a_fault_of_the_command_line_is_told_by_the_first_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    """Before the processes meet: each of them, as the launcher would start it."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            call(*flags)
        assert stopped.value.code not in (0, None)
        assert (told in capsys.readouterr().err) == (rank == "0")


def changed_processes(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python process begins with a program."""
    (folder / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_process_without_a_gpu_of_its_own_says_so(
    base: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes on a machine of one: the first of those that have none speaks."""
    program = """
import os
if "RANK" in os.environ:
    import time, torch
    torch.cuda.device_count = lambda: 1
    if os.environ["RANK"] == "0":  # which would go on
        time.sleep(600)
"""
    changed_processes(tmp_path, program, monkeypatch)
    message = refusal_of_ranks(3, *base, "--device", "cuda", "--output_dir", tmp_path / "out")
    assert message.startswith("There is no cuda:1, only 1 GPU. Give --device cpu, or start no more processes")


def spoil_cloud(data: Path) -> Path:
    """Without a valid point, which only shows when it is read."""
    path = data / "test/good/xyz/000.tiff"
    path.unlink()
    write_cloud(path, np.zeros((SIDE, SIDE, 3), np.float32))
    return path


def spoil_photo(data: Path) -> Path:
    """Header and end are sound, so that only decoding finds it."""
    path = data / "test/hole/rgb/002.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.unlink()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("parallel", "name", "spoil"), [("samples", "bagel", spoil_photo), ("classes", "cookie", spoil_cloud)]
)
def test_a_bad_scan_of_the_second_process_ends_the_run(
    base: list[object], data: Path, tmp_path: Path, parallel: str, name: str, spoil: Callable[[Path], Path]
) -> None:
    """It reads the last of ten test samples, or all cookies: bagels alone take as long."""
    bad = spoil(link_files(data / name, tmp_path / "data" / name))
    for other in set(SCANS) - {name}:
        (tmp_path / "data" / other).symlink_to(data / other)
    folder = tmp_path / "left"
    process = launch(2, *base, *outputs(folder), "--dataset_path", tmp_path / "data", "--parallel", parallel)
    _, stderr = finish(process)
    assert process.returncode not in (0, None)
    assert sentence_of_ranks(stderr).startswith(f"{name}: {bad} ")

    assert all_files_are_whole(folder)
    finished = set(SCANS) - {name}
    for method in METHODS:
        out = folder / "out" / method
        kept = {path.stem for path in (out / "classes").glob("[!.]*")}
        assert kept <= finished
        assert "dowel" in kept
        if (out / "results.json").exists():
            assert set(results_of(out)["classes"]) <= finished
        assert not (out / "anomaly_maps" / name).exists()
    assert not [table for table in TABLES if (folder / "out" / table).exists()]


def all_files_are_whole(folder: Path) -> bool:
    """Every file that a reader would take for a result can be read to its end."""
    found = [path for path in sorted(folder.rglob("[!.]*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in found:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".tiff":
            assert tifffile.imread(path).shape == (SIDE, SIDE)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.name in TABLES
            assert table_rows(path.parent, path.name)
    return bool(found)


# Going on


class Stopped(NamedTuple):
    """A run of which a process was killed, once the first class was there."""

    left: Left
    flags: list[object]
    seconds: float  # from then until the launcher had ended
    workers: list[int]


def workers_of(launcher: int) -> list[int]:
    """The processes that a launcher started, by their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{child}/environ").read_bytes())
        if found:
            ranks[int(found[1])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def stop(base: list[object], folder: Path, killed: int, *flags: object) -> Stopped:
    """Kill the process of a rank of two as soon as all has been kept of the first class."""
    flags = (*base, *outputs(folder), *flags)
    process = launch(2, *flags)
    try:
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT
        while not class_files(folder, "dowel"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        workers = workers_of(process.pid)
        begin = time.monotonic()
        os.kill(workers[killed], signal.SIGKILL)
    finally:
        stdout, stderr = finish(process)
    assert process.returncode not in (0, None), stderr
    return Stopped(Left(folder, stdout, stderr), list(flags), time.monotonic() - begin, workers)


def class_files(folder: Path, name: str) -> list[Path]:
    """The files of a class, once all methods have theirs."""
    paths = [folder / "out" / method / "classes" / f"{name}.json" for method in METHODS]
    return paths if all(path.exists() for path in paths) else []


@pytest.fixture(scope="module", params=[("samples", 1), ("classes", 0)], ids=str)
def stopped(request: pytest.FixtureRequest, base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    parallel, killed = request.param
    return stop(base, tmp_path_factory.mktemp("stopped"), killed, "--parallel", parallel)


def test_a_killed_process_ends_the_others(stopped: Stopped) -> None:
    assert len(stopped.workers) == 2
    assert stopped.seconds < 60
    assert not [worker for worker in stopped.workers if Path(f"/proc/{worker}").exists()]


def test_a_killed_process_ends_those_of_other_machines(base: list[object], tmp_path: Path) -> None:
    """Two launchers, each of which knows of its own process alone; the other one works on a class of its own."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=m3dm"]
    machines = [launch(1, *base, *outputs(tmp_path), "--parallel", "classes", meeting=meeting) for _ in range(2)]
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT
    workers: list[list[int]] = [[], []]
    while not (all(workers) and (tmp_path / "out").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        workers = [workers_of(machine.pid) for machine in machines]
    time.sleep(2)  # for them to be at work
    begin = time.monotonic()
    os.kill(workers[1][0], signal.SIGKILL)
    for machine in machines:
        _, stderr = finish(machine)
        assert machine.returncode not in (0, None), stderr
    assert time.monotonic() - begin < 60
    assert not [worker for of_machine in workers for worker in of_machine if Path(f"/proc/{worker}").exists()]


def test_what_a_killed_run_leaves_is_whole(stopped: Stopped) -> None:
    folder = stopped.left.folder
    assert class_files(folder, "dowel")
    assert not class_files(folder, "bagel"), "the machine was so slow that all was done: not what is tested here"
    assert all_files_are_whole(folder)
    assert not list((folder / "out").glob("*.md"))


def test_a_resumed_run_has_the_results_of_an_uninterrupted_one(stopped: Stopped, alone: Left, tmp_path: Path) -> None:
    """What the killed one had finished is not touched; of the rest nothing is left out.

    The run that shared its samples is gone on with by two processes, the other one by a single one.
    """
    processes = 2 if "samples" in stopped.flags else 1
    out = tmp_path / "out"
    shutil.copytree(stopped.left.folder / "out", out)
    kept = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in class_files(tmp_path, "dowel")}
    flags = [*stopped.flags, "--output_dir", out, "--resume"]
    if processes == 1:
        done: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            run_class = class_run.run_class
            patch.setattr(class_run, "run_class", lambda name, *rest: done.append(name) or run_class(name, *rest))
            stdout = printed(*flags)
        assert done[-1] == "bagel"
        assert "dowel" not in done
    else:
        stdout, stderr = run_ranks(processes, *flags)
        assert stderr.count("--resume: dowel finished before") == 1
        assert "main: dowel: 1 training" not in stderr
    assert kept == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept}

    resumed = Left(tmp_path, stdout)
    for method in METHODS:
        assert_same_classes(resumed.entries(method), alone.entries(method))
        pages = [(left.folder / "out" / method / "report.html").read_text() for left in (resumed, alone)]
        assert_same_page(*pages)
        assert {part["path"] for part in samples_of(pages[0]) if part["class"] == "dowel"} == {
            "test/good/000", "test/hole/000",
        }  # fmt: skip
    assert sorted(stdout.splitlines()[:-1]) == sorted(alone.stdout.splitlines()[:-1])
    assert [path for path in files_below(out) if "/." not in path] == files_below(alone.folder / "out")
    for name in TABLES:
        assert table_rows(out, name) == table_rows(alone.folder / "out", name)


def assert_same_page(ours: str, expected: str) -> None:
    """Two reports say the same but for date, command, time, and what rounding does to numbers of the gallery."""
    changing = r"<time .*?</time>|<details>.*?</details>|<section aria-label=\"Time and memory\">.*?</section>"
    numbers = r'<script type="application/json" id="parts">.*?</script>'
    ours_, expected_ = (re.sub(f"{changing}|{numbers}", "", page, flags=re.DOTALL) for page in (ours, expected))
    assert read_page(ours_) == read_page(expected_)
    shown, known = samples_of(ours), samples_of(expected)
    assert [(part["class"], part["path"], part["outcome"]) for part in shown] == [
        (part["class"], part["path"], part["outcome"]) for part in known
    ]
    for part, other in zip(shown, known, strict=True):
        assert part.keys() == other.keys()
        assert part["score"] == pytest.approx(other["score"], rel=1e-5)
        assert part["maps"].keys() == other["maps"].keys()
        assert (part["view"], part["truth"]) == (other["view"], other["truth"])


@pytest.fixture
def whole(alone: Left, tmp_path: Path) -> Path:
    """The output of a finished run, to do with as one likes."""
    shutil.copytree(alone.folder / "out", tmp_path / "out")
    return tmp_path / "out"


def again(base: Sequence[object], alone: Left, out: Path) -> list[object]:
    """The flags that go on with it."""
    return [*base, *outputs(alone.folder), "--output_dir", out, "--resume"]


def assert_nothing_new(out: Path, alone: Left, stdout: str) -> None:
    """A finished run is told again, and has its tables once more."""
    for method in METHODS:
        assert results_of(out / method)["classes"] == alone.entries(method)
    assert stdout.splitlines()[:-1] == alone.stdout.splitlines()[:-1]
    assert stdout.splitlines()[-1] == f"written to {out}/"
    for name in TABLES:
        assert table_rows(out, name) == 2 * table_rows(alone.folder / "out", name)


def test_after_the_last_class_nothing_is_computed(
    base: list[object], alone: Left, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_run, "run_class", lambda name, *_: pytest.fail(f"{name} computed"))
    assert_nothing_new(whole, alone, printed(*again(base, alone, whole)))


def test_after_the_last_class_processes_have_nothing_to_do(base: list[object], alone: Left, whole: Path) -> None:
    stdout, stderr = run_ranks(2, *again(base, alone, whole))
    assert_nothing_new(whole, alone, stdout)
    assert stderr.count(f"--resume: {', '.join(SCANS)} finished before") == 1
    assert not re.search(r"main: \w+: \d+ training", stderr)


def test_going_on_with_other_flags_is_refused(base: list[object], alone: Left, whole: Path) -> None:
    before = {path: (whole / path).read_bytes() for path in files_below(whole)}
    message = refusal_of_ranks(2, *again(base, alone, whole), "--f_coreset", 0.2)
    path = whole / METHODS[0] / "classes/dowel.json"
    assert message.startswith(f"{path} was computed with f_coreset 0.06, now 0.2. Use the same flags, or omit ")
    assert {path: (whole / path).read_bytes() for path in files_below(whole)} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--random_state", 1], "was computed with random_state 0, now 1. "),
        (["--target_fpr", 0.5, "--img_size", 96], f"was computed with img_size {SIDE}, now 96, target_fpr 0.01, now "),
    ],
)
def test_the_flags_that_differ_are_named(
    base: list[object], alone: Left, whole: Path, capsys: pytest.CaptureFixture[str], flags: list[object], told: str
) -> None:
    assert told in refusal(capsys, *again(base, alone, whole), *flags)


def test_other_test_parts_than_before_are_refused(
    base: list[object], data: Path, alone: Left, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = [data / f"dowel/test/good/{kind}" for kind in ("rgb/zzz.png", "xyz/zzz.tiff")]
    try:
        for path in added:
            shutil.copy(next(path.parent.iterdir()), path)
        message = refusal(capsys, *again(base, alone, whole))
    finally:
        for path in added:
            path.unlink(missing_ok=True)
    assert message.startswith(f"{whole / METHODS[0] / 'classes' / 'dowel.json'} was computed from other samples, ")


def test_a_damaged_class_is_refused_and_computed_anew_once_it_is_deleted(
    base: list[object], alone: Left, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole / METHODS[1] / "classes/dowel.json"
    path.write_text(path.read_text()[:-100])
    message = refusal(capsys, *again(base, alone, whole))
    assert message.startswith(f"{path} is damaged (not JSON: ")
    assert message.endswith("Delete it to compute its class again.")
    path.unlink()
    call(*again(base, alone, whole), "--classes", "dowel")
    assert path.exists()
    for method in METHODS:
        found = results_of(whole / method)["classes"]
        assert_same_classes(found, {"dowel": alone.entries(method)["dowel"]})


def test_without_resume_what_was_kept_is_forgotten(base: list[object], alone: Left, whole: Path) -> None:
    """Before the first class is computed: a stopped run leaves none of an older one to go on with."""

    def stop_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_run, "run_class", stop_at_once)
        with pytest.raises(SystemExit) as stopped:
            call(*again(base, alone, whole)[:-1], "--classes", "cookie", "dowel")
    assert stopped.value.code == 130
    for method in METHODS:
        assert [path.name for path in (whole / method / "classes").iterdir()] == ["bagel.json"]


@pytest.mark.parametrize("changed", ["uff", "detector"])
def test_other_weights_than_before_are_noticed(
    base: list[object], data: Path, changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the UFF, at the same path, or of the detector that is loaded."""
    out, detectors = tmp_path / "out", tmp_path / "detectors"
    place = base.index("--fusion_module_path") + 1
    torch.manual_seed(1)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, tmp_path / "uff.pth")
    fitting = [*base[:place], tmp_path / "uff.pth", *base[place + 1 :], "--classes", "cookie"]
    if changed == "detector":
        call(*fitting, "--output_dir", tmp_path / "fit", "--save_detector", detectors)
        run = ["--load_detector", detectors, "--dataset_path", data, "--classes", "cookie", "--output_dir", out]
        call(*run)
        call(*fitting, "--max_sample", 3, "--output_dir", tmp_path / "fit", "--save_detector", detectors)
    else:
        run = [*fitting, "--output_dir", out]
        call(*run)
        torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, tmp_path / "uff.pth")
    assert "other samples, weights or detectors" in refusal(capsys, *run, "--resume")

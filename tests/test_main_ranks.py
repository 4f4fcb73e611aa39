"""main.py in several processes under torchrun: results of a single process, one error message, and resumed runs."""

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

# Samples of each class: training, validation, good test, defective test. Images are extracted in batches of four,
# and a batch is never split: all processes have bagels, but some have no cookies or dowels.
SAMPLES = {"dowel": (1, 1, 1, 1), "cookie": (5, 0, 4, 2), "bagel": (9, 2, 4, 4)}
METHODS = ("DINO", "DINO+Point_MAE+Fusion")
DECISIONS = ("f1", "f1_threshold", "precision", "recall", "false_alarm_rate")
COLLECTIVE_TIMEOUT = 120  # seconds; a run takes about ten
NO_MEMORY = ["--memory_budget", 1e-6]  # GB, so that training features go to the disk
# Processes and flags of each way to share a run.
WAYS: dict[str, tuple[int, list[object]]] = {
    "2, samples": (2, ["--parallel", "samples"]),
    "3, samples": (3, ["--parallel", "samples"]),
    "2, classes": (2, ["--parallel", "classes"]),
    "3, classes, nothing to resume": (3, ["--parallel", "classes", "--resume"]),
}


class Output(NamedTuple):
    """Output of a run."""

    folder: Path  # contains out, detectors and patches
    stdout: str
    stderr: str = ""

    def entries(self, method: str) -> dict[str, Any]:
        return results_of(self.folder / "out" / method)["classes"]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def write_sample(folder: Path, stem: str, seed: int, defective: bool) -> None:
    """Write a sample: a bumpy surface below an empty border; a defect is a dent in it and a bright spot."""
    xyz, spot = surface(seed), (slice(24, 40), slice(20 + seed % 8, 36 + seed % 8))
    rgb = np.random.default_rng(seed).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    if defective:
        xyz[(*spot, 2)] += 0.004
        rgb[spot] = 255
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[spot] = 255
        write_image(folder / "gt" / f"{stem}.png", mask)
    xyz[: SIDE // 8] = 0
    write_cloud(folder / "xyz" / f"{stem}.tiff", xyz)
    write_image(folder / "rgb" / f"{stem}.png", rgb)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset with the classes of SAMPLES."""
    root = tmp_path_factory.mktemp("data")
    for number, (name, counts) in enumerate(SAMPLES.items()):
        for kind, count in zip(("train/good", "validation/good", "test/good", "test/hole"), counts, strict=True):
            for i in range(count):
                seed = 1000 * number + 100 * len(kind) + i
                write_sample(root / name / kind, f"{i:03d}", seed, defective=kind == "test/hole")
    return root


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of every fitting run, with the classes in the order of SAMPLES."""
    uff = tmp_path_factory.mktemp("uff") / "uff.pth"
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, uff)
    flags = ["--method_name", *METHODS, "--use_uff", "--fusion_module_path", uff, "--seeds", 0, *SMALL]
    return [*flags, "--f_coreset", 0.06, "--dataset_path", data, "--classes", *SAMPLES]


def outputs(folder: Path) -> list[object]:
    """Flags that request every output of a run."""
    flags = ["--output_dir", folder / "out", "--report_parts", 3, "--save_detector", folder / "detectors"]
    return [*flags, "--save_preds", METHODS[1], "--save_feature", "--save_feature_path", folder / "patches"]


def launch(processes: int, *flags: object, meeting: Sequence[str] = ("--standalone",)) -> "subprocess.Popen[str]":
    """Start main.py under torchrun, one thread per process and no network."""
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
    """Wait for the end of a run; return its stdout and stderr."""
    try:
        return process.communicate(timeout=COLLECTIVE_TIMEOUT)
    finally:
        process.kill()  # if it hangs; its workers end with it


def run_ranks(processes: int, *flags: object) -> tuple[str, str]:
    process = launch(processes, *flags)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    return stdout, stderr


def refusal_of_ranks(processes: int, *flags: object) -> str:
    """Error message of a run that fails before it has a result."""
    process = launch(processes, *flags)
    stdout, stderr = finish(process)
    assert process.returncode not in (0, None), stderr
    assert stdout == ""
    return error_of_ranks(stderr)


def error_of_ranks(stderr: str) -> str:
    """Error message, printed by one process only; the launcher or the backend may report the loss of the others."""
    messages = [line.partition("main.py: error: ")[2] for line in stderr.splitlines() if "main.py: error: " in line]
    assert len(messages) == 1, stderr
    return messages[0]


@pytest.fixture(scope="module")
def alone(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Output:
    """Output of the run by a single process."""
    folder = tmp_path_factory.mktemp("alone")
    return Output(folder, printed(*base, *outputs(folder)))


class SharedRun(NamedTuple):
    """Output of a run by several processes."""

    way: str
    output: Output


@pytest.fixture(scope="module", params=WAYS)
def shared(request: pytest.FixtureRequest, base: list[object], tmp_path_factory: pytest.TempPathFactory) -> SharedRun:
    folder = tmp_path_factory.mktemp("shared")
    processes, flags = WAYS[request.param]
    return SharedRun(request.param, Output(folder, *run_ranks(processes, *base, *flags, *outputs(folder))))


def assert_same_classes(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Entries of results.json are equal up to rounding, in the order of the classes."""
    assert list(ours) == list(expected)
    for name, known in expected.items():
        entry = ours[name]
        assert set(entry) == set(known)
        for key in ("path", "label"):
            assert [sample[key] for sample in entry["samples"]] == [sample[key] for sample in known["samples"]]
        for key, tolerance in (("score", {"rel": 1e-5}), ("severity", {"abs": 1e-3})):
            scores = [sample[key] for sample in known["samples"]]
            assert [sample[key] for sample in entry["samples"]] == pytest.approx(scores, **tolerance), (name, key)
        for key, value in known["threshold"].items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            assert entry["threshold"][key] == close, (name, key)
        for key in (*METRICS, *DECISIONS):
            assert entry[key] == pytest.approx(known[key], rel=1e-5), (name, key)
        assert entry["au_pro_exact"] == pytest.approx(known["au_pro_exact"], rel=1e-5), name
        assert list(entry["seconds"]) == list(known["seconds"])


# Equal to a single process


def test_a_single_process_separates_the_samples(alone: Output) -> None:
    """Otherwise the comparisons below would prove little."""
    for method in METHODS:
        for name, entry in alone.entries(method).items():
            scores = [sample["score"] for sample in entry["samples"]]
            assert len(set(scores)) == len(scores) == sum(SAMPLES[name][2:])
            assert min(scores) > 0
    assert alone.entries("DINO")["bagel"]["samples"] != alone.entries(METHODS[1])["bagel"]["samples"]
    sources = {name: entry["threshold"]["source"] for name, entry in alone.entries("DINO").items()}
    assert sources == {"dowel": "validation", "cookie": "training", "bagel": "validation"}


def test_results_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    for method in METHODS:
        assert_same_classes(shared.output.entries(method), alone.entries(method))
        ours, expected = (results_of(output.folder / "out" / method) for output in (shared.output, alone))
        assert list(ours) == list(expected)
        assert ours["mean"].pop("au_pro_exact") == pytest.approx(expected["mean"].pop("au_pro_exact"), rel=1e-5)
        assert ours["mean"] == pytest.approx(expected["mean"], rel=1e-5)
        own = ("output_dir", "save_detector", "save_feature_path", "parallel", "memory_budget", "resume")
        assert {key: value for key, value in ours["args"].items() if key not in own} == {
            key: value for key, value in expected["args"].items() if key not in own
        }


def test_few_shot_runs_of_several_seeds_match_a_single_process(data: Path, tmp_path: Path) -> None:
    """Both processes have samples, but only one has those that seed 0 draws."""
    flags = [*SMALL, "--dataset_path", data, "--classes", "bagel", "--method_name", METHODS[1], "--f_coreset", 0.06]
    flags += ["--few_shot", 3, "--seeds", 0, 1, "--report_parts", 0]
    call(*flags, "--output_dir", tmp_path / "one")
    run_ranks(2, *flags, "--output_dir", tmp_path / "two")
    assert files_below(tmp_path / "two") == files_below(tmp_path / "one")
    for seed in (0, 1):
        ours, expected = (results_of(tmp_path / run / f"seed_{seed}")["classes"] for run in ("two", "one"))
        assert ours["bagel"]["train_samples"] == expected["bagel"]["train_samples"]
        assert_same_classes(ours, expected)


def test_output_files_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    assert files_below(shared.output.folder) == files_below(alone.folder)
    assert all_files_are_whole(shared.output.folder)


def test_each_result_is_printed_once(shared: SharedRun, alone: Output) -> None:
    """The first process prints all results, then the tables; only classes that run side by side may change order."""
    lines, expected = ([line for line in output.stdout.splitlines() if line] for output in (shared.output, alone))
    assert lines[-1] == f"written to {shared.output.folder}/out/, detectors to {shared.output.folder}/detectors/"
    results = len(SAMPLES) * len(METHODS)
    assert [line.split(":")[0] for line in expected[:results]] == [f"{name}, {m}" for name in SAMPLES for m in METHODS]
    assert sorted(lines[:results]) == sorted(expected[:results])
    assert lines[results:-1] == expected[results:-1]
    if "classes" not in shared.way:
        assert lines[:results] == expected[:results]


def test_tables_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    for name in TABLES:
        rows = table_rows(shared.output.folder / "out", name)
        assert rows[0] == ["Method", *SAMPLES, "Mean"]
        assert rows == table_rows(alone.folder / "out", name)


def test_the_log_names_processes_and_classes_at_a_time(shared: SharedRun) -> None:
    processes, _ = WAYS[shared.way]
    at_once = f"{processes} classes" if "classes" in shared.way else "1 class"
    assert shared.output.stderr.count(f"{processes} processes, {at_once} at a time\n") == 1
    assert "Traceback" not in shared.output.stderr


def test_warnings_of_other_processes_are_printed_once(shared: SharedRun) -> None:
    """Cookies have no validation samples, and all classes have too few for the default false-alarm rate."""
    assert shared.output.stderr.count("no validation/good, so thresholds") == 1
    assert shared.output.stderr.count("a false-alarm rate of 0.01 needs 99") == 1


def test_anomaly_maps_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    maps = [path for path in files_below(alone.folder) if "/anomaly_maps/" in path]
    assert len(maps) == sum(good + defective for _, _, good, defective in SAMPLES.values())
    for path in maps:
        ours, expected = (tifffile.imread(output.folder / path) for output in (shared.output, alone))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.ptp(expected), err_msg=path)


def test_reports_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    for method in METHODS:
        pages = [(output.folder / "out" / method / "report.html").read_text() for output in (shared.output, alone)]
        assert_same_page(*pages)


def test_saved_detectors_have_the_same_banks(shared: SharedRun, alone: Output) -> None:
    for method in METHODS:
        for name in SAMPLES:
            ours, expected = (
                load_file(output.folder / "detectors" / method / name / "state.safetensors")
                for output in (shared.output, alone)
            )
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                tolerance = 1e-5 if key.startswith("decision_fusion") else 1e-6
                torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=1e-6, msg=f"{method} {name} {key}")


def test_saved_detectors_load(shared: SharedRun, alone: Output) -> None:
    for name in SAMPLES:
        ours, expected = (
            load_detector(output.folder / "detectors" / METHODS[-1] / name, "cpu") for output in (shared.output, alone)
        )
        assert list(ours.banks) == ["xyz", "rgb", "fusion"]
        assert [len(bank) for bank in ours.banks.values()] == [len(bank) for bank in expected.banks.values()]
        assert ours.thresholds is not None


def test_patch_files_match_a_single_process(shared: SharedRun, alone: Output) -> None:
    files = files_below(alone.folder / "patches")
    assert files == sorted(f"{name}/{i:03d}.safetensors" for name, (train, *_) in SAMPLES.items() for i in range(train))
    for file in files:
        ours, expected = (load_file(output.folder / "patches" / file) for output in (shared.output, alone))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], value) for key, value in expected.items()), file


def test_seconds_include_the_work_of_other_ranks(shared: SharedRun, alone: Output) -> None:
    """With shared samples the first process reads no dowel, so another rank reports the time of that class."""
    for method in METHODS:
        for name, known in alone.entries(method).items():
            entry = shared.output.entries(method)[name]
            idle = [stage for stage, spent in known["seconds"].items() if spent > 0 and entry["seconds"][stage] == 0]
            assert idle == [], (method, name)
            assert entry["latency"]["p50"] * len(entry["samples"]) < 3 * (
                entry["seconds"]["extract"] + entry["seconds"]["score"]
            )


def test_processes_share_the_evaluation_of_saved_detectors(alone: Output, data: Path, tmp_path: Path) -> None:
    flags = ["--dataset_path", data, "--classes", *SAMPLES, "--load_detector", alone.folder / "detectors"]
    stdout, stderr = run_ranks(2, *flags, "--output_dir", tmp_path / "out")
    # Bagels have as many test samples as cookies and dowels together, so class by class is faster.
    assert stderr.count("2 processes, 2 classes at a time\n") == 1
    for method in METHODS:
        loaded = results_of(tmp_path / "out" / method)["classes"]
        assert_same_classes(loaded, fitted_before(alone.entries(method)))
        assert all(entry["seconds"]["coreset"] == 0 for entry in loaded.values())
    assert sorted(stdout.splitlines()[:-1]) == sorted(alone.stdout.splitlines()[:-1])


def fitted_before(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries that an evaluation of saved detectors reports: fitting took no time."""
    stages = dict.fromkeys(("coreset", "fuse", "calibrate"), 0.0)
    return {name: entry | {"seconds": entry["seconds"] | stages} for name, entry in entries.items()}


def test_backbones_are_listed_once() -> None:
    stdout, _ = run_ranks(2, "--list_backbones")
    assert len([line for line in stdout.splitlines() if line.startswith("name ")]) == 1
    assert stdout.count("Any other timm network works") == 1
    assert len(re.findall("^vit_base_patch8_224_dino ", stdout, re.MULTILINE)) == 1


# Errors


def test_missing_dataset_is_reported_once(tmp_path: Path) -> None:
    flags = [*SMALL, "--output_dir", tmp_path / "out", "--dataset_path", tmp_path / "nowhere"]
    message = refusal_of_ranks(2, *flags)
    assert message.startswith(f"{tmp_path / 'nowhere'} is not a folder. Download MVTec 3D-AD")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--parallel", "both"], "argument --parallel: invalid choice: 'both'"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--device", "abacus"], "--device 'abacus' is unknown. Give auto, cpu, cuda"),
    ],
)
def test_invalid_flags_are_reported_by_the_first_process_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    """Flags are checked before the process group exists, so each process is simulated by its environment."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            call(*flags)
        assert stopped.value.code not in (0, None)
        assert (expected in capsys.readouterr().err) == (rank == "0")


def inject_into_processes(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program at the start of every Python process."""
    (folder / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_missing_gpu_of_a_rank_is_an_error(base: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three processes and one GPU, the first rank without a GPU reports the error."""
    program = """
import os
if "RANK" in os.environ:
    import time, torch
    torch.cuda.device_count = lambda: 1
    if os.environ["RANK"] == "0":  # it has a GPU and would continue
        time.sleep(600)
"""
    inject_into_processes(tmp_path, program, monkeypatch)
    message = refusal_of_ranks(3, *base, "--device", "cuda", "--output_dir", tmp_path / "out")
    assert message.startswith("There is no cuda:1, only 1 GPU. Give --device cpu, or start no more processes")


def spoil_cloud(data: Path) -> Path:
    """Write a cloud without a valid point into a file that the checks before the run do not read."""
    path = data / "test/good/xyz/003.tiff"
    path.unlink()
    write_cloud(path, np.zeros((SIDE, SIDE, 3), np.float32))
    return path


def spoil_image(data: Path) -> Path:
    """Damage the middle of an image file, an error that appears only when it is decoded."""
    path = data / "test/hole/rgb/002.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.unlink()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("parallel", "name", "spoil"), [("samples", "bagel", spoil_image), ("classes", "cookie", spoil_cloud)]
)
def test_damaged_sample_of_the_second_process_ends_the_run(
    base: list[object], data: Path, tmp_path: Path, parallel: str, name: str, spoil: Callable[[Path], Path]
) -> None:
    """The second process reads the last of ten test samples, or all cookies."""
    bad = spoil(link_files(data / name, tmp_path / "data" / name))
    for other in set(SAMPLES) - {name}:
        (tmp_path / "data" / other).symlink_to(data / other)
    folder = tmp_path / "output"
    process = launch(2, *base, *outputs(folder), "--dataset_path", tmp_path / "data", "--parallel", parallel)
    _, stderr = finish(process)
    assert process.returncode not in (0, None)
    assert error_of_ranks(stderr).startswith(f"{name}: {bad} ")

    assert all_files_are_whole(folder)
    finished = set(SAMPLES) - {name}
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
    """Read every result file to its end; hidden files are temporary."""
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
        elif path.suffix == ".csv":
            assert len({line.count(",") for line in path.read_text().splitlines()}) == 1
        elif path.suffix == ".tex":
            assert path.read_text().endswith("\\end{table}\n")
        else:
            assert path.name in TABLES
            assert table_rows(path.parent, path.name)
    return bool(found)


def test_processes_share_a_class_without_a_test_split(data: Path, tmp_path: Path) -> None:
    """The fit, then the detectors that it saved, both on two processes."""
    link_files(data / "bagel/train", tmp_path / "data/new/train")
    chosen = ["--dataset_path", tmp_path / "data", "--classes", "new"]
    flags = [*chosen, *SMALL, "--seeds", 0, "--method_name", "DINO+Point_MAE"]
    call(*flags, "--output_dir", tmp_path / "alone")
    saved = ["--save_detector", tmp_path / "detectors"]
    _, stderr = run_ranks(2, *flags, *saved, "--output_dir", tmp_path / "fitted", "--parallel", "samples")
    assert stderr.count("new has no test split, so I-AUROC") == 1
    run_ranks(2, *chosen, "--load_detector", tmp_path / "detectors", "--output_dir", tmp_path / "loaded")
    expected = results_of(tmp_path / "alone")["classes"]["new"]
    for name in ("fitted", "loaded"):
        results = results_of(tmp_path / name)
        entry = results["classes"]["new"]
        assert (entry["split"], results["mean"]["image_rocauc"]) == ("train", None)
        for ours, alone in zip(entry["samples"], expected["samples"], strict=True):
            assert (ours["path"], ours["label"]) == (alone["path"], 0)
            assert ours["score"] == pytest.approx(alone["score"], rel=1e-4)


# Resume


class Stopped(NamedTuple):
    """Run with one process killed after the first class was finished."""

    output: Output
    flags: list[object]
    seconds: float  # from the kill to the end of the launcher
    workers: list[int]


def workers_of(launcher: int) -> list[int]:
    """Process ids that a launcher started, in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{child}/environ").read_bytes())
        if found:
            ranks[int(found[1])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def stop(base: list[object], folder: Path, killed: int, *flags: object) -> Stopped:
    """Kill one rank of two as soon as the results of the first class are on disk."""
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
    return Stopped(Output(folder, stdout, stderr), list(flags), time.monotonic() - begin, workers)


def class_files(folder: Path, name: str) -> list[Path]:
    """Result files of a class, or none while a method lacks its file."""
    paths = [folder / "out" / method / "classes" / f"{name}.json" for method in METHODS]
    return paths if all(path.exists() for path in paths) else []


@pytest.fixture(scope="module", params=[("samples", 1), ("classes", 0)], ids=str)
def stopped(request: pytest.FixtureRequest, base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    parallel, killed = request.param
    return stop(base, tmp_path_factory.mktemp("stopped"), killed, "--parallel", parallel)


def test_killed_process_ends_the_others(stopped: Stopped) -> None:
    assert len(stopped.workers) == 2
    assert stopped.seconds < 60
    assert not [worker for worker in stopped.workers if Path(f"/proc/{worker}").exists()]


def test_killed_process_ends_those_of_other_machines(base: list[object], tmp_path: Path) -> None:
    """Two launchers act as two machines; the surviving process works on a class of its own."""
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
    time.sleep(2)  # until both are computing
    begin = time.monotonic()
    os.kill(workers[1][0], signal.SIGKILL)
    for machine in machines:
        _, stderr = finish(machine)
        assert machine.returncode not in (0, None), stderr
    assert time.monotonic() - begin < 60
    assert not [worker for of_machine in workers for worker in of_machine if Path(f"/proc/{worker}").exists()]


def test_killed_run_leaves_complete_files(stopped: Stopped) -> None:
    folder = stopped.output.folder
    assert class_files(folder, "dowel")
    assert not class_files(folder, "bagel"), "the run finished before it was killed"
    assert all_files_are_whole(folder)
    assert not list((folder / "out").glob("*.md"))


def test_resumed_run_matches_an_uninterrupted_one(stopped: Stopped, alone: Output, tmp_path: Path) -> None:
    """Finished classes are kept untouched and the others are computed.

    A run with shared samples is resumed by two processes, the other run by a single one.
    """
    processes = 2 if "samples" in stopped.flags else 1
    out = tmp_path / "out"
    shutil.copytree(stopped.output.folder / "out", out)
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

    resumed = Output(tmp_path, stdout)
    for method in METHODS:
        assert_same_classes(resumed.entries(method), alone.entries(method))
        pages = [(output.folder / "out" / method / "report.html").read_text() for output in (resumed, alone)]
        assert_same_page(*pages)
        assert {sample["path"] for sample in samples_of(pages[0]) if sample["class"] == "dowel"} == {
            "test/good/000", "test/hole/000",
        }  # fmt: skip
    assert sorted(stdout.splitlines()[:-1]) == sorted(alone.stdout.splitlines()[:-1])
    assert [path for path in files_below(out) if "/." not in path] == files_below(alone.folder / "out")
    for name in TABLES:
        assert table_rows(out, name) == table_rows(alone.folder / "out", name)


def assert_same_page(ours: str, expected: str) -> None:
    """Two reports are equal except for date, command, time, and rounding in the gallery's numbers."""
    changing = r"<time .*?</time>|<details>.*?</details>|<section aria-label=\"Time and memory\">.*?</section>"
    numbers = r'<script type="application/json" id="parts">.*?</script>'
    ours_, expected_ = (re.sub(f"{changing}|{numbers}", "", page, flags=re.DOTALL) for page in (ours, expected))
    assert read_page(ours_) == read_page(expected_)
    shown, known = samples_of(ours), samples_of(expected)
    assert [(sample["class"], sample["path"], sample["outcome"]) for sample in shown] == [
        (sample["class"], sample["path"], sample["outcome"]) for sample in known
    ]
    for sample, other in zip(shown, known, strict=True):
        assert sample.keys() == other.keys()
        assert sample["score"] == pytest.approx(other["score"], rel=1e-5)
        assert sample["maps"].keys() == other["maps"].keys()
        assert (sample["view"], sample["truth"]) == (other["view"], other["truth"])


@pytest.fixture
def finished(alone: Output, tmp_path: Path) -> Path:
    """Copy of the output of a finished run, which tests may change."""
    shutil.copytree(alone.folder / "out", tmp_path / "out")
    return tmp_path / "out"


def resume_flags(base: Sequence[object], alone: Output, out: Path) -> list[object]:
    """Flags that resume the finished run."""
    return [*base, *outputs(alone.folder), "--output_dir", out, "--resume"]


def assert_nothing_new(out: Path, alone: Output, stdout: str) -> None:
    """The results of a finished run are printed again and its tables stay as they are."""
    for method in METHODS:
        assert results_of(out / method)["classes"] == alone.entries(method)
    assert stdout.splitlines()[:-1] == alone.stdout.splitlines()[:-1]
    assert stdout.splitlines()[-1] == f"written to {out}/, detectors to {alone.folder}/detectors/"
    for name in TABLES:
        assert table_rows(out, name) == table_rows(alone.folder / "out", name)  # replaced, not appended


def test_resume_of_a_finished_run_computes_nothing(
    base: list[object], alone: Output, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_run, "run_class", lambda name, *_: pytest.fail(f"{name} computed"))
    assert_nothing_new(finished, alone, printed(*resume_flags(base, alone, finished)))


def test_resume_of_a_finished_run_by_two_processes_computes_nothing(
    base: list[object], alone: Output, finished: Path
) -> None:
    stdout, stderr = run_ranks(2, *resume_flags(base, alone, finished))
    assert_nothing_new(finished, alone, stdout)
    assert stderr.count(f"--resume: {', '.join(SAMPLES)} finished before") == 1
    assert not re.search(r"main: \w+: \d+ training", stderr)


def test_resume_with_other_flags_is_refused(base: list[object], alone: Output, finished: Path) -> None:
    before = {path: (finished / path).read_bytes() for path in files_below(finished)}
    message = refusal_of_ranks(2, *resume_flags(base, alone, finished), "--f_coreset", 0.2)
    path = finished / METHODS[0] / "classes/dowel.json"
    assert message.startswith(f"{path} was computed with f_coreset 0.06, now 0.2. Use the same flags, or omit ")
    assert {path: (finished / path).read_bytes() for path in files_below(finished)} == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seeds", 1], "was computed with random_state 0, now 1. "),
        (["--target_fpr", 0.5, "--img_size", 96], f"was computed with img_size {SIDE}, now 96, target_fpr 0.01, now "),
    ],
)
def test_resume_names_the_flags_that_differ(
    base: list[object],
    alone: Output,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[object],
    expected: str,
) -> None:
    assert expected in refusal(capsys, *resume_flags(base, alone, finished), *flags)


def test_resume_with_other_samples_is_refused(
    base: list[object],
    data: Path,
    alone: Output,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    added = [data / f"dowel/test/good/{kind}" for kind in ("rgb/zzz.png", "xyz/zzz.tiff")]
    try:
        for path in added:
            shutil.copy(next(path.parent.iterdir()), path)
        message = refusal(capsys, *resume_flags(base, alone, finished))
    finally:
        for path in added:
            path.unlink(missing_ok=True)
    assert message.startswith(f"{finished / METHODS[0] / 'classes' / 'dowel.json'} was computed from other samples, ")


def test_damaged_class_file_is_refused_until_deleted(
    base: list[object], alone: Output, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / METHODS[1] / "classes/dowel.json"
    path.write_text(path.read_text()[:-100])
    message = refusal(capsys, *resume_flags(base, alone, finished))
    assert message.startswith(f"{path} is damaged (not JSON: ")
    assert message.endswith("Delete it to compute its class again.")
    path.unlink()
    call(*resume_flags(base, alone, finished), "--classes", "dowel")
    assert path.exists()
    for method in METHODS:
        found = results_of(finished / method)["classes"]
        assert_same_classes(found, {"dowel": alone.entries(method)["dowel"]})


def test_without_resume_older_results_are_deleted(base: list[object], alone: Output, finished: Path) -> None:
    """They go before the first class is computed, so a stopped run leaves no older results to resume."""

    def stop_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_run, "run_class", stop_at_once)
        with pytest.raises(SystemExit) as stopped:
            call(*resume_flags(base, alone, finished)[:-1], "--classes", "cookie", "dowel")
    assert stopped.value.code == 130
    for method in METHODS:
        assert [path.name for path in (finished / method / "classes").iterdir()] == ["bagel.json"]


@pytest.mark.parametrize("changed", ["uff", "detector"])
def test_resume_with_other_weights_is_refused(
    base: list[object], data: Path, changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The UFF changes at the same path, or the loaded detector does."""
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

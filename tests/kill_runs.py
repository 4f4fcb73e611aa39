"""Kill the scripts at random moments, let them finish, and compare their results with those of uninterrupted runs.

    python tests/kill_runs.py                        # 10 kills of each script, some minutes
    python tests/kill_runs.py --kills 2 --seed 7 --only uff predict

It sends SIGKILL to preprocessing, a fit with --save_detector --save_preds --resume, UFF training and predict.py, on
small synthetic data. A lot is one to four kills of the same command, followed by a run to its end. The result values
must equal those of a run that was not killed, and no temporary file may be left. Times, dates and paths are ignored.
Exit code: 0 if all lots are equal, else 1.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cleaning_runs import contents, write_scan
from main_runs import SMALL, write_bagels
from uff_runs import read, write_samples

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("bagel", "cookie", "dowel")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Keys of JSON records whose values differ between two runs of a command, or between two output folders.
VARYING = {"seconds", "peak_memory_mb", "written", "command", "args", "flags", "map", "overlay"}
VARYING |= {"latency", "config_sha256", "report_sha256", "stamp"}
TIMES = ("seconds_", "latency_")  # starts of columns of results.csv
MOST_IN_LOT = 4


class Job(NamedTuple):
    """A command that may be killed. Each lot has a new folder, prepared by `prepare`."""

    prepare: Callable[[Path], None]
    command: Callable[[Path], list[str]]  # takes the new folder; writes to its subfolder "out"
    values: Callable[[Path], dict[str, Any]]  # results by file name


class Row(NamedTuple):
    """Result of all lots of a job."""

    job: str
    kills: int
    lots: int
    differing: list[str]  # names of files with different values, and of temporary files


def write_raw_scans(folder: Path) -> None:
    for seed in range(12):
        split = ("train/good", "test/hole")[seed % 2]
        write_scan(folder / "out" / CLASSES[seed % 3] / split, f"{seed:03d}", seed, with_gt=split.startswith("test"))


def preprocess_command(folder: Path) -> list[str]:
    return ["utils/preprocessing.py", f"{folder}/out", "--workers", "2"]


def preprocessed_values(folder: Path) -> dict[str, Any]:
    return dict(contents(folder / "out"))


def write_classes(folder: Path) -> None:
    write_bagels(folder / "data")
    for name in CLASSES[1:]:
        shutil.copytree(folder / "data" / CLASSES[0], folder / "data" / name)


def fit_command(folder: Path) -> list[str]:
    out = ["--output_dir", f"{folder}/out/results", "--save_detector", f"{folder}/out/detectors"]
    data = ["--dataset_path", f"{folder}/data", "--classes", *CLASSES, "--method_name", "DINO", "DINO+Point_MAE"]
    return ["main.py", *data, *out, *SMALL_FLAGS, "--save_preds", "--resume"]


SMALL_FLAGS = [*map(str, SMALL), "--seeds", "0", "--num_workers", "0", "--report_parts", "1", "--device", "cpu"]


def without_varying(value: Any) -> Any:
    """A JSON value without the keys of VARYING."""
    if isinstance(value, dict):
        return {key: without_varying(each) for key, each in value.items() if key not in VARYING}
    return [without_varying(each) for each in value] if isinstance(value, list) else value


def file_values(path: Path) -> Any:
    """Content of a result file without what varies."""
    if path.suffix == ".html":
        return ""  # it holds times, and the numbers of results.json
    if path.suffix == ".json":
        return without_varying(json.loads(path.read_text()))
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        values = [{key: each for key, each in row.items() if not key.startswith(TIMES)} for row in rows]
        return [without_varying(row | {"rgb": "", "xyz": ""}) for row in values]
    if path.suffix == ".jsonl":
        return [without_varying(json.loads(line) | {"rgb": "", "xyz": ""}) for line in path.read_text().splitlines()]
    if path.suffix in (".md", ".tex"):  # without the lines of date and command
        return re.sub(r"## \d{4}-\S+ \S+|^%? *\S*main\.py .*", "", path.read_text(), flags=re.MULTILINE)
    if path.suffix == ".pth":
        checkpoint = read(path)
        return {name: flat(checkpoint[name]) for name in ("model", "optimizer", "epoch")}
    return path.read_bytes()


def flat(value: Any) -> Any:
    """A nested value whose tensors are replaced by lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list | tuple) else value


def all_values(folder: Path) -> dict[str, Any]:
    root = folder / "out"
    return {str(path.relative_to(root)): file_values(path) for path in sorted(root.rglob("*")) if path.is_file()}


def write_patches(folder: Path) -> None:
    write_samples(folder / "patches", 8)


def uff_command(folder: Path) -> list[str]:
    flags = ["--batch_size", "1", "--accum_iter", "2", "--epochs", "20", "--lr", "0.01", "--num_workers", "1"]
    flags += ["--val_fraction", "0.25", "--save_steps", "1", "--device", "cpu"]
    last = folder / "out/checkpoint-last.pth"
    resume = ["--resume", str(last)] if last.exists() else []
    return ["fusion_pretrain.py", "--data_path", f"{folder}/patches", "--output_dir", f"{folder}/out", *flags, *resume]


def write_detector(folder: Path) -> None:
    """Write a dataset and a detector; the samples to predict are 20 copies of a training sample."""
    write_bagels(folder / "data")
    flags = ["--dataset_path", f"{folder}/data", "--classes", "bagel", "--method_name", "DINO+Point_MAE", *SMALL_FLAGS]
    out = ["--output_dir", f"{folder}/fitted", "--save_detector", f"{folder}/detectors"]
    finish(["main.py", *flags, *out])
    for name, suffix in (("rgb", ".png"), ("xyz", ".tiff")):
        (folder / name).mkdir()
        for number in range(20):
            source = folder / f"data/bagel/train/good/{name}/{number % 2:03d}{suffix}"
            shutil.copy(source, folder / name / f"{number:03d}{suffix}")


def predict_command(folder: Path) -> list[str]:
    samples = ["--rgb", f"{folder}/rgb", "--xyz", f"{folder}/xyz", "--batch_size", "1", "--device", "cpu"]
    return ["predict.py", "--detector", f"{folder}/detectors/bagel", *samples, "--output_dir", f"{folder}/out"]


JOBS = {
    "preprocessing": Job(write_raw_scans, preprocess_command, preprocessed_values),
    "fit": Job(write_classes, fit_command, all_values),
    "uff": Job(write_patches, uff_command, all_values),
    "predict": Job(write_detector, predict_command, all_values),
}


def start(command: Sequence[str], log: Any = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    script, *flags = command
    return subprocess.Popen([sys.executable, ROOT / script, *flags], env=ENVIRONMENT, stdout=log, stderr=log, text=True)


def finish(command: Sequence[str]) -> None:
    """Run a command to its end, or find that it has ended; RuntimeError with its output if it fails."""
    process = start(command, subprocess.PIPE)
    _, errors = process.communicate()
    if process.returncode and "Nothing is left to train" not in errors:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}: {errors[-2000:]}")


def undisturbed(job: Job, folder: Path) -> tuple[float, float]:
    """Run a command to its end; returns the time of its first change in the folder "out" and of its end, s."""
    before, begin, first = snapshot(folder / "out"), time.monotonic(), 0.0
    process = start(job.command(folder))
    while process.poll() is None:
        if not first and snapshot(folder / "out") != before:
            first = time.monotonic() - begin
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{' '.join(job.command(folder))} ended with exit code {process.returncode}")
    return first, time.monotonic() - begin


def snapshot(folder: Path) -> list[str]:
    return sorted(map(str, folder.rglob("*")))


def run_job(name: str, kills: int, rng: random.Random, root: Path) -> Row:
    """Kill a command `kills` times in lots."""
    job, original, reference = JOBS[name], root / name / "original", root / name / "reference"
    job.prepare(original)
    shutil.copytree(original, reference)
    first, end = undisturbed(job, reference)
    expected = job.values(reference)
    done = lots = 0
    differing: list[str] = []
    while done < kills:
        folder = root / name / f"lot_{lots}"
        shutil.copytree(original, folder)
        for _ in range(min(rng.randint(1, MOST_IN_LOT), kills - done)):
            process = start(job.command(folder))
            try:
                process.wait(rng.uniform(0.9 * first, end))
                break  # it ended first, since less was left to do
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
        finish(job.command(folder))
        differing += [f"lot {lots}: {each}" for each in differences(expected, job.values(folder), folder)]
        lots += 1
    return Row(name, done, lots, differing)


def differences(expected: dict[str, Any], found: dict[str, Any], folder: Path) -> list[str]:
    """Names of files that are missing, additional, temporary or different."""
    names = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    temporary = [each for each in snapshot(folder / "out") if re.search(r"/\.|\.journal$|\.preprocessing$", each)]
    return names + [f"temporary {each}" for each in temporary if each not in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="kills of each script")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="scripts to kill")
    args = parser.parse_args(argv)
    print(f"{'script':14} {'kills':>5} {'lots':>5}  result", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            row = run_job(name, args.kills, random.Random(f"{args.seed} {name}"), Path(folder).resolve())
            result = "; ".join(row.differing[:5]) or "equal, no temporary file"
            print(f"{row.job:14} {row.kills:5} {row.lots:5}  {result}", flush=True)
            failed |= bool(row.differing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

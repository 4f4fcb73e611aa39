"""Small raw scans, and runs of the preprocessing scripts in this process, in a new one, and in one that is killed."""

import importlib
import inspect
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from utils.cleaning.cloud_cleaning import CleaningRule
from utils.preprocessing import Config

ROOT = Path(__file__).resolve().parent.parent


def raw_cloud(seed: int) -> np.ndarray:
    """Tilted table with a box on it, (40, 44, 3) float32, 1 mm between pixels."""
    y, x = np.mgrid[:40, :44] * 1e-3
    z = 0.5 + 0.05 * x + np.random.default_rng(seed).normal(0, 2e-4, x.shape)
    z[14:28, 14:30] -= 0.02
    return np.stack([x + 0.01, y + 0.01, z], 2).astype(np.float32)


def write_scan(folder: Path, stem: str, seed: int, with_gt: bool) -> None:
    """Write `raw_cloud` with a noise image and, on request, a ground truth."""
    for name in ("xyz", "rgb", "gt")[: 3 if with_gt else 2]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", raw_cloud(seed))
    image = np.random.default_rng(seed).integers(1, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "rgb" / f"{stem}.png")
    if with_gt:
        Image.fromarray((image[..., 0] > 128).astype(np.uint8) * 255).save(folder / "gt" / f"{stem}.png")


ALL = ["bagel/test/hole/000", "bagel/train/good/000", "bagel/train/good/001"]


def write_dataset(root: Path) -> Path:
    """Write the three scans of ALL."""
    for seed, name in enumerate(ALL):
        folder, _, stem = name.rpartition("/")
        write_scan(root / folder, stem, seed, with_gt="test" in folder)
    return root


def config_for(dataset: Path, output_dir: Path | None = None, keep_rgb: bool = False, dry_run: bool = False) -> Config:
    """Configuration of a run with one worker."""
    rule = CleaningRule(keep_rgb=keep_rgb)
    return Config(dataset, output_dir, workers=1, dry_run=dry_run, preview=None, rule=rule)


def contents(root: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder, without the manifest's times, which differ between runs."""
    found = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    return {name: STAMPS.sub(b"", data) if name == "preprocessing.json" else data for name, data in found.items()}


STAMPS = re.compile(rb',\s*"mtime_ns": \d+,\s*"sources": \[[^"]*\](?=\s*\})')


def call_script(main: Callable[[], int | None], *args: object) -> subprocess.CompletedProcess:
    """Call a script's main in this process with these arguments; capture its output and exit code."""
    stdout, stderr, code = StringIO(), StringIO(), 0
    script = Path(inspect.getfile(inspect.unwrap(main)))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        try:
            code = main() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return subprocess.CompletedProcess(args, code, stdout.getvalue(), stderr.getvalue())


def run_script(name: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "utils" / f"{name}.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as an ordinary user if the tests run as root, who may write everywhere."""
    Image.init()  # import the codecs first: only root may be able to read the environment
    tifffile.imread(BytesIO(tifffile_bytes()))
    user = os.getuid()
    if user == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(user, user, user)


def tifffile_bytes() -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, np.zeros((2, 2, 3), np.float32), photometric="rgb")
    return buffer.getvalue()


def run_killed_at(step: int, script: str, *args: object, steps: str = "replace") -> int:
    """Run a script, kill it (SIGKILL) just before its n-th rename, and return the exit code.

    `steps`: the methods of Path that count as a step.
    """
    process = multiprocessing.get_context("fork").Process(target=_run_until, args=(step, script, args, steps.split()))
    process.start()  # forking is safe: preprocessing uses no thread of the test process
    process.join(60)
    assert process.exitcode is not None, "still running after a minute"
    return process.exitcode


def _run_until(step: int, script: str, args: Sequence[object], steps: Sequence[str]) -> None:
    left = itertools.count(step - 1, -1)

    def counted(function: Callable) -> Callable:
        def run(self: Path, *args: object, **kwargs: object) -> object:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(self, *args, **kwargs)

        return run

    for name in steps:
        setattr(Path, name, counted(getattr(Path, name)))
    sys.exit(importlib.import_module(f"utils.{script}").main([*map(str, args), "--workers", "1"]))

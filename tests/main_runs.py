"""Runs of main.py, in this process and in a new one, and the smallest dataset that it accepts."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import main
from models import rgb_backbone

PIP_BACKBONES = ["--rgb_backbone_name", "efficientnet_lite0", "--xyz_backbone_name", "FPFH"]
RGB_DIM, XYZ_DIM = 152, 33  # feature widths of these backbones
TABLES = ("image_rocauc_results.md", "pixel_rocauc_results.md", "aupro_results.md")
WRITTEN = (*TABLES, "results.csv", "tables.tex")  # files of all methods together
METRICS = ("image_rocauc", "pixel_rocauc", "au_pro")


class Run(NamedTuple):
    """Output of a run of main.py."""

    folder: Path
    stdout: str
    results: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """Results of the only class."""
        (entry,) = self.results["classes"].values()
        return entry

    @property
    def scores(self) -> list[float]:
        return [sample["score"] for sample in self.entry["samples"]]

    @property
    def pixel_figures(self) -> list[float]:
        """Metrics of the anomaly maps."""
        return [self.entry["pixel_rocauc"], self.entry["au_pro"], *self.entry["au_pro_exact"].values()]


def call(*flags: object) -> None:
    """Call main.py's main in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *map(str, flags)])
        main.main()


def printed(*flags: object) -> str:
    """Text that main.py prints to stdout."""
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        call(*flags)
    return stdout.getvalue()


def read_run(folder: Path, stdout: str) -> Run:
    return Run(folder, stdout, json.loads((folder / "results.json").read_text()))


def run_into(folder: Path, *flags: object) -> Run:
    """Run one method and read its results."""
    return read_run(folder, printed(*flags, "--output_dir", folder))


def table_rows(folder: Path, name: str) -> list[list[str]]:
    """Cells of all tables in a markdown file, without the separator lines."""
    lines = [line for line in (folder / name).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def link_files(source: Path, target: Path, without: Sequence[str] = ()) -> Path:
    """Link the files of a folder into another one, except those in folders named in `without`."""
    for path in sorted(source.rglob("*.*")):
        if path.is_file() and path.parent.name not in without:
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return target


@pytest.fixture(autouse=True)
def run_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its temporary folder, so that default paths do not write into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests off the network and off the machine's cache of weights."""

    def refuse(timm_name: str) -> Path:
        raise OSError(f"the weights of {timm_name} are not fetched in tests")

    monkeypatch.setattr(rgb_backbone, "download_weights", refuse)
    monkeypatch.setattr(rgb_backbone, "cached_weights", lambda timm_name: None)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use one thread for small networks, which are slower on several; networks of full size keep all threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if "golden_weights" in request.fixturenames else 1)
    yield
    torch.set_num_threads(threads)


def refusal(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """Error message of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


def error_line(stderr: str) -> str:
    """Error message on the last line of stderr, which has no other error and no traceback."""
    lines = stderr.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:], stderr
    assert "Traceback" not in stderr
    assert lines[-1].startswith("main.py: error: "), stderr
    assert len(lines[-1]) < 600
    return lines[-1].removeprefix("main.py: error: ")


SIDE = 64  # height and width of the smallest samples, pixels
SMALL = [*PIP_BACKBONES, "--img_size", SIDE]


def surface(seed: int) -> np.ndarray:
    """Bumpy surface half a meter away, (SIDE, SIDE, 3) float32, meters, 1 mm between pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] * 0.001 + 0.001
    z = 0.5 + 0.002 * np.sin(x * 300 + seed) * np.cos(y * 200) + rng.normal(0, 1e-4, x.shape)
    return np.stack([x, y, z], axis=-1).astype(np.float32)


def write_cloud(path: Path, xyz: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, xyz, photometric="rgb" if xyz.ndim == 3 and xyz.shape[2] == 3 else "minisblack")


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_bagels(root: Path) -> Path:
    """Write the smallest dataset: two training samples, a good and a defective test sample, SIDE pixels a side."""
    for seed, sample in enumerate(["train/good/000", "train/good/001", "test/good/000", "test/hole/000"]):
        folder, stem = (root / "bagel" / sample).parent, Path(sample).name
        write_cloud(folder / "xyz" / f"{stem}.tiff", surface(seed))
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        write_image(folder / "rgb" / f"{stem}.png", noise)
    write_image(root / "bagel/test/hole/gt/000.png", np.pad(np.full((16, 16), 255, np.uint8), 24))
    return root


@pytest.fixture(name="bagels")
def bagels_fixture(tmp_path: Path) -> Path:
    return write_bagels(tmp_path / "data")


def process(cwd: Path, *command: object) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments in a new process, offline and on one thread."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)  # type: ignore[arg-type]

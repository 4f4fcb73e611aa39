"""Repeated preprocessing runs: finished scans, copies, changed sources, and foreign scans."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import ALL, config_for, contents, raw_cloud, unprivileged, write_dataset
from PIL import Image

from utils.cleaning import journal
from utils.errors import InputError
from utils.preprocessing import Config, preprocess
from utils.scans.organized_pc import read_organized_pc, write_organized_pc

CHANGED = "Its files changed after preprocessing. Restore the originals or the results."


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "parts")


@pytest.fixture
def skips_unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], None]:
    """Check that a run finds everything finished without reading or writing a file."""

    def read(*_: object) -> str:
        raise AssertionError("a file is read")

    def check(config: Config) -> None:
        before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*")}
        with monkeypatch.context() as patch:
            patch.setattr(journal, "sha256", read)
            assert preprocess(config) == ([], ALL, {}, {})
        assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*")} == before

    return check


@pytest.mark.parametrize("elsewhere", [False, True])
def test_finished_dataset_is_neither_read_nor_written(
    dataset: Path, tmp_path: Path, skips_unread: Callable[[Config], None], elsewhere: bool
) -> None:
    config = config_for(dataset, tmp_path / "out" if elsewhere else None)
    preprocess(config)
    skips_unread(config)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_copy_counts_as_done(dataset: Path, tmp_path: Path, elsewhere: bool) -> None:
    preprocess(config_for(dataset, tmp_path / "out" if elsewhere else None))
    for name in ("parts", "out"):
        if (tmp_path / name).is_dir():
            shutil.copytree(tmp_path / name, tmp_path / "copy" / name, copy_function=shutil.copyfile)
    config = config_for(tmp_path / "copy/parts", tmp_path / "copy/out" if elsewhere else None)
    assert preprocess(config) == ([], ALL, {}, {})


def test_result_overwritten_with_the_same_size_is_noticed(dataset: Path) -> None:
    preprocess(config_for(dataset))
    tiff = dataset / "bagel/train/good/xyz/000.tiff"
    size = tiff.stat().st_size
    write_organized_pc(tiff, read_organized_pc(tiff)[::-1])
    assert tiff.stat().st_size == size
    assert preprocess(config_for(dataset)) == ([], [ALL[0], ALL[2]], {ALL[1]: CHANGED}, {})


def test_originals_as_large_as_their_results_are_done_again(tmp_path: Path) -> None:
    """A scan that needs no padding, whose image stays as it is."""
    folder = tmp_path / "parts/bagel/train/good"
    xyz = np.pad(raw_cloud(0), ((30, 30), (28, 28), (0, 0)), mode="reflect")
    xyz[..., 2] = 0.5 + 0.05 * xyz[..., 0]
    xyz[40:60, 40:60, 2] -= 0.02
    write_organized_pc(folder / "xyz/000.tiff", xyz)
    (folder / "rgb").mkdir()
    Image.new("RGB", (100, 100), "red").save(folder / "rgb/000.png")
    shutil.copytree(tmp_path / "parts", tmp_path / "originals")
    config = config_for(tmp_path / "parts", keep_rgb=True)
    assert preprocess(config).done == [ALL[1]]
    cleaned = contents(tmp_path / "parts")
    shutil.copytree(tmp_path / "originals", tmp_path / "parts", dirs_exist_ok=True)
    restored = contents(tmp_path / "parts")
    assert restored != cleaned
    assert {name: len(data) for name, data in restored.items()} == {name: len(data) for name, data in cleaned.items()}
    assert preprocess(config).done == [ALL[1]]
    assert contents(tmp_path / "parts") == cleaned


def test_changed_source_is_cleaned_again_but_not_a_touched_one(dataset: Path, tmp_path: Path) -> None:
    config = config_for(dataset, tmp_path / "out")
    preprocess(config)
    tiff = dataset / "bagel/train/good/xyz/000.tiff"
    write_organized_pc(tiff, raw_cloud(9))  # same file size
    os.utime(dataset / "bagel/train/good/xyz/001.tiff", ns=(1, 1))
    assert preprocess(config) == ([ALL[1]], [ALL[0], ALL[2]], {}, {})
    preprocess(config_for(dataset, tmp_path / "expected"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_sources_behind_a_link_in_the_output_are_not_overwritten(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bagel").symlink_to(dataset / "bagel")
    before = contents(dataset)
    with pytest.raises(InputError, match="holds scans of another origin"):
        preprocess(config_for(dataset, tmp_path / "out"))
    assert contents(dataset) == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_foreign_scans_are_not_overwritten(dataset: Path, tmp_path: Path, dry_run: bool) -> None:
    write_dataset(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"scans of another origin, such as .*000.tiff, and no preprocessing.json"):
        preprocess(config_for(dataset, tmp_path / "out", dry_run=dry_run))
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out/notes").mkdir(parents=True)  # other files are allowed
    assert preprocess(config_for(dataset, tmp_path / "out")).done == ALL


@pytest.mark.parametrize("locked", ["", "bagel/train/good/xyz"])
@pytest.mark.parametrize("copied", [False, True])
def test_finished_dataset_on_a_read_only_disk(copied: bool, locked: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folders
        root = write_dataset(Path(folder) / "parts")
        preprocess(config_for(root))
        if copied:  # the new times cannot be recorded
            for path in root.rglob("*.tiff"):
                path.touch()
        before, files = contents(root), sorted(root.rglob("*"))
        for path in (root.parent, root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o444)
        for path in (root / locked, *(() if locked else root.rglob("*/"))):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with unprivileged():
            summary = preprocess(config_for(root))
        root.parent.chmod(0o755)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert (summary, contents(root)) == (([], ALL, {}, {}), before)
        assert sorted(root.rglob("*")) == files

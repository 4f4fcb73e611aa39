"""Files and folders without permission: one file fails its sample, a folder ends the run before it starts."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cleaning_runs import ALL, config_for, unprivileged, write_dataset, write_scan

from dataset import class_folders, find_classes, index_split
from runner.dataset_check import check_split
from utils.errors import InputError
from utils.preprocessing import preprocess

BOTH = frozenset({"rgb", "xyz"})
FIX = "(Permission denied). Allow access to it and its folder and run the same command again."


@pytest.fixture
def dataset() -> Iterator[Path]:
    """ALL and a class "dowel" in folders open to every user, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder) / "parts")
        write_scan(root / "dowel/train/good", "000", 4, with_gt=False)
        for path in (root.parent, root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield root
        for path in (root, *root.rglob("*")):
            path.chmod(0o777)


@pytest.mark.parametrize(
    "locked, name, done",
    [
        ("bagel/train/good/xyz/000.tiff", ALL[1], [ALL[0], ALL[2], "dowel/train/good/000"]),
        ("bagel/train/good/rgb/000.png", ALL[1], [ALL[0], ALL[2], "dowel/train/good/000"]),
    ],
)
def test_cleaning_reports_unreadable_files_and_does_the_rest(
    dataset: Path, locked: str, name: str, done: list[str]
) -> None:
    (dataset / locked).chmod(0)
    with unprivileged():
        summary = preprocess(config_for(dataset))
        assert summary == (done, [], {name: f"{dataset / locked} cannot be read {FIX}"}, {})
    (dataset / locked).chmod(0o777)
    with unprivileged():
        assert preprocess(config_for(dataset)).skipped == done


@pytest.mark.parametrize("locked", ["", "bagel", "bagel/train", "bagel/test/hole/gt", "preprocessing.json"])
def test_unreadable_folder_or_manifest_is_an_error(dataset: Path, locked: str) -> None:
    preprocess(config_for(dataset))
    (dataset / locked).chmod(0)
    for dry_run in (False, True):
        with unprivileged(), pytest.raises(InputError) as caught:
            preprocess(config_for(dataset, dry_run=dry_run))
        assert str(caught.value) == f"{dataset / locked} cannot be read {FIX}"


def test_unreadable_finished_scan_is_checked_by_its_size(dataset: Path) -> None:
    preprocess(config_for(dataset))
    tiff = dataset / "bagel/train/good/xyz/000.tiff"
    tiff.chmod(0)
    with unprivileged():
        assert ALL[1] in preprocess(config_for(dataset)).skipped
    tiff.touch()
    with unprivileged():
        assert preprocess(config_for(dataset)).failed == {ALL[1]: f"{tiff} cannot be read or written {FIX}"}


def test_dataset_check_reports_unreadable_files(dataset: Path) -> None:
    tiff = dataset / "bagel/train/good/xyz/000.tiff"
    tiff.chmod(0)
    with unprivileged():
        report = check_split(dataset / "bagel", "train", BOTH, num_workers=0)
    assert (report.samples, report.problems) == (2, (f"{tiff} cannot be read {FIX}",))
    tiff.parent.chmod(0)
    with unprivileged(), pytest.raises(InputError, match="xyz cannot be read"):
        check_split(dataset / "bagel", "train", BOTH, num_workers=0)
    (dataset / "bagel").chmod(0)
    with unprivileged(), pytest.raises(InputError, match="bagel cannot be read"):
        class_folders(dataset)
    dataset.chmod(0)
    with unprivileged(), pytest.raises(InputError, match="cannot be read"):
        find_classes(dataset, "mvtec3d")
    with unprivileged(), pytest.raises(InputError, match="cannot be read"):
        index_split(dataset / "bagel", "train", BOTH)

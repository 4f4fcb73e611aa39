"""Preprocessing of damaged scans, which are reported and kept, and of every supported file format."""

import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from cleaning_runs import (
    ALL,
    call_script,
    config_for,
    contents,
    raw_cloud,
    run_killed_at,
    run_script,
    write_dataset,
    write_scan,
)
from PIL import Image

from dataset import index_split
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, pad_to_square
from utils.cleaning.journal import Journal
from utils.errors import InputError
from utils.preprocessing import main, preprocess
from utils.scans.organized_pc import as_cloud, read_organized_pc

BOTH = frozenset({"rgb", "xyz"})
Files = dict[str, Path]  # files of one scan by modality


# Damaged scans


def cloud(change: Callable[[np.ndarray], object]) -> Callable[[Files], object]:
    """Write the cloud, (40, 44, 3) float32, again after `change`."""

    def damage(files: Files) -> None:
        xyz = raw_cloud(0)
        change(xyz)
        tifffile.imwrite(files["xyz"], xyz)

    return damage


def few_border_points(xyz: np.ndarray) -> None:
    xyz[:10] = xyz[-10:] = xyz[:, :10] = xyz[:, -10:] = 0
    xyz[0, :40] = raw_cloud(0)[0, :40]


def no_plane(xyz: np.ndarray) -> None:
    xyz[:] = np.random.default_rng(0).uniform(0.2, 1, xyz.shape)


def everything_plane(xyz: np.ndarray) -> None:
    xyz[..., 2] = 0.5 + 0.05 * xyz[..., 0]


def cut(name: str, size: int) -> Callable[[Files], object]:
    return lambda files: files[name].write_bytes(files[name].read_bytes()[:size])


def resized(name: str, mode: str) -> Callable[[Files], object]:
    return lambda files: Image.new(mode, (44, 41)).save(files[name])


def removed(name: str) -> Callable[[Files], object]:
    return lambda files: files[name].unlink()


FAULTS: dict[str, tuple[Callable[[Files], object], str]] = {  # damage, expected error
    "all_zero": (cloud(lambda xyz: xyz.fill(0)), "has no valid point"),
    "all_nan": (cloud(lambda xyz: xyz.fill(np.nan)), "has no valid point"),
    "one_axis_nan": (cloud(lambda xyz: xyz[..., 1].fill(np.nan)), "has no valid point"),
    "millimeters": (cloud(lambda xyz: np.multiply(xyz, 1000, out=xyz)), "--xyz_unit mm or cm"),
    "few_border_points": (cloud(few_border_points), "40 of the 1280 pixels within 10 pixels of the image border"),
    "no_plane": (cloud(no_plane), "% of the 1280 measurements within 10 pixels of the image border lie on one plane"),
    "everything_plane": (cloud(everything_plane), "Nothing is left of the scan: 0 pixels lie off the plane"),
    "rgb_size": (resized("rgb", "RGB"), "41 x 44"),
    "gt_size": (resized("gt", "L"), "41 x 44"),
    "no_xyz": (removed("xyz"), "xyz/no_xyz.tiff (found: xyz/no_rgb.tiff). Rename"),
    "no_rgb": (removed("rgb"), "rgb/no_rgb.png (found: rgb/no_xyz.png). Rename"),
    "no_gt": (removed("gt"), "gt/no_gt.png (found: "),
    "cut_xyz": (cut("xyz", 9000), "xyz/cut_xyz.tiff is cut short, with 9000 of"),
    "cut_xyz_header": (cut("xyz", 6), "xyz/cut_xyz_header.tiff cannot be read as a tiff file"),
    "empty_xyz": (cut("xyz", 0), "xyz/empty_xyz.tiff cannot be read as a tiff file"),
    "cut_rgb": (cut("rgb", 3000), "rgb/cut_rgb.png is not a complete PNG"),
    "empty_rgb": (cut("rgb", 0), "rgb/empty_rgb.png is not a complete PNG"),
    "cut_gt": (cut("gt", 100), "gt/cut_gt.png is not a complete PNG"),
    "text": (lambda files: files["rgb"].write_text("no picture"), "rgb/text.png is not a complete PNG"),
    "depth_alone": (
        lambda files: tifffile.imwrite(files["xyz"], raw_cloud(0)[..., 2]),
        "xyz/depth_alone.tiff holds an array of 40 x 44, expected H x W x 3",
    ),
    "two_rgb": (
        lambda files: Image.new("RGB", (44, 40)).save(files["rgb"].with_suffix(".jpg")),
        "rgb/two_rgb.png are files of one scan. Keep one of them",
    ),
}


class FaultyRun(NamedTuple):
    """Run of the script on three good scans and one for each fault."""

    original: dict[str, bytes]
    after: dict[str, bytes]
    result: subprocess.CompletedProcess
    output: Path
    restored: str  # output of the script after one scan was restored


def make_faulty(root: Path) -> None:
    folder = write_dataset(root) / "bagel" / "test" / "hole"
    for fault, (damage, _) in FAULTS.items():
        write_scan(folder, fault, 0, with_gt=True)
        damage(
            {"xyz": folder / f"xyz/{fault}.tiff", "rgb": folder / f"rgb/{fault}.png", "gt": folder / f"gt/{fault}.png"}
        )


@pytest.fixture(scope="module", params=["in place", "elsewhere"])
def faulty_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    root = tmp_path_factory.mktemp("faulty") / "parts"
    make_faulty(root)
    original = contents(root)
    output = root if request.param == "in place" else root.parent / "out"
    flags = (root, "--output_dir", output, "--workers", 2 if request.param == "in place" else 1)
    run = partial(run_script, "preprocessing") if request.param == "in place" else partial(call_script, main)
    result = run(*flags)
    after = contents(root)
    write_scan(root / "bagel" / "test" / "hole", "cut_rgb", 0, with_gt=True)
    return FaultyRun(original, after, result, output, call_script(main, *flags).stdout)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_scan_is_reported_and_kept(faulty_run: FaultyRun, fault: str) -> None:
    lines = [line for line in faulty_run.result.stdout.splitlines() if line.startswith(f"  bagel/test/hole/{fault}: ")]
    assert len(lines) == 1
    assert FAULTS[fault][1] in lines[0]
    files = [name for name in faulty_run.original if Path(name).stem == fault]
    assert files
    assert all(faulty_run.after[name] == faulty_run.original[name] for name in files)


def test_other_scans_are_cleaned_and_restored_ones_follow(faulty_run: FaultyRun, tmp_path: Path) -> None:
    assert (faulty_run.result.returncode, faulty_run.result.stderr.count("Traceback")) == (1, 0)
    assert f"done 3, skipped 0 (done before), failed {len(FAULTS)}\n" in faulty_run.result.stdout
    assert f"done 1, skipped 3 (done before), failed {len(FAULTS) - 1}\n" in faulty_run.restored
    write_dataset(tmp_path / "parts")
    preprocess(config_for(tmp_path / "parts"))
    found = contents(faulty_run.output)
    for name, data in contents(tmp_path / "parts").items():
        assert name == "preprocessing.json" or found[name] == data
    assert not [name for name in found if name.endswith((".preprocessing", ".journal")) or ".tmp" in name]


def doubtful(xyz: np.ndarray) -> None:
    """Leave a sixth of the border."""
    xyz[5:10] = xyz[-10:] = xyz[:, :10] = xyz[:, -10:] = 0
    xyz[:5] = raw_cloud(0)[:5]


@pytest.mark.parametrize("flags", [(), ("--strict",)])
def test_dry_run_predicts_the_report_of_the_run(tmp_path: Path, flags: tuple[str, ...]) -> None:
    make_faulty(tmp_path / "parts")
    folder = tmp_path / "parts/bagel/test/hole"
    write_scan(folder, "doubtful", 0, with_gt=True)
    cloud(doubtful)({"xyz": folder / "xyz/doubtful.tiff"})
    before = contents(tmp_path)
    planned = call_script(main, tmp_path / "parts", "--dry_run", "--workers", 1, *flags)
    assert contents(tmp_path) == before
    done = call_script(main, tmp_path / "parts", "--workers", 1, *flags)
    assert planned.returncode == done.returncode == 1
    assert planned.stdout.replace("to do", "done", 1) == done.stdout
    assert done.stdout.startswith(f"done {3 if flags else 4}, ")
    assert ("warning: the table may not have been found in 1 of the scans" in done.stdout) == (not flags)
    assert done.stdout.count("bagel/test/hole/doubtful: ") == 1


# Other formats


def jpeg(ending: str) -> Callable[[Files], None]:
    def store(files: Files) -> None:
        Image.open(files["rgb"]).save(files["rgb"].with_suffix(ending), format="JPEG", quality=80)
        files["rgb"].unlink()

    return store


def renamed(name: str, ending: str) -> Callable[[Files], object]:
    return lambda files: files[name].rename(files[name].with_suffix(ending))


def stored(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Files], object]:
    return lambda files: Image.fromarray(change(np.asarray(Image.open(files[name])))).save(files[name])


def with_transparency(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image, np.random.default_rng(0).integers(0, 256, (40, 44, 1), dtype=np.uint8)], axis=2)


def sixteen_bits(image: np.ndarray) -> np.ndarray:
    return image.reshape(40, 44, -1)[..., 0].astype(np.uint16) * 257


FORMATS: dict[str, Callable[[Files], object]] = {
    "jpg": jpeg(".jpg"),
    "jpeg": jpeg(".jpeg"),
    "upper_jpg": jpeg(".JPG"),
    "upper_png": renamed("rgb", ".PNG"),
    "upper_gt": renamed("gt", ".PNG"),
    "tif": renamed("xyz", ".tif"),
    "upper_tif": renamed("xyz", ".TIFF"),
    "rgba": stored("rgb", with_transparency),
    "gray_16_bit": stored("rgb", sixteen_bits),
    "gray": stored("rgb", lambda image: image[..., 0]),
    "gt_16_bit": stored("gt", lambda gt: (gt > 0).astype(np.uint16)),  # the smallest id, lost if scaled to 8 bits
    "gt_ids": stored("gt", lambda gt: gt // 85),
    "gt_rgba": stored("gt", lambda gt: np.stack([gt, gt, gt, np.full_like(gt, 255)], axis=2)),
    "float64": lambda files: tifffile.imwrite(files["xyz"], raw_cloud(0).astype(np.float64)),
    "nan_holes": cloud(lambda xyz: xyz[18:20, 16:19].fill(np.nan)),
    "infinite_holes": cloud(lambda xyz: xyz[::5, ::7, 2].fill(np.inf)),
}


def as_stored(path: Path) -> np.ndarray:
    """Pixels of an image or ground truth in one of FORMS, (H, W, 3) or (H, W) uint8."""
    image = np.asarray(Image.open(path))
    if path.parent.name == "gt":
        plain = image.ndim == 2 and image.dtype == np.uint8
        return image if plain else (image.reshape(40, 44, -1)[..., 0] > 0).astype(np.uint8) * 255
    image = (image // 257).astype(np.uint8) if image.dtype == np.uint16 else image
    return np.stack([image] * 3, axis=2) if image.ndim == 2 else image[..., :3]


class Expected(NamedTuple):
    xyz: np.ndarray
    rgb: np.ndarray
    gt: np.ndarray


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    """Dataset of a scan in each format, cleaned in place by the script, and the expected results."""
    root = tmp_path_factory.mktemp("formed") / "parts"
    folder, expected = root / "bagel" / "test" / "hole", {}
    for form, store in FORMATS.items():
        write_scan(folder, form, 0, with_gt=True)
        store({"xyz": folder / f"xyz/{form}.tiff", "rgb": folder / f"rgb/{form}.png", "gt": folder / f"gt/{form}.png"})
        found = {name: next((folder / name).glob(f"{form}.*")) for name in ("xyz", "rgb", "gt")}
        xyz = as_cloud(tifffile.imread(found["xyz"]))
        gt = as_stored(found["gt"])
        clean_xyz, clean_rgb, *_ = clean_scan(xyz, as_stored(found["rgb"]), gt, CleaningRule())
        expected[form] = Expected(clean_xyz, clean_rgb, pad_to_square(gt, 100))
    result = run_script("preprocessing", root, "--workers", 2)
    assert (result.returncode, result.stdout) == (0, f"done {len(FORMATS)}, skipped 0 (done before), failed 0\n")
    return root, expected


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_cleaned_in_place_without_loss(formed: tuple[Path, dict[str, Expected]], form: str) -> None:
    folder = formed[0] / "bagel" / "test" / "hole"
    assert sorted(path.name for path in folder.glob(f"*/{form}.*")) == [f"{form}.png", f"{form}.png", f"{form}.tiff"]
    assert np.array_equal(read_organized_pc(folder / "xyz" / f"{form}.tiff"), formed[1][form].xyz)
    assert formed[1][form].xyz.any()
    for name, expected in (("rgb", formed[1][form].rgb), ("gt", formed[1][form].gt)):
        assert np.array_equal(np.asarray(Image.open(folder / name / f"{form}.png")), expected)


def test_cleaned_formats_are_finished_and_fit_the_dataset(formed: tuple[Path, dict[str, Expected]]) -> None:
    assert len(index_split(formed[0] / "bagel", "test", BOTH)) == len(FORMATS)
    assert len(preprocess(config_for(formed[0])).skipped) == len(FORMATS)


@pytest.fixture
def other_suffixes(tmp_path: Path) -> Path:
    """Dataset of one scan as .tif and .jpg."""
    folder = tmp_path / "parts" / "bagel" / "test" / "hole"
    write_scan(folder, "000", 0, with_gt=True)
    files = {"xyz": folder / "xyz/000.tiff", "rgb": folder / "rgb/000.png"}
    renamed("xyz", ".tif")(files)
    jpeg(".jpg")(files)
    return tmp_path / "parts"


def test_originals_with_other_suffixes_are_kept_with_an_output_folder(other_suffixes: Path, tmp_path: Path) -> None:
    before = contents(other_suffixes)
    assert preprocess(config_for(other_suffixes, tmp_path / "out")).done == ALL[:1]
    assert contents(other_suffixes) == before


STEPS = "replace unlink"
# Rename of the manifest, unlink of its temporary name and of the journal; the first two for each of three files; the
# final renames of these files; unlink of two originals; the manifest again.
NUMBER_OF_STEPS = 3 + 6 + 3 + 2 + 3


@pytest.mark.parametrize("step", range(1, NUMBER_OF_STEPS + 2))
def test_killed_run_loses_no_file_with_another_suffix(other_suffixes: Path, tmp_path: Path, step: int) -> None:
    preprocess(config_for(other_suffixes, tmp_path / "expected"))
    original, expected = contents(other_suffixes), contents(tmp_path / "expected")
    killed = step <= NUMBER_OF_STEPS
    assert run_killed_at(step, "preprocessing", other_suffixes, steps=STEPS) == (-signal.SIGKILL if killed else 0)
    half_done = contents(other_suffixes)
    for old, new in (("xyz/000.tif", "xyz/000.tiff"), ("rgb/000.jpg", "rgb/000.png"), ("gt/000.png", "gt/000.png")):
        old, new = f"bagel/test/hole/{old}", f"bagel/test/hole/{new}"
        assert half_done.get(old) == original[old] or half_done.get(new) == expected[new]
    try:
        index_split(other_suffixes / "bagel", "test", BOTH)
    except InputError as error:
        assert "Run the preprocessing again if it was interrupted" in str(error)
        assert {name for name in half_done if name.endswith(("000.tif", "000.jpg"))}
    planned = preprocess(config_for(other_suffixes, dry_run=True))
    assert contents(other_suffixes) == half_done
    assert preprocess(config_for(other_suffixes)) == planned
    assert contents(other_suffixes) == expected


def test_original_that_changed_during_the_run_is_not_deleted(
    other_suffixes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = other_suffixes / "bagel/test/hole/rgb/000.jpg"
    commit = Journal.commit

    def change_and_commit(self: Journal, *args: object) -> None:
        Image.new("RGB", (44, 40), "red").save(image)
        commit(self, *args)

    monkeypatch.setattr(Journal, "commit", change_and_commit)
    preprocess(config_for(other_suffixes))
    assert np.asarray(Image.open(image))[0, 0, 0] > 200
    with pytest.raises(InputError, match=r"000.jpg and 000.png are two files of one sample"):
        index_split(other_suffixes / "bagel", "test", BOTH)

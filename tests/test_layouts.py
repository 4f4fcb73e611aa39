"""Layouts of real datasets, content of ground truth, and paths that are not regular files."""

import logging
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import ALL, config_for, write_dataset, write_scan
from PIL import Image

import main
import predict
from dataset import check_files, index_split
from runner.dataset_check import check_split
from runner.prediction import SampleReader
from runner.settings import make_parser
from utils import preprocessing
from utils.errors import InputError
from utils.feature_store import read_header
from utils.scans.depth_camera import Camera
from utils.scans.files import MAX_BYTES, open_file, read_bytes
from utils.scans.images import OVERLAY_SIDE, defect_share, image_size, open_image, read_image, shrink_image
from utils.scans.organized_pc import write_organized_pc
from utils.scans.sample_files import find_samples, read_cloud

BOTH = frozenset({"rgb", "xyz"})
SIDE = 16
DEFECT = np.zeros((SIDE, SIDE), np.uint8)
DEFECT[4:8, 4:8] = 255
CAMERA = Camera(fx=1.0, fy=1.0, cx=0.0, cy=0.0, depth_scale=0.001)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_sample(folder: Path, stem: str, mask: np.ndarray | None = None) -> None:
    save(folder / f"rgb/{stem}.png", np.full((SIDE, SIDE, 3), 90, np.uint8))
    y, x = np.mgrid[:SIDE, :SIDE] * 0.001 + 0.001
    write_organized_pc(folder / f"xyz/{stem}.tiff", np.stack([x, y, x + 0.4], axis=-1).astype(np.float32))
    if mask is not None:
        save(folder / f"gt/{stem}.png", mask)


@pytest.fixture
def bracket(tmp_path: Path) -> Path:
    """Class with two training samples, a good and two defective test samples."""
    root = tmp_path / "parts/bracket"
    for stem in ("000", "001"):
        write_sample(root / "train/good", stem)
        write_sample(root / "test/hole", stem, DEFECT)
    write_sample(root / "test/good", "000")
    return root


def rename(root: Path, pattern: str, name: Callable[[Path], str]) -> None:
    for path in sorted(root.glob(pattern)):
        path.rename(path.with_name(name(path)))


def convert(root: Path, pattern: str, suffix: str, **options: object) -> None:
    for path in sorted(root.glob(pattern)):
        Image.open(path).save(path.with_suffix(suffix), **options)
        path.unlink()


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "as published": lambda root: None,
    "ground_truth": lambda root: rename(root, "test/*/gt", lambda path: "ground_truth"),
    "_mask": lambda root: rename(root, "test/*/gt/*", lambda path: f"{path.stem}_mask.png"),
    "_MASK.PNG": lambda root: rename(root, "test/*/gt/*", lambda path: f"{path.stem}_MASK.PNG"),
    "stems that end in _mask": lambda root: rename(root, "*/*/*/*", lambda path: f"{path.stem}_mask{path.suffix}"),
    "masks of stems that end in _mask": lambda root: (
        rename(root, "*/*/*/*", lambda path: f"{path.stem}_mask{path.suffix}"),
        rename(root, "test/*/gt/*", lambda path: f"{path.stem}_mask.png"),
    ),
    "half of ground_truth cleaned into gt": lambda root: (
        (root / "test/hole/ground_truth").mkdir(),
        (root / "test/hole/gt/001.png").rename(root / "test/hole/ground_truth/001_mask.png"),
        save(root / "test/hole/ground_truth/000_mask.png", 255 - DEFECT),
    ),
    "Good": lambda root: rename(root, "*/good", lambda path: "Good"),
    "OK": lambda root: rename(root, "*/good", lambda path: "OK"),
    "normal": lambda root: rename(root, "*/good", lambda path: "normal"),
    **{
        suffix: lambda root, suffix=suffix: convert(root, "*/*/[rg][gt]*/*", suffix)  # type: ignore[misc]
        for suffix in (".bmp", ".webp", ".jpg", ".jpeg", ".tif", ".TIFF")
    },
    "two Unicode forms": lambda root: (
        rename(root, "*/*/rgb/*", lambda path: unicodedata.normalize("NFC", f"ü{path.name}")),
        rename(root, "*/*/xyz/*", lambda path: unicodedata.normalize("NFD", f"ü{path.name}")),
        rename(root, "*/*/gt/*", lambda path: unicodedata.normalize("NFC", f"ü{path.name}")),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_real_datasets(bracket: Path, layout: str) -> None:
    LAYOUTS[layout](bracket)
    train, test = (index_split(bracket, split, BOTH) for split in ("train", "test"))
    assert [files.label for files in train] == [None, None]
    assert sorted(str(files.label) for files in test) == ["0", "1", "1"]
    check_files(train + test, BOTH)
    for files in test:
        assert (bracket / files.path).parent.is_dir(), "a path has the name of the folder"
        if files.label:
            assert files.mask is not None
            share, problem = defect_share(files.mask, defective=True)
            assert (share, problem) == (16 / SIDE**2, "")
    assert not check_split(bracket, "test", BOTH, num_workers=0).problems


@pytest.mark.parametrize(("name", "noted"), [("good", False), ("Good", False), ("ok", True), ("Normal", True)])
def test_folders_that_count_as_good_are_noted(
    bracket: Path, caplog: pytest.LogCaptureFixture, name: str, noted: bool
) -> None:
    (bracket / "train/good").rename(bracket / "train" / name)
    assert len(index_split(bracket, "train", BOTH)) == 2
    check_split(bracket, "train", BOTH, num_workers=0)
    assert caplog.text.count(f"The name of {bracket}/train/{name} marks its samples as good") == noted


def test_empty_folder_beside_one_of_good_samples_is_left_out(bracket: Path) -> None:
    (bracket / "train/ok/rgb").mkdir(parents=True)
    assert len(index_split(bracket, "train", BOTH)) == 2
    (bracket / "train/ok").rename(bracket / "train/empty")
    (bracket / "train/good").rename(bracket / "train/ok")
    (bracket / "train/empty").rename(bracket / "train/good")
    assert len(index_split(bracket, "train", BOTH)) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("test/hole/gt/001.png", "test/hole/gt/001_seg.png"),
            "001.png is missing (found: gt/001_seg.png). Rename",
        ),
        (("test/hole/gt/001.png", "test/hole/gt/001.exr"), "(found: gt/001.exr). Rename or convert"),
        (
            ("test/hole/gt", "test/hole/masks"),
            "000.png, 001.png are missing (found: hole/masks). Rename",
        ),
        (
            ("train/good/xyz/001.tiff", "train/good/xyz/001.npy"),
            "(found: xyz/001.npy). Rename or convert those of the samples to xyz/<stem>.tiff",
        ),
        (
            ("train/good/rgb/001.png", "train/good/rgb/image_001.png"),
            "image_001.tiff is missing (found: xyz/001.tiff). Rename or convert those of the samples to xyz/",
        ),
        (("train/good/rgb/001.png", "lost.png"), "001.png is missing. Restore them, or remove their samples."),
    ],
)
def test_error_for_a_missing_partner_lists_what_is_there(bracket: Path, change: tuple[str, str], expected: str) -> None:
    (bracket / change[0]).rename(bracket / change[1])
    with pytest.raises(InputError, match=re.escape(expected)):
        index_split(bracket, "train" if "train" in change[0] else "test", BOTH)


def test_prediction_lists_files_without_partner(tmp_path: Path) -> None:
    for name in ("rgb/a.png", "rgb/b.png", "xyz/a.tiff", "xyz/b_1.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    problems = [problem for _, problem in find_samples(str(tmp_path / "rgb"), str(tmp_path / "xyz")).incomplete]
    assert "b.png has no cloud of the same stem (unpaired: b_1.tiff). Rename" in problems[0]
    assert "b_1.tiff has no image of the same stem (unpaired: b.png). Rename" in problems[1]


def test_prediction_pairs_unicode_forms_and_keeps_the_paths(tmp_path: Path) -> None:
    image, cloud = tmp_path / unicodedata.normalize("NFC", "ü.png"), tmp_path / unicodedata.normalize("NFD", "ü.tiff")
    image.touch()
    cloud.touch()
    (sample,) = find_samples(f"{tmp_path}/*.png", f"{tmp_path}/*.tiff").samples
    assert (sample.rgb, sample.xyz) == (image, cloud)


def test_a_folder_of_images_and_clouds_holds_no_second_images(tmp_path: Path) -> None:
    for name in ("a.png", "a.tiff"):
        (tmp_path / name).touch()
    assert find_samples(str(tmp_path), str(tmp_path)).samples[0][1:3] == (tmp_path / "a.png", tmp_path / "a.tiff")
    (tmp_path / "a.png").unlink()
    assert find_samples(str(tmp_path), None).samples[0].rgb == tmp_path / "a.tiff"


def test_preprocessing_of_other_layouts_writes_gt(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "parts")
    rename(root, "*/test/*/gt", lambda path: "ground_truth")
    rename(root, "*/test/*/ground_truth/*", lambda path: f"{path.stem}_mask.png")
    rename(root, "*/train/good", lambda path: "OK")
    names = [name.replace("train/good", "train/OK") for name in ALL]
    for expected in ((sorted(names), [], {}), ([], sorted(names), {})):
        summary = preprocessing.preprocess(config_for(root))
        assert (sorted(summary.done), sorted(summary.skipped), summary.failed) == expected
    for files in index_split(root / "bagel", "test", BOTH):
        assert files.mask is None or files.mask.parent.name == "gt"


# Paths that are not regular files

IN_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a broken link": (lambda path: path.symlink_to("/not/mounted/000"), "is missing"),
    "a looping link": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "a pipe": (os.mkfifo, "is a pipe or a device"),
    "a folder": (Path.mkdir, "Is a directory"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "image.png": read_image,
    "header.jpg": image_size,
    "mask.png": lambda path: defect_share(path, True),
    "depth.png": lambda path: read_cloud(path, CAMERA),
    **{f"cloud{suffix}": read_cloud for suffix in (".tiff", ".npy", ".pcd", ".ply")},
    "patches.safetensors": read_header,
    "text.txt": lambda path: read_bytes(path, "record"),
}


@pytest.mark.parametrize("in_place", IN_PLACE)
@pytest.mark.parametrize("name", READERS)
def test_readers_name_a_path_that_is_not_a_file(tmp_path: Path, name: str, in_place: str) -> None:
    put, expected = IN_PLACE[in_place]
    put(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} .*{expected}"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_datasets_and_predictions_name_a_path_that_is_not_a_file(bracket: Path, in_place: str) -> None:
    image = bracket / "train/good/rgb/001.png"
    image.unlink()
    put, expected = IN_PLACE[in_place]
    put(image)
    with pytest.raises(InputError, match=f"001.png .*{expected}"):
        check_files(index_split(bracket, "train", BOTH), BOTH)
    found = find_samples(str(image.parent), None)
    problems = [each.problem for each in map(SampleReader(found.samples, frozenset({"rgb"}), 8).__getitem__, range(2))]
    assert problems[0] == "" and expected in problems[1]


def test_size_limit_of_files(tmp_path: Path) -> None:
    for kind, limit in MAX_BYTES.items():
        with (tmp_path / kind).open("wb") as file:
            file.truncate(limit)
        open_file(tmp_path / kind, kind).close()
        os.truncate(tmp_path / kind, limit + 1)
        with pytest.raises(InputError, match="MB, expected at most"):
            open_file(tmp_path / kind, kind)


# Content of ground truth

ADVICE = "Check the other files of its folder, too."

TRUTHS: dict[str, tuple[np.ndarray, bool, str]] = {
    "right": (DEFECT, True, ""),
    "empty of a defective sample": (DEFECT * 0, True, "marks no defect"),
    "empty of a good sample": (DEFECT * 0, False, ""),
    "of a good sample": (DEFECT, False, "marks 6.25% of a good sample"),
    "inverted": (255 - DEFECT, True, "marks 93.75% of the image"),
    "half": (np.repeat(np.uint8([[0], [255]]), SIDE // 2, axis=0).repeat(SIDE, axis=1), True, ""),
    "in alpha, black": (np.dstack([DEFECT * 0, DEFECT * 0, DEFECT * 0, DEFECT]), True, "in its alpha channel"),
    "in alpha, red": (np.dstack([DEFECT * 0 + 255, DEFECT * 0, DEFECT * 0, DEFECT]), True, "in its alpha channel"),
    "colors with alpha": (np.dstack([DEFECT, DEFECT, DEFECT, DEFECT]), True, ""),
    "opaque": (np.dstack([DEFECT * 0, DEFECT * 0, DEFECT * 0, DEFECT * 0 + 255]), True, "marks no defect"),
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_wrong_ground_truth_is_reported(bracket: Path, caplog: pytest.LogCaptureFixture, truth: str) -> None:
    array, defective, expected = TRUTHS[truth]
    path = save(bracket / f"test/{'hole' if defective else 'good'}/gt/000.png", array)
    with caplog.at_level(logging.WARNING):
        check_files(index_split(bracket, "test", BOTH), BOTH)
    problems = check_split(bracket, "test", BOTH, num_workers=0).problems
    assert [record.getMessage() for record in caplog.records] == [f"{each} {ADVICE}" for each in problems]
    assert len(problems) == bool(expected)
    assert all(problem.startswith(f"{path} ") and expected in problem for problem in problems)


@pytest.mark.parametrize("truth", TRUTHS)
def test_preprocessing_loses_no_ground_truth(tmp_path: Path, caplog: pytest.LogCaptureFixture, truth: str) -> None:
    array, defective, expected = TRUTHS[truth]
    folder = tmp_path / f"data/cookie/test/{'hole' if defective else 'good'}"
    write_scan(folder, "000", 0, with_gt=True)
    path = save(folder / "gt/000.png", array[np.arange(40)[:, None] * SIDE // 40, np.arange(44) * SIDE // 44])
    before = path.read_bytes()
    code = preprocessing.main([str(tmp_path / "data"), "--workers", "1"])
    refused = "alpha" in expected
    assert code == int(refused) and (path.read_bytes() == before) == refused
    assert ("gt/000.png" in caplog.text) == (bool(expected) and not refused)


def test_dataset_check_reports_the_share_of_defect_pixels(bracket: Path) -> None:
    save(bracket / "test/hole/gt/001.png", DEFECT | DEFECT.T[::-1])
    report = check_split(bracket, "test", BOTH, num_workers=0)
    assert report.defect == (16 / SIDE**2, 32 / SIDE**2)
    assert "6.25% to 12.50%" in report.row()
    assert check_split(bracket, "train", BOTH, num_workers=0).defect is None


def test_one_warning_for_each_folder(bracket: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        write_sample(bracket / "test/hole", f"{number:03d}", DEFECT * 0)
    check_files(index_split(bracket, "test", BOTH), BOTH)
    assert len(caplog.records) == 1


# Images


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif"])
def test_image_formats_and_files_cut_short(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", array)
    assert image_size(path) == (40, 60)
    assert read_image(path).shape == (40, 60, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for read in (image_size, read_image):
        with pytest.raises(InputError, match="not a complete"):
            read(path)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about metadata
@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".tif"])
def test_damaged_images_of_other_formats_are_named(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    content = save(tmp_path / f"a{suffix}", rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in (*rng.integers(0, 60, 3), *(len(content) - rng.integers(1, 200, 3))):
            damaged[place] = rng.integers(256)
        (tmp_path / f"a{suffix}").write_bytes(damaged)
        try:
            read_image(tmp_path / f"a{suffix}")
        except InputError as error:
            assert f"a{suffix}" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8, 9])
def test_images_with_an_orientation_are_refused(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", np.zeros((8, 8, 3), np.uint8), exif=exif)
    if orientation in (3, 6, 8):
        with pytest.raises(InputError, match=f"EXIF orientation {orientation}, .* remove the EXIF data"):
            read_image(path)
    else:
        assert read_image(path).shape == (8, 8, 3)


@pytest.mark.parametrize("value", [4095, 4400, 65535])
def test_12_bits_in_16_give_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: int) -> None:
    for name in ("a.png", "b.png"):
        read_image(save(tmp_path / name, np.full((4, 4), value, np.uint16)))
    read_image(save(tmp_path / "c.png", np.full((4, 4), 9, np.uint8)))  # 8 bits may be as dark
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == (
        [str(tmp_path / "a.png")] if value < 4096 else []
    )


SCRIPTS: dict[str, Callable[[list[str]], object]] = {
    "main.py": lambda flags: main.main(["--inspect_dataset", "--dataset_path", "none", *flags]),
    "predict.py": lambda flags: predict.main(["--detector", "none", "--rgb", "none", *flags]),
    "preprocessing.py": lambda flags: preprocessing.main(["none", *flags]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_limit_of_megapixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64_000_000)
    path = save(tmp_path / "a.png", np.zeros((1000, 1001), np.uint8))
    for limit, refused in ((1, True), (2, False)):
        with pytest.raises((SystemExit, InputError)):
            SCRIPTS[script](["--max_megapixels", str(limit)])
        try:
            with open_image(path):
                assert not refused
        except InputError as error:
            assert refused and "more than 1 megapixels" in str(error)
    with pytest.raises((SystemExit, InputError)):
        SCRIPTS[script](["--max_megapixels", "0"])
    assert Image.MAX_IMAGE_PIXELS == 2_000_000


def test_large_images_are_shrunk_by_averaging() -> None:
    image = np.random.default_rng(0).integers(0, 255, (OVERLAY_SIDE // 2, 2 * OVERLAY_SIDE, 3), dtype=np.uint8)
    small = shrink_image(image)
    assert small.shape == (OVERLAY_SIDE // 4, OVERLAY_SIDE, 3)
    blocks = image.reshape(OVERLAY_SIDE // 4, 2, OVERLAY_SIDE, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - blocks).max() <= 1
    assert shrink_image(small) is small


def test_classes_may_end_in_a_slash() -> None:
    assert make_parser().parse_args(["--classes", "bracket/", "bagel"]).classes == ["bracket", "bagel"]

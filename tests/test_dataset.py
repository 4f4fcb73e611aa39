"""Dataset: class lists, index by stem, header checks, decoded samples and loader."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dataset import (
    EYECANDIES_CLASSES,
    MVTEC3D_CLASSES,
    AnomalyDataset,
    SampleFiles,
    check_files,
    find_classes,
    index_split,
    load_samples,
    make_sample,
    original_size,
    read_ahead,
    read_rgb,
)
from utils.errors import InputError
from utils.records import Sample

RGB, XYZ, BOTH = frozenset({"rgb"}), frozenset({"xyz"}), frozenset({"rgb", "xyz"})
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def save_image(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def save_cloud(path: Path, xyz: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, xyz, photometric="rgb" if xyz.ndim == 3 else "minisblack")
    return path


def noise_image(size: tuple[int, int] = (12, 12), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def cloud(size: tuple[int, int] = (12, 12), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.5, (*size, 3)).astype(np.float32)


def write_sample(folder: Path, stem: str, gt: bool = False) -> None:
    save_image(folder / "rgb" / f"{stem}.png", noise_image())
    save_cloud(folder / "xyz" / f"{stem}.tiff", cloud())
    if gt:
        save_image(folder / "gt" / f"{stem}.png", np.eye(12, dtype=np.uint8) * 255)


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Class folder with gaps in its numbers: 3 training, 1 validation, 2 good and 2 + 1 defective test samples."""
    root = tmp_path / "data" / "bracket"
    for stem in ("000", "002", "017"):
        write_sample(root / "train" / "good", stem)
    write_sample(root / "validation" / "good", "001")
    for stem in ("003", "010"):
        write_sample(root / "test" / "good", stem)
    write_sample(root / "test" / "hole", "005", gt=True)
    write_sample(root / "test" / "hole", "001", gt=True)
    write_sample(root / "test" / "cut", "004", gt=True)
    return root


def image_only(tmp_path: Path, name: str, array: np.ndarray, **options: object) -> SampleFiles:
    """Write an image; return a training sample's files with only this image."""
    return SampleFiles("train/good/000", rgb=save_image(tmp_path / name, array, **options))


def load_mask(path: Path, img_size: int = 4) -> np.ndarray:
    sample = AnomalyDataset([SampleFiles("test/hole/000", mask=path, label=1)], RGB, img_size)[0]
    assert sample.mask is not None and sample.mask.dtype == torch.uint8 and sample.mask.shape == (1, img_size, img_size)
    return sample.mask[0].numpy()


# Classes


def test_published_classes_are_found_in_the_order_of_the_list(tmp_path: Path) -> None:
    for name in ("tire", "bagel", "extra", "foam", "Confetto", "CandyCane"):
        (tmp_path / name).mkdir()
    assert find_classes(tmp_path, "mvtec3d", None) == ["bagel", "foam", "tire"]
    assert find_classes(tmp_path, "eyecandies", None) == ["CandyCane", "Confetto"]
    assert len(set(MVTEC3D_CLASSES)) == len(set(EYECANDIES_CLASSES)) == 10


def test_chosen_classes_may_be_any_folder_and_keep_their_order(tmp_path: Path) -> None:
    for name in ("bagel", "screw", "my class"):
        (tmp_path / name).mkdir()
    assert find_classes(str(tmp_path), "mvtec3d", ["screw", "bagel", "my class", "screw"]) == [
        "screw",
        "bagel",
        "my class",
    ]


def test_the_error_for_an_unknown_class_names_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "screw").mkdir()
    (tmp_path / "bracket").mkdir()
    (tmp_path / ".cache").mkdir()
    with pytest.raises(InputError, match=r"'bagle' is not in .* holds bracket, screw. .*--classes"):
        find_classes(tmp_path, "mvtec3d", ["screw", "bagle"])
    with pytest.raises(InputError) as error:
        find_classes(tmp_path, "mvtec3d", None)
    for words in (str(tmp_path), "bracket, screw", "--classes"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp", "a\\b", "../other"])
def test_class_must_be_a_plain_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="plain folder name"):
        find_classes(tmp_path, "mvtec3d", [name])


@pytest.mark.parametrize(("dataset_type", "place"), [("mvtec3d", "mvtec.com"), ("eyecandies", "eyecandies")])
def test_the_error_for_a_missing_dataset_names_its_source(tmp_path: Path, dataset_type: str, place: str) -> None:
    with pytest.raises(InputError, match=rf"absent is not a folder. .*{place}.*--dataset_path"):
        find_classes(tmp_path / "absent", dataset_type, None)


# Index


def test_files_are_paired_by_stem_in_sorted_order(class_folder: Path) -> None:
    train = index_split(class_folder, "train", BOTH)
    assert [files.path for files in train] == ["train/good/000", "train/good/002", "train/good/017"]
    test = index_split(class_folder, "test", BOTH)
    assert [(files.path, files.label) for files in test] == [
        ("test/cut/004", 1),
        ("test/good/003", 0),
        ("test/good/010", 0),
        ("test/hole/001", 1),
        ("test/hole/005", 1),
    ]
    for files in train + test:
        assert files.rgb is not None and files.xyz is not None
        assert files.rgb.stem == files.xyz.stem == Path(files.path).name
        assert files.mask == (files.rgb.parent.parent / "gt" / files.rgb.name if files.label else None)
    assert [files.label for files in train + index_split(class_folder, "validation", BOTH)] == [None] * 4


def test_order_does_not_depend_on_the_directory(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {split: index_split(class_folder, split, BOTH) for split in ("train", "test")}
    real = Path.iterdir

    def reversed_listing(self: Path) -> Iterator[Path]:
        return iter(sorted(real(self), reverse=True))

    monkeypatch.setattr(Path, "iterdir", reversed_listing)
    assert {split: index_split(class_folder, split, BOTH) for split in ("train", "test")} == expected


def test_an_unused_modality_may_be_absent_or_incomplete(class_folder: Path) -> None:
    (class_folder / "train/good/xyz/002.tiff").unlink()
    assert [files.xyz is None for files in index_split(class_folder, "train", RGB)] == [False, True, False]
    for file in (class_folder / "test/hole/rgb").iterdir():
        file.unlink()
    (class_folder / "test/hole/rgb").rmdir()
    hole = index_split(class_folder, "test", XYZ)[3:]
    assert [files.path for files in hole] == ["test/hole/001", "test/hole/005"]
    assert all(files.rgb is None and files.xyz is not None and files.mask is not None for files in hole)


def test_files_are_recognized_by_suffix_in_either_case(class_folder: Path) -> None:
    folder = class_folder / "train/good"
    (folder / "rgb/000.png").rename(folder / "rgb/000.PNG")
    save_image(folder / "rgb/020.JPG", noise_image())
    save_image(folder / "rgb/021.jpeg", noise_image())
    save_cloud(folder / "xyz/020.tif", cloud())
    save_cloud(folder / "xyz/021.TIFF", cloud())
    (folder / "rgb/Thumbs.db").touch()
    (folder / "rgb/._000.png").touch()
    (class_folder / "test/.cache").mkdir()
    stems = [files.path.rpartition("/")[2] for files in index_split(class_folder, "train", BOTH)]
    assert stems == ["000", "002", "017", "020", "021"]
    assert len(index_split(class_folder, "test", BOTH)) == 5


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("xyz/017.tiff", "2 xyz files for 3 samples in .*train/good: 017.tiff is missing. Restore"),
        ("rgb/000.png", "2 rgb files for 3 samples in .*train/good: 000.png is missing. Restore"),
    ],
)
def test_missing_partner_is_named(class_folder: Path, removed: str, message: str) -> None:
    (class_folder / "train/good" / removed).unlink()
    with pytest.raises(InputError, match=message):
        index_split(class_folder, "train", BOTH)


def test_equal_counts_do_not_hide_a_missing_partner(class_folder: Path) -> None:
    (class_folder / "train/good/xyz/017.tiff").rename(class_folder / "train/good/xyz/018.tiff")
    with pytest.raises(InputError, match=r"3 xyz files for 4 samples in .*: 017.tiff is missing"):
        index_split(class_folder, "train", BOTH)


def test_the_error_for_a_missing_folder_lists_few_files(class_folder: Path) -> None:
    folder = class_folder / "train/good"
    for stem in range(100, 110):
        save_image(folder / f"rgb/{stem}.png", noise_image())
    (folder / "xyz").rename(folder / "points")
    with pytest.raises(InputError, match=r"0 xyz files for 13 samples.*000.tiff.*, \.\.\. are missing"):
        index_split(class_folder, "train", BOTH)


def test_a_defective_sample_needs_ground_truth(class_folder: Path) -> None:
    (class_folder / "test/hole/gt/005.png").unlink()
    with pytest.raises(InputError, match=r"1 gt files for 2 samples in .*test/hole: 005.png is missing"):
        index_split(class_folder, "test", RGB)


def test_two_files_of_one_stem_are_refused(class_folder: Path) -> None:
    save_image(class_folder / "train/good/rgb/002.jpg", noise_image())
    with pytest.raises(InputError, match=r"002.jpg and 002.png are two files of one sample. .*; otherwise keep only"):
        index_split(class_folder, "train", BOTH)


def test_splits_without_files_are_refused(class_folder: Path) -> None:
    with pytest.raises(InputError, match=r"No training files in .*other/train/good\. .*rgb and xyz"):
        index_split(class_folder.parent / "other", "train", BOTH)
    with pytest.raises(InputError, match=r"No validation files in .*folder xyz"):
        index_split(class_folder.parent / "other", "validation", XYZ)
    (class_folder.parent / "other/test").mkdir(parents=True)
    with pytest.raises(InputError, match=r"No test samples in .*other/test"):
        index_split(class_folder.parent / "other", "test", RGB)
    (class_folder / "test/combined").mkdir()
    with pytest.raises(InputError, match=r"No test files in .*test/combined"):
        index_split(class_folder, "test", BOTH)


# Header checks


def test_valid_files_pass(class_folder: Path) -> None:
    for split in ("train", "validation", "test"):
        check_files(index_split(class_folder, split, BOTH), BOTH)


def test_checks_read_only_what_is_needed(class_folder: Path) -> None:
    (class_folder / "train/good/rgb/002.png").write_bytes(b"no image")
    samples = index_split(class_folder, "train", XYZ)
    check_files(samples, XYZ)
    with pytest.raises(
        InputError, match=r"002.png is not a complete PNG, JPEG, BMP, WebP or TIFF that can be decoded. Restore"
    ):
        check_files(samples, BOTH)


@pytest.mark.parametrize(
    ("name", "size"),
    [("xyz/001.tiff", (12, 10)), ("gt/001.png", (10, 12)), ("rgb/001.png", (6, 6))],
)
def test_file_sizes_of_one_sample_must_agree(class_folder: Path, name: str, size: tuple[int, int]) -> None:
    path = class_folder / "test/hole" / name
    if path.suffix == ".tiff":
        save_cloud(path, cloud(size))
    else:
        save_image(path, np.zeros((*size, 3), np.uint8))
    with pytest.raises(InputError, match="restore") as error:
        check_files(index_split(class_folder, "test", BOTH), BOTH)
    for found in (str(path), "12 x 12", f"{size[0]} x {size[1]}"):
        assert found in str(error.value)


@pytest.mark.parametrize("name", ["rgb/001.png", "xyz/001.tiff", "gt/001.png"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_header_check_and_reading(class_folder: Path, name: str, kept: float) -> None:
    path = class_folder / "test/hole" / name
    if path.suffix == ".png":  # large enough that half the file still has a valid header
        save_image(path, noise_image((64, 64)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    samples = [files for files in index_split(class_folder, "test", BOTH) if files.path == "test/hole/001"]
    with pytest.raises(InputError, match="001"):
        check_files(samples, BOTH)
    with pytest.raises(InputError, match="001"):
        AnomalyDataset(samples, BOTH, 8)[0]


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    files = image_only(tmp_path, "000.jpg", noise_image((64, 64)))
    check_files([files], RGB)
    assert files.rgb is not None
    content = files.rgb.read_bytes()
    files.rgb.write_bytes(content + b"\0" * 100)  # bytes after the end are accepted
    check_files([files], RGB)
    files.rgb.write_bytes(content[: len(content) // 2])
    for read in (
        lambda: check_files([files], RGB),
        lambda: AnomalyDataset([files], RGB, 8)[0],
        lambda: read_rgb(files),
    ):
        with pytest.raises(InputError, match=r"000.jpg is not a complete"):
            read()


@pytest.mark.parametrize("array", [np.ones((12, 12, 3), np.uint16), np.ones((12, 12), np.float32)])
def test_a_tiff_that_is_no_organized_cloud_is_refused(class_folder: Path, array: np.ndarray) -> None:
    path = save_cloud(class_folder / "train/good/xyz/002.tiff", array)
    samples = index_split(class_folder, "train", BOTH)
    with pytest.raises(InputError, match=str(path)):
        check_files(samples, BOTH)
    with pytest.raises(InputError, match=str(path)):
        AnomalyDataset(samples, BOTH, 8)[1]


def test_an_image_with_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = image_only(tmp_path, "000.png", noise_image())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"000.png has more than 5e-05 megapixels. Scale .*--max_megapixels"):
        check_files([files], RGB)


# Samples


@pytest.mark.golden
def test_sample_equals_the_recorded_one(goldens: Path, golden_samples: dict[str, Sample]) -> None:
    sample = golden_samples["test/hole/000"]
    with np.load(goldens / "stages_bagel_test_hole_000.npz") as golden:
        assert sample.rgb is not None and sample.xyz is not None
        np.testing.assert_array_equal(sample.rgb.numpy(), golden["img"])
        np.testing.assert_array_equal(sample.xyz.numpy(), golden["resized_pc"])
        valid = np.flatnonzero((sample.xyz.numpy() != 0).all(axis=0))
        np.testing.assert_array_equal(valid, golden["nonzero_indices"])
        assert sample.mask is not None and sample.label == 1
        np.testing.assert_array_equal(sample.mask.numpy(), golden["gt"])
    assert golden_samples["train/good/000"].mask is None
    assert golden_samples["train/good/000"].label is None


@pytest.mark.golden
def test_recorded_dataset_is_indexed_completely(goldens: Path) -> None:
    root = goldens / "data"
    assert find_classes(root, "mvtec3d", None) == ["bagel"]
    counts = {}
    for split in ("train", "test"):
        samples = index_split(root / "bagel", split, BOTH)
        check_files(samples, BOTH)
        counts[split] = len(samples)
        full_size = {files.path for files in samples if original_size(files) == (400, 400)}
        assert full_size == ({"test/hole/000"} if split == "test" else set())
    assert counts == {"train": 6, "test": 10}


def test_real_images_without_clouds(real_data: Path) -> None:
    root = real_data / "mvtec3d_tire_rgb"
    assert find_classes(root, "mvtec3d", None) == ["tire"]
    splits = {split: index_split(root / "tire", split, RGB) for split in ("train", "validation", "test")}
    assert [len(samples) for samples in splits.values()] == [42, 6, 39]
    for samples in splits.values():
        check_files(samples, RGB)
    with pytest.raises(InputError, match="0 xyz files for 42 samples"):
        index_split(root / "tire", "train", BOTH)

    values: set[int] = set()
    for files, sample in zip(splits["test"], load_samples(AnomalyDataset(splits["test"], RGB, 64), 2), strict=True):
        assert files.mask is not None and sample.mask is not None and sample.rgb is not None
        ids = np.asarray(Image.open(files.mask))
        values |= set(np.unique(ids).tolist())
        assert original_size(files) == ids.shape == (300, 400)
        image = Image.fromarray(np.where(ids, 255, 0).astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(sample.mask[0].numpy(), np.asarray(image) > 127)
        assert sample.path == files.path and sample.xyz is None and sample.rgb.shape == (3, 64, 64)
        assert sample.label == int("/good/" not in sample.path) == int(ids.any())
    assert values == {0, 253, 254, 255}


def test_rgb_is_resized_and_normalized_like_torchvision(class_folder: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose(
        [
            transforms.Resize((20, 20), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()),
        ]
    )
    files = index_split(class_folder, "train", RGB)[1]
    for size in ((50, 70), (9, 20), (20, 20)):
        save_image(files.rgb, noise_image(size))
        sample = AnomalyDataset([files], RGB, 20)[0]
        torch.testing.assert_close(sample.rgb, reference(Image.open(files.rgb).convert("RGB")), rtol=0, atol=1e-6)
        assert sample.xyz is None


def checked_rgb(files: SampleFiles) -> np.ndarray:
    """RGB image of a sample, after a check that the sample has the same pixels."""
    image = read_rgb(files)
    sample = AnomalyDataset([files], RGB, image.shape[0])[0]
    np.testing.assert_array_equal(((sample.rgb * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy(), image)
    return image


def test_a_16_bit_gray_image_is_scaled_not_clipped(tmp_path: Path) -> None:
    gray = np.array([[0, 256, 257], [5140, 32896, 40000], [65278, 65534, 65535]], dtype=np.uint16)
    image = checked_rgb(image_only(tmp_path, "000.png", gray))
    assert image.dtype == np.uint8 and image.shape == (3, 3, 3)
    expected = np.rint(gray / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1"])
def test_other_image_modes_become_rgb_without_transparency(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(noise_image((8, 8))).convert(mode.rstrip("A"))
    expected = np.asarray(image.convert("RGB"))
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    image.save(tmp_path / "000.png")
    np.testing.assert_array_equal(checked_rgb(SampleFiles("x", rgb=tmp_path / "000.png")), expected)


def test_a_palette_image_with_transparency_becomes_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(noise_image((8, 8))).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "000.png", transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(checked_rgb(SampleFiles("x", rgb=tmp_path / "000.png")), expected)


def test_missing_points_are_exactly_zero(tmp_path: Path) -> None:
    xyz = cloud((6, 6))
    xyz[0, 0] = np.nan
    xyz[1, 1, 2] = np.inf
    xyz[2, 2, 0] = -np.inf
    xyz[3, 3, 1] = 0
    xyz[4, 4] = 0
    files = SampleFiles("train/good/000", xyz=save_cloud(tmp_path / "000.tiff", xyz))
    sample = AnomalyDataset([files], XYZ, 6)[0]
    expected = cloud((6, 6)).transpose(2, 0, 1).copy()
    expected[:, range(5), range(5)] = 0
    assert sample.rgb is None and sample.xyz is not None and sample.xyz.dtype == torch.float32
    np.testing.assert_array_equal(sample.xyz.numpy(), expected)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_cloud_without_a_valid_point_is_refused(tmp_path: Path, value: float) -> None:
    xyz = np.full((6, 6, 3), value, np.float32)
    xyz[..., 0] = 0.3
    files = SampleFiles("train/good/000", xyz=save_cloud(tmp_path / "000.tiff", xyz))
    with pytest.raises(InputError, match=r"000.tiff has no valid point .*Restore"):
        AnomalyDataset([files], XYZ, 4)[0]


def test_a_sample_from_arrays_equals_the_sample_from_files(tmp_path: Path) -> None:
    image, xyz = noise_image((20, 30)), cloud((20, 30))
    xyz[3, 4] = (np.nan, 0.1, np.inf)
    files = image_only(tmp_path, "000.png", image)._replace(xyz=save_cloud(tmp_path / "000.tiff", xyz))
    expected = AnomalyDataset([files], BOTH, 16)[0]
    sample = make_sample("007", image, xyz.astype(np.float64), 16)
    assert (sample.path, sample.mask, sample.label) == ("007", None, None)
    for name in ("rgb", "xyz"):
        found = getattr(sample, name)
        assert found.is_contiguous() and torch.equal(found, getattr(expected, name))
    assert make_sample("007", None, xyz, 16).rgb is None
    assert make_sample("007", image, None, 16).xyz is None


@pytest.mark.filterwarnings("error")
def test_making_a_sample_does_not_change_the_arrays() -> None:
    image, xyz = noise_image((16, 16)), cloud((16, 16)).astype(np.float64)
    xyz[2, 3], xyz[4, 4] = np.nan, 1e300
    before = image.copy(), xyz.copy()
    sample = make_sample("007", image, xyz, 16)
    assert sample.xyz is not None
    assert (sample.xyz[:, 2, 3] == 0).all() and (sample.xyz[:, 4, 4] == 0).all()
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(xyz, before[1])


@pytest.mark.parametrize(
    ("rgb", "xyz", "expected"),
    [
        (np.zeros((8, 8), np.uint8), None, ["image of 007", "8 x 8 uint8", "Convert it to RGB"]),
        (np.zeros((8, 8, 4), np.uint8), None, ["8 x 8 x 4 uint8"]),
        (np.zeros((8, 8, 3), np.float32), None, ["8 x 8 x 3 float32"]),
        (None, np.ones((8, 8), np.float32), ["point cloud of 007", "8 x 8, expected H x W x 3"]),
        (None, np.ones((8, 8, 3), np.int16), ["int16 numbers"]),
        (None, np.zeros((8, 8, 3), np.float32), ["007 has no valid point"]),
    ],
)
def test_unfit_arrays_are_refused(rgb: np.ndarray | None, xyz: np.ndarray | None, expected: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make_sample("007", rgb, xyz, 4)
    assert all(words in str(error.value) for words in expected)


IDS = np.array([[0, 1, 0, 2], [0, 0, 3, 0], [255, 0, 0, 0], [0, 254, 253, 0]], dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_any_nonzero_mask_value_is_a_defect(tmp_path: Path, dtype: type) -> None:
    path = save_image(tmp_path / "000.png", IDS.astype(dtype))
    with Image.open(path) as image:
        assert image.mode == {np.uint8: "L", np.uint16: "I;16", bool: "1"}[dtype]
    np.testing.assert_array_equal(load_mask(path), IDS != 0)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_color_mask_marks_nonzero_colors(tmp_path: Path, channels: int) -> None:
    colors = np.zeros((4, 4, channels), np.uint8)
    colors[..., 2] = IDS  # one channel is enough; alpha is ignored
    colors[..., 3:] = 255
    np.testing.assert_array_equal(load_mask(save_image(tmp_path / "000.png", colors)), IDS != 0)


@pytest.mark.parametrize(
    ("palette", "background"),
    [
        ([(0, 0, 0), (255, 0, 0), (0, 255, 0)], 0),  # class ids in colors
        ([(0, 0, 0), (0, 0, 0), (0, 0, 0)], 0),  # class ids without colors
        ([(255, 255, 255), (0, 0, 0), (9, 9, 9)], 1),  # a black-and-white image that a writer reduced to a palette
        ([(0, 0, 128), (255, 0, 0), (0, 255, 0)], 0),  # class ids with a background color
    ],
)
def test_background_of_a_palette_mask_is_black_or_index_zero(
    tmp_path: Path, palette: list[tuple[int, int, int]], background: int
) -> None:
    ids = IDS % 3
    image = Image.fromarray(ids)
    image.putpalette(list(itertools.chain.from_iterable(palette)))
    image.save(tmp_path / "000.png")
    with Image.open(tmp_path / "000.png") as saved:
        assert saved.mode == "P"
    np.testing.assert_array_equal(load_mask(tmp_path / "000.png"), ids != background)


@pytest.mark.parametrize("size", [(4, 4), (7, 11), (30, 40), (3, 3)])
def test_a_mask_is_resized_like_the_reference(tmp_path: Path, size: tuple[int, int]) -> None:
    truth = (np.random.default_rng(3).random(size) > 0.6).astype(np.uint8) * 255
    reference = np.asarray(Image.fromarray(truth).resize((8, 8), Image.Resampling.NEAREST)) / 255 > 0.5
    np.testing.assert_array_equal(load_mask(save_image(tmp_path / "000.png", truth), 8), reference)


def test_a_good_sample_without_ground_truth_has_an_empty_mask(class_folder: Path) -> None:
    samples = index_split(class_folder, "test", BOTH)
    sample = AnomalyDataset(samples, BOTH, 16)[1]
    assert sample.path == "test/good/003" and sample.label == 0
    assert sample.mask is not None and sample.mask.dtype == torch.uint8 and sample.mask.shape == (1, 16, 16)
    assert not sample.mask.any()


def test_original_size_and_image_of_the_files(tmp_path: Path) -> None:
    mask = save_image(tmp_path / "gt.png", np.zeros((5, 7), np.uint8))
    rgb = save_image(tmp_path / "rgb.png", noise_image((6, 8)))
    xyz = save_cloud(tmp_path / "xyz.tiff", cloud((3, 9)))
    assert original_size(SampleFiles("x", rgb, xyz, mask)) == (5, 7)
    assert original_size(SampleFiles("x", rgb, xyz)) == (6, 8)
    assert original_size(SampleFiles("x", xyz=xyz)) == (3, 9)
    assert read_rgb(SampleFiles("x", xyz=xyz)) is None
    np.testing.assert_array_equal(read_rgb(SampleFiles("x", rgb)), noise_image((6, 8)))


def test_a_damaged_header_names_the_file(tmp_path: Path) -> None:
    """Every exception that PIL raises for a damaged header becomes an InputError."""
    files = image_only(tmp_path, "000.png", noise_image())
    assert files.rgb is not None
    content = files.rgb.read_bytes()
    rng = np.random.default_rng(0)
    damaged = 0
    for _ in range(300):
        broken = bytearray(content)
        for place in rng.integers(0, 60, 4):
            broken[place] = rng.integers(256)
        files.rgb.write_bytes(broken)
        try:
            read_rgb(files)
        except InputError as error:
            assert "000.png" in str(error)
            damaged += 1
    assert damaged > 200


# Loader


class CountingDataset:
    """Stand-in for a dataset whose items are their index; later ones can be ready earlier, and one may fail."""

    def __init__(self, length: int, broken: int = -1) -> None:
        self.length, self.broken = length, broken
        self.started: set[int] = set()
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.started.add(index)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.004 * (3 - index % 4))
        if index == self.broken:
            raise InputError(f"{index}.png is broken")
        return index


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("load_samples")]


@pytest.mark.parametrize("num_workers", [0, 1, 3, 50])
@pytest.mark.parametrize("length", [0, 1, 23])
def test_samples_come_in_order(num_workers: int, length: int) -> None:
    dataset = CountingDataset(length)
    assert list(load_samples(dataset, num_workers)) == list(range(length))
    assert (dataset.threads <= {threading.main_thread().name}) == (num_workers == 0 or length == 0)
    assert not loader_threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_raised_unchanged_at_its_sample(num_workers: int) -> None:
    samples = load_samples(CountingDataset(50, broken=5), num_workers)
    assert list(itertools.islice(samples, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"^5.png is broken$"):
        next(samples)
    assert not loader_threads()


def test_prefetching_is_bounded_and_ends_with_the_iterator() -> None:
    dataset = CountingDataset(100)
    samples = load_samples(dataset, 2)
    for taken in range(1, 6):
        next(samples)
        deadline = time.monotonic() + 10
        while len(dataset.started) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03)
        assert len(dataset.started) == taken + 4
    samples.close()
    assert not loader_threads()
    assert len(dataset.started) <= 5 + 4


def test_samples_do_not_depend_on_the_number_of_threads(class_folder: Path) -> None:
    dataset = AnomalyDataset(index_split(class_folder, "test", BOTH), BOTH, 16)
    for plain, threaded in zip(load_samples(dataset, 0), load_samples(dataset, 3), strict=True):
        assert plain.path == threaded.path and plain.label == threaded.label
        for name in ("rgb", "xyz", "mask"):
            assert torch.equal(getattr(plain, name), getattr(threaded, name))


def test_read_ahead_yields_items_in_order_and_produces_the_next_meanwhile() -> None:
    started = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        started.set()
        yield 2

    ahead = read_ahead(items())
    assert next(ahead) == 1
    assert started.wait(timeout=30)  # before the second item is asked for
    assert list(ahead) == [2]
    assert list(read_ahead([])) == []


def test_read_ahead_raises_errors_in_their_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("the second cannot be read")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(InputError, match="second"):
        next(ahead)


def test_read_ahead_ends_its_thread_when_closed_early() -> None:
    ahead = read_ahead(iter(range(100)))
    assert next(ahead) == 0
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]

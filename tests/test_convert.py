"""Conversion of recordings to dataset files: every format, images, bad files, and files that exist already."""

import json
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import tifffile
from cleaning_runs import call_script, contents, raw_cloud
from PIL import Image

from dataset import index_split
from utils import convert, preprocessing
from utils.scans.depth_camera import Camera, back_project
from utils.scans.organized_pc import read_organized_pc, write_organized_pc

HEIGHT, WIDTH = raw_cloud(0).shape[:2]
CAMERA = {"fx": 600.0, "fy": 610.0, "cx": 20.5, "cy": 21.5, "depth_scale": 0.001}
OUTPUT = "parts/bracket/train/good"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder, so that paths are relative as on a command line."""
    monkeypatch.chdir(tmp_path)


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def write_image(path: Path | str, pixels: np.ndarray) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_ply(path: Path | str, xyz: np.ndarray) -> None:
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {xyz.size // 3}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    Path(path).write_bytes(header.encode() + xyz.astype("<f4").tobytes())


def write_pcd(path: Path | str, xyz: np.ndarray) -> None:
    size = f"WIDTH {xyz.shape[1]}\nHEIGHT {xyz.shape[0]}\n"
    header = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\n{size}DATA binary\n"
    Path(path).write_bytes(header.encode() + xyz.astype("<f4").tobytes())


def write_scans(suffix: str = ".npy", count: int = 2) -> Path:
    """Clouds in meters with an image beside each."""
    for seed in range(count):
        path = Path("scans") / f"{seed:03d}{suffix}"
        write_image(path.with_suffix(".png"), image_of(seed))
        {".npy": np.save, ".ply": write_ply, ".pcd": write_pcd}[suffix](path, raw_cloud(seed))
    return Path("scans")


def run(*flags: object, code: int = 0, output: str = OUTPUT) -> tuple[list[str], list[str]]:
    """Convert; returns the lines on stdout and stderr."""
    done = call_script(convert.main, *flags, "--output", output)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def converted(stem: str = "000", output: str = OUTPUT) -> np.ndarray:
    return read_organized_pc(Path(output) / "xyz" / f"{stem}.tiff")


def image_written(stem: str = "000") -> np.ndarray:
    return np.asarray(Image.open(Path(OUTPUT) / "rgb" / f"{stem}.png"))


# Formats


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("000.ply", write_ply),  # whose size is that of the image
        ("000.pcd", write_pcd),
        ("000.npy", np.save),
        ("000.tiff", lambda path, xyz: write_organized_pc(path, xyz)),
    ],
)
@pytest.mark.parametrize(("unit", "scale"), [("m", 1), ("mm", 1000), ("cm", 100)])
def test_clouds_become_meters(name: str, write: Callable[[Path, np.ndarray], None], unit: str, scale: int) -> None:
    write_image("scans/000.png", image_of(0))
    xyz = raw_cloud(0)
    xyz[3, 4] = np.nan
    xyz[5, 6, 2] = -9999 / scale  # marks a pixel without a measurement
    write(Path("scans") / name, xyz * scale)
    run("scans", "--xyz_unit", unit, "--missing_value=-9999")
    xyz[3, 4] = xyz[5, 6] = 0
    stored = tifffile.imread(f"{OUTPUT}/xyz/000.tiff")
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored, xyz, rtol=1e-6)
    np.testing.assert_array_equal(image_written(), image_of(0))


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".npy"])
def test_depth_images_are_back_projected(suffix: str) -> None:
    depth = np.random.default_rng(0).integers(400, 420, (HEIGHT, WIDTH)).astype(np.uint16)
    Path("camera.json").write_text(json.dumps(CAMERA))
    write_image("color/000.jpg", image_of(0))
    Path("depth").mkdir()
    writers = {".png": write_image, ".tiff": tifffile.imwrite, ".npy": np.save}
    writers[suffix](f"depth/000{suffix}", depth)
    run("depth", "--rgb", "color", "--intrinsics", "camera.json")
    np.testing.assert_array_equal(converted(), back_project(depth, Camera(**CAMERA)))


def test_the_result_is_a_dataset_that_can_be_cleaned() -> None:
    write_scans(".ply")
    stdout, stderr = run("scans")
    assert not stderr
    assert stdout[0] == f"converted 2 of 2 samples to {OUTPUT}"
    assert stdout[-1].endswith("python utils/preprocessing.py parts")
    assert [each.path for each in index_split(Path("parts/bracket"), "train", frozenset({"rgb", "xyz"}))] == [
        "train/good/000",
        "train/good/001",
    ]
    assert call_script(preprocessing.main, "parts", "--workers", 1).returncode == 0


def test_the_next_command_is_quoted() -> None:
    write_scans()
    stdout, _ = run("scans", output="my parts/bracket/test/dent")
    assert stdout[-1].endswith("python utils/preprocessing.py 'my parts'")


# Sources and images


def test_files_folders_and_patterns_are_sources() -> None:
    write_scans(".ply", 3)
    Path("more").mkdir()
    for path, place in (("scans/001", "more/001"), ("scans/002", "more/a002")):
        for suffix in (".ply", ".png"):
            Path(path + suffix).rename(place + suffix)
    stdout, _ = run("scans/", "more/001.ply", "more/a*.ply", "scans/000.ply")
    assert stdout[0] == f"converted 3 of 3 samples to {OUTPUT}"
    assert sorted(path.name for path in Path(OUTPUT, "rgb").iterdir()) == ["000.png", "001.png", "a002.png"]


def test_an_unquoted_pattern_names_the_images_as_well() -> None:
    write_scans(".ply", 1)
    stdout, _ = run("scans/000.png", "scans/000.ply")
    assert stdout[0] == f"converted 1 of 1 samples to {OUTPUT}"


def test_one_image_and_one_cloud_need_no_common_name() -> None:
    write_image("color.png", image_of(0))
    np.save("cloud.npy", raw_cloud(0))
    run("cloud.npy", "--rgb", "color.png")
    np.testing.assert_array_equal(converted("color"), raw_cloud(0))


def test_clouds_without_images_are_converted_alone() -> None:
    write_image("scans/preview.png", image_of(0))
    np.save("scans/000.npy", raw_cloud(0))
    stdout, _ = run("scans")
    assert "no images beside the clouds" in stdout[1]
    assert not Path(OUTPUT, "rgb").exists()


def test_names_in_two_unicode_forms_match() -> None:
    Path("scans").mkdir()
    np.save(f"scans/{normalize('NFD', 'ä')}.npy", raw_cloud(0))
    write_image(f"scans/{normalize('NFC', 'ä')}.png", image_of(0))
    for _ in range(2):
        run("scans")
    assert len(list(Path(OUTPUT, "rgb").iterdir())) == 1


@pytest.mark.parametrize("factor", [2, 3])
def test_a_larger_image_is_scaled_to_the_pixels_of_the_cloud(factor: int, caplog: pytest.LogCaptureFixture) -> None:
    write_scans(count=1)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:20, 22:] = 255
    write_image("scans/000.png", pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    run("scans")
    (message,) = caplog.messages
    assert f"has {factor * HEIGHT} x {factor * WIDTH} pixels (H x W), its cloud {HEIGHT} x {WIDTH}" in message
    assert (image_written() > 127).tolist() == (pixels > 127).tolist()


# Bad files


def test_bad_files_are_reported_in_a_line_each_and_the_others_converted() -> None:
    write_scans(".ply", 6)
    write_ply("scans/001.ply", raw_cloud(1)[1:])  # without its missing points
    Path("scans/002.ply").write_bytes(Path("scans/002.ply").read_bytes()[:-1])
    write_image("scans/003.png", image_of(3)[:20])
    Path("scans/004.png").unlink()
    write_ply("scans/005.ply", raw_cloud(5) * 1000)
    stdout, stderr = run("scans", code=1)
    assert stdout[0] == f"converted 1 of 6 samples to {OUTPUT}"
    expected = {
        "001": "holds 1716 points, expected 40 x 44, one for each pixel",
        "002": "holds 1759 points, but its header says 1760",
        "003": "holds 1760 points, expected 20 x 44",
        "004": "004.ply has no image of the same stem",
        "005": "Give --xyz_unit mm or cm",
    }
    lines = sorted(stderr)
    for line, (name, words) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"convert.py: {name} could not be converted: ")
        assert words in line
    assert sorted(path.name for path in Path(OUTPUT).rglob("*.*")) == ["000.png", "000.tiff"]


def test_an_image_of_another_view_is_refused() -> None:
    write_scans(count=1)
    write_image("scans/000.png", np.zeros((HEIGHT, 2 * WIDTH, 3), np.uint8))
    stdout, stderr = run("scans", code=1)
    assert "expected the same view" in stderr[0]
    assert stdout == [f"converted 0 of 1 samples to {OUTPUT}"]
    assert not list(Path(OUTPUT).rglob("*.*"))


def test_sources_of_one_name_are_refused() -> None:
    write_scans(count=2)
    Path("more").mkdir()
    np.save("more/001.npy", raw_cloud(5))
    stdout, stderr = run("scans", "more", code=1)
    assert stdout[0] == f"converted 1 of 2 samples to {OUTPUT}"
    assert "scans/001.npy and more/001.npy share a stem" in stderr[0]


@pytest.mark.parametrize("copy", ["000.jpg", "000.webp"])
def test_two_images_of_one_name_are_refused(copy: str) -> None:
    write_scans(count=1)
    write_image(f"scans/{copy}", image_of(1))
    _, stderr = run("scans", code=2)
    assert f"scans/{copy}" in stderr[0] and "share a stem" in stderr[0]
    run("scans", "--rgb", "scans/*.png")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["nothing"], "SOURCE 'nothing' names no file"),
        (["scans", "typo*.ply"], "SOURCE 'typo*.ply' names no file"),
        (["scans/*.png"], "SOURCE scans/*.png names depth images. Give the intrinsics"),
        (["scans", "--rgb", "nothing"], "--rgb 'nothing' names no file"),
        (["scans", "--intrinsics", "nothing.json"], "nothing.json is missing"),
        (["scans/*.npy", "--intrinsics", "camera.json"], "--intrinsics only applies to depth images"),
        (["depth", "--intrinsics", "camera.json", "--xyz_unit", "mm"], "--xyz_unit does not apply to depth images"),
        (["scans", "--output", "parts"], "--output parts is not in the folder of a split"),
        (["scans", "--output", "/train/good"], "--output /train/good is not in the folder of a split"),
    ],
)
def test_bad_arguments_end_the_run_before_it_starts(flags: list[str], expected: str) -> None:
    write_scans()
    write_image("depth/000.png", np.full((HEIGHT, WIDTH), 500, np.uint16))
    Path("camera.json").write_text(json.dumps(CAMERA))
    done = call_script(convert.main, "--output", OUTPUT, *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert not Path("parts").exists()


# Files that exist already


def test_a_repeated_run_changes_nothing() -> None:
    write_scans()
    run("scans")
    times = {path: path.stat().st_mtime_ns for path in Path(OUTPUT).rglob("*.*")}
    stdout, _ = run("scans")
    assert stdout[0] == f"converted 2 of 2 samples to {OUTPUT}"
    assert times == {path: path.stat().st_mtime_ns for path in Path(OUTPUT).rglob("*.*")}


def test_a_missing_half_of_a_sample_is_added() -> None:
    write_scans(count=1)
    run("scans")
    Path(OUTPUT, "rgb/000.png").unlink()
    run("scans")
    np.testing.assert_array_equal(image_written(), image_of(0))


@pytest.mark.parametrize("old", ["xyz/000.tiff", "xyz/000.tif", "rgb/000.jpg", "rgb/000.png"])
def test_other_files_of_the_same_name_are_kept(old: str) -> None:
    write_scans()
    path = Path(OUTPUT) / old
    if old.startswith("xyz"):
        write_organized_pc(path, raw_cloud(7))
    else:
        write_image(path, image_of(7))
    before = contents(Path(OUTPUT))
    stdout, stderr = run("scans", code=1)
    assert stdout[0] == f"converted 1 of 2 samples to {OUTPUT}"
    assert f"{path} exists and differs from the new file. Remove it, rename scans/000.npy" in stderr[0]
    assert {name: contents(Path(OUTPUT))[name] for name in before} == before
    assert not [name for name in contents(Path(OUTPUT)) if "000" in name and name != old]


def test_a_source_is_never_replaced() -> None:
    write_organized_pc(Path(OUTPUT, "xyz/000.tiff"), raw_cloud(0) * 1000)
    write_image(Path(OUTPUT, "rgb/000.png"), image_of(0))
    before = contents(Path(OUTPUT))
    _, stderr = run(f"{OUTPUT}/xyz", "--rgb", f"{OUTPUT}/rgb", "--xyz_unit", "mm", code=1)
    assert "exists and differs" in stderr[0]
    assert contents(Path(OUTPUT)) == before

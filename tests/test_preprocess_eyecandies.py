"""Eyecandies conversion: geometry, agreement with published results, errors of single samples, and killed runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from cleaning_runs import ROOT, contents, run_killed_at, run_script, unprivileged
from PIL import Image

from dataset import AnomalyDataset, index_split
from utils import preprocess_eyecandies as eyecandies
from utils.cleaning.scan_processing import Summary, report
from utils.errors import InputError
from utils.preprocess_eyecandies import (
    Config,
    background,
    meters_of,
    organized_cloud,
    parse_args,
    preprocess,
    unproject,
)
from utils.records import CloudForm
from utils.scans.organized_pc import read_organized_pc

HEIGHT, WIDTH = 48, 64  # not square, to detect swapped rows and columns
TILT = np.deg2rad(-40)  # of the table about x; its far end is higher in the image, and y points down
BOTH = frozenset({"rgb", "xyz"})


def rotation(axis: int, angle: float) -> np.ndarray:
    """Rotation matrix (3, 3) about an axis, by the right-hand rule."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[second, first] = np.sin(angle)
    matrix[first, second] = -np.sin(angle)
    return matrix


def camera_pose() -> np.ndarray:
    """Pose turned about all three axes, so its inverse differs from a transpose with a negated shift."""
    pose = np.eye(4)
    pose[:3, :3] = rotation(2, 0.1) @ rotation(1, 0.05) @ rotation(0, -0.08)
    pose[:3, 3] = 0.13, -0.07, 0.1
    return pose


class View(NamedTuple):
    """Rendered scene, all arrays (H, W, ...) float64 in meters."""

    points: np.ndarray  # (H, W, 3) in the frame of the pose
    on_table: np.ndarray  # (x, y, z) with y down from the table, z along it, 0 at the middle of the last row
    depth: np.ndarray  # (H, W)


Box = tuple[float, float, float, float, float]  # x from, to; z from, to; height

SMALL_OBJECT: Box = (-0.05, 0.05, -0.06, 0.06, 0.08)


def render(boxes: list[Box], pose: np.ndarray, focal_length: float) -> View:
    """Follow the ray of each pixel to the table, or to the first box on its way.

    The boxes stand on the table around its point 3 m in front of the camera. The rays do not use the projection
    matrix of the tested code: they start at the camera's center, pass through the pixel and are turned by the
    transposed rotation.
    """
    to_table = rotation(0, TILT)
    u, v = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    in_camera = np.stack(
        [(u - WIDTH / 2) / focal_length, (v - HEIGHT / 2) / focal_length, np.ones((HEIGHT, WIDTH))], -1
    )
    center = -pose[:3, :3].T @ pose[:3, 3]
    rays = in_camera @ pose[:3, :3]
    start, direction = -3 * to_table @ pose[2, :3], rays @ to_table.T
    depth = -start[1] / direction[..., 1]
    assert (depth > 0).all(), "every pixel sees the table"
    for x0, x1, z0, z1, height in boxes:
        to_sides = [(np.array(corner) - start) / direction for corner in ((x0, -height, z0), (x1, 0, z1))]
        enter = np.minimum(*to_sides).max(-1)
        leave = np.maximum(*to_sides).min(-1)
        depth = np.where((enter < leave) & (enter > 0), np.minimum(depth, enter), depth)
    points = center + depth[..., None] * rays
    from_last = points - [0, 1, 1] * points[-1, WIDTH // 2]  # x stays that of the pose
    return View(points, from_last @ to_table.T, depth)


def write_sample(
    folder: Path,
    number: str,
    seed: int = 0,
    defective: bool = False,
    holes: np.ndarray | None = None,
    focal_length: float = eyecandies.FOCAL_LENGTH,
    boxes: list[Box] | None = None,
) -> View:
    """Write a sample as published; `seed` makes images, height of the part and limits of the depth its own.

    Args:
        folder: <Class>/<split>/data.
        holes: (H, W) bool, pixels whose depth is missing.
    """
    rng = np.random.default_rng(seed)
    view = render(boxes or [(*SMALL_OBJECT[:4], rng.uniform(0.06, 0.1))], camera_pose(), focal_length)
    low, high = view.depth.min() - rng.uniform(0.01, 0.1), view.depth.max() + rng.uniform(0.01, 0.1)
    stored = np.round((view.depth - low) / (high - low) * 65535).astype(np.uint16)
    if holes is not None:
        stored[holes] = 0
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stored).save(folder / f"{number}_depth.png")
    limits = {"normalization": {"max": float(high), "min": float(low)}}
    (folder / f"{number}_info_depth.yaml").write_text(yaml.safe_dump(limits))
    np.savetxt(folder / f"{number}_pose.txt", camera_pose())
    for light in range(6):
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}_image_{light}.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:24, 30:37] = 255 * defective
    Image.fromarray(mask).save(folder / f"{number}_mask.png")
    return view


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """One class as published: numbers in train have three digits, those in test_public two."""
    root = tmp_path / "published"
    write_sample(root / "Confetto/train/data", "000", 0)
    write_sample(root / "Confetto/test_public/data", "00", 1)
    write_sample(root / "Confetto/test_public/data", "01", 2, defective=True)
    return root


ALL = ["Confetto/test/bad/001", "Confetto/test/good/000", "Confetto/train/good/000"]
WRITTEN = [
    *(f"Confetto/test/bad/{name}" for name in ("gt/001.png", "rgb/001.png", "xyz/001.tiff")),
    *(f"Confetto/test/good/{name}" for name in ("gt/000.png", "rgb/000.png", "xyz/000.tiff")),
    *(f"Confetto/train/good/{name}" for name in ("rgb/000.png", "xyz/000.tiff")),
    "preprocessing.json",
]


def run(root: Path, target: Path, *flags: object) -> int:
    """Run the script in this process: exit code 0 or 1, or an InputError where it would exit with 2."""
    argv = ["--dataset_path", str(root), "--target_dir", str(target), "--workers", "1", *map(str, flags)]
    return report(preprocess(parse_args(argv)))


def convert(root: Path, target: Path, classes: list[str] | None = None) -> Summary:
    return preprocess(Config(root, target, classes, light=4, workers=1))


# ---- geometry


def test_meters_of_stored_depth() -> None:
    stored = np.array([[0, 1, 13107], [32768, 65535, 0]], np.uint16)
    expected = [[0, 2 + 3 / 65535, 2.6], [2 + 3 * 32768 / 65535, 5, 0]]
    np.testing.assert_allclose(meters_of(stored, 2, 5), expected, rtol=1e-14)
    assert meters_of(stored.astype(np.float64), 2, 5).dtype == np.float64
    expected[1][1] = 0
    np.testing.assert_allclose(meters_of(stored, 2, 5, missing=65535), expected, rtol=1e-14)


def unproject_pixel_by_pixel(depth: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Plain form: the equation of Bonfiglioli et al. for each pixel."""
    height, width = depth.shape
    camera = np.diag([711.11, 711.11, 1.0, 1.0])
    camera[:2, 2] = width / 2, height / 2
    points = np.full((height, width, 3), np.nan)
    for row in range(height):
        for column in range(width):
            if depth[row, column] != 0:
                seen = np.array([column, row, 1, 1 / depth[row, column]])
                points[row, column] = depth[row, column] * (np.linalg.inv(camera @ pose) @ seen)[:3]
    return points


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (11, 4)])
def test_unproject_equals_its_plain_form(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    pose = rng.normal(size=(4, 4))  # invertible, with a general last row
    depth = rng.uniform(0.5, 6, shape)
    if depth.size > 1:
        depth[0, -1] = 0
    expected = unproject_pixel_by_pixel(depth, pose)
    np.testing.assert_allclose(unproject(depth, pose), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_unproject_by_hand() -> None:
    depth = np.full((4, 6), 2.0)
    points = unproject(depth, np.eye(4))
    np.testing.assert_allclose(points[2, 3], [0, 0, 2], atol=1e-12)  # the principal point: column 3, row 2
    np.testing.assert_allclose(points[2, 5], [2 * 2 / 711.11, 0, 2], atol=1e-12)
    np.testing.assert_allclose(points[0, 3], [0, -2 * 2 / 711.11, 2], atol=1e-12)


def background_point_by_point(points: np.ndarray) -> np.ndarray:
    """Plain form: rotate each point and check every limit, as the original does on a flat list."""
    height, width, _ = points.shape
    flat = points.reshape(-1, 3)
    first, last = flat[width // 2], flat[-(width // 2)]
    norm = np.sqrt((first[1] - last[1]) ** 2 + (first[2] - last[2]) ** 2)
    cos, sin = (first[2] - last[2]) / norm, (first[1] - last[1]) / norm
    matrix = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    result = []
    for point in flat:
        x, y, z = matrix @ (point - np.array([0, last[1], last[2]]))
        result.append(bool(np.isnan(point).any() or y > -0.02 or z > 1.8 or x > 1 or x < -1))
    return np.array(result).reshape(height, width)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(2, 2), (3, 8), (24, 16)])
def test_background_equals_its_plain_form(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(-2.5, 2.5, (*shape, 3)) + rng.normal(size=3) * [0.2, 3, 3]
    missing = rng.random(shape) < 0.1
    middle = shape[1] // 2
    missing[0, middle] = missing[-1, -middle] = False
    points[missing] = np.nan
    expected = background_point_by_point(points)
    assert np.array_equal(background(points), expected)
    if shape == (24, 16):
        assert 0 < (~expected).sum() < expected.size, "some points are kept"


BOX_CASES = {  # x, y, z in the frame of the table: background or not
    (0.0, -0.021, 0.5): False,
    (0.0, -0.019, 0.5): True,
    (0.0, 0.5, 0.5): True,
    (0.0, -0.5, 1.79): False,
    (0.0, -0.5, 1.81): True,
    (0.0, -0.5, -4.0): False,  # the box has no front limit
    (0.99, -0.5, 0.5): False,
    (1.01, -0.5, 0.5): True,
    (-0.99, -0.5, 0.5): False,
    (-1.01, -0.5, 0.5): True,
    (np.nan, np.nan, np.nan): True,
}


@pytest.mark.parametrize("tilt", [0.0, 0.6, -2.5])
def test_limits_of_the_box_at_any_tilt(tilt: float) -> None:
    points = np.zeros((3, 12, 3))
    points[0, :] = 0, 0, 1
    points[1, : len(BOX_CASES)] = list(BOX_CASES)
    points = points @ rotation(0, tilt).T + [0, 0.7, -3]  # the box follows the table in y and z, not in x
    assert background(points)[1, : len(BOX_CASES)].tolist() == list(BOX_CASES.values())
    assert background(points)[[0, 2]].all()  # points on the table


@pytest.mark.parametrize("fault", ["first missing", "last missing", "the same"])
def test_table_needs_its_two_points(fault: str) -> None:
    points = np.random.default_rng(0).normal(size=(4, 6, 3))
    if fault == "first missing":
        points[0, 3] = np.nan
    elif fault == "last missing":
        points[-1, -3] = np.nan
    else:
        points[0, 3, 1:] = points[-1, -3, 1:]
    with pytest.raises(InputError, match="The table cannot be found"):
        background(points)


def wide_scene() -> list[Box]:
    """One object that is kept, one across the far limit and one across each side limit."""
    return [
        (-0.3, 0.3, -0.3, 0.2, 0.3),
        (-0.5, 0.5, 0.5, 1.1, 0.3),
        (0.85, 1.2, -0.2, 0.2, 0.2),
        (-1.2, -0.85, -0.2, 0.2, 0.2),
    ]


@pytest.mark.parametrize("wide", [False, True])
def test_known_points_are_recovered_from_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    focal_length = 71.0 if wide else eyecandies.FOCAL_LENGTH
    monkeypatch.setattr(eyecandies, "FOCAL_LENGTH", focal_length)
    holes = np.zeros((HEIGHT, WIDTH), bool)
    holes[22:25, 29:32] = holes[3, 5] = True
    boxes = wide_scene() if wide else [SMALL_OBJECT]
    view = write_sample(tmp_path / "in/Confetto/train/data", "000", holes=holes, focal_length=focal_length, boxes=boxes)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    xyz = read_organized_pc(tmp_path / "out/Confetto/train/good/xyz/000.tiff")
    kept = xyz.any(axis=2)

    x, y, z = np.moveaxis(view.on_table, 2, 0)
    margins = np.stack([-0.02 - y, 1.8 - z, 1 - np.abs(x)])
    clear = (np.abs(margins) > 1e-3).all(axis=0)  # rounding of the depth decides for points on a limit
    expected = (margins > 0).all(axis=0) & ~holes
    part = (y < -1e-6) & ~holes
    assert clear.sum() > 0.9 * clear.size
    assert np.array_equal(kept[clear], expected[clear])
    assert not kept[holes].any()
    assert (part & expected).sum() > 150
    if wide:  # each limit removes points that the others keep
        others = [np.delete(margins, i, axis=0).min(axis=0) > 0 for i in range(3)]
        assert all(
            (part & clear & other & (margin < 0)).sum() > 5 for other, margin in zip(others, margins, strict=True)
        )

    ours = np.stack([0.1 * view.points[..., 0], -0.1 * view.points[..., 2], 0.1 * view.points[..., 1]], axis=2)
    assert np.abs(xyz - ours)[kept].max() < 0.1 * 1e-4
    assert np.ptp(ours[kept], axis=0).min() > 0.1 * 50 * 1e-4, "the object is far larger than the tolerance"


def test_missing_depth_is_background_and_zero_in_the_cloud() -> None:
    view = render([SMALL_OBJECT], camera_pose(), 711.11)
    row, column = 22, 31
    assert organized_cloud(view.depth, camera_pose())[row, column].all(), "the pixel shows the object"
    view.depth[row, column] = 0
    assert background(unproject(view.depth, camera_pose()))[row, column]
    assert organized_cloud(view.depth, camera_pose())[row, column].tolist() == [0, 0, 0]
    assert organized_cloud(view.depth, camera_pose()).dtype == np.float32


# ---- the original's numbers


@pytest.mark.golden
@pytest.mark.parametrize("sample", ["train/000", "test_public/00", "test_public/01"])
def test_recorded_geometry(goldens: Path, sample: str) -> None:
    split, number = sample.split("/")
    prefix = goldens / "eyecandies/Confetto" / split / "data" / number
    limits = yaml.safe_load(Path(f"{prefix}_info_depth.yaml").read_text())["normalization"]
    pose = np.loadtxt(f"{prefix}_pose.txt")
    depth = meters_of(np.asarray(Image.open(f"{prefix}_depth.png")).astype(np.float64), limits["min"], limits["max"])
    with np.load(goldens / "eyecandies_Confetto.npz") as original:
        expected = original[f"{split}_{int(number)}_xyz"]
        packed = original[f"{split}_{int(number)}_background"]
    ours = background(unproject(depth, pose))
    assert 0.02 < (~ours).mean() < 0.9
    assert np.array_equal(np.packbits(ours), packed)
    assert np.abs(organized_cloud(depth, pose)[::2, ::2] - expected).max() < 1e-5


@pytest.mark.golden
def test_recorded_samples_converted_by_two_processes(goldens: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "published", tmp_path / "deep" / "out"
    shutil.copytree(goldens / "eyecandies", source)
    for seed, depth in enumerate(sorted(source.rglob("*_depth.png"))):  # the goldens hold no images
        noise = np.random.default_rng(seed).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(noise).save(depth.with_name(depth.name.replace("depth", "image_4")))
    result = run_script("preprocess_eyecandies", "--dataset_path", source, "--target_dir", target, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "done 3, skipped 0 (done before), failed 0" in result.stdout
    assert sorted(contents(target)) == WRITTEN
    train = index_split(target / "Confetto", "train", BOTH)
    test = index_split(target / "Confetto", "test", BOTH)
    assert [files.path for files in train + test] == ["train/good/000", "test/bad/001", "test/good/000"]
    assert [files.label for files in test] == [1, 0]
    published = ["train/data/000", "test_public/data/01", "test_public/data/00"]
    with np.load(goldens / "eyecandies_Confetto.npz") as original:
        for files, prefix, key in zip(
            train + test, published, ("train_0", "test_public_1", "test_public_0"), strict=True
        ):
            assert files.xyz is not None and files.rgb is not None
            xyz = read_organized_pc(files.xyz)
            assert np.array_equal(np.packbits(~xyz.any(axis=2)), original[f"{key}_background"])
            assert np.abs(xyz[::2, ::2] - original[f"{key}_xyz"]).max() < 1e-5
            before = f"{source / 'Confetto' / prefix}"
            assert np.array_equal(np.asarray(Image.open(files.rgb)), np.asarray(Image.open(f"{before}_image_4.png")))
            if files.mask is not None:
                assert np.array_equal(np.asarray(Image.open(files.mask)), np.asarray(Image.open(f"{before}_mask.png")))
    turned = [each._replace(form=CloudForm(camera_frame=False)) for each in test]
    bad, good = AnomalyDataset(turned, BOTH, 64)
    assert bad.mask is not None and bad.mask.any()
    assert good.mask is not None and not good.mask.any()
    assert bad.xyz is not None and bad.xyz.shape == (3, 64, 64)


# ---- output files


def test_layout_and_splits(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_sample(published / "Confetto/val/data", "000", 7)
    (published / "Confetto/train/data/000_mask.png").unlink()  # only the test split has ground truth
    (published / "Confetto/val/data/notes_depth.png").write_bytes(b"no sample")
    write_sample(published / "Confetto/test_private/data", "00", 8)  # published without ground truth, so not converted
    before = contents(published)
    assert run(published, tmp_path / "out") == 0
    assert capsys.readouterr().out == "done 4, skipped 0 (done before), failed 0\n"
    assert contents(published) == before
    validation = ["Confetto/validation/good/rgb/000.png", "Confetto/validation/good/xyz/000.tiff"]
    assert sorted(contents(tmp_path / "out")) == sorted([*WRITTEN, *validation])
    out = tmp_path / "out/Confetto"
    assert all(read_organized_pc(path).any(axis=2).sum() > 150 for path in out.glob("*/*/xyz/*.tiff"))
    assert [s.path for s in index_split(out, "validation", BOTH)] == ["validation/good/000"]
    mask = np.asarray(Image.open(out / "test/bad/gt/001.png"))
    assert mask.dtype == np.uint8 and mask.sum() == 255 * 4 * 7 and (mask[20:24, 30:37] == 255).all()
    assert not np.asarray(Image.open(out / "test/good/gt/000.png")).any()
    image = np.asarray(Image.open(published / "Confetto/val/data/000_image_4.png"))
    assert np.array_equal(np.asarray(Image.open(out / "validation/good/rgb/000.png")), image)


def test_opaque_rgba_image_and_mask_of_any_value(published: Path, tmp_path: Path) -> None:
    data = published / "Confetto/test_public/data"
    image = Image.open(data / "00_image_4.png")
    image.convert("RGBA").save(data / "00_image_4.png")
    mask = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    mask[..., 3] = 255
    mask[5, 6, 0] = 1
    Image.fromarray(mask).save(data / "00_mask.png")
    assert run(published, tmp_path / "out") == 0
    out = tmp_path / "out/Confetto/test/bad"
    assert np.array_equal(np.asarray(Image.open(out / "rgb/000.png")), np.asarray(image))
    assert np.argwhere(np.asarray(Image.open(out / "gt/000.png")) == 255).tolist() == [[5, 6]]


def test_light_chooses_the_image_and_nothing_else(published: Path, tmp_path: Path) -> None:
    assert run(published, tmp_path / "default") == 0
    default = contents(tmp_path / "default")
    for light in (0, 4, 5):
        out = tmp_path / f"light{light}"
        assert run(published, out, "--light", light) == 0
        found = contents(out)
        image = np.asarray(Image.open(published / f"Confetto/train/data/000_image_{light}.png"))
        assert np.array_equal(np.asarray(Image.open(out / "Confetto/train/good/rgb/000.png")), image)
        changed = {name for name in found if found[name] != default[name]}
        assert changed == (set() if light == 4 else {n for n in found if "/rgb/" in n} | {"preprocessing.json"})
        assert json.loads(found["preprocessing.json"])["settings"]["light"] == light


def test_missing_value_of_the_stored_depth(published: Path, tmp_path: Path) -> None:
    depth = published / "Confetto/train/data/000_depth.png"
    stored = np.asarray(Image.open(depth)).astype(np.uint16)
    middle = np.s_[HEIGHT // 2 - 2 : HEIGHT // 2 + 2, WIDTH // 2]
    for value, out in ((0, "zero"), (65535, "largest")):
        stored[middle] = value
        Image.fromarray(stored).save(depth)
        assert run(published, tmp_path / out, *(["--missing_value", value] if value else [])) == 0
    clouds = [(tmp_path / out / "Confetto/train/good/xyz/000.tiff").read_bytes() for out in ("zero", "largest")]
    assert clouds[0] == clouds[1]
    with pytest.raises(InputError, match=r"with missing_value 65535 \(now not given\)"):
        run(published, tmp_path / "largest")


def test_other_light_in_the_same_target_is_refused(published: Path, tmp_path: Path) -> None:
    assert run(published, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"was preprocessed with light 4 \(now 2\)"):
        run(published, tmp_path / "out", "--light", 2)
    assert contents(tmp_path / "out") == before


def test_target_of_the_other_script_is_refused(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    content = {"schema": 1, "settings": {"cluster_eps": 0.006}, "scans": {"bagel/train/good/000": {}}}
    (target / "preprocessing.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"out was written by the other script, utils/preprocessing.py. Give another"):
        run(published, target)
    assert sorted(contents(target)) == ["preprocessing.json"]


def test_classes_can_be_converted_in_several_runs(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(published / "Confetto", published / "Gummy")
    write_sample(published / "Lemon/train/data", "000", 9)
    target = tmp_path / "out"
    assert run(published, target, "--classes", "Gummy", "Lemon") == 0
    assert {name.split("/")[0] for name in contents(target)} == {"Gummy", "Lemon", "preprocessing.json"}
    assert run(published, target) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done 3, skipped 4 (done before), failed 0"
    assert {name.split("/")[0] for name in contents(target)} == {"Confetto", "Gummy", "Lemon", "preprocessing.json"}


# ---- invalid arguments


def test_invalid_folders_and_classes_are_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(published)
    (tmp_path / "empty/Confetto/train/data").mkdir(parents=True)
    (published / "Plain/train/data").mkdir(parents=True)
    before = contents(tmp_path)
    out = tmp_path / "out"
    for root, target, flags, message in [
        (tmp_path / "none", out, [], "none is not a folder. Give the folder that holds the classes of Eyecandies"),
        (published / "Confetto/train/data/000_pose.txt", out, [], "is not a folder. Give"),
        (published / "Confetto", out, [], "Give the folder that holds the classes"),
        (tmp_path / "empty", out, [], "holds no <Class>/train/data/<number>_depth.png"),
        (published, published, [], "is the dataset itself. Give another folder"),
        (published, published / "Confetto" / "..", [], "is the dataset itself"),
        (published, tmp_path / "link", [], "is the dataset itself"),
        (published, out, ["--classes", "Confetto", "Gummy"], r"has no class Gummy. --classes takes Confetto, Plain.$"),
        (published, out, ["--classes", "Plain"], "holds no <Class>/train/data/<number>_depth.png"),
        (published / "Confetto/train", out, ["--classes", "x"], "has no class x. --classes takes data.$"),
        (published, published / "Confetto/train/data/000_pose.txt", [], "cannot be made"),
    ]:
        with pytest.raises(InputError, match=message):
            run(root, target, *flags)
    assert contents(tmp_path) == before
    assert not out.exists()


def test_invalid_arguments_exit_with_2(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = run_script(
        "preprocess_eyecandies", "--dataset_path", published, "--target_dir", tmp_path / "out", "--classes", "Gummy"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "--classes takes Confetto" in result.stderr.splitlines()[-1]
    for flags, message in [
        (["--light", 6], "invalid choice: 6"),
        (["--light", -1], "invalid choice: -1"),
        (["--workers", 0], "--workers is 0. Give a number from 1 to 1024."),
        (["--classes"], "expected at least one argument"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run(published, tmp_path / "out", *flags)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# ---- errors of single samples


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def gray(path: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 99, np.uint8)).save(path)


def limits(low: object, high: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(f"normalization:\n  max: {high}\n  min: {low}\n")


def zero_depth(path: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(path)


SINGULAR = np.eye(4)
SINGULAR[2] = SINGULAR[1]

FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {  # file, damage, expected error
    "no pose": ("pose.txt", Path.unlink, "pose.txt is missing. Restore it"),
    "pose of words": ("pose.txt", lambda path: path.write_text("a b\n"), "pose.txt holds no invertible 4 x 4"),
    "pose of bytes": ("pose.txt", lambda path: path.write_bytes(b"\xff\xfe\x00"), "pose.txt holds no invertible 4 x 4"),
    "ragged pose": ("pose.txt", lambda path: path.write_text("1 0\n0\n"), "pose.txt holds no invertible 4 x 4"),
    "3 x 4 pose": ("pose.txt", lambda path: np.savetxt(path, np.eye(4)[:3]), "pose.txt holds no invertible 4 x 4"),
    "flat pose": ("pose.txt", lambda path: np.savetxt(path, np.eye(4).reshape(1, 16)), "holds no invertible 4 x 4"),
    "singular pose": ("pose.txt", lambda path: np.savetxt(path, SINGULAR), "pose.txt holds no invertible 4 x 4"),
    "nan pose": ("pose.txt", lambda path: np.savetxt(path, np.eye(4) * np.nan), "pose.txt holds no invertible 4 x 4"),
    "no yaml": ("info_depth.yaml", Path.unlink, "info_depth.yaml is missing. Restore it"),
    "empty yaml": ("info_depth.yaml", lambda path: path.write_text(""), "expected normalization: min, max"),
    "broken yaml": ("info_depth.yaml", lambda path: path.write_text("{a: ["), "expected normalization: min, max"),
    "yaml of bytes": ("info_depth.yaml", lambda path: path.write_bytes(b"\xff\xfe\xfa"), "info_depth.yaml cannot be"),
    "other yaml": (
        "info_depth.yaml",
        lambda path: path.write_text("min: 1\nmax: 2\n"),
        "cannot be read, expected norm",
    ),
    "yaml list": ("info_depth.yaml", lambda path: path.write_text("- 1\n- 2\n"), "cannot be read, expected norm"),
    "no max": (
        "info_depth.yaml",
        lambda path: path.write_text("normalization:\n  min: 1\n"),
        "cannot be read, expected",
    ),
    "min of words": ("info_depth.yaml", limits("near", 4), "cannot be read, expected normalization"),
    "min = max": ("info_depth.yaml", limits(3, 3), "has the depths 3.0 to 3.0, expected 0 < min < max"),
    "min > max": ("info_depth.yaml", limits(3, 2), "has the depths 3.0 to 2.0, expected 0 < min < max"),
    "min < 0": ("info_depth.yaml", limits(-1, 2), "has the depths -1.0 to 2.0, expected 0 < min < max"),
    "min nan": ("info_depth.yaml", limits(".nan", 2), "has the depths nan to 2.0"),
    "max inf": ("info_depth.yaml", limits(1, ".inf"), "has the depths 1.0 to inf"),
    "short depth": ("depth.png", lambda path: truncate(path, 900), "depth.png is not a complete PNG"),
    "no picture": ("depth.png", lambda path: path.write_bytes(b"depth"), "depth.png is not a complete PNG"),
    "no depth": ("depth.png", Path.unlink, "00_depth.png is missing. Restore it"),
    "8-bit depth": ("depth.png", gray, "holds an image of mode L, expected 16-bit gray"),
    "zero depth": ("depth.png", zero_depth, "The table cannot be found"),
    "no image": ("image_4.png", Path.unlink, "_image_4.png"),
    "short image": ("image_4.png", lambda path: truncate(path, 900), "image_4.png is not a complete PNG"),
    "small image": (
        "image_4.png",
        lambda path: Image.new("RGB", (WIDTH, HEIGHT - 1)).save(path),
        f"_image_4.png is {HEIGHT - 1} x {WIDTH}, its depth {HEIGHT} x {WIDTH} (H x W). Copy them again",
    ),
    "turned image": (
        "image_4.png",
        lambda path: Image.new("RGB", (HEIGHT, WIDTH)).save(path),
        f"_image_4.png is {WIDTH} x {HEIGHT}, its depth {HEIGHT} x {WIDTH} (H x W). Copy them again",
    ),
    "no mask": ("mask.png", Path.unlink, "_mask.png"),
    "short mask": ("mask.png", lambda path: truncate(path, 60), "_mask.png is not a complete PNG"),
    "small mask": (
        "mask.png",
        lambda path: Image.new("L", (WIDTH + 1, HEIGHT)).save(path),
        f"_mask.png is {HEIGHT} x {WIDTH + 1}, its depth {HEIGHT} x {WIDTH} (H x W). Copy them again",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_sample_is_reported_and_the_others_converted(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture, fault: str
) -> None:
    ending, damage, reason = FAULTS[fault]
    path = published / f"Confetto/test_public/data/00_{ending}"
    original = path.read_bytes()
    damage(path)
    target = tmp_path / "out"
    assert run(published, target) == 1
    summary, line = capsys.readouterr().out.splitlines()
    assert summary == "done 2, skipped 0 (done before), failed 1"
    assert line.startswith("  Confetto/test/")
    assert "/000: " in line
    assert reason in line
    if fault != "zero depth":  # this error names no file
        assert f"test_public/data/00_{ending}" in line
    assert sorted(contents(target)) == [name for name in WRITTEN if "test/good" not in name]

    path.write_bytes(original)  # only the restored sample is converted
    assert run(published, target) == 0
    assert capsys.readouterr().out == "done 1, skipped 2 (done before), failed 0\n"
    assert sorted(contents(target)) == WRITTEN


def test_yaml_tags_are_not_executed(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tag = f"normalization: !!python/object/apply:os.mkdir ['{tmp_path / 'run'}']\n"
    path = published / "Confetto/train/data/000_info_depth.yaml"
    path.write_text(tag)
    assert run(published, tmp_path / "out") == 1
    assert f"{path} cannot be read, expected normalization" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    yaml.unsafe_load(tag)  # proves that the tag works
    assert (tmp_path / "run").exists()


def test_all_samples_damaged(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in published.glob("*/*/data/*_pose.txt"):
        path.unlink()
    assert run(published, tmp_path / "out") == 1
    assert capsys.readouterr().out.splitlines()[0] == "done 0, skipped 0 (done before), failed 3"
    assert sorted(contents(tmp_path / "out")) == ["preprocessing.json"]


# ---- repeated, killed and parallel runs


def test_second_run_does_nothing(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = convert(published, target)
    assert (first.done, first.skipped, first.failed) == (ALL, [], {})
    before, files = contents(target), [path for path in target.rglob("*.*") if path.name != "preprocessing.json"]
    times = [path.stat().st_mtime_ns for path in files]
    second = convert(published, target)
    assert (second.done, sorted(second.skipped), second.failed) == ([], ALL, {})
    assert contents(target) == before
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize("ending", ["depth.png", "info_depth.yaml", "pose.txt"])
def test_change_of_any_source_of_a_cloud_is_noticed(published: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / "out"
    convert(published, target)
    source = published / "Confetto/train/data" / f"000_{ending}"
    original = source.read_bytes()
    shutil.copy(published / "Confetto/test_public/data" / f"00_{ending}", source)
    if ending == "pose.txt":  # all samples have the same pose
        np.savetxt(source, camera_pose() + np.eye(4) * 1e-3)
    for content in (source.read_bytes(), original):
        source.write_bytes(content)
        assert convert(published, target).done == ["Confetto/train/good/000"]
        assert convert(published, target).done == []


def test_manifest_of_version_1_is_refused(published: Path, tmp_path: Path) -> None:
    """Its checksums cover only the depth images of the clouds."""
    assert run(published, tmp_path / "out") == 0
    manifest = tmp_path / "out" / "preprocessing.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(InputError, match=r"was preprocessed with version 1 \(now 2\)"):
        run(published, tmp_path / "out")


def test_missing_results_are_converted_again(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(published, target)
    before = contents(target)
    (target / "Confetto/test/bad/rgb/001.png").unlink()
    truncate(target / "Confetto/train/good/xyz/000.tiff", 500)
    assert convert(published, target).done == [ALL[0], ALL[2]]
    assert contents(target) == before


def test_two_processes_write_the_same_bytes(published: Path, tmp_path: Path) -> None:
    for number in ("001", "002"):
        write_sample(published / "Confetto/train/data", number, int(number) + 10)
    (published / "Confetto/train/data/002_pose.txt").unlink()  # errors come back from a process, too
    results = []
    for workers in (1, 2):
        args = ("--dataset_path", published, "--target_dir", tmp_path / f"out{workers}", "--workers", workers)
        result = run_script("preprocess_eyecandies", *args)
        assert result.returncode == 1
        assert "done 4, skipped 0 (done before), failed 1" in result.stdout
        results.append(contents(tmp_path / f"out{workers}"))
    assert results[0] == results[1]
    assert len(results[0]) == len(WRITTEN) + 2


# The empty manifest; two or three files written and renamed per sample; the final manifest.
RENAMES = 1 + 6 + 6 + 4 + 1


@pytest.mark.parametrize("rename", [1, 3, 4, 5, 6, 9, 11, 15, RENAMES, RENAMES + 1])
def test_run_killed_at_any_rename_is_continued(published: Path, tmp_path: Path, rename: int) -> None:
    target = tmp_path / "out"
    convert(published, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    command = ("preprocess_eyecandies", "--dataset_path", published, "--target_dir", target)
    assert run_killed_at(rename, *command) == (-signal.SIGKILL if rename <= RENAMES else 0)
    for name, data in contents(target).items():  # every file with the name of a result is complete
        if name in expected and name != "preprocessing.json":
            assert data == expected[name]
    summary = convert(published, target)
    assert sorted(summary.done + summary.skipped) == ALL
    assert len(summary.skipped) == (0 if rename < 4 else 1 if rename < 9 else 2 if rename < 15 else 3)
    assert contents(target) == expected


def test_killed_run_is_continued_by_a_run_of_another_class(published: Path, tmp_path: Path) -> None:
    write_sample(published / "Gummy/train/data", "000", 4)
    target = tmp_path / "out"
    convert(published, tmp_path / "expected")
    command = ("preprocess_eyecandies", "--dataset_path", published, "--target_dir", target, "--classes", "Confetto")
    assert run_killed_at(5, *command) == -signal.SIGKILL  # xyz of the first renamed, rgb not
    assert convert(published, target, ["Gummy"]).done == ["Gummy/train/good/000"]
    assert convert(published, target).done == ALL[:2]
    assert contents(target) == contents(tmp_path / "expected")


SLOW = """
import sys, time
from utils.preprocess_eyecandies import main
from utils.cleaning.journal import Journal
commit = Journal.commit
def commit_and_wait(self, *args):
    commit(self, *args)
    time.sleep(0.1)
Journal.commit = commit_and_wait
sys.exit(main([*sys.argv[1:], "--workers", "2"]))
"""


def test_killed_run_of_two_processes_loses_no_sample(published: Path, tmp_path: Path) -> None:
    for number in range(1, 10):
        for path in (published / "Confetto/train/data").glob("000_*"):
            shutil.copy(path, path.with_name(path.name.replace("000", f"{number:03d}")))
    target = tmp_path / "out"
    convert(published, tmp_path / "expected")
    command = [sys.executable, "-c", SLOW, "--dataset_path", str(published), "--target_dir", str(target)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    journal = target / "preprocessing.journal"
    while process.poll() is None and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the workers, too
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    summary = convert(published, target)
    assert summary.skipped and summary.done and not summary.failed
    assert contents(target) == contents(tmp_path / "expected")


def test_half_written_sample_without_temporary_files_is_converted_again(published: Path, tmp_path: Path) -> None:
    write_sample(published / "Gummy/train/data", "000", 4)
    target = tmp_path / "out"
    command = ("preprocess_eyecandies", "--dataset_path", published, "--target_dir", target, "--classes", "Confetto")
    assert run_killed_at(5, *command) == -signal.SIGKILL
    for path in target.rglob("*.preprocessing"):
        path.unlink()
    assert convert(published, target, ["Gummy"]).done == ["Gummy/train/good/000"]
    assert convert(published, target).done == ALL


def test_errors_do_not_name_flags_of_the_other_script(published: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Choose another output folder"):
        run(published, published / "Confetto/train/data/000_pose.txt")
    assert run(published, tmp_path / "out") == 0
    with pytest.raises(InputError, match="give another output folder"):
        run(published, tmp_path / "out", "--light", 2)


def test_foreign_scans_are_not_overwritten(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(published, target)
    (target / "preprocessing.json").unlink()
    before = contents(target)
    with pytest.raises(InputError, match=r"holds scans of another origin, such as .* and no preprocessing.json"):
        run(published, target)
    assert contents(target) == before


def test_hidden_and_unreadable_folders() -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folders
        root = Path(folder) / "in"
        for name in ("Confetto", "Gummy", ".Trash"):
            write_sample(root / name / "train/data", "000")
        locked = root / "Confetto/train/data"
        root.parent.chmod(0o777)
        locked.chmod(0)
        with unprivileged(), pytest.raises(PermissionError, match="Confetto/train/data"):
            convert(root, root.parent / "out")
        locked.chmod(0o777)
        assert convert(root, root.parent / "out").done == ["Confetto/train/good/000", "Gummy/train/good/000"]

"""Synthetic scans: layout on disk, reproducibility by seed, masks of defects, and scanner geometry."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.synthetic import Plan, main, make_dataset
from utils.synthetic_data.defects import DEFECTS, HOLE_FLOOR
from utils.synthetic_data.fields import CELL, GRID, TOP, Part, smooth_noise
from utils.synthetic_data.parts import PARTS
from utils.synthetic_data.scanner import (
    DEPTH_CHANGE,
    FIELD_OF_VIEW,
    View,
    lay_down,
    look,
    make_scan,
    pixel_rays,
    random_stream,
)

SIZE = 96
IN_3D, IN_COLOR = ("dent", "bump", "hole"), ("stain", "contamination")


def noise_free(part_class: str, path: str, size: int, damaged: bool = True) -> tuple[Part, View]:
    """Object of a scan with seed 0, and its view by every pixel."""
    stream = partial(random_stream, 0, part_class, path)
    part = PARTS[part_class](stream("part"))
    if damaged:
        part = DEFECTS[path.split("/")[1]](part, stream("defect"))
    return part, look(part.height, lay_down(stream("pose")), pixel_rays(size))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_and_formats(tmp_path: Path) -> None:
    counts = ["--train", "2", "--validation", "1", "--test_good", "3", "--test_defective", "1"]
    main([str(tmp_path), "--classes", "cookie", "gasket", *counts, "--size", str(SIZE), "--num_workers", "1"])
    groups = {"train/good": 2, "validation/good": 1, "test/good": 3} | {f"test/{defect}": 1 for defect in DEFECTS}
    expected = {"preview.png"}
    for group, n in groups.items():
        kinds = {"rgb": "png", "xyz": "tiff"} | ({"gt": "png"} if group.startswith("test") else {})
        for kind, suffix in kinds.items():
            expected |= {f"{c}/{group}/{kind}/{i:03d}.{suffix}" for c in ("cookie", "gasket") for i in range(n)}
    assert set(files_of(tmp_path)) == expected
    for path in tmp_path.glob("*/*/*/xyz/*.tiff"):
        xyz = tifffile.imread(path)
        assert xyz.shape == (SIZE, SIZE, 3)
        assert xyz.dtype == np.float32
    for path in tmp_path.glob("*/*/*/rgb/*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
    for path in tmp_path.glob("*/test/*/gt/*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (SIZE, SIZE))
            levels = set(np.unique(np.asarray(image)).tolist())
        assert levels == ({0} if "good" in path.parts else {0, 255})
    with Image.open(tmp_path / "preview.png") as image:
        assert min(image.size) > 500
        assert np.asarray(image.convert("L")).std() > 20
        second_row = np.asarray(image.convert("RGB"))[image.height * 3 // 10 : image.height * 4 // 10]
        assert np.median(np.ptp(second_row.astype(int), axis=2)) > 20  # heights are in color


def test_files_depend_on_the_seed_but_not_on_counts_or_workers(tmp_path: Path) -> None:
    few = Plan(tmp_path / "few", ("bracket",), train=1, validation=0, test_good=0, test_defective=1, size=64)
    more = Plan(tmp_path / "more", ("cookie", "bracket"), train=2, validation=0, test_good=0, test_defective=2, size=64)
    make_dataset(few)
    make_dataset(more, num_workers=2)
    few_files, more_files = files_of(few.output_dir / "bracket"), files_of(more.output_dir / "bracket")
    assert len(few_files) == 2 + 3 * len(DEFECTS)
    assert few_files == {name: more_files[name] for name in few_files}
    clouds = [content for name, content in more_files.items() if name.endswith(".tiff")]
    assert len(set(clouds)) == len(clouds)


def test_other_seed_gives_another_scan() -> None:
    first, second = (make_scan("gasket", "train/good/000", 64, seed) for seed in (0, 1))
    assert (first.rgb != second.rgb).mean() > 0.5
    assert (first.xyz != second.xyz).mean() > 0.5


@pytest.mark.parametrize("part_class", PARTS)
@pytest.mark.parametrize("defect", IN_COLOR)
def test_color_defects_do_not_change_the_cloud(part_class: str, defect: str) -> None:
    scan = make_scan(part_class, f"test/{defect}/000", SIZE, 0)
    intact = make_scan(part_class, f"test/{defect}/000", SIZE, 0, damaged=False)
    inside = scan.gt > 0
    np.testing.assert_array_equal(scan.xyz, intact.xyz)
    difference = np.abs(scan.rgb.astype(int) - intact.rgb).max(2)
    assert difference[inside].mean() > 15
    blurred = ndimage.binary_dilation(inside, iterations=3)
    assert difference[~blurred].max() <= 11  # color changes below the threshold of the ground truth
    assert not intact.gt.any()


@pytest.mark.parametrize("part_class", PARTS)
@pytest.mark.parametrize("defect", IN_3D)
def test_3d_defects_keep_the_color(part_class: str, defect: str) -> None:
    path = f"test/{defect}/000"
    scan, intact = make_scan(part_class, path, 224, 0), make_scan(part_class, path, 224, 0, damaged=False)
    inside = ndimage.binary_dilation(scan.gt > 0, iterations=3)
    difference = np.abs(scan.rgb.astype(int) - intact.rgb).max(2)
    assert difference[~inside].max() <= 6
    assert difference[inside].mean() < 12  # shading, and color noise that moves with the surface
    np.testing.assert_array_equal(
        noise_free(part_class, path, 8)[0].albedo, noise_free(part_class, path, 8, damaged=False)[0].albedo
    )
    both = (scan.xyz != 0).all(2) & (intact.xyz != 0).all(2)
    assert np.abs(scan.xyz - intact.xyz)[both & ~inside].max() <= DEPTH_CHANGE * 1.001
    moved = np.abs(scan.xyz - intact.xyz)[..., 2][both & (scan.gt > 0)]
    assert moved.size == 0 or moved.max() > 0.001  # a narrow hole has no measurement at its bottom


@pytest.mark.parametrize("part_class", PARTS)
@pytest.mark.parametrize("defect", [*IN_3D, "combined"])
def test_mask_covers_the_moved_surface(part_class: str, defect: str) -> None:
    path = f"test/{defect}/001"
    mask = make_scan(part_class, path, 160, 0).gt > 0
    moved = np.abs(noise_free(part_class, path, 160)[1].depth - noise_free(part_class, path, 160, False)[1].depth)
    assert (mask | (moved <= DEPTH_CHANGE)).all()
    if defect in IN_3D:
        assert (moved[mask] > DEPTH_CHANGE).all()
    extent = np.ptp(np.argwhere(mask), axis=0) * 1000 * FIELD_OF_VIEW * 0.5 / 160
    assert 2 <= extent.max() <= 20  # millimeters
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("part_class", PARTS)
def test_every_defect_has_a_mask(part_class: str) -> None:
    for defect in DEFECTS:
        for i in range(2):
            assert make_scan(part_class, f"test/{defect}/{i:03d}", 64, 3, strength=0.5).gt.any(), (defect, i)


def test_effect_of_each_defect_on_height_and_color() -> None:
    for part_class, make in PARTS.items():
        for seed in range(3):
            part = make(np.random.default_rng(seed))
            changed = {name: defect(part, np.random.default_rng(seed)) for name, defect in DEFECTS.items()}
            rise = {name: damaged.height - part.height for name, damaged in changed.items()}
            assert 0.0014 < -rise["dent"].min() < 0.0041
            assert rise["dent"].max() <= 0
            assert 0.0014 < rise["bump"].max() < 0.0041
            assert rise["bump"].min() >= 0
            hole = changed["hole"].height[rise["hole"] < 0]
            assert hole.min() == pytest.approx(HOLE_FLOOR)
            assert 0.001 < np.abs(rise["combined"]).max() < 0.004
            assert not any(rise[name].any() for name in IN_COLOR)
            for name, damaged in changed.items():
                assert (damaged.albedo is part.albedo) == (name in IN_3D), name
                assert ((damaged.height > 0) == (part.height > 0)).all(), (part_class, name)
                assert damaged.height.max() < TOP
                assert damaged.height.dtype == damaged.albedo.dtype == np.float32
                on_part = damaged.albedo[:, part.height > 0]
                assert 0 <= on_part.min() <= on_part.max() <= 1


def test_weak_defects_are_fainter_and_smaller() -> None:
    for part_class, make in PARTS.items():
        part = make(np.random.default_rng(0))
        for name, defect in DEFECTS.items():
            strong, weak = (defect(part, np.random.default_rng(0), strength) for strength in (1.0, 0.5))
            case = (part_class, name)
            for full, half, good in zip(strong, weak, part, strict=True):
                change, halved = np.abs(full - good), np.abs(half - good)
                if not change.any():
                    assert not halved.any(), case
                    continue
                assert 0.4 < halved.max() / change.max() < 0.75, case  # a hole is halved relative to the height
                assert 0.35 < np.count_nonzero(halved) / np.count_nonzero(change) < 0.75, case


def test_objects_have_the_expected_size_and_vary() -> None:
    elongated, alike = ("carrot", "rope"), ("gasket", "bracket")
    for part_class, make in PARTS.items():
        first, second = (make(np.random.default_rng(seed)) for seed in (0, 1))
        width = np.sort(np.ptp(np.argwhere(first.height), axis=0) * CELL)
        assert 0.08 < width[1] < 0.12, part_class
        assert 0.02 < width[0] < 0.06 if part_class in elongated else width[0] > 0.08, part_class
        assert 0.015 < first.height.max() < 0.028, part_class
        assert first.height[:, [0, -1]].max() == first.height[[0, -1]].max() == 0
        on_both = (first.height > 0) & (second.height > 0)
        difference = np.abs(first.height - second.height)[on_both].mean()
        assert 1e-4 < difference < (0.0004 if part_class in alike else 0.004), part_class
        assert first.albedo.shape == (3, GRID, GRID)


@pytest.mark.parametrize("part_class", PARTS)
def test_missing_pixels_are_zero_and_others_lie_on_the_pixel_grid(part_class: str) -> None:
    xyz = make_scan(part_class, "test/hole/000", SIZE, 0).xyz
    assert np.isfinite(xyz).all()
    zeros = (xyz == 0).sum(2)
    assert set(np.unique(zeros).tolist()) == {0, 3}  # never a single coordinate
    assert 0.003 < (zeros == 3).mean() < 0.15
    valid = zeros == 0
    assert 0.3 < xyz[valid][:, 2].min() < xyz[valid][:, 2].max() < 0.8
    row, column = np.nonzero(valid)
    x, y, z = xyz[valid].astype(float).T
    pitch = FIELD_OF_VIEW / SIZE
    for slope, pixel in ((x / z, column), (y / z, row)):
        fit = np.polyfit(pixel, slope, 1)
        assert fit[0] == pytest.approx(pitch, rel=1e-5)
        np.testing.assert_allclose(np.polyval(fit, pixel), slope, atol=1e-6)


@pytest.mark.parametrize("size", [64, 65, 100, 127, 400, 900])
def test_no_ray_lies_in_a_coordinate_plane(size: int) -> None:
    assert (pixel_rays(size) != 0).all()


def test_table_is_a_slightly_tilted_plane_along_the_border() -> None:
    planes = []
    for i in range(3):
        xyz = make_scan("bracket", f"train/good/00{i}", 224, 0).xyz.astype(float)
        border = (xyz != 0).all(2)
        border[10:-10, 10:-10] = False
        a = np.c_[xyz[border][:, :2], np.ones(border.sum())]
        plane, *_ = np.linalg.lstsq(a, xyz[border][:, 2], rcond=None)
        residual = a @ plane - xyz[border][:, 2]
        assert 0.0001 < residual.std() < 0.0003
        assert np.abs(residual).max() < 0.0015
        planes.append(np.degrees(np.arctan(np.hypot(*plane[:2]))))
    assert 2 < min(planes) < max(planes) < 7
    assert np.ptp(planes) > 0.01


@pytest.mark.parametrize("part_class", PARTS)
def test_shadow_lies_right_of_the_object(part_class: str) -> None:
    """The projector is left of the camera, so more points are missing at the right edge of an object."""
    xyz = make_scan(part_class, "train/good/000", 224, 0).xyz
    _, view = noise_free(part_class, "train/good/000", 224, damaged=False)
    part = ndimage.binary_fill_holes(view.point[2] > 0)
    missing = (xyz == 0).all(2)
    right, left = (
        np.any([np.roll(part, side * step, axis=1) for step in (2, 3, 4)], axis=0) & ~part for side in (1, -1)
    )
    assert missing[right].mean() > 1.5 * missing[left].mean()


@pytest.mark.parametrize("part_class", PARTS)
def test_ray_casting_equals_fine_steps_along_each_ray(part_class: str) -> None:
    stream = partial(random_stream, 0, part_class, "train/good/000")
    height, pose, rays = PARTS[part_class](stream("part")).height, lay_down(stream("pose")), pixel_rays(64)
    view = look(height, pose, rays)
    pick = np.random.default_rng(0).choice(np.flatnonzero(view.point[2].ravel() > 0.004), 60)
    eye = -pose.rotation.T @ pose.origin
    for row, column in zip(*divmod(pick, 64), strict=True):
        direction = pose.rotation.T @ rays[:, row, column]
        levels = np.arange(TOP, 0, -2e-5)
        u, v, _ = eye[:, None] + (levels - eye[2]) / direction[2] * direction[:, None]
        surface = ndimage.map_coordinates(height, np.array([v, u]) / CELL + (GRID - 1) / 2, order=1)
        first = levels[np.argmax(surface >= levels)]
        assert view.point[2, row, column] == pytest.approx(first, abs=5e-5)


@pytest.mark.parametrize("part_class", PARTS)
@pytest.mark.parametrize("group", ["train/good", "test/hole", "test/bump"])
def test_cleaning_keeps_exactly_the_object(part_class: str, group: str) -> None:
    scan = make_scan(part_class, f"{group}/000", 224, 0)
    _, view = noise_free(part_class, f"{group}/000", 224, damaged=not group.endswith("good"))
    xyz = clean_scan(scan.xyz, scan.rgb, scan.gt, CleaningRule(side_multiple=1))[0]
    kept = (xyz != 0).all(2)
    measured = (scan.xyz != 0).all(2)
    assert kept[measured & (view.point[2] > 0.006)].all()
    assert not kept[view.point[2] < 0.004].any()


def test_smooth_noise_is_smooth_and_of_unit_deviation() -> None:
    for wavelength in (0.001, 0.01):
        field = smooth_noise(np.random.default_rng(0), wavelength)
        assert field.shape == (GRID, GRID)
        assert field.dtype == np.float32
        assert field.std() == pytest.approx(1, abs=0.15)
        assert np.abs(np.diff(field)).max() < 6 * CELL / wavelength


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--classes", "bagel"], "--classes names 'bagel'"),
        (["--classes", "cookie", "cookie"], "names a class twice"),
        (["--size", "32"], "--size is 32"),
        (["--size", "100000"], "--size is 100000"),
        (["--train", "-1"], "--train is -1"),
        (["--test_defective", "5000"], "--test_defective is 5000"),
        (["--train", "0", "--validation", "0", "--test_good", "0", "--test_defective", "0"], "nothing to make"),
        (["--seed", "-3"], "--seed is -3"),
        (["--defect_strength", "0.1"], "--defect_strength is 0.1"),
        (["--num_workers", "0"], "--num_workers is 0"),
    ],
)
def test_invalid_flags_exit_with_2(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", ["out/cookie/train/good/rgb/000.png", "out/cookie", "out"])
def test_existing_files_are_not_overwritten(existing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    obstacle = tmp_path / existing
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), "--size", "64", "--num_workers", "1"])
    assert stop.value.code == 2
    assert "another OUTPUT_DIR" in capsys.readouterr().err
    assert files_of(tmp_path) == {existing: b"mine"}


def test_script_runs_by_path_and_as_a_module(tmp_path: Path) -> None:
    counts = ["--train", "1", "--validation", "0", "--test_good", "0", "--test_defective", "0", "--size", "64"]
    command = [sys.executable, str(ROOT / "utils" / "synthetic.py"), "made", *counts, "--classes", "cookie"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 samples in made" in done.stdout
    assert (tmp_path / "made" / "cookie" / "train" / "good" / "xyz" / "000.tiff").is_file()
    command = [sys.executable, "-m", "utils.synthetic", str(tmp_path / "made"), "--classes", "cookie"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("synthetic.py: error: ")
    assert "is not empty" in done.stderr

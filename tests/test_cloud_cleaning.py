"""Cleaning of scans: clusters and plane against plain DBSCAN, least squares and open3d; padding; whole scans."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.cleaning.cloud_cleaning import (
    CleaningRule,
    clean_scan,
    cluster_labels,
    fit_border_plane,
    is_cleaned,
    largest_cluster,
    pad_to_square,
    remove_plane,
    shows_table,
)
from utils.errors import InputError
from utils.scans.organized_pc import read_organized_pc, valid_mask

RULE = CleaningRule()


def scan_of_box(height: int = 80, width: int = 90, part: tuple[slice, slice] | None = None) -> np.ndarray:
    """Tilted table with a box 20 mm high on it and a few missing pixels, 1 mm between pixels."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width] * 1e-3
    z = 0.5 + 0.05 * x - 0.1 * y + rng.normal(0, 2e-4, x.shape)
    z[part or (slice(25, 60), slice(30, 60))] -= 0.02
    xyz = np.stack([x - 0.0407, y - 0.0353, z], axis=2).astype(np.float32)
    xyz[rng.random((height, width)) < 0.02] = 0
    return xyz


def plain_dbscan(points: np.ndarray, eps: float, min_points: int) -> list[int]:
    """Textbook DBSCAN: visit the points in order and grow a cluster from each core point that has none."""
    near = np.linalg.norm(points[:, None] - points[None], axis=2) <= eps
    labels: list[int | None] = [None] * len(points)
    cluster = 0
    for i in range(len(points)):
        if labels[i] is not None:
            continue
        if near[i].sum() < min_points:
            labels[i] = -1
            continue
        queue = [i]
        while queue:
            j = queue.pop()
            if labels[j] is not None and labels[j] != -1:
                continue
            labels[j] = cluster
            if near[j].sum() >= min_points:
                queue.extend(np.flatnonzero(near[j]).tolist())
        cluster += 1
    return [-1 if label is None else label for label in labels]


# (points, eps, min_points): from noise only, over many clusters with shared border points, to one cluster.
DENSITIES = [(300, 0.01, 3), (400, 0.1, 6), (400, 0.1, 7), (400, 0.1, 8), (400, 0.1, 9), (400, 0.1, 12), (300, 0.5, 30)]


@pytest.mark.parametrize("n, eps, min_points", DENSITIES)
@pytest.mark.parametrize("thickness", [0.0, 0.05, 0.5])
def test_cluster_labels_equal_plain_dbscan(n: int, eps: float, min_points: int, thickness: float) -> None:
    for seed in range(4):
        points = np.random.default_rng(seed).random((n, 3)) * [1, 1, thickness] - 0.3
        assert cluster_labels(points, eps, min_points).tolist() == plain_dbscan(points, eps, min_points)


def test_cluster_labels_of_chains_equal_plain_dbscan() -> None:
    """Clusters are joined if only one point, far from the first point of its cell, connects them."""
    rng = np.random.default_rng(1)
    for gap in (0.9, 1.1):
        blob = rng.normal(0, 3e-3, (40, 3)).clip(-5e-3, 5e-3)
        tips = np.diag([1e-2 * (0.5 + gap)] * 3)[:2]
        points = np.concatenate([np.concatenate([blob, tips]) + np.array([0.02 * i, 0, 0]) for i in range(5)])
        points = points[rng.permutation(len(points))]
        for min_points in (1, 2, 5, 20):
            expected = plain_dbscan(points, 1e-2, min_points)
            assert cluster_labels(points, 1e-2, min_points).tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 29, 30, 31])
def test_cluster_labels_of_few_or_equal_points(n: int) -> None:
    expected = 0 if n >= 30 else -1
    assert cluster_labels(np.ones((n, 3)), 0.006, 30).tolist() == [expected] * n


@pytest.mark.golden
@pytest.mark.parametrize("eps, min_points", [(0.006, 30), (0.003, 30), (0.0012, 7), (0.0015, 9)])
def test_cluster_labels_of_a_scan_equal_open3d(goldens: Path, eps: float, min_points: int) -> None:
    open3d = pytest.importorskip("open3d")
    xyz = read_organized_pc(goldens / "raw/bagel/test/hole/xyz/000.tiff")[::3, ::3]
    points = xyz[valid_mask(xyz)].astype(np.float64)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    expected = np.asarray(cloud.cluster_dbscan(eps, min_points))
    assert np.array_equal(cluster_labels(points, eps, min_points), expected)


def test_largest_cluster_is_never_the_noise() -> None:
    xyz = np.zeros((100, 100, 3))
    grid = np.stack(np.meshgrid(*[np.arange(1.0, 7) * 1e-3] * 2, [0.5]), axis=3).reshape(6, 6, 3)
    xyz[10:16, 20:26] = grid
    xyz[50:] = np.random.default_rng(0).uniform(1, 5, (50, 100, 3))  # 5000 points, each alone
    expected = np.zeros((100, 100), dtype=bool)
    expected[10:16, 20:26] = True
    assert np.array_equal(largest_cluster(xyz, RULE), expected)


@pytest.mark.golden
def test_pad_to_square_places_the_image_like_the_original(goldens: Path) -> None:
    cases = json.loads((goldens / "unit_meta.json").read_text())["pad_cropped_pc"]
    assert len(cases) == 5
    for name, recorded in cases.items():
        height, width = map(int, name.split("x"))
        image = np.arange(1, height * width * 3 + 1, dtype=np.int64).reshape(height, width, 3)
        padded = pad_to_square(image, 100)
        top, left = recorded["pad"]
        assert list(padded.shape) == recorded["out"]
        assert np.array_equal(padded[top : top + height, left : left + width], image)
        assert padded.sum() == image.sum()
        assert padded.dtype == image.dtype


def test_pad_to_square_gives_the_odd_pixel_to_the_bottom_and_the_right() -> None:
    padded = pad_to_square(np.ones((3, 8), dtype=np.uint8), 4)
    assert padded.any(axis=1).tolist() == [False, False, True, True, True, False, False, False]
    padded = pad_to_square(np.ones((8, 3), dtype=np.uint8), 4)
    assert padded.any(axis=0).tolist() == [False, False, True, True, True, False, False, False]


def test_plane_of_an_unobstructed_border_is_the_least_squares_plane() -> None:
    xyz = scan_of_box()
    frame = np.ones(xyz.shape[:2], dtype=bool)
    frame[10:-10, 10:-10] = False
    points = xyz[frame & valid_mask(xyz)].astype(np.float64)
    normal = np.linalg.svd(points - points.mean(axis=0))[2][2]
    plane, _ = fit_border_plane(xyz, np.random.default_rng(0), RULE)
    assert np.allclose(plane * np.sign(plane[2]), np.append(normal, -normal @ points.mean(axis=0)) * np.sign(normal[2]))


def test_plane_of_a_rough_table_does_not_depend_on_the_seed() -> None:
    """The plane is the same for every seed on a rough table with a tenth of its border covered."""
    xyz = scan_of_box(part=(slice(25, 60), slice(40, 90)))
    roughness = np.random.default_rng(9).normal(0, 2e-3, xyz.shape[:2]).astype(np.float32)
    xyz[..., 2] += np.where(valid_mask(xyz), roughness, 0)
    masks = [
        valid_mask(remove_plane(xyz, fit_border_plane(xyz, np.random.default_rng(seed), RULE)[0], RULE.plane_distance))
        for seed in range(5)
    ]
    assert masks[0][25:60, 40:].mean() > 0.95
    assert masks[0].sum() < 1.05 * 35 * 50
    assert all(np.array_equal(mask, masks[0]) for mask in masks[1:])


def test_smaller_samples_find_the_table_where_a_third_of_its_border_is_covered() -> None:
    part = (slice(25, 80), slice(40, 90))
    xyz = scan_of_box(part=part)
    plane, _ = fit_border_plane(xyz, np.random.default_rng(0), CleaningRule(fit_sample=3))
    left = valid_mask(remove_plane(xyz, plane, RULE.plane_distance))
    assert np.array_equal(left[part], valid_mask(xyz)[part])
    assert left.sum() == left[part].sum()


@pytest.mark.golden
@pytest.mark.parametrize("left, top, tolerance", [(0, 0, 0), (110, 0, 1e-4), (90, 90, 1e-4)])
def test_plane_agrees_with_open3d(goldens: Path, left: int, top: int, tolerance: float) -> None:
    """The planes agree on a crop whose border is covered up to a sixth by the part, where open3d itself varies."""
    open3d = pytest.importorskip("open3d")
    xyz = read_organized_pc(goldens / "raw/bagel/test/hole/xyz/000.tiff")[top:, left:]
    frame = np.ones(xyz.shape[:2], dtype=bool)
    frame[10:-10, 10:-10] = False
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(xyz[frame & valid_mask(xyz)].astype(np.float64)))
    open3d.utility.random.seed(0)
    reference, support = cloud.segment_plane(0.004, 50, 1000)
    assert (len(support) < len(cloud.points)) == (tolerance > 0)
    plane, _ = fit_border_plane(xyz, np.random.default_rng(0), RULE)
    ours, theirs = (valid_mask(remove_plane(xyz, p, 0.005)) for p in (plane, np.asarray(reference)))
    assert (ours != theirs).mean() <= tolerance


@pytest.mark.golden
def test_clean_scan_is_bit_equal_to_the_original(goldens: Path) -> None:
    def load(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        folder = goldens / kind / "bagel/test/hole"
        rgb, gt = (np.asarray(Image.open(folder / name / "000.png")) for name in ("rgb", "gt"))
        return read_organized_pc(folder / "xyz/000.tiff"), rgb, gt

    for ours, original in zip(clean_scan(*load("raw"), RULE)[:3], load("data"), strict=True):
        assert ours is not None
        assert ours.dtype == original.dtype
        assert np.array_equal(ours, original)


@pytest.mark.golden
@pytest.mark.parametrize("scan", ["train_good_000", "test_good_000"])
def test_clean_scan_keeps_the_pixels_that_the_original_keeps(goldens: Path, scan: str) -> None:
    xyz = read_organized_pc(goldens / f"raw_rounded/{scan}.tiff")
    clean, *_ = clean_scan(xyz, np.zeros(xyz.shape, np.uint8), None, RULE)
    recorded = np.load(goldens / "raw_rounded/masks.npz")[scan]
    assert np.array_equal(np.packbits(valid_mask(clean)), recorded)


def test_clean_scan_keeps_the_part_and_image_pixels_without_measurement() -> None:
    part = (slice(25, 60), slice(30, 60))
    xyz = scan_of_box(part=part)
    xyz[70:74, 70:74, 2] -= np.float32(0.03)  # a crumb beside the part, too small to be the largest cluster
    rgb = np.random.default_rng(0).integers(1, 256, (80, 90, 3), dtype=np.uint8)
    gt = np.random.default_rng(1).integers(0, 2, (80, 90)).astype(np.uint8) * 255
    measured = valid_mask(xyz)
    on_part = np.zeros_like(measured)
    on_part[part] = measured[part]
    before = [array.copy() for array in (xyz, rgb, gt)]
    clean_xyz, clean_rgb, padded_gt, _ = clean_scan(xyz, rgb, gt, RULE)
    window = (slice(10, 90), slice(5, 95))
    assert clean_xyz.shape == clean_rgb.shape == (100, 100, 3)
    assert np.array_equal(clean_xyz[window], np.where(on_part[..., None], xyz, 0))
    assert np.array_equal(clean_rgb[window], np.where((on_part | ~measured)[..., None], rgb, 0))
    assert padded_gt is not None
    assert np.array_equal(padded_gt[window], gt)
    assert clean_rgb.sum() == clean_rgb[window].sum()
    assert padded_gt.sum(dtype=int) == gt.sum(dtype=int)
    assert all(np.array_equal(old, new) for old, new in zip(before, (xyz, rgb, gt), strict=True))
    assert clean_scan(xyz, rgb, None, RULE)[2] is None


def faulty(fault: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    xyz, rgb, gt = scan_of_box(), np.ones((80, 90, 3), np.uint8), np.ones((80, 90), np.uint8)
    if fault == "no border":
        xyz[:10], xyz[-10:], xyz[:, :10], xyz[:, -9:], xyz[50:, -10:] = 0, 0, 0, 0, 0  # keeps 40 pixels of one column
    elif fault == "all plane":
        xyz = scan_of_box(part=(slice(0), slice(0)))
    elif fault == "dust":
        xyz[:] = 0
        xyz[0, :60] = np.random.default_rng(0).uniform(0.5, 90, (60, 3))
    elif fault == "rgb size":
        rgb = rgb[:79]
    elif fault == "gt size":
        gt = gt[:, :50]
    return xyz, rgb, gt


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            "no border",
            r"^\d\d of the 3000 .* of the image border .* at least 50\. .* give --empty_margins\.$",
        ),
        ("all plane", "Nothing is left of the scan: 0 pixels lie off the plane"),
        (
            "dust",
            r"^\d% of the 60 measurements .*, expected at least 10%\. If the scan was cleaned before",
        ),
        ("rgb size", r"The image is 79 x 90 \(H x W\), but the point cloud 80 x 90"),
        ("gt size", r"The ground truth is 80 x 50 \(H x W\), but the point cloud 80 x 90"),
    ],
)
def test_clean_scan_names_the_fault(fault: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clean_scan(*faulty(fault), RULE)


def test_a_part_of_scattered_points_is_not_kept() -> None:
    xyz = scan_of_box()
    part = np.zeros(xyz.shape[:2], dtype=bool)
    part[20:70, 20:70] = True
    xyz[part & (np.random.default_rng(0).random(part.shape) < 0.9)] = 0
    with pytest.raises(InputError, match=r"Nothing is left of the scan: \d+ pixels lie off the plane and none has 30"):
        clean_scan(xyz, np.ones((80, 90, 3), np.uint8), None, RULE)


def views_without_a_table() -> dict[str, tuple[np.ndarray, str]]:
    """Clouds whose border shows no table, (300, 300, 3), 1 mm between pixels, and the message for each."""
    y, x = (np.mgrid[:300, :300] - 149.5) * 1e-3
    wall = np.maximum(np.abs(x), np.abs(y))
    flat = np.full_like(x, 0.5)
    stamp = np.stack([x, y, flat], axis=2)
    stamp[:10] = stamp[-10:] = stamp[:, :10] = stamp[:, -10:] = 0
    stamp[0, :60] = 0.1, 0.1, 0.5
    return {
        "waves": (np.stack([x, y, 0.5 + 0.02 * np.sin(150 * x) * np.cos(130 * y)], 2), r"^3\d% of the 11600 .* 50%"),
        "noise": (
            np.stack([x, y, 0.5 + np.random.default_rng(0).uniform(-0.05, 0.05, x.shape)], 2),
            r"^\d% of the 11600 measurements within 10 pixels .* lie on one plane, expected at least 10%",
        ),
        "walls": (np.stack([x, y, 1.5 - 6 * wall], 2), r"^\d\d% of the 11600 measurements"),
        "sphere": (np.stack([x, y, 0.8 - np.sqrt(0.25**2 - x**2 - y**2)], 2), r"^31% of the 11600 measurements"),
        "few equal points": (
            stamp,
            r"^60 of the 11600 pixels .* expected 25%\. The .* lie on a line or a point",
        ),
        "one point": (np.full((300, 300, 3), 0.5), "lie on a line or a point, 0 m wide, expected at least 0.004 m"),
        "one line": (np.stack([x, np.full_like(x, 0.1), flat], 2), "lie on a line or a point"),
    }


@pytest.mark.parametrize("view", views_without_a_table())
def test_a_view_without_a_table_is_refused_if_strict(view: str) -> None:
    xyz, message = views_without_a_table()[view]
    xyz = xyz.astype(np.float32)
    with pytest.raises(InputError, match=message):
        clean_scan(xyz, np.ones((300, 300, 3), np.uint8), None, CleaningRule(strict=True))
    assert not shows_table(xyz, RULE)


@pytest.mark.parametrize("view", ["waves", "sphere", "few equal points"])
def test_a_doubtful_table_is_removed_with_a_warning(view: str) -> None:
    xyz, message = views_without_a_table()[view]
    clean = clean_scan(xyz.astype(np.float32), np.ones((300, 300, 3), np.uint8), None, RULE)
    assert valid_mask(clean.xyz).any()
    assert re.match(message, clean.doubt)


def test_a_dark_table_seen_in_patches_is_removed_without_a_doubt() -> None:
    part = np.zeros((80, 90), dtype=bool)
    part[25:60, 30:60] = True
    xyz = scan_of_box(part=(slice(25, 60), slice(30, 60)))
    rows, columns = np.indices(part.shape) // 8
    xyz[((rows + columns) % 2 == 0) & ~part] = 0
    clean = clean_scan(xyz, np.ones((80, 90, 3), np.uint8), None, RULE)
    assert clean.doubt == ""
    assert np.array_equal(valid_mask(clean.xyz)[10:90, 5:95], part & valid_mask(xyz))


def test_a_cleaned_scan_has_no_measurements_along_its_border() -> None:
    xyz = scan_of_box()
    clean = clean_scan(xyz, np.zeros((*xyz.shape[:2], 3), np.uint8), None, RULE).xyz
    assert is_cleaned(clean, RULE) and not is_cleaned(xyz, RULE)
    assert not is_cleaned(clean, CleaningRule(empty_margins=True))  # a raw scan may have such margins as well


def test_empty_margins_move_the_border_to_the_measured_area() -> None:
    part = (slice(25, 60), slice(30, 60))
    xyz = np.pad(scan_of_box(part=part), ((12, 13), (15, 11), (0, 0)))
    rgb = np.ones(xyz.shape, np.uint8)
    with pytest.raises(InputError, match="give --empty_margins"):
        clean_scan(xyz, rgb, None, RULE)
    clean = clean_scan(xyz, rgb, None, CleaningRule(empty_margins=True))
    plain = clean_scan(scan_of_box(part=part), np.ones((80, 90, 3), np.uint8), None, RULE)
    assert clean.doubt == plain.doubt == ""
    kept = valid_mask(clean.xyz)
    assert np.array_equal(clean.xyz[kept], plain.xyz[valid_mask(plain.xyz)])
    xyz[15:] = 0
    xyz[12:15, :50] = xyz[12:15, 60:] = 0
    with pytest.raises(InputError, match=r"border of the measured area .* at least 50\. .* otherwise leave it out\.$"):
        clean_scan(xyz, rgb, None, CleaningRule(empty_margins=True))


@pytest.mark.parametrize("keep_rgb", [False, True])
def test_unmeasured_pixels_are_blackened_on_request(keep_rgb: bool) -> None:
    xyz = scan_of_box()
    rgb = np.full((80, 90, 3), 7, np.uint8)
    plain, masked = (
        clean_scan(xyz, rgb, None, CleaningRule(keep_rgb=keep_rgb, mask_unmeasured=mask)).rgb[10:90, 5:95]
        for mask in (False, True)
    )
    assert (plain[~valid_mask(xyz)] == 7).all()
    assert np.array_equal(masked, np.where(valid_mask(xyz)[..., None], plain, 0))


def test_a_room_cropped_to_its_measured_area_shows_no_table(real_data: Path) -> None:
    xyz = read_organized_pc(real_data / "scans/xyz/office1.tiff")
    rows, columns = np.nonzero(valid_mask(xyz))
    crop = xyz[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    with pytest.raises(InputError, match=r"^\d+% of the 13495 measurements .* lie on one plane, expected at least 10%"):
        clean_scan(crop, np.ones((*crop.shape[:2], 3), np.uint8), None, RULE)


@pytest.mark.parametrize(
    "name, doubt", [("milk_cartoon_all_small_clorox", "^$"), ("table_scene_mug_stereo_textured", r"^39% of the 17420")]
)
def test_a_real_scan_is_cleaned_with_empty_margins(real_data: Path, name: str, doubt: str) -> None:
    xyz = read_organized_pc(real_data / f"scans/xyz/{name}.tiff")
    rgb = np.ones(xyz.shape, np.uint8)
    with pytest.raises(InputError, match=r"^0 of the 22000 pixels .* give --empty_margins\.$"):
        clean_scan(xyz, rgb, None, RULE)
    clean = clean_scan(xyz, rgb, None, CleaningRule(empty_margins=True))
    assert 10_000 < valid_mask(clean.xyz).sum() < valid_mask(xyz).sum() * 0.6
    assert re.match(doubt, clean.doubt)


def test_requirements_on_the_border_are_fields_but_not_recorded_settings() -> None:
    xyz = views_without_a_table()["sphere"][0].astype(np.float32)
    assert shows_table(xyz, CleaningRule(min_support=0.3))
    xyz[:, 50:250] = 0
    xyz[np.arange(300) % 4 > 0] = 0
    assert not shows_table(xyz, CleaningRule(min_support=0.0))
    assert shows_table(xyz, CleaningRule(min_support=0.0, min_border=0.1))
    assert CleaningRule(min_support=0.3, min_border=0.1, least_support=0.2, strict=True).settings() == RULE.settings()
    assert CleaningRule(empty_margins=True).settings() == RULE.settings() | {"empty_margins": True}
    assert CleaningRule(cluster_eps=0.005).settings() != RULE.settings()

"""Anomaly maps and figures: right pixels in the right places."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from utils.reporting.visualization import (
    FUSED,
    GAP,
    NEUTRAL,
    PANEL,
    PREDICTED,
    TRUTH,
    Drawing,
    bar_labels,
    caption,
    color_scale,
    heat_colors,
    heat_strength,
    object_box,
    resize_map,
    save_anomaly_map,
    save_figure,
)

SIDE = 32
SCALE = {"rgb": (0.0, 1.0), "xyz": (0.0, 2.0), FUSED: (0.0, 1.0)}


def inputs() -> dict:
    rng = np.random.default_rng(0)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[4:12, 16:24] = 1
    return {
        "image": rng.integers(0, 255, (48, 48, 3), dtype=np.uint8),
        "mask": mask,
        "bank_maps": {name: rng.random((SIDE, SIDE)) for name in ("xyz", "rgb")},
        "anomaly_map": rng.random((SIDE, SIDE)),
        "scale": SCALE,
        "threshold": 0.9,
        "title": "bagel test/hole/000",
    }


def drawn(folder: Path, **changes: object) -> np.ndarray:
    path = folder / "figure.png"
    save_figure(path, **{**inputs(), **changes})
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Figure of the unchanged `inputs`."""
    return drawn(tmp_path_factory.mktemp("plain"))


def test_anomaly_map_of_the_same_size_is_written_bit_by_bit(tmp_path: Path) -> None:
    anomaly_map = np.random.default_rng(0).random((SIDE, SIDE), dtype=np.float32)
    path = tmp_path / "anomaly_maps" / "bagel" / "test" / "hole" / "000.tiff"
    save_anomaly_map(path, anomaly_map, (SIDE, SIDE))
    read = tifffile.imread(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, anomaly_map)
    assert [each.name for each in path.parent.iterdir()] == ["000.tiff"]


def test_anomaly_map_is_resized_bilinearly_by_pixel_areas(tmp_path: Path) -> None:
    # align_corners False: centers of four pixels on two are at -0.25, 0.25, 0.75 and 1.25
    save_anomaly_map(tmp_path / "a.tiff", np.array([[0.0, 4.0], [8.0, 12.0]]), (2, 4))
    np.testing.assert_allclose(tifffile.imread(tmp_path / "a.tiff"), [[0, 1, 3, 4], [8, 9, 11, 12]])


@pytest.mark.parametrize("size", [(40, 30), (3, 4), (5, 3)])
def test_anomaly_map_keeps_its_axes_at_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    rows = np.repeat(np.arange(SIDE, dtype=np.float32)[:, None], SIDE, axis=1)
    save_anomaly_map(tmp_path / "a.tiff", rows, size)
    read = tifffile.imread(tmp_path / "a.tiff")
    assert read.shape == size
    assert (np.diff(read, axis=0) > 0).all()
    np.testing.assert_allclose(read, np.repeat(read[:, :1], size[1], axis=1), rtol=1e-6)


def test_the_middle_of_a_color_scale_is_the_threshold() -> None:
    maps = [np.linspace(2, 3, 5000).reshape(50, 100), np.linspace(3, 4, 5000).reshape(50, 100)]
    assert color_scale(maps, 3.25) == pytest.approx((3.0, 3.5))
    assert bar_labels((3.0, 3.5), 3.25) == ["0", "threshold", "2"]


def test_a_color_scale_without_a_threshold_above_the_median_ignores_a_hot_pixel() -> None:
    maps = [np.linspace(2, 3, 5000).reshape(50, 100), np.linspace(3, 4, 5000).reshape(50, 100)]
    maps[1][0, 0] = 1000
    for threshold in (None, 2.5):
        lo, hi = color_scale(maps, threshold)
        assert lo == pytest.approx(3, abs=0.01)
        assert 3.99 < hi <= 4
        assert bar_labels((lo, hi), threshold) == ["3", "", "4"]


def test_color_scale_of_flat_maps_is_usable() -> None:
    assert color_scale([np.full((4, 4), 7.0)]) == (7.0, 8.0)
    almost_flat = np.zeros((100, 100))
    almost_flat[0, 0] = 3
    assert color_scale([almost_flat]) == (0.0, 3.0)


# The drawing


def points(*shown: slice) -> np.ndarray:
    valid = np.zeros((40, 80), dtype=bool)
    if shown:
        valid[shown] = True
    return valid


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        (None, (0, 0, 80, 40)),
        (points(), (0, 0, 80, 40)),
        (points(slice(15, 25), slice(30, 50)), (40 - 11.2, 20 - 11.2, 40 + 11.2, 20 + 11.2)),
        (points(slice(0, 40), slice(0, 10)), (0, 0, 27.4, 40)),  # as far as the view reaches
    ],
)
def test_the_drawn_part_is_a_square_around_the_points(valid: np.ndarray | None, expected: tuple) -> None:
    assert np.array(object_box(valid)) * [80, 40, 80, 40] == pytest.approx(np.array(expected))


def test_image_map_and_outlines_of_any_resolution_are_cropped_alike() -> None:
    valid = points(slice(10, 30), slice(40, 60))
    image = np.zeros((80, 160, 3), np.uint8)
    image[40:60, 80:120] = 255  # the lower half of the points
    plane = np.zeros((20, 40))
    plane[10:15, 20:30] = 1.0  # likewise
    drawing = Drawing(image, plane, 0.5, None, valid, side=224)
    assert drawing.size == (224, 224)
    shot = drawing.picture()[..., 0]
    lines = drawing.lines()
    assert shot[130, 112] > 250 and shot[90, 112] < 5  # the box begins 12 pixels outside of the points
    rows = np.flatnonzero((lines == 2).any(axis=1))
    assert abs(rows[0] - 112) <= 6 and abs(rows[-1] - 212) <= 6
    heat = drawing.heat(plane, (0.0, 1.0))
    assert (heat[2, 2] == NEUTRAL).all() and (heat[150, 112] > 200).any() and heat[90, 112].max() < 30


def test_heat_colors_do_not_depend_on_other_pixels() -> None:
    calm, wild = np.full((8, 8), 0.9), np.full((8, 8), 0.9)
    wild[5:] = 40.0
    first, second = (Drawing(None, each, side=16).heat(each, (0.0, 2.0)) for each in (calm, wild))
    np.testing.assert_array_equal(first[:8], second[:8])


def test_predicted_and_true_defects_have_outlines_of_two_colors() -> None:
    image = np.full((80, 80, 3), 128, np.uint8)
    plane, mask = np.full((80, 80), 0.5), np.zeros((80, 80), np.uint8)
    plane[10:30, 40:70] = 1.5
    mask[50:60, 10:30] = 1
    shot = Drawing(image, plane, 1.0, mask, side=80).outlined()
    for color, rows, columns in ((PREDICTED, (10, 29), (40, 69)), (TRUTH, (50, 59), (10, 29))):
        found = np.nonzero((shot == list(bytes.fromhex(color[1:]))).all(axis=2))
        assert (found[0].min(), found[0].max()) == rows
        assert (found[1].min(), found[1].max()) == columns
    assert (shot[20, 55] == 128).all()
    at_the_threshold = Drawing(image, plane, 1.5, None, side=80)
    assert not at_the_threshold.lines().any()


def test_the_smallest_defect_and_one_at_the_edge_are_outlined() -> None:
    mask = np.zeros((900, 900), np.uint8)
    mask[400, 401] = 1
    mask[0, 800:] = 1
    lines = Drawing(None, np.zeros((8, 8)), None, mask, side=225).lines()
    assert lines[100, 100] == 3 and (lines[0, 201:] == 3).all()


# Figures


def test_figure_has_content_and_the_width_of_its_panels(tmp_path: Path, plain: np.ndarray) -> None:
    assert plain.shape[0] > PANEL
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) > 1000
    assert plain.shape[1] == GAP + 5 * (PANEL + GAP)  # image, outlines, xyz, rgb, fused
    assert drawn(tmp_path, image=None).shape[1] == GAP + 3 * (PANEL + GAP)


def test_map_of_a_single_bank_is_not_drawn_twice(tmp_path: Path) -> None:
    anomaly_map = inputs()["anomaly_map"]
    single = drawn(tmp_path, bank_maps={"rgb": anomaly_map})
    np.testing.assert_array_equal(single, drawn(tmp_path, bank_maps={}))


@pytest.mark.parametrize(
    "changes",
    [
        {"image": inputs()["image"][::-1]},
        {"mask": inputs()["mask"].T},
        {"mask": np.zeros((SIDE, SIDE))},
        {"mask": None},
        {"valid": inputs()["mask"] > 0},
        {"bank_maps": {name: bank[::-1] for name, bank in inputs()["bank_maps"].items()}},
        {"anomaly_map": inputs()["anomaly_map"][::-1]},
        {"scale": {**SCALE, "rgb": (0.0, 3.0)}},
        {"scale": {**SCALE, FUSED: (0.0, 3.0)}},
        {"threshold": None},
        {"title": "another"},
    ],
)
def test_each_input_changes_the_figure(tmp_path: Path, plain: np.ndarray, changes: dict) -> None:
    changed = drawn(tmp_path, **changes)
    assert plain.shape != changed.shape or (plain != changed).any()


def test_figures_are_reproducible(tmp_path: Path, plain: np.ndarray) -> None:
    np.testing.assert_array_equal(drawn(tmp_path), plain)


def test_image_and_heat_of_each_panel(plain: np.ndarray) -> None:
    given, top = inputs(), int(np.flatnonzero((plain[:, GAP : GAP + PANEL] != 255).any(axis=(1, 2)))[-1]) - PANEL + 1

    def panel(number: int) -> np.ndarray:
        left = GAP + number * (PANEL + GAP)
        return plain[top : top + PANEL, left : left + PANEL].astype(int)

    maps = (given["bank_maps"]["xyz"], given["bank_maps"]["rgb"], given["anomaly_map"])
    for number, heat, key in zip((2, 3, 4), maps, ("xyz", "rgb", FUSED), strict=True):
        expected = heat_colors(heat_strength(resize_map(heat, (PANEL, PANEL)), SCALE[key]))
        assert np.abs(panel(number) - expected).max() <= 4  # one step of the color map
    drawing = Drawing(given["image"], given["anomaly_map"], 0.9, given["mask"])
    np.testing.assert_array_equal(panel(0), drawing.picture())
    np.testing.assert_array_equal(panel(1), drawing.outlined())


@pytest.mark.parametrize(
    ("severity", "anomalous", "expected"),
    [
        (1.234, True, "a: anomalous, severity 1.23 (threshold 1)"),
        (None, False, "a: good"),
        (None, None, "a: no threshold"),
    ],
)
def test_caption(severity: float | None, anomalous: bool | None, expected: str) -> None:
    assert caption("a", severity, anomalous) == expected


def test_title_is_plain_text(tmp_path: Path) -> None:
    drawn(tmp_path, title="a $\\broken{$ _title^ \udcff\n")

"""Anomaly maps, figures and overlays: right pixels in the right places."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from utils.reporting.visualization import (
    FUSED,
    GAP,
    HEAD,
    PANEL,
    color_scale,
    heat_colors,
    heat_strength,
    resize_map,
    save_anomaly_map,
    save_overlay,
    save_prediction_figure,
)
from utils.scans.images import OVERLAY_SIDE

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
        "title": "bagel test/hole/000",
    }


def drawn(folder: Path, **changes: object) -> np.ndarray:
    path = folder / "figure.png"
    save_prediction_figure(path, **{**inputs(), **changes})
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


def test_color_scale_spans_the_class_and_ignores_a_hot_pixel() -> None:
    maps = [np.linspace(2, 3, 5000).reshape(50, 100), np.linspace(3, 4, 5000).reshape(50, 100)]
    maps[1][0, 0] = 1000
    lo, hi = color_scale(maps)
    assert lo == 2
    assert 3.99 < hi <= 4


def test_color_scale_of_flat_maps_is_usable() -> None:
    assert color_scale([np.full((4, 4), 7.0)]) == (7.0, 8.0)
    almost_flat = np.zeros((100, 100))
    almost_flat[0, 0] = 3
    assert color_scale([almost_flat]) == (0.0, 3.0)


def test_figure_has_content_and_the_width_of_its_panels(tmp_path: Path, plain: np.ndarray) -> None:
    assert plain.shape[0] > 200
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) > 1000
    per_panel = plain.shape[1] / 6  # image, ground truth, xyz, rgb, fused, overlay
    assert drawn(tmp_path, mask=None).shape[1] == pytest.approx(5 * per_panel, rel=0.02)
    assert drawn(tmp_path, image=None).shape[1] == pytest.approx(4 * per_panel, rel=0.02)


def test_map_of_a_single_bank_is_not_drawn_twice(tmp_path: Path) -> None:
    anomaly_map = inputs()["anomaly_map"]
    single = drawn(tmp_path, bank_maps={"rgb": anomaly_map.copy()}, scale={FUSED: (0.0, 1.0)})
    none = drawn(tmp_path, bank_maps={}, scale={FUSED: (0.0, 1.0)})
    np.testing.assert_array_equal(single, none)
    assert drawn(tmp_path, bank_maps={"rgb": anomaly_map + 1}).shape[1] > single.shape[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"image": inputs()["image"][::-1]},
        {"mask": inputs()["mask"].T},
        {"mask": np.zeros((SIDE, SIDE))},
        {"bank_maps": {name: bank[::-1] for name, bank in inputs()["bank_maps"].items()}},
        {"anomaly_map": inputs()["anomaly_map"][::-1]},
        {"scale": {**SCALE, "rgb": (0.0, 3.0)}},
        {"scale": {**SCALE, FUSED: (0.0, 3.0)}},
        {"title": "another"},
    ],
)
def test_each_input_changes_the_figure(tmp_path: Path, plain: np.ndarray, changes: dict) -> None:
    changed = drawn(tmp_path, **changes)
    assert plain.shape != changed.shape or (plain != changed).any()


def test_figures_are_reproducible(tmp_path: Path, plain: np.ndarray) -> None:
    np.testing.assert_array_equal(drawn(tmp_path), plain)


def panel(figure: np.ndarray, number: int, height: int = PANEL) -> np.ndarray:
    """Pixels of a panel, from the left, of a figure."""
    left = GAP + number * (PANEL + GAP)
    return figure[HEAD : HEAD + height, left : left + PANEL].astype(int)


@pytest.mark.parametrize("image_size", [(48, 48), (30, 60)])
def test_outline_surrounds_the_defect(tmp_path: Path, image_size: tuple[int, int]) -> None:
    height = PANEL * image_size[0] // image_size[1]
    black = np.zeros((*image_size, 3), np.uint8)
    figure = drawn(tmp_path, image=black, anomaly_map=np.zeros((SIDE, SIDE)))
    for number in (1, 5):  # ground truth and overlay
        rows, columns = np.nonzero((panel(figure, number, height) == (0, 229, 255)).all(axis=2))
        a_pixel = 1.01 * PANEL / SIDE
        for found, edge, length in (
            (rows.min(), 4, height), (rows.max(), 12, height), (columns.min(), 16, PANEL), (columns.max(), 24, PANEL)
        ):  # fmt: skip
            assert found == pytest.approx(edge / SIDE * length, abs=a_pixel)
    assert not panel(figure, 0, height).any()


def test_image_and_heat_of_each_panel(plain: np.ndarray) -> None:
    given = inputs()
    maps = (given["bank_maps"]["xyz"], given["bank_maps"]["rgb"], given["anomaly_map"])
    for number, heat, key in zip((2, 3, 4), maps, ("xyz", "rgb", FUSED), strict=True):
        expected = heat_colors(heat_strength(resize_map(heat, (PANEL, PANEL)), SCALE[key]))
        assert np.abs(panel(plain, number) - expected).max() <= 1
    enlarged = np.repeat(np.repeat(given["image"], PANEL // 48, axis=0), PANEL // 48, axis=1)
    np.testing.assert_array_equal(panel(plain, 0), enlarged)


def test_defect_that_fills_the_image_is_outlined(tmp_path: Path) -> None:
    everything = drawn(tmp_path, mask=np.ones((SIDE, SIDE), dtype=bool))
    nothing = drawn(tmp_path, mask=np.zeros((SIDE, SIDE), dtype=bool), image=inputs()["image"])
    assert (everything != nothing).any()


def test_title_is_plain_text(tmp_path: Path) -> None:
    drawn(tmp_path, title="a $\\broken{$ _title^ \udcff\n")


@pytest.mark.parametrize("scale", [{"rgb": (0.0, 1.0), "xyz": (0.0, 1.0)}, {**SCALE, FUSED: (1.0, 1.0)}])
def test_missing_or_empty_scale_is_refused(tmp_path: Path, scale: dict) -> None:
    with pytest.raises(ValueError, match="color scale of fused"):
        drawn(tmp_path, scale=scale)
    assert not (tmp_path / "figure.png").exists()


# Overlays


def overlay(folder: Path, image: np.ndarray | None, anomaly_map: np.ndarray, threshold: float | None) -> np.ndarray:
    save_overlay(folder / "overlay.png", image, anomaly_map, (0.0, 2.0), threshold)
    with Image.open(folder / "overlay.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_overlay_has_the_size_and_gray_values_of_the_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    drawn = overlay(tmp_path, image, np.zeros((8, 8)), None)
    assert drawn.shape == (60, 90, 3)
    luma = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(drawn, np.repeat(luma[..., None], 3, axis=2), atol=2)
    image = np.full((40, 2 * OVERLAY_SIDE, 3), 100, np.uint8)
    assert overlay(tmp_path, image, np.zeros((8, 8)), None).shape == (20, OVERLAY_SIDE, 3)


def test_overlay_outlines_pixels_above_the_threshold(tmp_path: Path) -> None:
    image = np.full((80, 80, 3), 128, np.uint8)
    anomaly_map = np.full((8, 8), 0.5)
    anomaly_map[1:3, 4:7] = 1.5

    def outline(threshold: float) -> np.ndarray:
        return (np.abs(overlay(tmp_path, image, anomaly_map, threshold) - (0, 229, 255)) < 3).all(axis=2)

    rows, columns = np.nonzero(outline(1.0))
    assert abs(rows.min() - 10) <= 2 and abs(rows.max() - 30) <= 2
    assert abs(columns.min() - 40) <= 2 and abs(columns.max() - 70) <= 2
    assert not outline(1.0)[15:25, 45:65].any() and not outline(2.0).any()


def test_overlay_shows_only_the_image_far_below_the_threshold(tmp_path: Path) -> None:
    image = np.full((16, 16, 3), 128, np.uint8)
    for value, shown in ((0.0, 0), (0.79, 0), (1.0, 10), (1.5, 60), (2.0, 100)):  # the scale is 0 to 2
        drawn = overlay(tmp_path, image, np.full((8, 8), value), 1.0)[8, 8]
        assert np.abs(drawn - 128).max() >= shown and (shown or (drawn == 128).all()), value


def test_overlay_colors_do_not_depend_on_other_pixels(tmp_path: Path) -> None:
    image = np.full((16, 16, 3), 128, np.uint8)
    calm, wild = np.full((8, 8), 0.9), np.full((8, 8), 0.9)
    wild[4:] = 40.0
    np.testing.assert_array_equal(overlay(tmp_path, image, calm, 1.0)[:4], overlay(tmp_path, image, wild, 1.0)[:4])


def test_overlay_without_an_image_is_the_map(tmp_path: Path) -> None:
    anomaly_map = np.zeros((32, 48))
    anomaly_map[:, 24:] = 2.0
    drawn = overlay(tmp_path, None, anomaly_map, None)
    assert drawn.shape == (32, 48, 3)
    assert drawn[:, :22].sum(axis=2).max() < 60 and drawn[:, 26:].sum(axis=2).min() > 500

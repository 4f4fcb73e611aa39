"""AU-PRO against hand-computed numbers, a slow plain form, and the recorded curves of the original computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from utils.au_pro import UndefinedMetricError, area_to_limit, au_pro, pro_curve

# Two regions (2 pixels, 1 pixel) and 5 anomaly-free pixels; the scores tie across the classes.
HAND_MASK = np.array([[1, 1, 0, 0], [0, 0, 0, 1]])
HAND_MAP = np.array([[0.9, 0.5, 0.5, 0.1], [0.1, 0.1, 0.2, 0.2]])


def plain_components(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected components by flood fill."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    components = []
    while left:
        frontier = [left.pop()]
        component = set(frontier)
        while frontier:
            row, column = frontier.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            component |= near
            frontier += near
        components.append(component)
    return components


def plain_exact_curve(masks: np.ndarray, maps: np.ndarray) -> tuple[list[float], list[float]]:
    """Curve with every distinct score as a threshold, one component at a time."""
    regions = [(number, region) for number, mask in enumerate(masks) for region in plain_components(mask)]
    fprs, pros = [0.0], [0.0]
    for threshold in sorted(set(np.ravel(maps).tolist()), reverse=True):
        above = maps >= threshold
        fprs.append(above[masks == 0].mean())
        pros.append(np.mean([np.mean([above[number][pixel] for pixel in region]) for number, region in regions]))
    return fprs, pros


def plain_reference_curve(masks: np.ndarray, maps: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Curve by the official rule, one threshold and one component at a time."""
    regions = [(number, region) for number, mask in enumerate(masks) for region in plain_components(mask)]
    normal = sorted(maps[masks == 0].tolist())
    fprs, pros = [1.0], [1.0]
    for rank in np.linspace(0, len(normal) - 1, count, dtype=int):
        fprs.append(1.0 - (rank + 1) / len(normal))
        above = maps > normal[rank]
        pros.append(np.mean([np.mean([above[number][pixel] for pixel in region]) for number, region in regions]))
    return fprs[::-1], pros[::-1]


def random_case(seed: int, levels: int | None, count: int = 3, side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.standard_normal((count, side, side)), (0, 1, 1)) > 0.35
    maps = rng.standard_normal((count, side, side)) + masks
    return masks, maps.astype(np.float32) if levels is None else np.round(maps * levels) / levels


def test_exact_curve_by_hand() -> None:
    # 0.9: half of region 1. 0.5: all of it and 1 of 5 normal pixels. 0.2: region 2 and another normal pixel. 0.1: all
    fprs, pros = pro_curve(HAND_MASK[None], HAND_MAP[None])
    np.testing.assert_allclose(fprs, [0, 0, 0.2, 0.4, 1])
    np.testing.assert_allclose(pros, [0, 0.25, 0.5, 1, 1])


def test_area_by_hand() -> None:
    # 0.2 wide from 0.25 to 0.5, then 0.1 wide from 0.5 to 0.75
    assert au_pro(HAND_MASK[None], HAND_MAP[None], limit=0.3) == pytest.approx((0.2 * 0.375 + 0.1 * 0.625) / 0.3)
    # the limit falls on a point of the curve
    assert au_pro(HAND_MASK[None], HAND_MAP[None], limit=0.2) == pytest.approx(0.375)
    assert au_pro(HAND_MASK[None], HAND_MAP[None], limit=1.0) == pytest.approx(0.2 * 0.375 + 0.2 * 0.75 + 0.6)


def test_reference_curve_by_hand() -> None:
    # sorted anomaly-free scores 0.1 0.1 0.1 0.2 0.5; three thresholds at ranks 0, 2 and 4; only scores above them count
    fprs, pros = pro_curve(HAND_MASK[None], HAND_MAP[None], num_thresholds=3)
    np.testing.assert_allclose(fprs, [0, 0.4, 0.8, 1])
    np.testing.assert_allclose(pros, [0.25, 1, 1, 1])


def test_diagonal_neighbors_are_one_region() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0]])  # two regions: the diagonal pair, the corner
    _, pros = pro_curve(mask[None], np.array([[[9, 0, 0, 8], [0, 7, 0, 0]]]))
    np.testing.assert_allclose(pros, [0, 0.25, 0.75, 1, 1])


def test_regions_do_not_connect_across_samples() -> None:
    masks = np.array([[[1, 0]], [[1, 0]]])
    _, pros = pro_curve(masks, np.array([[[3.0, 0]], [[2, 0]]]))
    np.testing.assert_allclose(pros, [0, 0.5, 1, 1])


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(3))
def test_exact_curve_equals_the_plain_form(seed: int, levels: int | None) -> None:
    masks, maps = random_case(seed, levels)
    fprs, pros = pro_curve(masks, maps)
    expected_fprs, expected_pros = plain_exact_curve(masks, maps)
    np.testing.assert_array_equal(fprs, expected_fprs)
    np.testing.assert_allclose(pros, expected_pros, atol=1e-12)


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("count", [2, 7, 100, 1000])  # 1000: more thresholds than anomaly-free pixels
def test_reference_curve_equals_the_plain_form(count: int, levels: int | None) -> None:
    masks, maps = random_case(5, levels)
    fprs, pros = pro_curve(masks, maps, count)
    expected_fprs, expected_pros = plain_reference_curve(masks, maps, count)
    np.testing.assert_array_equal(fprs, expected_fprs)
    np.testing.assert_allclose(pros, expected_pros, atol=1e-12)


def test_all_scores_equal_give_the_diagonal() -> None:
    masks = np.array([[[1, 0], [0, 0]]])
    assert au_pro(masks, np.zeros((1, 2, 2)), limit=0.3) == pytest.approx(0.15)


def test_perfect_and_inverted_maps() -> None:
    masks, _ = random_case(1, None)
    assert au_pro(masks, masks.astype(float), limit=0.05) == 1
    assert au_pro(masks, -masks.astype(float), limit=0.05) == 0


def test_order_of_the_samples_does_not_matter() -> None:
    masks, maps = random_case(2, 4, count=5)
    assert au_pro(masks[::-1], maps[::-1]) == pytest.approx(au_pro(masks, maps), abs=1e-12)


def test_lists_tensors_and_samples_of_different_sizes_are_accepted() -> None:
    masks, maps = random_case(3, 4)
    expected = pro_curve(masks, maps)
    for given in ((list(masks), list(maps)), (torch.from_numpy(masks), torch.from_numpy(maps)), (masks * 255, maps)):
        np.testing.assert_array_equal(pro_curve(*given), expected)
    fprs, _ = pro_curve([masks[0], HAND_MASK], [maps[0], HAND_MAP])
    assert fprs[-1] == 1


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), "no ground truth has a defective pixel"),
        (np.ones((1, 2, 2)), np.zeros((1, 2, 2)), "no ground truth has an anomaly-free pixel"),
        (np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), "no sample"),
    ],
)
def test_a_curve_without_both_kinds_of_pixels_is_undefined(masks: np.ndarray, maps: np.ndarray, message: str) -> None:
    for thresholds in (None, 100):
        with pytest.raises(UndefinedMetricError, match=message):
            pro_curve(masks, maps, thresholds)


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        (np.eye(2)[None], np.zeros((2, 2, 2)), "1 masks for 2 anomaly maps"),
        (np.eye(2)[None], np.zeros((1, 2, 3)), r"mask of shape \(2, 2\), anomaly map of shape \(2, 3\)"),
        (np.eye(2)[None, None], np.zeros((1, 1, 2, 2)), r"expected the same \(H, W\)"),
        (np.eye(2)[None], np.array([[[0, np.nan], [0, 0]]]), "sample 0 holds NaN"),
        (np.eye(2)[None], np.array([[[0, np.inf], [0, 0]]]), "infinite"),
    ],
)
def test_unfit_masks_and_maps_are_refused(masks: np.ndarray, maps: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        au_pro(masks, maps)
    assert not isinstance(caught.value, UndefinedMetricError)


def test_bad_limits_curves_and_counts_are_refused() -> None:
    masks, maps = random_case(0, None)
    for limit in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="limit"):
            au_pro(masks, maps, limit)
    with pytest.raises(ValueError, match="at least 2"):
        pro_curve(masks, maps, 1)
    for fprs in ([0.1, 1.0], [0.0, 0.2], [1.0, 0.0]):
        with pytest.raises(ValueError, match="ascend"):
            area_to_limit(np.array(fprs), np.array([0.0, 1.0]), 0.3)


@pytest.mark.golden
def test_recorded_unit_case(goldens: Path) -> None:
    recorded = json.loads((goldens / "unit_meta.json").read_text())["aupro"]
    with np.load(goldens / "unit.npz") as arrays:
        masks, maps, curve = arrays["aupro_gts"], arrays["aupro_preds"], arrays["aupro_curve"]
    fprs, pros = pro_curve(masks, maps, recorded["num_thresholds"])
    np.testing.assert_array_equal(fprs, curve[0])
    np.testing.assert_allclose(pros, curve[1], atol=1e-12)
    area = au_pro(masks, maps, recorded["integration_limit"], recorded["num_thresholds"])
    assert area == pytest.approx(recorded["au_pro"], abs=1e-13)


@pytest.mark.golden
@pytest.mark.parametrize(("method", "bank"), [("DINO", "rgb"), ("Point_MAE", "xyz")])
def test_recorded_runs_with_maps_that_tie(goldens: Path, method: str, bank: str) -> None:
    """Recorded curves are reproduced for methods without a map SVM, whose 8-bit blur leaves few distinct scores."""
    recorded = json.loads((goldens / "runs_meta.json").read_text())[f"bn_{method}"]["metrics"]
    with np.load(goldens / f"run_bn_{method}.npz") as run:
        maps = run[f"blurq_test_{bank}"] / np.float32(255) * run[f"blurscale_test_{bank}"][:, None, None]
        curve = run["pro_curve"]
    with np.load(goldens / "run_bn_DINO.npz") as run:  # every run has the same ground truth
        masks = np.unpackbits(run["gts_packed"]).reshape(maps.shape)
    fprs, pros = pro_curve(masks, maps, 100)
    np.testing.assert_array_equal(fprs, curve[0])
    np.testing.assert_allclose(pros, curve[1], atol=1e-12)
    assert area_to_limit(fprs, pros) == pytest.approx(recorded["au_pro"], abs=1e-13)
    assert au_pro(masks, maps) > recorded["au_pro"]  # ranks overstate the false positives of tied scores

"""Thresholds: ranks and quantiles by hand, severity, and other false-alarm rates of a calibration."""

import logging
import math

import numpy as np
import pytest

from feature_extractors.thresholds import TAILS, Calibration, Thresholds, calibrate, warn_of_few_samples


def of_scores(scores: list[float], target_fpr: float) -> Thresholds:
    maps = [np.zeros((2, 2), np.float32)] * len(scores)
    return calibrate(scores, maps, target_fpr, "validation").thresholds(target_fpr)


NINE = [5.0, 1, 9, 2, 8, 3, 7, 4, 6]  # 1 ... 9, unsorted


@pytest.mark.parametrize(
    ("target_fpr", "image"),
    [
        (0.1, 9),  # rank 0.9 * 10
        (0.15, 9),  # rank 8.5, rounded up
        (0.2, 8),
        (0.5, 5),
        (0.7, 3),  # (1 - 0.7) * 10 is 3.0000000000000004 in floating point
        (0.9, 1),
        (0.999, 1),
    ],
)
def test_image_threshold_is_a_rank_of_the_good_scores(target_fpr: float, image: float) -> None:
    thresholds = of_scores(NINE, target_fpr)
    assert thresholds.image == image
    assert (thresholds.target_fpr, thresholds.source, thresholds.parts, thresholds.typical) == (
        target_fpr,
        "validation",
        9,
        5,
    )


def test_ranks_are_exact_despite_rounding() -> None:
    """Every rate k / (n + 1) leaves exactly k of n + 1 ranks above the threshold."""
    for samples in range(1, 130):
        for k in range(1, samples + 1):
            assert of_scores(list(range(1, samples + 1)), k / (samples + 1)).image == samples + 1 - k


def test_too_few_samples_give_the_largest_score_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert of_scores(NINE, 0.09).image == 9
    with caplog.at_level(logging.WARNING):
        warn_of_few_samples({"cookie": 11, "bagel": 9, "tire": 10}, 0.09)
    assert "0.09 needs 11 good samples, but there are 9 of bagel, 10 of tire, which allow 0.1. " in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_few_samples({"bagel": 9}, 0.1)
        warn_of_few_samples({"bagel": 99}, 0.01)
    assert caplog.text == ""


def test_false_alarm_rate_of_new_good_samples() -> None:
    """Split conformal prediction holds over many draws of 19 calibration samples and a new one."""
    rng = np.random.default_rng(0)
    above = [rng.exponential() > of_scores(rng.exponential(size=19).tolist(), 0.1).image for _ in range(4000)]
    assert np.mean(above) == pytest.approx(0.1, abs=0.015)


def test_ties_count_as_good() -> None:
    thresholds = of_scores([2.0, 2, 2, 2, 1], 1 / 6)
    assert thresholds.image == 2
    assert not thresholds.image > 2.0


@pytest.mark.parametrize(
    ("target_fpr", "pixel"), [(0.5, 4), (0.25, 6), (0.3, 6), (0.01, 8), (0.99, 1), (1 - 2**-53, 1)]
)
def test_pixel_threshold_is_a_quantile_of_all_good_pixels(target_fpr: float, pixel: float) -> None:
    maps = [np.array([[8, 2], [3, 1]], np.float32), np.array([[7, 4], [5, 6]], np.float32)]
    before = [each.copy() for each in maps]
    thresholds = calibrate([1.0, 2], maps, target_fpr, "training").thresholds(target_fpr)
    assert thresholds.pixel == pixel
    assert np.mean(np.stack(maps) > pixel) <= target_fpr
    assert all((each == old).all() for each, old in zip(maps, before, strict=True))


def test_thresholds_are_positive_where_good_samples_score_0() -> None:
    """A score of 0 stays good, and every positive score that a detector can give is anomalous."""
    thresholds = calibrate([0.0] * 9, [np.zeros((4, 4), np.float32)] * 9, 0.1, "training").thresholds(0.1)
    assert 0 < thresholds.image == thresholds.pixel < 1e-20


def test_pixel_threshold_is_the_smallest_valid_one() -> None:
    """Every rate k / 10 is exact, although (1 - 0.7) * 10 is 3.0000000000000004 in floating point."""
    pixels = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    for k in range(1, 10):
        assert calibrate([1.0], [pixels], k / 10, "training").thresholds(k / 10).pixel == 10 - k


def test_invalid_scores_and_maps_are_refused() -> None:
    plane = np.zeros((2, 2), np.float32)
    for scores, maps in (([], []), ([1.0], [plane, plane])):
        with pytest.raises(ValueError, match="expected one of each"):
            calibrate(scores, maps, 0.1, "training")
    for scores, maps in (([math.nan], [plane]), ([1.0], [plane + np.inf])):
        with pytest.raises(ValueError, match="NaN or infinity"):
            calibrate(scores, maps, 0.1, "training")


# Another false-alarm rate


def test_another_rate_gives_the_thresholds_of_a_new_calibration() -> None:
    """The image threshold is equal; the one for pixels belongs to the next smaller share that was kept."""
    rng = np.random.default_rng(0)
    scores, maps = rng.exponential(size=50).tolist(), list(rng.exponential(size=(50, 40, 40)).astype(np.float32))
    kept = calibrate(scores, maps, 0.01, "validation")
    for rate in (0.001, 0.02, 0.1, 0.3):
        fresh, changed = calibrate(scores, maps, rate, "validation").thresholds(rate), kept.thresholds(rate)
        assert changed.image == fresh.image
        assert rate / 1.06 < np.mean(np.stack(maps) > changed.pixel) <= rate
        assert changed.pixel >= fresh.pixel


def test_a_calibration_is_small() -> None:
    kept = calibrate([1.0] * 9, [np.zeros((50, 50), np.float32)] * 9, 0.01, "validation")
    assert len(kept.tails) == len(kept.pixels) == len(TAILS) + 1
    assert kept == Calibration((1.0,) * 9, kept.tails, (0.0,) * len(kept.pixels), "validation")


# Severity


def thresholds_at(image: float, typical: float) -> Thresholds:
    return Thresholds(image, 0.5, 0.01, "validation", 10, typical)


@pytest.mark.parametrize(("image", "typical"), [(3.0, 1.0), (1.0, -4.0), (2e-7, 1e-7), (1e9, -1e9)])
def test_severity_is_0_at_the_median_and_1_at_the_threshold(image: float, typical: float) -> None:
    thresholds = thresholds_at(image, typical)
    assert thresholds.severity(typical) == 0
    assert thresholds.severity(image) == 1
    assert thresholds.severity(2 * image - typical) == pytest.approx(2)
    assert thresholds.severity(100 * image - 99 * typical) == pytest.approx(100)


@pytest.mark.parametrize(("image", "typical"), [(3.0, 3.0), (1.0, 3.0), (1 + 2**-52, 1.0), (1e-30, 0.0)])
def test_severity_needs_a_threshold_above_the_median(image: float, typical: float) -> None:
    assert thresholds_at(image, typical).severity(5.0) is None

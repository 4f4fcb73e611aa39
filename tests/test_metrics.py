"""ROC areas, metrics of a class, mean over classes, decisions and latency."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.au_pro import UndefinedMetricError, au_pro
from utils.metrics import (
    EXACT_LIMITS,
    decision_metrics,
    evaluate,
    image_rocauc,
    latency_percentiles,
    mean_over_classes,
    pixel_rocauc,
)


def plain_rocauc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Fraction of (positive, negative) pairs in the right order; a tie counts half."""
    wins = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    return float(np.mean(wins))


def made_up_class(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((6, 16, 16), dtype=np.uint8)
    masks[:3, 4:7, 5:9] = 1
    masks[1, 12:14, 1:4] = 1
    maps = rng.random((6, 16, 16), dtype=np.float32) + 0.5 * masks
    return np.array([1, 1, 1, 0, 0, 0]), maps.max(axis=(1, 2)), masks, maps


def test_image_rocauc_by_hand() -> None:
    # of the four pairs two are in order, one ties, one is not
    assert image_rocauc([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.5]) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize("decimals", [8, 1])
def test_rocauc_equals_its_plain_form(decimals: int) -> None:
    labels, _, masks, maps = made_up_class()
    maps = maps.round(decimals)
    assert pixel_rocauc(masks, maps) == pytest.approx(plain_rocauc(masks.ravel() == 1, maps.ravel()))
    scores = maps[:, 0, 0]
    assert image_rocauc(labels, scores) == pytest.approx(plain_rocauc(labels == 1, scores))


def test_evaluate_has_the_keys_of_the_results_file() -> None:
    labels, scores, masks, maps = made_up_class()
    metrics, _ = evaluate(labels, scores, masks, maps)
    assert list(metrics) == ["image_rocauc", "pixel_rocauc", "au_pro", "au_pro_exact"]
    assert list(metrics["au_pro_exact"]) == ["0.3", "0.1", "0.05", "0.01"]
    assert metrics["image_rocauc"] == image_rocauc(labels, scores)
    assert metrics["pixel_rocauc"] == pixel_rocauc(masks, maps)
    assert metrics["au_pro"] == au_pro(masks, maps, 0.3, 100)
    for limit, area in metrics["au_pro_exact"].items():
        assert area == au_pro(masks, maps, float(limit))
    assert all(type(value) is float for value in (*list(metrics.values())[:3], *metrics["au_pro_exact"].values()))


def test_evaluate_takes_tensors() -> None:
    arrays = made_up_class()
    assert evaluate(*map(torch.from_numpy, arrays)) == evaluate(*arrays)


def test_each_input_of_evaluate_matters() -> None:
    labels, scores, masks, maps = made_up_class()
    metrics, _ = evaluate(labels, scores, masks, maps)
    other_scores, _ = evaluate(labels, scores[::-1], masks, maps)
    assert other_scores["image_rocauc"] != metrics["image_rocauc"]
    assert other_scores["pixel_rocauc"] == metrics["pixel_rocauc"]
    other_maps, _ = evaluate(labels, scores, masks, maps[::-1])
    assert other_maps["image_rocauc"] == metrics["image_rocauc"]
    assert all(other_maps[key] != metrics[key] for key in ("pixel_rocauc", "au_pro", "au_pro_exact"))


def test_undefined_metrics_are_none_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    labels, scores, masks, maps = made_up_class()
    with caplog.at_level(logging.WARNING, "utils.metrics"):
        metrics, _ = evaluate(np.zeros_like(labels), scores, masks, maps)
    assert metrics["image_rocauc"] is None
    assert metrics["au_pro"] is not None
    assert [record.getMessage() for record in caplog.records] == [
        "I-AUROC is undefined: all 6 samples are good, and a ROC curve needs both"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "utils.metrics"):
        metrics, _ = evaluate(labels, scores, np.zeros_like(masks), maps)
    assert metrics["image_rocauc"] is not None
    assert metrics["pixel_rocauc"] is None
    assert metrics["au_pro"] is None
    assert metrics["au_pro_exact"] == dict.fromkeys(EXACT_LIMITS)
    assert len(caplog.records) == 3
    assert all("defective" in record.getMessage() or "good" in record.getMessage() for record in caplog.records)


def test_single_metrics_raise_where_undefined() -> None:
    with pytest.raises(UndefinedMetricError, match="all 2 samples are defective"):
        image_rocauc([1, 1], [0.1, 0.2])
    with pytest.raises(UndefinedMetricError, match="no sample"):
        pixel_rocauc([], [])


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "differ in shape"),
        ([[0, 1]], [[0.1, 0.2]], r"\(N,\)"),
        ([0, 1], [0.1, np.nan], "sample 1 is NaN"),
    ],
)
def test_invalid_image_scores_are_refused(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_rocauc(labels, scores)


def test_nan_in_maps_is_an_error() -> None:
    labels, scores, masks, maps = made_up_class()
    maps[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="sample 2 holds NaN"):
        evaluate(labels, scores, masks, maps)


def test_mean_uses_unrounded_values_and_skips_none() -> None:
    def record(value: float | None, image: float | None) -> dict:
        exact = dict.fromkeys(EXACT_LIMITS, value)
        return {"image_rocauc": image, "pixel_rocauc": value, "au_pro": value, "au_pro_exact": exact, "samples": []}

    mean = mean_over_classes({"bagel": record(0.1234, 0.8), "rope": record(0.4321, None), "tire": record(0.0, 0.6)})
    assert mean["image_rocauc"] == pytest.approx(0.7)
    assert mean["au_pro"] == pytest.approx((0.1234 + 0.4321 + 0.0) / 3, abs=1e-15)
    assert mean["au_pro_exact"] == dict.fromkeys(EXACT_LIMITS, mean["au_pro"])
    assert list(mean) == ["image_rocauc", "pixel_rocauc", "au_pro", "au_pro_exact"]
    assert mean_over_classes({"bagel": record(None, None)})["au_pro_exact"]["0.1"] is None


@pytest.mark.golden
def test_recorded_pixel_rocauc(goldens: Path) -> None:
    recorded = json.loads((goldens / "unit_meta.json").read_text())["aupro"]["pixel_rocauc"]
    with np.load(goldens / "unit.npz") as arrays:
        assert pixel_rocauc(arrays["aupro_gts"], arrays["aupro_preds"]) == pytest.approx(recorded, abs=1e-12)


@pytest.mark.golden
def test_recorded_image_rocauc(goldens: Path) -> None:
    for key, run in json.loads((goldens / "runs_meta.json").read_text()).items():
        with np.load(goldens / f"run_{key}.npz") as arrays:
            value = image_rocauc(arrays["image_labels"], arrays["image_preds"])
        assert value == pytest.approx(run["metrics"]["image_rocauc"], abs=1e-12), key


@pytest.mark.golden
def test_recorded_metrics_of_a_run(goldens: Path) -> None:
    recorded = json.loads((goldens / "runs_meta.json").read_text())["bn_DINO"]["metrics"]
    with np.load(goldens / "run_bn_DINO.npz") as run:
        maps = run["blurq_test_rgb"] / np.float32(255) * run["blurscale_test_rgb"][:, None, None]
        masks = np.unpackbits(run["gts_packed"]).reshape(maps.shape)
        metrics, _ = evaluate(run["image_labels"], run["image_preds"], masks, maps)
    assert {key: metrics[key] for key in recorded} == pytest.approx(recorded, abs=1e-12)


# Decisions


def test_decisions_by_hand() -> None:
    labels, scores = [1, 1, 1, 0, 0, 0, 0], [0.9, 0.8, 0.3, 0.7, 0.3, 0.2, 0.1]
    figures = decision_metrics(labels, scores, 0.3)  # above it: two defective samples and one good
    assert (figures["precision"], figures["recall"]) == (2 / 3, 2 / 3)
    assert figures["false_alarm_rate"] == 1 / 4
    # above 0.7: 2 of 2 are defective, F1 4/5; above 0.2: 3 of 5, F1 6/8
    assert (figures["f1"], figures["f1_threshold"]) == (0.8, 0.7)
    assert list(figures) == ["f1", "f1_threshold", "precision", "recall", "false_alarm_rate"]
    assert all(type(value) is float for value in figures.values())


def test_best_f1_equals_its_plain_form() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels, scores = rng.random(12) < 0.4, rng.integers(0, 6, 12) / 4
        if not labels.any():
            continue
        found = decision_metrics(labels, scores, None)

        def f1(threshold: float, labels: np.ndarray = labels, scores: np.ndarray = scores) -> float:
            hits = sum(labels & (scores > threshold))
            return 2 * hits / (sum(scores > threshold) + sum(labels))

        everywhere = np.linspace(-1, 2, 1201)
        assert found["f1"] == pytest.approx(max(map(f1, everywhere)))
        assert f1(found["f1_threshold"]) == found["f1"]
        larger = scores[scores > found["f1_threshold"]]
        assert all(f1(x) < found["f1"] for x in larger)
        assert found["f1"] > max((f1(x) for x in everywhere if x > found["f1_threshold"] + 0.26), default=0) - 1e-12


def test_best_threshold_of_defective_samples_only() -> None:
    figures = decision_metrics([1, 1], [0.5, 0.7], 0.6)
    assert figures["f1"] == 1
    assert figures["f1_threshold"] < 0.5
    assert figures["f1_threshold"] == pytest.approx(0.5)
    assert (figures["precision"], figures["recall"], figures["false_alarm_rate"]) == (1, 0.5, None)


def test_undefined_decisions_are_none() -> None:
    nothing = dict.fromkeys(("f1", "f1_threshold", "precision", "recall", "false_alarm_rate"))
    assert decision_metrics([0, 0], [0.5, 0.7], None) == nothing
    assert decision_metrics([0, 0], [0.5, 0.7], 0.6) == nothing | {"precision": 0, "false_alarm_rate": 0.5}
    assert decision_metrics([0, 1], [0.5, 0.7], 0.7)["precision"] is None  # no score is above it
    assert decision_metrics([0, 1], [0.5, 0.7], 0.7)["recall"] == 0


def test_latency_percentiles() -> None:
    assert latency_percentiles(i / 100 for i in range(101)) == {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    assert latency_percentiles([3.0]) == {"p50": 3, "p95": 3, "p99": 3}

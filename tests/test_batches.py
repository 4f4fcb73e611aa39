"""Predictions of batches match those of single samples, and no step waits for values from a GPU."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_networks import TRIPLE, fit, made_up_samples, settings

from benchmarks.gpu_waits import Operations
from feature_extractors import detector as detector_module
from feature_extractors.alignment import pack_clouds
from feature_extractors.config import METHODS, PROTOCOLS
from feature_extractors.detector import Batch, Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.pipeline import calibrate_detectors
from models import row_search
from utils.records import PatchFeatures, Prediction, Sample


def samples_of_unequal_size(count: int) -> list[Sample]:
    """Test samples whose clouds have different numbers of points."""
    tested = made_up_samples("test")
    samples = []
    for number in range(count):
        sample = tested[number % len(tested)]
        xyz = sample.xyz.clone()
        xyz[:, 32 - number :] = 0
        samples.append(sample._replace(xyz=xyz))
    return samples


def extract_together(extractor: PatchExtractor, samples: Sequence[Sample]) -> list[PatchFeatures]:
    """Features from a single batch of clouds, as on a GPU."""
    inputs = extractor.prepare(samples)
    if inputs.clouds:
        inputs = inputs._replace(clouds=[pack_clouds([sample.xyz for sample in samples])])
    return extractor.extract_prepared(inputs)


def compare(detector: Detector, ours: Sequence[Prediction], theirs: Sequence[Prediction], tolerance: float) -> None:
    """Compare scores and bank maps.

    The tolerance of a fused score is relative to the distance from the median good score to the threshold. Rounding
    in the resize may change a few pixels of the 8-bit blur by up to two levels.
    """
    several = len(detector.banks) > 1
    spread = detector.thresholds.image - detector.thresholds.typical if several else 0.0
    levels = 0 if detector.config.protocol.float_blur else 2 / 255
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.score == pytest.approx(other.score, rel=0 if several else tolerance, abs=tolerance * abs(spread))
        assert mine.bank_scores == pytest.approx(other.bank_scores, rel=tolerance)
        for name, plane in mine.bank_maps.items():
            difference = (plane - other.bank_maps[name]).abs() / other.bank_maps[name].max()
            assert difference.max() <= tolerance + levels
            assert (difference > tolerance).float().mean() <= 0.01


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", METHODS)
def test_batches_give_the_predictions_of_single_samples(name: str, protocol: str) -> None:
    detector, features = fit(settings(name, protocol=PROTOCOLS[protocol], use_uff="Fusion" in name))
    calibrate_detectors({name: detector}, features, 0.1, "training")
    samples = samples_of_unequal_size(8)
    expected = [detector.predict(sample) for sample in samples]
    for count in (1, 3, 8):
        compare(detector, detector.predict_batch(samples[:count]), expected[:count], 1e-6)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_samples_that_are_computed_together(protocol: str, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps take the whole batch, as on a GPU."""
    detector, features = fit(settings(TRIPLE, protocol=PROTOCOLS[protocol], use_uff=True))
    calibrate_detectors({TRIPLE: detector}, features, 0.1, "training")
    samples = samples_of_unequal_size(8)
    expected = [detector.predict(sample) for sample in samples]
    held_out = detector.bank_results(list(features), left_out=range(len(features)))
    single = [detector.extractor(sample) for sample in samples]
    together = extract_together(detector.extractor, samples)
    for ours, theirs in zip(together, single, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(detector_module, "SCORED_TOGETHER_ON_CPU", 8)
    monkeypatch.setattr(detector_module, "Batch", lambda *arguments, **_: Batch(*arguments, bounded=bounded))
    compare(detector, detector.predict_features(single), expected, 1e-6)
    compare(detector, detector.predict_features(together), expected, 1e-4)  # other rounding of the features
    found = detector.bank_results(list(features), left_out=range(len(features)))
    for (scores, maps), (other_scores, other_maps) in zip(found, held_out, strict=True):
        assert scores == pytest.approx(other_scores, rel=1e-4)
        for plane, other in zip(maps, other_maps, strict=True):
            torch.testing.assert_close(plane, other, rtol=1e-4, atol=1e-4 * float(other.max()))


def test_incomplete_batches_are_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of one candidate does not know whether there are others, so none is complete."""
    detector, _ = fit(settings(TRIPLE))
    samples = made_up_samples("test")[:2]
    expected = [detector.predict(sample) for sample in samples]
    seen: list[bool] = []
    score = Detector._score

    def counted(self: Detector, batch: Batch, fused: bool) -> Any:
        seen.append(batch.bounded)
        return score(self, batch, fused)

    monkeypatch.setattr(Detector, "_score", counted)
    monkeypatch.setattr(detector_module, "Batch", lambda *arguments, **_: Batch(*arguments, bounded=True))
    detector.predict_batch(samples)
    assert seen == [True, True]
    seen.clear()
    monkeypatch.setattr(row_search, "CANDIDATES", 1)
    found = detector.predict_batch(samples)
    assert seen == [True, False, True, False]
    assert [each.score for each in found] == [each.score for each in expected]


def test_more_samples_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, _ = fit(settings(TRIPLE))
    samples = samples_of_unequal_size(6)
    counts: list[int] = []
    prepare = PatchExtractor.prepare
    monkeypatch.setattr(PatchExtractor, "prepare", lambda self, part: counts.append(len(part)) or prepare(self, part))
    assert len(detector.predict_batch(samples)) == 6
    assert counts == [4, 2]
    assert detector.predict_batch([]) == []


@pytest.fixture
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn autocast off, because the meta device does not support it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


@pytest.mark.usefixtures("without_autocast")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_step_waits_for_values(protocol: str) -> None:
    """Tensors on the meta device have shapes but no values. Reading a value or a shape that depends on one fails.

    The number of scoring operations hardly grows with the batch.
    """
    config = settings(TRIPLE, protocol=replace(PROTOCOLS[protocol], exact_distances=True), use_uff=True)
    fitted, _ = fit(config)
    networks = fitted.extractor.rgb_backbone, fitted.extractor.xyz_backbone, fitted.extractor.feature_fusion
    extractor = PatchExtractor(config, *networks, device="meta")
    banks = {name: without_values(bank) for name, bank in fitted.banks.items()}
    detector = Detector(replace(config, protocol=PROTOCOLS[protocol]), extractor, banks, fitted.decision_fusion)
    counts = []
    for count in (1, 4):
        features = extractor.extract(made_up_samples("test")[:count])
        with Operations() as operations, torch.inference_mode():
            scores, maps, complete = detector._score(Batch(features, "cancelling", None, bounded=True), fused=True)
        assert scores.is_meta and maps.is_meta and complete.is_meta
        assert scores.shape == (4, count)
        counts.append(operations.counts)
    assert counts[1].total() < 1.5 * counts[0].total(), counts[1] - counts[0]


def without_values(bank: MemoryBank) -> MemoryBank:
    spacing = None if bank.spacing is None else bank.spacing.to("meta")
    return MemoryBank(bank.rows.to("meta"), bank.statistics, spacing=spacing)

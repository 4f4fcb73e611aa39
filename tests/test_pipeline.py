"""Fitting and evaluation with tiny networks: banks, shared features, decision fusion and time measurement."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_networks import (
    DOUBLE,
    GRID,
    RGB_GRID,
    SINGLE,
    SIZE,
    TEST,
    TRAIN,
    TRIPLE,
    Outcome,
    build,
    fit,
    made_up_samples,
    one_thread,  # noqa: F401 (a fixture)
    rows_of,
    run,
    settings,
)
from torch import Tensor

from feature_extractors import banks, pipeline
from feature_extractors.banks import build_banks
from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.coreset import select_coreset
from feature_extractors.decision_fusion import fit_decision_fusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import Inputs, PatchExtractor
from feature_extractors.pipeline import (
    Evaluation,
    Stopwatch,
    calibrate_detectors,
    collect_features,
    evaluate,
    fit_detector,
)
from feature_extractors.scoring import anomaly_maps, image_scores
from feature_extractors.training_features import TrainingFeatures
from utils.au_pro import area_to_limit
from utils.errors import InputError
from utils.metrics import PRO_LIMIT
from utils.records import PatchFeatures, Sample, SampleResult

# --- banks ---

ROWS = {"xyz": TRAIN * GRID**2, "rgb": TRAIN * RGB_GRID**2, "fusion": TRAIN * GRID**2}


def background_rows(outcome: Outcome) -> int:
    """Number of training xyz patches without a valid point."""
    return int((rows_of(outcome.features, "xyz") == 0).all(dim=1).sum())


def sizes(outcome: Outcome) -> dict[str, int]:
    return {name: len(bank.rows) for name, bank in outcome.detector.banks.items()}


@pytest.mark.parametrize(
    ("method_name", "expected"),
    [
        ("DINO", {"rgb": 19}),  # int(0.3 * 64)
        ("Point_MAE", {"xyz": 76}),  # int(0.3 * 256)
        ("Fusion", {"fusion": 76}),
        ("DINO+Point_MAE", {"xyz": 76, "rgb": 22}),  # int(0.3 * 76)
        ("DINO+Point_MAE+add", {"xyz": 76, "rgb": 22}),
        ("DINO+Point_MAE+Fusion", {"xyz": 76 + 1, "rgb": 22, "fusion": 22}),  # the zero row does not count
    ],
)
def test_bank_sizes_of_the_reference_protocol(method_name: str, expected: dict[str, int]) -> None:
    assert sizes(run(settings(method_name))) == expected


@pytest.mark.parametrize("method_name", METHODS)
def test_bank_sizes_of_the_corrected_protocol(method_name: str) -> None:
    outcome = run(settings(method_name, protocol=PROTOCOLS["corrected"]))
    expected = {name: int(0.3 * ROWS[name]) for name in METHODS[method_name].banks}
    if "xyz" in expected:
        background = background_rows(outcome)
        assert 0 < background < ROWS["xyz"]
        expected["xyz"] = int(0.3 * (ROWS["xyz"] - background)) + 1
    assert sizes(outcome) == expected


def test_bank_sizes_at_extreme_fractions() -> None:
    assert sizes(run(settings(f_coreset=1.0))) == {"xyz": ROWS["xyz"], "rgb": ROWS["rgb"]}
    assert sizes(run(settings(f_coreset=0.9))) == {
        "xyz": 230,
        "rgb": ROWS["rgb"],
    }  # fewer rgb rows than int(0.9 * 230)
    assert sizes(run(settings(f_coreset=1e-4))) == {"xyz": 1, "rgb": 1}


def test_asymmetric_banks_use_the_first_samples_for_xyz_and_fusion() -> None:
    outcome = run(settings(TRIPLE, asy_memory_bank=2, f_coreset=1.0))
    rows = partial(rows_of, outcome.features)
    banks = outcome.detector.banks
    assert sizes(outcome) == {"xyz": ROWS["xyz"] // 2 + 1, "rgb": ROWS["rgb"], "fusion": ROWS["fusion"] // 2}
    for name, samples in (("xyz", 2), ("rgb", TRAIN), ("fusion", 2)):
        raw = rows(name)[: samples * len(rows(name)) // TRAIN]
        assert torch.equal(banks[name].rows[: len(raw)], banks[name].statistics.normalize(raw))
    shared = (float(rows("xyz", 2).double().mean()), float(rows("rgb").double().std()))
    assert banks["rgb"].statistics == pytest.approx(shared, rel=1e-9)


@pytest.mark.parametrize("method_name", METHODS)
def test_bank_statistics_of_each_protocol(method_name: str) -> None:
    """Reference: mean of xyz and std of rgb, a bank's own, or none. Corrected: each bank its own."""

    def own(rows: Tensor) -> tuple[float, float]:
        return float(rows.double().mean()), float(rows.double().std(correction=1))

    reference = run(settings(method_name))
    rows = partial(rows_of, reference.features)
    for name, bank in reference.detector.banks.items():
        expected = (0.0, 1.0)
        if method_name == "DINO":
            expected = own(rows("rgb"))
        elif len(reference.detector.banks) > 1:
            expected = (own(rows("xyz"))[0], own(rows("rgb"))[1])
        assert bank.statistics == pytest.approx(expected, rel=1e-9), name

    corrected = run(settings(method_name, protocol=PROTOCOLS["corrected"]))
    for name, bank in corrected.detector.banks.items():
        raw = rows_of(corrected.features, name)
        expected = own(raw[(raw != 0).any(dim=1)] if name == "xyz" else raw)
        assert bank.statistics == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("protocol", ["reference", "corrected"])
def test_banks_are_the_normalized_coresets(protocol: str) -> None:
    config = settings(TRIPLE, protocol=PROTOCOLS[protocol])
    outcome = run(config)
    for name, bank in outcome.detector.banks.items():
        raw = rows_of(outcome.features, name)
        if name == "xyz" and protocol == "corrected":
            raw = raw[(raw != 0).any(dim=1)]
        count = len(bank.rows) - (name == "xyz")  # without the appended background row
        picks = select_coreset(raw, bank.statistics, count, config.coreset_eps, config.random_state)
        assert torch.equal(bank.rows[:count], bank.statistics.normalize(raw[picks]))


def test_reference_triple_appends_a_zero_row() -> None:
    """The row is zero after normalization; the background rows stay, with other values."""
    outcome = run(settings(TRIPLE, f_coreset=1.0))
    bank = outcome.detector.banks["xyz"]
    assert (bank.rows[-1] == 0).all()
    background = bank.statistics.normalize(torch.zeros(bank.rows.shape[1]))
    assert (bank.rows == background).all(dim=1).sum() == background_rows(outcome) > 0
    for name in ("Point_MAE", "DINO+Point_MAE"):
        assert not (run(settings(name)).detector.banks["xyz"].rows[-1] == 0).all()


def test_reference_triple_drops_normalized_rows_with_a_zero() -> None:
    """By hand: the mean of xyz is 0, so one row of three keeps its zero and is replaced by the zero row."""
    features = TrainingFeatures(1)
    xyz = torch.tensor([[1.0, -1.0], [2.0, 0.0], [-1.0, -1.0]])
    features.append(PatchFeatures(xyz=xyz, rgb=torch.tensor([[1.0, 3.0]]), fusion=torch.ones(3, 4)))
    bank = build_banks(settings(TRIPLE, f_coreset=1.0), features)["xyz"]
    root = 2**0.5  # the standard deviation of rgb
    expected = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]]) / root
    torch.testing.assert_close(bank.rows, expected)


@pytest.mark.parametrize("method_name", ["Point_MAE", DOUBLE, TRIPLE])
def test_corrected_protocol_keeps_one_background_row(method_name: str) -> None:
    outcome = run(settings(method_name, f_coreset=1.0, protocol=PROTOCOLS["corrected"]))
    bank = outcome.detector.banks["xyz"]
    background = bank.statistics.normalize(torch.zeros(bank.rows.shape[1]))
    assert len(bank.rows) == ROWS["xyz"] - background_rows(outcome) + 1
    assert (bank.rows == background).all(dim=1).nonzero().flatten().tolist() == [len(bank.rows) - 1]


def test_rm_zero_keeps_one_zero_row_in_the_reference_protocol() -> None:
    outcome = run(settings(SINGLE, f_coreset=1.0, rm_zero_for_project=True))
    bank = outcome.detector.banks["xyz"]
    assert len(bank.rows) == ROWS["xyz"] - background_rows(outcome) + 1
    assert (bank.rows == 0).all(dim=1).nonzero().flatten().tolist() == [len(bank.rows) - 1]


def test_rows_with_a_single_zero_are_background_only_for_rm_zero() -> None:
    """A column that is zero everywhere, such as an empty histogram bin, leaves --rm_zero_for_project no row."""
    features = TrainingFeatures(1)
    xyz = torch.rand(50, 5) + 1
    xyz[:10, 3] = 0.0  # single zeros
    xyz[10:15] = 0.0  # background
    features.append(PatchFeatures(xyz=xyz))
    corrected = build_banks(settings(SINGLE, f_coreset=1.0, protocol=PROTOCOLS["corrected"]), features)
    assert len(corrected["xyz"].rows) == 45 + 1
    removed = settings(SINGLE, f_coreset=1.0, rm_zero_for_project=True)
    assert len(build_banks(removed, features)["xyz"].rows) == 35 + 1
    xyz[:, 3] = 0.0
    features = TrainingFeatures(1)
    features.append(PatchFeatures(xyz=xyz))
    with pytest.raises(InputError, match=r"All 50 xyz patches .* --rm_zero_for_project"):
        build_banks(removed, features)


# --- methods that share features ---


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """List of (rows, picks) of each coreset selection."""
    counts: list[tuple[int, int]] = []

    def counting(raw: Tensor, statistics: object, n: int, *rest: object) -> Tensor:
        counts.append((len(raw), n))
        return select_coreset(raw, statistics, n, *rest)

    monkeypatch.setattr(banks, "select_coreset", counting)
    return counts


def assert_same_detector(one: Detector, other: Detector) -> None:
    assert list(one.banks) == list(other.banks)
    for name, bank in one.banks.items():
        assert bank.statistics == other.banks[name].statistics
        assert torch.equal(bank.rows, other.banks[name].rows), name
    for sample in made_up_samples("test"):
        mine, theirs = one.predict(sample), other.predict(sample)
        assert mine.score == theirs.score
        assert torch.equal(mine.anomaly_map, theirs.anomaly_map)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_coresets_are_selected_once_for_all_methods(protocol: str, selections: list[tuple[int, int]]) -> None:
    """Three methods need three coresets in all, and each detector equals one fitted alone."""
    configs = {name: settings(name, protocol=PROTOCOLS[protocol]) for name in (DOUBLE, "DINO+Point_MAE+add", TRIPLE)}
    extractor = build(configs[TRIPLE])
    features = collect_features(extractor, made_up_samples("train"), TRAIN)
    detectors, counts = {}, []
    for name, config in configs.items():
        detectors[name] = fit_detector(config, extractor, features)
        counts.append(len(selections))
    assert counts == [2, 2, 3]
    assert len(set(selections)) == len(selections)
    for name, config in configs.items():
        assert_same_detector(detectors[name], run(config).detector)


def test_coresets_are_not_shared_without_a_random_state(selections: list[tuple[int, int]]) -> None:
    configs = [settings(name, random_state=None) for name in (DOUBLE, "DINO+Point_MAE+add", TRIPLE)]
    extractor = build(configs[-1])
    features = collect_features(extractor, made_up_samples("train"), TRAIN)
    banks = [fit_detector(config, extractor, features).banks for config in configs]
    assert len(selections) == 2 + 2 + 3
    assert not torch.equal(banks[0]["xyz"].rows, banks[1]["xyz"].rows)
    assert features.coresets == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"random_state": 1},
        {"coreset_eps": 0.8},
        {"f_coreset": 0.2},
        {"asy_memory_bank": 2},
        {"method_name": "DINO"},  # its own statistics
        {"method_name": "Point_MAE"},  # no statistics
        {"protocol": PROTOCOLS["corrected"]},
    ],
    ids=str,
)
def test_coresets_of_other_settings_are_not_shared(
    changed: dict[str, object], selections: list[tuple[int, int]]
) -> None:
    """A detector fitted after another on the same features equals one fitted alone."""
    first = settings()
    extractor = build(first)
    features = collect_features(extractor, made_up_samples("train"), TRAIN)
    fit_detector(first, extractor, features)
    selections.clear()
    other = replace(first, **changed)
    after = build_banks(other, features)
    fresh = TrainingFeatures(TRAIN)
    for i in range(TRAIN):
        fresh.append(features.sample(i))
    alone = build_banks(other, fresh)
    for name in alone:
        assert torch.equal(after[name].rows, alone[name].rows), name
    assert len(selections) == 2 * len(alone)


# --- scoring and decision fusion ---


@pytest.mark.parametrize("protocol", ["reference", "corrected"])
@pytest.mark.parametrize("method_name", METHODS)
def test_score_rule_of_each_method(method_name: str, protocol: str) -> None:
    """Only the reference's double method divides by 1000; only the single RGB and xyz methods add 1e-5."""
    corrected = protocol == "corrected"
    divisor = 1000.0 if method_name == DOUBLE and not corrected else 1.0
    epsilon = 1e-5 if method_name in ("DINO", "Point_MAE") else 0.0
    detector, features, _ = run(settings(method_name, protocol=PROTOCOLS[protocol]))[2:]
    features = features.sample(1)
    ((scores, maps),) = detector.bank_results([features])
    for (name, bank), score, plane in zip(detector.banks.items(), scores, maps, strict=True):
        patches = (getattr(features, name) - bank.statistics.mean) / bank.statistics.std
        distances, index = bank.search(patches, "nowhere" if corrected else "everywhere")[:2]
        found = patches[None], distances[None], index[None]
        assert score == image_scores(*found, bank, divisor, epsilon)
        assert torch.equal(plane, anomaly_maps([distances[None]], SIZE, float_blur=corrected)[0, 0])


@pytest.mark.parametrize(("method_name", "banks"), [(DOUBLE, (0, 1)), (TRIPLE, (0, 1, 2))])
def test_decision_fusion_is_fitted_on_the_training_samples(method_name: str, banks: tuple[int, ...]) -> None:
    """The order is xyz, rgb, fusion, and each bank has its own lambda."""
    config = settings(method_name, score_lambdas=(1.0, 0.2, 3.0), map_lambdas=(2.0, 0.3, 0.5))
    detector, features, predictions = run(config)[2:]
    results = detector.bank_results(list(features))
    expected = fit_decision_fusion(
        [scores for scores, _ in results],
        [maps for _, maps in results],
        tuple(config.score_lambdas[k] for k in banks),
        tuple(config.map_lambdas[k] for k in banks),
        config.ocsvm_nu,
        config.ocsvm_maxiter,
    )
    for prediction in predictions:
        scores = torch.tensor(list(prediction.bank_scores.values()), dtype=torch.float64)
        score, plane = expected.fuse(list(scores), list(prediction.bank_maps.values()))
        assert prediction.score == pytest.approx(float(score), rel=1e-9)
        torch.testing.assert_close(prediction.anomaly_map, plane)


@pytest.mark.parametrize("method_name", ["DINO", "Point_MAE", "Fusion", "DINO+Point_MAE+add"])
def test_methods_without_svm_add_scores_and_maps(method_name: str) -> None:
    outcome = run(settings(method_name))
    assert outcome.detector.decision_fusion is None
    for prediction in outcome.predictions:
        assert prediction.score == pytest.approx(sum(prediction.bank_scores.values()))
        torch.testing.assert_close(prediction.anomaly_map, torch.stack(list(prediction.bank_maps.values())).sum(dim=0))


# --- extraction ---


class CountingExtractor(PatchExtractor):
    """Extractor that records the paths of its samples."""

    seen: list[str]

    def prepare(self, samples: Sequence[Sample]) -> Inputs:
        self.seen += [sample.path for sample in samples]
        return super().prepare(samples)


def counting(config: DetectorConfig) -> CountingExtractor:
    plain = build(config)
    extractor = CountingExtractor(config, plain.rgb_backbone, plain.xyz_backbone, plain.feature_fusion)
    extractor.seen = []
    return extractor


def test_training_samples_are_extracted_once() -> None:
    config = settings(TRIPLE)
    extractor = counting(config)
    detector, _ = fit(config, extractor)
    paths = [sample.path for sample in made_up_samples("train")]
    assert extractor.seen == paths
    test = made_up_samples("test")
    evaluate({TRIPLE: detector}, test, len(test))
    assert extractor.seen == paths + [sample.path for sample in test]


def test_on_features_receives_each_sample() -> None:
    config = settings()
    seen: list[tuple[str, PatchFeatures]] = []
    collected = collect_features(
        build(config),
        iter(made_up_samples("train")),
        TRAIN,
        on_features=lambda sample, each: seen.append((sample.path, each)),
    )
    assert [path for path, _ in seen] == [sample.path for sample in made_up_samples("train")]
    assert len(collected) == TRAIN
    for i, (_, each) in enumerate(seen):
        kept = collected.sample(i)
        assert kept.fusion is None
        assert torch.equal(kept.xyz, each.xyz)
        assert torch.equal(kept.rgb, each.rgb)
    assert torch.equal(rows_of(collected, "rgb"), torch.cat([each.rgb for _, each in seen]))
    assert torch.equal(rows_of(collected, "xyz", 2), torch.cat([each.xyz for _, each in seen[:2]]))


# --- evaluation ---


def test_evaluate_equals_predict() -> None:
    outcome = run(settings())
    test = made_up_samples("test")
    evaluations = evaluate({"mine": outcome.detector}, iter(test), len(test))
    assert list(evaluations) == ["mine"]
    assert isinstance(evaluations["mine"], Evaluation)
    results, metrics, curve, _ = evaluations["mine"]
    assert len(results) == len(test)
    for result, sample, prediction in zip(results, test, outcome.predictions, strict=True):
        assert isinstance(result, SampleResult)
        assert (result.path, result.label) == (sample.path, sample.label)
        assert torch.equal(result.mask, sample.mask[0])
        assert result.prediction.score == prediction.score
        assert torch.equal(result.prediction.anomaly_map, prediction.anomaly_map)
        assert result.prediction.bank_scores == prediction.bank_scores
        for name, plane in prediction.bank_maps.items():
            assert torch.equal(result.prediction.bank_maps[name], plane)
    assert metrics["image_rocauc"] == 1.0
    assert metrics["pixel_rocauc"] > 0.8
    assert metrics["au_pro_exact"]["0.3"] > 0.5
    assert curve is not None
    assert area_to_limit(*map(np.array, curve), PRO_LIMIT) == pytest.approx(metrics["au_pro_exact"]["0.3"], abs=0.01)


def test_evaluate_refuses_training_samples() -> None:
    with pytest.raises(ValueError, match="train/good/000 has no label or no mask"):
        evaluate({DOUBLE: run(settings()).detector}, made_up_samples("train"), TRAIN)


def detectors_of_one_extractor() -> tuple[CountingExtractor, dict[str, Detector]]:
    """Three methods fitted on the same features."""
    configs = {name: settings(name) for name in ("DINO", DOUBLE, TRIPLE)}
    extractor = counting(configs[TRIPLE])
    features = collect_features(extractor, made_up_samples("train"), TRAIN)
    extractor.seen.clear()
    return extractor, {name: fit_detector(config, extractor, features) for name, config in configs.items()}


def test_evaluation_of_several_detectors_equals_separate_ones() -> None:
    extractor, detectors = detectors_of_one_extractor()
    test = made_up_samples("test")
    together = evaluate(detectors, iter(test), len(test))
    assert extractor.seen == [sample.path for sample in test]  # once each
    assert list(together) == list(detectors)
    for name, detector in detectors.items():
        results, metrics, curve, _ = evaluate({name: detector}, iter(test), len(test))[name]
        assert (together[name].metrics, together[name].pro_curve) == (metrics, curve)
        assert len(together[name].results) == len(results) == len(test)
        for mine, theirs in zip(together[name].results, results, strict=True):
            assert (mine.path, mine.label) == (theirs.path, theirs.label)
            assert torch.equal(mine.mask, theirs.mask)
            assert mine.prediction.score == theirs.prediction.score
            assert mine.prediction.bank_scores == theirs.prediction.bank_scores
            assert torch.equal(mine.prediction.anomaly_map, theirs.prediction.anomaly_map)
    scores = {name: [each.prediction.score for each in evaluation.results] for name, evaluation in together.items()}
    assert scores["DINO"] != scores[DOUBLE] != scores[TRIPLE]


def test_stopwatches_count_shared_extraction_and_own_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extractor, detectors and metrics each advance a fake clock by a step of their own."""
    _, detectors = detectors_of_one_extractor()
    clock = [0.0]

    def taking(seconds: float, function: Callable[..., object]) -> Callable[..., object]:
        def slow(*args: object) -> object:
            clock[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock[0])
    slow_extraction = taking(100.0 * TEST, CountingExtractor.extract_prepared)  # in one batch
    monkeypatch.setattr(CountingExtractor, "extract_prepared", slow_extraction)
    monkeypatch.setattr(pipeline, "compute_metrics", taking(7.0, pipeline.compute_metrics))
    steps = dict(zip(detectors, (1.0, 2.0, 3.0), strict=True))
    for name, detector in detectors.items():
        monkeypatch.setattr(detector, "predict_features", taking(steps[name] * TEST, detector.predict_features))
    before = {"extract": 5.0, "coreset": 4.0, "fuse": 0.0, "score": 0.5, "metrics": 0.0}
    stopwatches = {name: Stopwatch(before) for name in detectors}
    evaluations = evaluate(detectors, made_up_samples("test"), TEST, stopwatches)
    for name, evaluation in evaluations.items():
        assert [result.seconds for result in evaluation.results] == [100 + steps[name]] * TEST
    for name, stopwatch in stopwatches.items():
        expected = {"extract": 5.0 + 100 * TEST, "score": 0.5 + steps[name] * TEST, "metrics": 7.0}
        assert stopwatch.seconds == before | expected
    assert before["extract"] == 5.0  # the initial times are copied


def test_stopwatch_starts_at_zero_or_at_given_times() -> None:
    assert Stopwatch().seconds == dict.fromkeys(("extract", "coreset", "fuse", "calibrate", "score", "metrics"), 0.0)
    first = Stopwatch()
    first.seconds["extract"] = 3.0
    second = Stopwatch(first.seconds)
    with second.measure("extract"):
        pass
    assert second.seconds["extract"] > 3.0
    assert first.seconds["extract"] == 3.0


@pytest.mark.parametrize("method_name", [DOUBLE, "DINO"])
def test_every_stage_is_measured(method_name: str) -> None:
    config = settings(method_name)
    stopwatch = Stopwatch()
    assert list(stopwatch.seconds) == ["extract", "coreset", "fuse", "calibrate", "score", "metrics"]
    extractor = build(config)
    features = collect_features(extractor, made_up_samples("train"), TRAIN, stopwatch)
    training = stopwatch.seconds["extract"]
    assert training > 0
    detector = fit_detector(config, extractor, features, stopwatch)
    assert stopwatch.seconds["calibrate"] == stopwatch.seconds["score"] == stopwatch.seconds["metrics"] == 0
    calibrate_detectors({method_name: detector}, features, 0.3, "training", {method_name: stopwatch})
    evaluate({method_name: detector}, made_up_samples("test"), TEST, {method_name: stopwatch})
    assert stopwatch.seconds["extract"] > training
    without = set() if method_name == DOUBLE else {"fuse"}
    assert {stage for stage, seconds in stopwatch.seconds.items() if seconds == 0} == without


def test_failed_stage_is_measured() -> None:
    stopwatch = Stopwatch()
    with pytest.raises(KeyError), stopwatch.measure("fuse"):
        raise KeyError
    assert stopwatch.seconds["fuse"] > 0

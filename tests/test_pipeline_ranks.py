"""Fitting and evaluation by several ranks against a single process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import MEMBERS, PROCESSES, in_groups, run_processes, saved, shard_of
from tiny_networks import SINGLE, SIZE, TEST, TRIPLE, build, made_up_samples, one_thread, settings  # noqa: F401 (a fixture)

from feature_extractors.banks import build_banks
from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.pipeline import calibrate_detectors, collect_features, evaluate, fit_detector
from feature_extractors.training_features import TrainingFeatures
from utils.distributed import Group, is_main, rank
from utils.errors import InputError
from utils.records import PatchFeatures, Prediction

pytestmark = pytest.mark.slow

# Methods of each run; all use the features of the last one.
RUNS: dict[str, tuple[DetectorConfig, ...]] = {
    **{name: tuple(settings(method, protocol=protocol) for method in METHODS) for name, protocol in PROTOCOLS.items()},
    "first samples": (settings(TRIPLE, asy_memory_bank=2),),
    "no background": (settings(SINGLE, rm_zero_for_project=True),),
    "all patches": (settings("DINO", f_coreset=1.0),),
    "foreground": (settings(TRIPLE, protocol=PROTOCOLS["extended"], xyz_grid=16, asy_memory_bank=3),),
}


def run(configs: tuple[DetectorConfig, ...], group: Group | None, cut: int) -> dict[str, Any]:
    """Fit, calibrate and evaluate every method; return the results of this rank."""
    extractor = build(configs[-1])
    train, test = made_up_samples("train"), made_up_samples("test")
    train, test = train[shard_of(len(train), group, cut)], test[shard_of(len(test), group, 1 - cut)]
    features = collect_features(extractor, train, len(train), group=group)
    detectors = {config.method_name: fit_detector(config, extractor, features) for config in configs}
    calibrate_detectors(detectors, features, 0.3, "training")
    evaluations = evaluate(detectors, test, len(test), group=group)
    found: dict[str, Any] = {"evaluated": list(evaluations)}
    for name, detector in detectors.items():
        assert detector.thresholds is not None
        found[name] = {
            "rows": {bank: each.rows for bank, each in detector.banks.items()},
            "statistics": {bank: tuple(each.statistics) for bank, each in detector.banks.items()},
            "thresholds": [value for value in vars(detector.thresholds).values() if value != "training"],
        }
        if not is_main(group):
            continue
        results, metrics, *_ = evaluations[name]
        found[name]["metrics"] = metrics
        found[name]["bytes"] = [memory_of(each.prediction) for each in results]
        found[name]["samples"] = [(each.path, each.label) for each in results]
        found[name]["masks"] = [each.mask for each in results]
        found[name]["results"] = [plain(each.prediction) for each in results]
    return found


def background_error(group: Group | None) -> str:
    """Error message of a class that is all background; rank r has r samples of five patches."""
    empty, own = torch.zeros(0, 4), rank(group)
    features = TrainingFeatures(own, empty=PatchFeatures(xyz=empty), group=group)
    for _ in range(own):
        features.append(PatchFeatures(xyz=torch.zeros(5, 4)))
    with pytest.raises(InputError) as refused:
        build_banks(settings(SINGLE, rm_zero_for_project=True), features)
    return str(refused.value)


def plain(prediction: Prediction) -> dict[str, Any]:
    """Scores and maps of a prediction, fused and per bank."""
    scores = {"all": prediction.score, **prediction.bank_scores}
    return {"scores": scores, "maps": {"all": prediction.anomaly_map, **prediction.bank_maps}}


def memory_of(prediction: Prediction) -> int:
    """Bytes of memory that the maps of a prediction hold."""
    storages = [each.untyped_storage() for each in (prediction.anomaly_map, *prediction.bank_maps.values())]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def work(rank: int, folder: Path) -> None:
    found: dict[int, dict[str, Any]] = {}
    with in_groups(rank, folder) as groups:
        for members in MEMBERS:
            if rank in members:
                group = groups[len(members)]
                found[len(members)] = {"refused": background_error(group)}
                for number, (name, configs) in enumerate(RUNS.items()):
                    found[len(members)][name] = run(configs, group, number % 2)
    torch.save(found, folder / f"{rank}.pth")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    folder = tmp_path_factory.mktemp("work")
    assert run_processes([(work, (rank, folder)) for rank in range(PROCESSES)]) == [0] * PROCESSES
    return [saved(folder, rank) for rank in range(PROCESSES)]


@pytest.fixture(params=MEMBERS, ids=str)
def found(request: pytest.FixtureRequest, by_rank: list[dict[int, Any]]) -> list[dict[str, Any]]:
    """Results of a group, in the order of its ranks."""
    return [by_rank[rank][len(request.param)] for rank in request.param]


@pytest.fixture(scope="module")
def alone() -> Callable[[tuple[DetectorConfig, ...]], dict[str, Any]]:
    """Run by a single process without a group, cached."""
    return cache(lambda configs: run(configs, None, 0))


@pytest.mark.parametrize("name", RUNS)
def test_several_ranks_match_a_single_process(
    found: list[dict[str, Any]], alone: Callable[[tuple[DetectorConfig, ...]], dict[str, Any]], name: str
) -> None:
    """Scores, maps, thresholds and metrics of all methods are equal, and the samples keep their order."""
    of_one = alone(RUNS[name])
    for place, each in enumerate(found):
        assert each[name]["evaluated"] == (of_one["evaluated"] if place == 0 else [])
        for config in RUNS[name]:
            mine, expected = each[name][config.method_name], of_one[config.method_name]
            for bank, statistics in mine["statistics"].items():
                assert statistics == pytest.approx(expected["statistics"][bank], rel=1e-12, abs=1e-12)
            assert_close(mine["thresholds"], expected["thresholds"])
            assert_close(mine["rows"], expected["rows"])
            if place == 0:
                assert mine["samples"] == expected["samples"]
                for key in ("masks", "results", "metrics"):
                    assert_close(mine[key], expected[key])


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_has_the_same_banks(found: list[dict[str, Any]], name: str) -> None:
    for config in RUNS[name]:
        first, *others = (each[name][config.method_name]["rows"] for each in found)
        for other in others:
            assert other.keys() == first.keys()
            assert all(torch.equal(rows, first[bank]) for bank, rows in other.items())


def test_background_samples_are_an_error_in_all_ranks(found: list[dict[str, Any]]) -> None:
    patches = 5 * sum(range(len(found)))
    for each in found:
        assert each["refused"].startswith(f"All {patches} xyz patches of the training samples are background")


def test_samples_of_other_ranks_hold_only_their_maps(by_rank: list[dict[int, Any]]) -> None:
    """Each test sample holds one map per bank and the fused map."""
    found = by_rank[0][4]["reference"]
    for name, method in METHODS.items():
        assert found[name]["bytes"] == [(len(method.banks) + 1) * SIZE**2 * 4] * TEST


def assert_close(mine: Any, expected: Any) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0.0)

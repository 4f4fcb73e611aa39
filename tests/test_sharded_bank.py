"""A bank spread over several processes, and whole runs by several of them, against those of one process."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from process_runs import MEMBERS, PROCESSES, in_groups, run_processes, saved, shard_of
from test_coreset import copied_rows, grid_rows, random_rows
from tiny_networks import SINGLE, SIZE, TEST, TRIPLE, build, made_up_samples, one_thread, settings  # noqa: F401 (a fixture)
from torch import Tensor

from feature_extractors import sharded_bank
from feature_extractors.banks import build_banks
from feature_extractors.config import BANKS, METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.memory_bank import EXPANDED_BELOW, BankStatistics, MemoryBank
from feature_extractors.pipeline import calibrate_detectors, collect_features, evaluate, fit_detector
from feature_extractors.sharded_bank import ShardedBank
from feature_extractors.training_features import TrainingFeatures
from utils.distributed import Group, is_main, rank, world_size
from utils.errors import InputError
from utils.records import PatchFeatures, Prediction

pytestmark = pytest.mark.slow

# The bank

STATISTICS = BankStatistics(1.5, 2.5)
# Kind of the rows, how many there are, cut, queries that are under way at once.
SEARCHED = [
    ("random", 60, 0, 1 << 15),
    ("random", 60, 1, 8),
    ("copies", 45, 0, 1 << 15),
    ("copies", 45, 2, 1),
    ("grid", 70, 2, 20),
    ("grid", 5, 0, 1 << 15),  # fewer rows than neighbors in most shards
    ("random", 1, 0, 4),
]
SEARCH_IDS = [" ".join(map(str, each)) for each in SEARCHED]
NEIGHBORS = (1, 3, 7)


def bank_rows(kind: str, count: int) -> Tensor:
    return {"random": random_rows, "copies": copied_rows, "grid": grid_rows}[kind](count, 6, 2)


def queries_of(kind: str, count: int, number: int) -> Tensor:
    """Those of process `number`, which has none where that is 1: rows of the bank, and others."""
    rows = bank_rows(kind, count)[torch.arange(2 * number + 3) * 7 % count]
    queries = torch.cat([rows, rows + 1, bank_rows(kind, 4) - 0.5])
    return queries[:0] if number == 1 else queries


def asked_rows(count: int, number: int) -> list[int]:
    """Rows whose neighbors process `number` asks for, one after the other."""
    return [11 * number % count, (11 * number + 5) % count]


def share_out(rows: Tensor, group: Group | None, cut: int) -> ShardedBank:
    """Rows of any place in each process: those that follow on each other lie in different ones."""
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))[shard_of(len(rows), group, cut)]
    order = places.sort().values
    return ShardedBank(rows[order], order, STATISTICS, group)


def search(group: Group | None) -> list[dict[str, Any]]:
    """What a process hears of each bank."""
    own, found = rank(group), []
    for kind, count, cut, at_once in SEARCHED:
        bank = share_out(bank_rows(kind, count), group, cut)
        heard: dict[str, Any] = {"length": len(bank), "shard": len(bank.rows)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharded_bank, "QUERIES_AT_ONCE", at_once)
            for expanded in EXPANDED_BELOW:
                heard[expanded] = bank.nearest(queries_of(kind, count, own), expanded)
            heard["neighborhoods"] = [
                [bank.neighborhood(torch.tensor([row]), k) for k in NEIGHBORS] for row in asked_rows(count, own)
            ]
            heard["no row"] = bank.neighborhood(torch.tensor([own] if own == 0 else [], dtype=torch.int64), 3)
            # The last process judges, the others take part.
            if own < world_size(group) - 1:
                bank.take_part("nowhere", 3)
            else:
                heard["alone"] = (*bank.nearest(queries_of(kind, count, 0)), bank.neighborhood(torch.tensor([0]), 3))
        whole, doubled = bank.whole(), bank.with_rows(2 * bank.rows).whole()
        heard["whole"] = None if whole is None else (whole.rows, tuple(whole.statistics))
        heard["doubled"] = None if doubled is None else doubled.rows
        found.append(heard)
    return found


# Whole runs

# Memory of the first process, GB: no bank is small enough to be copied, or that of rgb is, or all are.
SPREAD, MIXED, COPIED = 0.0, 2.4e-4, math.inf
LARGE = ("xyz", "fusion")


class Run(NamedTuple):
    """Methods that run side by side, on the features of the last one."""

    configs: tuple[DetectorConfig, ...]
    budget: float


EACH_METHOD = {
    name: tuple(settings(method, protocol=protocol) for method in METHODS) for name, protocol in PROTOCOLS.items()
}
RUNS = {
    **{f"{name}, copied": Run(configs, COPIED) for name, configs in EACH_METHOD.items()},
    **{f"{name}, spread": Run(configs, SPREAD) for name, configs in EACH_METHOD.items()},
    "some spread": Run((settings("DINO"), settings(TRIPLE)), MIXED),
    "first samples, copied": Run((settings(TRIPLE, asy_memory_bank=2),), COPIED),
    "first samples, spread": Run((settings(TRIPLE, asy_memory_bank=2),), SPREAD),
    "no background, copied": Run((settings(SINGLE, rm_zero_for_project=True),), COPIED),
    "no background, spread": Run((settings(SINGLE, rm_zero_for_project=True),), SPREAD),
    "all patches, spread": Run((settings("DINO", f_coreset=1.0),), SPREAD),
}


def judge(configs: tuple[DetectorConfig, ...], budget: float, group: Group | None, cut: int) -> dict[str, Any]:
    """Fit, calibrate and evaluate every method; what a process then knows of each."""
    extractor = build(configs[-1])
    train, test = made_up_samples("train"), made_up_samples("test")
    train, test = train[shard_of(len(train), group, cut)], test[shard_of(len(test), group, 1 - cut)]
    features = collect_features(extractor, train, len(train), memory_budget=budget, group=group)
    detectors = {config.method_name: fit_detector(config, extractor, features) for config in configs}
    calibrate_detectors(detectors, map(features.sample, range(len(features))), 0.3, "training", group=group)
    evaluations = evaluate(detectors, test, len(test), group=group)
    found: dict[str, Any] = {"evaluated": list(evaluations)}
    for name, detector in detectors.items():
        found[name] = {
            "is sharded": detector.is_sharded,
            "sharded": [bank for bank, each in detector.banks.items() if isinstance(each, ShardedBank)],
            "rows": {bank: each.rows for bank, each in detector.banks.items()},
            "statistics": {bank: tuple(each.statistics) for bank, each in detector.banks.items()},
            "thresholds": [value for value in detector.thresholds if value != "training"],
        }
        whole = detector.whole()
        found[name]["whole banks"] = list(whole.banks)
        if not is_main(group):
            continue
        assert not whole.is_sharded
        found[name]["whole rows"] = {bank: each.rows for bank, each in whole.banks.items()}
        found[name]["whole"] = [plain(whole.predict(sample)) for sample in made_up_samples("test")]
        results, metrics = evaluations[name]
        found[name]["metrics"] = metrics
        found[name]["bytes"] = [memory_of(each.prediction) for each in results]
        found[name]["judged"] = [(each.path, each.label) for each in results]
        found[name]["masks"] = [each.mask for each in results]
        found[name]["results"] = [plain(each.prediction) for each in results]
    return found


def refuse(group: Group | None) -> str:
    """The error of a class whose scans are all background; process r has r samples of five patches."""
    empty, own = torch.zeros(0, 4), rank(group)
    features = TrainingFeatures(own, empty=PatchFeatures(xyz=empty), group=group)
    for _ in range(own):
        features.append(PatchFeatures(xyz=torch.zeros(5, 4)))
    with pytest.raises(InputError) as refused:
        build_banks(settings(SINGLE, rm_zero_for_project=True), features)
    return str(refused.value)


def plain(prediction: Prediction) -> dict[str, Any]:
    """Scores and maps, together and of each bank."""
    scores = {"all": prediction.score, **prediction.bank_scores}
    return {"scores": scores, "maps": {"all": prediction.anomaly_map, **prediction.bank_maps}}


def memory_of(prediction: Prediction) -> int:
    """Bytes that its maps keep from being freed."""
    storages = [each.untyped_storage() for each in (prediction.anomaly_map, *prediction.bank_maps.values())]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@contextmanager
def asked_distances() -> Iterator[list[str]]:
    """Grows by the key of EXPANDED_BELOW of each search of a bank that is spread."""
    asked: list[str] = []
    nearest = ShardedBank.nearest

    def overheard(bank: ShardedBank, queries: Tensor, expanded: str = "nowhere") -> tuple[Tensor, Tensor]:
        asked.append(expanded)
        return nearest(bank, queries, expanded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedBank, "nearest", overheard)
        yield asked


def work(rank: int, folder: Path) -> None:
    found: dict[int, dict[str, Any]] = {}
    with in_groups(rank, folder) as groups:
        for members in MEMBERS:
            if rank in members:
                group = groups[len(members)]
                found[len(members)] = {"banks": search(group), "refused": refuse(group)}
                for number, (name, run) in enumerate(RUNS.items()):
                    # Another process may have been told another budget: that of the first one counts.
                    budget = run.budget if is_main(group) else COPIED
                    with asked_distances() as asked:
                        found[len(members)][name] = judge(run.configs, budget, group, number % 2) | {"asked": asked}
    torch.save(found, folder / f"{rank}.pth")


@pytest.fixture(scope="module")
def by_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    folder = tmp_path_factory.mktemp("work")
    assert run_processes([(work, (rank, folder)) for rank in range(PROCESSES)]) == [0] * PROCESSES
    return [saved(folder, rank) for rank in range(PROCESSES)]


@pytest.fixture(params=MEMBERS, ids=str)
def found(request: pytest.FixtureRequest, by_process: list[dict[int, Any]]) -> list[dict[str, Any]]:
    """What the processes of a group found, in the order of their ranks."""
    return [by_process[rank][len(request.param)] for rank in request.param]


@pytest.mark.parametrize("expanded", EXPANDED_BELOW)
@pytest.mark.parametrize("number", range(len(SEARCHED)), ids=SEARCH_IDS)
def test_the_nearest_row_is_that_of_the_whole_bank(found: list[dict[str, Any]], number: int, expanded: str) -> None:
    """Also where rows of several processes tie, of which the one at the lowest place counts."""
    kind, count, *_ = SEARCHED[number]
    bank = MemoryBank(bank_rows(kind, count), STATISTICS)
    for place, each in enumerate(found):
        distance, index = each["banks"][number][expanded]
        expected_distance, expected_index = bank.nearest(queries_of(kind, count, place), expanded)
        assert index.dtype == torch.int64
        if expanded == "nowhere" or kind == "grid":  # its products are whole numbers, and exact
            assert torch.equal(index, expected_index)
            assert torch.equal(distance, expected_distance)
        else:  # where copies of a row may tie but for the rounding of a product, whose squares may cancel
            assert torch.equal(bank.rows[index], bank.rows[expected_index])
            assert_close(distance.square(), expected_distance.square(), atol=1e-4)


@pytest.mark.parametrize("number", range(len(SEARCHED)), ids=SEARCH_IDS)
def test_the_neighborhood_is_that_of_the_whole_bank(found: list[dict[str, Any]], number: int) -> None:
    """Bit for bit, in the same order, also of more rows than a process holds or all of them."""
    kind, count, *_ = SEARCHED[number]
    bank = MemoryBank(bank_rows(kind, count), STATISTICS)
    for place, each in enumerate(found):
        heard = each["banks"][number]
        for row, of_row in zip(asked_rows(count, place), heard["neighborhoods"], strict=True):
            for k, rows in zip(NEIGHBORS, of_row, strict=True):
                assert torch.equal(rows, bank.neighborhood(row, k))
        assert torch.equal(heard["no row"], bank.neighborhood(0, 3)[: 3 if place == 0 else 0])


@pytest.mark.parametrize("number", range(len(SEARCHED)), ids=SEARCH_IDS)
def test_processes_without_a_query_take_part(found: list[dict[str, Any]], number: int) -> None:
    kind, count, *_ = SEARCHED[number]
    bank = MemoryBank(bank_rows(kind, count), STATISTICS)
    assert ["alone" in each["banks"][number] for each in found] == [False] * (len(found) - 1) + [True]
    distance, index, rows = found[-1]["banks"][number]["alone"]
    expected_distance, expected_index = bank.nearest(queries_of(kind, count, 0))
    assert torch.equal(distance, expected_distance)
    assert torch.equal(index, expected_index)
    assert torch.equal(rows, bank.neighborhood(0, 3))


@pytest.mark.parametrize("number", range(len(SEARCHED)), ids=SEARCH_IDS)
def test_the_first_process_puts_the_bank_together(found: list[dict[str, Any]], number: int) -> None:
    kind, count, *_ = SEARCHED[number]
    of_bank = [each["banks"][number] for each in found]
    assert [each["length"] for each in of_bank] == [count] * len(found)
    assert sum(each["shard"] for each in of_bank) == count
    rows, statistics = of_bank[0]["whole"]
    assert torch.equal(rows, bank_rows(kind, count))
    assert statistics == STATISTICS
    assert torch.equal(of_bank[0]["doubled"], 2 * rows)
    assert all(each["whole"] is each["doubled"] is None for each in of_bank[1:])


@pytest.fixture(scope="module")
def alone() -> Callable[[tuple[DetectorConfig, ...]], dict[str, Any]]:
    """A run by one process that is in no group, each done once."""
    return cache(lambda configs: judge(configs, COPIED, None, 0))


# Runs with spread banks are not compared: they multiply different blocks of rows, so rounding differs, and the
# one-class SVMs amplify the difference.
@pytest.mark.parametrize("run", [name for name in RUNS if "spread" not in name])
def test_a_run_of_several_processes_says_what_one_process_says(
    found: list[dict[str, Any]], alone: Callable[[tuple[DetectorConfig, ...]], dict[str, Any]], run: str
) -> None:
    """Scores, maps, thresholds and figures of all methods, of the samples in their order."""
    configs = RUNS[run].configs
    of_one = alone(configs)
    for place, each in enumerate(found):
        assert each[run]["evaluated"] == (of_one["evaluated"] if place == 0 else [])
        for config in configs:
            mine, expected = each[run][config.method_name], of_one[config.method_name]
            for bank, statistics in mine["statistics"].items():
                assert statistics == pytest.approx(expected["statistics"][bank], rel=1e-12, abs=1e-12)
            assert_close(mine["thresholds"], expected["thresholds"])
            if place == 0:
                assert mine["judged"] == expected["judged"]
                for key in ("masks", "results", "metrics", "whole", "whole rows"):
                    assert_close(mine[key], expected[key])


@pytest.mark.parametrize("run", RUNS)
def test_banks_are_spread_where_copies_would_take_too_much(found: list[dict[str, Any]], run: str) -> None:
    """By the budget of the first process; one process alone has nothing to spread."""
    configs, budget = RUNS[run]
    for config in configs:
        of_method = [each[run][config.method_name] for each in found]
        large = () if budget == COPIED or len(found) == 1 else LARGE if budget == MIXED else BANKS
        spread = [bank for bank in config.method.banks if bank in large]
        copied = [bank for bank in config.method.banks if bank not in large]
        for place, each in enumerate(of_method):
            assert each["sharded"] == spread
            assert each["is sharded"] == bool(spread)
            assert each["whole banks"] == (list(config.method.banks) if place == 0 else copied)
        for bank, whole in of_method[0]["whole rows"].items():
            rows = [each["rows"][bank] for each in of_method]
            if bank in copied:
                assert all(torch.equal(each, whole) for each in rows)
            else:
                assert sum(map(len, rows)) == len(whole)


@pytest.mark.parametrize("run", RUNS)
def test_all_processes_search_by_the_same_arithmetic(found: list[dict[str, Any]], run: str) -> None:
    """With a query or without: what decision fusion is fitted on cancels, under the reference protocol."""
    configs, budget = RUNS[run]
    asked = found[0][run]["asked"]
    assert all(each[run]["asked"] == asked for each in found)
    expected = set()
    if budget != COPIED and len(found) > 1:
        expected = {"nowhere"} if configs[0].protocol.exact_distances else {"cancelling"}
        if expected == {"cancelling"} and configs[-1].method.fusion == "svm":
            expected |= {"everywhere"}
    assert set(asked) == expected


def test_scans_of_background_only_are_an_error_in_all_processes(found: list[dict[str, Any]]) -> None:
    patches = 5 * sum(range(len(found)))
    for each in found:
        assert each["refused"].startswith(f"none of the {patches} xyz patches of the training samples is left")


def test_a_sample_of_another_process_takes_no_more_memory_than_its_maps(by_process: list[dict[int, Any]]) -> None:
    """One plane of each bank and the fused one, of each of the test samples."""
    found = by_process[0][4]["reference, copied"]
    for name, method in METHODS.items():
        assert found[name]["bytes"] == [(len(method.banks) + 1) * SIZE**2 * 4] * TEST


def assert_close(mine: Any, expected: Any, atol: float = 0.0) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=atol)

"""Collectives, coreset and statistics of rows that are sharded over ranks."""

import socket
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import CPU, MEMBERS, PROCESSES, in_groups, run_processes, saved, shard_of
from test_coreset import KINDS, plain_picks, random_rows, set_candidates
from tiny_networks import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from feature_extractors import coreset
from feature_extractors.coreset import FIRST_CANDIDATES, greedy_coreset, select_coreset
from feature_extractors.memory_bank import BankStatistics, mean_and_std
from feature_extractors.patch_rows import ShardedRows
from utils import distributed
from utils.distributed import (
    Group,
    Ranks,
    all_gather_counts,
    all_gather_rows,
    all_reduce_any,
    all_reduce_sum,
    broadcast_object,
    gather_objects,
    is_main,
    make_groups,
    process_group,
    rank,
    shard_range,
    share,
    world_size,
)
from utils.errors import InputError

# In a single process


@pytest.mark.parametrize("step", [1, 2, 7])
def test_shares_are_contiguous_and_equal_in_steps(step: int) -> None:
    for count, shares in product(range(30), range(1, 9)):
        ranges = [share(count, shares, number, step) for number in range(shares)]
        assert [item for each in ranges for item in each] == list(range(count))
        assert all(each.stop == after.start for each, after in pairwise(ranges))
        assert all(border % step == 0 or border == count for each in ranges for border in (each.start, each.stop))
        steps = [-(-len(each) // step) for each in ranges]
        assert max(steps) - min(steps) <= 1


def test_shares_by_hand() -> None:
    assert [share(10, 4, number) for number in range(4)] == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert [share(10, 3, number, 4) for number in range(3)] == [range(4), range(4, 8), range(8, 10)]
    assert [share(2, 3, number) for number in range(3)] == [range(0), range(1), range(1, 2)]


def test_collectives_of_a_single_process() -> None:
    assert shard_range(5) == range(5)
    assert all_gather_counts(3) == [3]
    assert gather_objects((1, 2)) == [1, 2]
    assert broadcast_object("mine") == "mine"
    assert make_groups(1) == (None, 0)


# Groups of several ranks

# Kind of rows, number of rows, picks, first pick, candidates per pass, cut.
SELECTIONS = [
    *((kind, 60, 60, 0, FIRST_CANDIDATES, 0) for kind in [*KINDS, "background"]),
    *((kind, 60, 60, 0, 3, 1) for kind in [*KINDS, "background"]),
    *((kind, 50, 30, 0, 1, 0) for kind in [*KINDS, "background"]),
    *((kind, 80, 50, start, 20, cut) for kind, start, cut in [("random", 79, 0), ("grid", 33, 1), ("copies", 1, 2)]),
    ("background", 3, 3, 2, 2, 0),  # fewer rows than processes
    ("random", 900, 200, 0, 256, 0),
]


def made_up_rows(kind: str, count: int) -> Tensor:
    if kind != "background":
        return KINDS[kind](count, 5, 0)
    rows = random_rows(count, 5, 0)
    rows[torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0
    return rows


def wide_rows() -> Tensor:
    """Rows wide enough to be projected."""
    return 2.0 + 3.0 * random_rows(350, 250, 1)


def run_collectives(group: Group | None) -> dict[str, Any]:
    """Results of every collective; rank r of the group has r items."""
    own = rank(group)
    values = torch.tensor([0.1 * own, 1.0], dtype=torch.float64)
    return {
        "place": (own, world_size(group), is_main(group)),
        "share": [list(shard_range(count, group, step)) for count, step in [(10, 1), (2, 1), (10, 4)]],
        "counts": all_gather_counts(10 * own, group),
        "items": gather_objects([f"{own}.{number}" for number in range(own)], group),
        "no items": gather_objects([], group),
        "main": broadcast_object((own, "sent"), group),
        "sum": (all_reduce_sum(values, group), values, all_reduce_sum(torch.tensor([2**60 + own]), group)),
        "rows": all_gather_rows(torch.full((own, 2), own), group),
        "any": [all_reduce_any(own == place, CPU, group) for place in range(world_size(group) + 1)],
    }


def select(group: Group | None) -> dict[str, Any]:
    """Picks and statistics of rows that are sharded over the ranks."""
    picks = []
    for kind, count, n, start, candidates, cut in SELECTIONS:
        rows = made_up_rows(kind, count)
        with pytest.MonkeyPatch.context() as patch:
            set_candidates(patch, candidates)
            picks.append(greedy_coreset(ShardedRows(rows[shard_of(count, group, cut)], group), n, start))
    errors = []
    for n, start in [(61, 0), (0, 0), (5, 60), (5, -1)]:
        try:
            greedy_coreset(ShardedRows(made_up_rows("random", 60)[shard_of(60, group)], group), n, start)
        except ValueError as error:
            errors.append(str(error))
    own = ShardedRows(wide_rows()[shard_of(350, group)], group)
    index = torch.tensor([349, 0, 1, 200, 0, 201])
    seeds: list[int] = []
    projection = coreset.random_projection

    def spy(count: int, dim: int, eps: float, random_state: int) -> Tensor | None:
        seeds.append(random_state)
        return projection(count, dim, eps, random_state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "random_projection", spy)
        raw = [select_coreset(own, BankStatistics(1.5, 2.5), 60, 0.9, state) for state in (4, None, None)]
    statistics = [tuple(mean_and_std(own, step)) for step in (1 << 14, 7)]
    return {
        "picks": picks,
        "errors": errors,
        "raw": raw,
        "seeds": seeds,
        "statistics": statistics,
        "taken": own.take(index),
        "mean": own.mean(),
    }


def work(rank: int, folder: Path) -> None:
    found: dict[Any, Any] = {}
    with in_groups(rank, folder) as groups:
        for size, group in groups.items():
            found[size] = run_collectives(group) | select(group)
        found["numbers"] = []
        for count in (1, 2, 3, 4):
            group, number = make_groups(count)
            found["numbers"].append(
                (number, group is None, gather_objects([rank], group), broadcast_object(rank, group))
            )
    torch.save(found, folder / f"{rank}.pth")


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int | None]]:
    """Folder with the saved results of each rank, and the exit codes."""
    folder = tmp_path_factory.mktemp("work")
    return folder, run_processes([(work, (rank, folder)) for rank in range(PROCESSES)])


@pytest.fixture(scope="module")
def by_rank(all_ranks: tuple[Path, list[int | None]]) -> list[dict[Any, Any]]:
    folder, codes = all_ranks
    assert codes == [0] * PROCESSES
    return [saved(folder, rank) for rank in range(PROCESSES)]


@pytest.fixture(params=[(0, 1), *MEMBERS[1:]], ids=str)
def found(request: pytest.FixtureRequest, by_rank: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    """Results of a group in the order of its ranks."""
    return [by_rank[rank][len(request.param)] for rank in request.param]


def test_groups_hold_neighboring_ranks(by_rank: list[dict[Any, Any]]) -> None:
    """One group of all, two halves, three groups with a larger last one, and one group per rank."""
    for count, groups in enumerate([[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2, 3]], [[0], [1], [2], [3]]]):
        for number, members in enumerate(groups):
            for each in members:
                gathered = members if each == members[0] else []
                assert by_rank[each]["numbers"][count] == (number, len(groups) == 1, gathered, members[0])


@pytest.mark.parametrize("members", MEMBERS, ids=str)
def test_rank_world_size_and_share_in_a_group(by_rank: list[dict[Any, Any]], members: tuple[int, ...]) -> None:
    size = len(members)
    for number, each in enumerate(members):
        found = by_rank[each][size]
        assert found["place"] == (number, size, number == 0)
        assert found["share"] == [list(share(*each)) for each in [(10, size, number), (2, size, number)]] + [
            list(share(10, size, number, 4))
        ]


def test_gathered_items_keep_the_order_of_the_ranks(found: list[dict[str, Any]]) -> None:
    ranks = range(len(found))
    for place, each in enumerate(found):
        assert each["counts"] == [10 * other for other in ranks]
        assert each["items"] == [f"{other}.{number}" for other in ranks for number in range(other) if place == 0]
        assert each["no items"] == []
        gathered, begin = each["rows"]
        assert gathered.tolist() == [[other, other] for other in ranks for _ in range(other)]
        assert begin == sum(range(place))


def test_broadcast_and_reductions_reach_all_ranks(found: list[dict[str, Any]]) -> None:
    count = len(found)
    total = sum(range(count))
    for place, each in enumerate(found):
        assert each["main"] == (0, "sent")
        assert each["any"] == [True] * count + [False]
        sums, own, whole = each["sum"]
        assert sums.tolist() == pytest.approx([0.1 * total, count], rel=1e-15)
        assert own.tolist() == [0.1 * place, 1.0]  # the input is unchanged
        assert whole.tolist() == [count * 2**60 + total]


def expected_picks(kind: str, count: int, n: int, start: int) -> list[int]:
    rows = made_up_rows(kind, count)
    picks = greedy_coreset(rows, n, start).tolist()
    assert picks == plain_picks(rows, n, start)
    return picks


@pytest.mark.parametrize("number", range(len(SELECTIONS)), ids=[" ".join(map(str, each)) for each in SELECTIONS])
def test_picks_match_a_single_process(found: list[dict[str, Any]], number: int) -> None:
    """All ranks get the same picks in the same order, however the rows are sharded."""
    kind, count, n, start, *_ = SELECTIONS[number]
    expected = expected_picks(kind, count, n, start)
    for each in found:
        assert each["picks"][number].dtype == torch.int64
        assert each["picks"][number].tolist() == expected


def test_invalid_numbers_of_picks_are_an_error_in_all_ranks(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["errors"] == [
            "cannot pick 61 of 60 rows",
            "cannot pick 0 of 60 rows",
            "start is 60, expected an index below 60",
            "start is -1, expected an index below 60",
        ]


def test_rows_are_taken_from_any_shard(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert torch.equal(each["taken"], wide_rows()[[349, 0, 1, 200, 0, 201]])
        torch.testing.assert_close(each["mean"], wide_rows().double().mean(dim=0), rtol=1e-12, atol=0)


def test_statistics_cover_all_shards(found: list[dict[str, Any]]) -> None:
    rows = wide_rows().double()
    expected = (float(rows.mean()), float(rows.std(correction=1)))
    for each in found:
        for statistics in each["statistics"]:
            assert statistics == pytest.approx(expected, rel=1e-12)
            assert statistics == found[0]["statistics"][0]


def test_coresets_of_raw_rows_match_a_single_process(found: list[dict[str, Any]]) -> None:
    """Without a random_state the first rank draws a new one for all ranks each time."""
    seeds = found[0]["seeds"]
    assert seeds[0] == 4
    assert len(set(seeds)) == 3
    for number, seed in enumerate(seeds):
        expected = select_coreset(wide_rows(), BankStatistics(1.5, 2.5), 60, 0.9, seed)
        for each in found:
            assert each["seeds"] == seeds
            assert torch.equal(each["raw"][number], expected)
    assert not torch.equal(found[0]["raw"][0], found[0]["raw"][1])


# Failed connections


def test_missing_first_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT", timedelta(seconds=1))
    with socket.create_server(("localhost", 0)) as taken:
        url = f"tcp://localhost:{taken.getsockname()[1]}"
    expected = rf"rank 1 cannot connect to the other 2 by {url} \(.*\)\. Start all ranks, "
    with pytest.raises(InputError, match=expected), process_group(Ranks(1, 3, 1), CPU, url):
        raise AssertionError("connected")


def test_missing_other_rank_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT", timedelta(seconds=1))
    expected = "rank 0 cannot connect to the other 1 by file:"
    with pytest.raises(InputError, match=expected), process_group(Ranks(0, 2), CPU, f"file://{tmp_path}/meet"):
        raise AssertionError("connected")


def test_unknown_kind_of_address_is_an_error() -> None:
    expected = "cannot connect to the other 1 by post://office"
    with pytest.raises(InputError, match=expected), process_group(Ranks(0, 2), CPU, "post://office"):
        raise AssertionError("connected")

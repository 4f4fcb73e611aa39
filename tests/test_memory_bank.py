"""Nearest-neighbor search against the full distance matrix, and bank statistics against torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from feature_extractors import reference
from feature_extractors.coreset import random_projection, select_coreset
from feature_extractors.memory_bank import BankStatistics, MemoryBank, mean_and_std
from models import row_search
from models.row_search import Found, RowSearch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random_rows(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def exact_nearest(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (float64) and index by the plain search in double precision."""
    return reference.nearest_rows(queries.double(), rows.double(), exact_distances=True)


@pytest.fixture(params=["whole", "chunked", "single queries"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search in one block, in several blocks, and query by query."""
    entries = {"whole": row_search.MAX_BLOCK_ENTRIES, "chunked": 400, "single queries": 1}[request.param]
    monkeypatch.setattr(row_search, "MAX_BLOCK_ENTRIES", entries)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List of the number of queries in each searched block."""
    counts: list[int] = []
    nearest_of = RowSearch._nearest_exact

    def counted(search: RowSearch, queries: Tensor, *arguments: Any) -> Found:
        counts.append(len(queries))
        return nearest_of(search, queries, *arguments)

    monkeypatch.setattr(RowSearch, "_nearest_exact", counted)
    return counts


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 1, 1), (7, 1, 5), (1, 9, 3), (50, 33, 2), (90, 100, 64)])
def test_nearest_equals_the_full_matrix(queries: int, rows: int, dim: int, device: str) -> None:
    asked, bank = random_rows(queries, dim, 0).to(device), random_rows(rows, dim, 1).to(device)
    expected_distance, expected_index = exact_nearest(asked, bank)
    distance, index = MemoryBank(bank).nearest(asked)
    assert (distance.dtype, index.dtype) == (torch.float32, torch.int64)
    assert index.tolist() == expected_index.tolist()
    torch.testing.assert_close(distance, expected_distance.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_the_bank_is_found_at_distance_zero(device: str) -> None:
    """The distance is exactly zero, where a distance by matrix product would be lost in rounding."""
    bank = (100.0 + random_rows(200, 64, 2)).to(device)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(device)
    distance, index = MemoryBank(bank).nearest(bank[order])
    assert (distance == 0).all()
    assert torch.equal(index, order)


def test_small_distances_keep_their_precision() -> None:
    bank = 10.0 + random_rows(200, 64, 2)
    queries = bank + 1e-3 * random_rows(200, 64, 3)
    distance, _ = MemoryBank(bank).nearest(queries)
    torch.testing.assert_close(distance, exact_nearest(queries, bank)[0].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_nearest_of_almost_equal_rows_is_found(device: str) -> None:
    """Groups of four rows differ by less than the precision of an fp32 product; of copies the lowest index wins."""
    group = torch.arange(60).repeat_interleave(4)
    bank = (10.0 + 10 * random_rows(60, 64, 2)[group] + 1e-4 * random_rows(240, 64, 3)).to(device)
    distance, index = MemoryBank(bank).nearest(bank)
    assert (distance == 0).all()
    assert index.tolist() == list(range(240))
    copies = MemoryBank(bank[::4].repeat(3, 1)).nearest(bank[::4])[1]
    assert copies.tolist() == list(range(60))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 1, 1), (7, 1, 5), (1, 30, 3), (90, 100, 64)])
def test_nearest_by_expanded_squares_is_near_the_full_matrix(queries: int, rows: int, dim: int, device: str) -> None:
    """The reference's arithmetic finds the same rows, but small distances lose precision."""
    asked, bank = random_rows(queries, dim, 0).to(device), random_rows(rows, dim, 1).to(device)
    distance, index = MemoryBank(bank).search(asked, expanded="everywhere")[:2]
    expected_distance, expected_index = exact_nearest(asked, bank)
    assert (distance.dtype, index.dtype) == (torch.float32, torch.int64)
    assert index.tolist() == expected_index.tolist()
    torch.testing.assert_close(distance, expected_distance.float(), rtol=1e-4, atol=1e-3)


def test_expanded_squares_only_for_close_queries() -> None:
    """With "cancelling", queries close to a row use expanded squares bit by bit and far ones direct differences."""
    bank = MemoryBank(10.0 + random_rows(200, 64, 2))
    queries = torch.cat([bank.rows[:50] + 1e-3 * random_rows(50, 64, 3), 10.0 + 3 * random_rows(50, 64, 4)])
    found = {name: bank.search(queries, name)[:2] for name in row_search.EXPANDED}
    for distance, index in found.values():
        assert torch.equal(index, found["nowhere"][1])
        torch.testing.assert_close(distance, found["nowhere"][0], rtol=1e-5, atol=0.5)
    mixed = found["cancelling"][0]
    assert torch.equal(mixed[:50], found["everywhere"][0][:50])
    assert torch.equal(mixed[50:], found["nowhere"][0][50:])
    assert (mixed[:50] != found["nowhere"][0][:50]).all()


def test_expanded_squares_lose_precision() -> None:
    """Rows of norm 80 lose at least 1e-3 of their distance, which the exact search keeps."""
    bank = MemoryBank(10.0 + random_rows(200, 64, 2))
    queries = bank.rows + 1e-3 * random_rows(200, 64, 3)
    exact, index = bank.nearest(queries)
    expanded, expanded_index = bank.search(queries, expanded="everywhere")[:2]
    assert torch.equal(index, expanded_index)
    assert 1e-3 < (exact - expanded).abs().max() < 0.5


@pytest.mark.parametrize("expanded", ["nowhere", "cancelling"])
@pytest.mark.parametrize(("entries", "at_once", "queries"), [(310, 256, 10), (1 << 24, 12, 12), (5, 256, 1)])
def test_blocks_stay_within_their_bound(
    entries: int, at_once: int, queries: int, expanded: str, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """95 queries against 30 rows are searched in blocks of whole queries."""
    bank, asked = MemoryBank(random_rows(30, 8, 0)), random_rows(95, 8, 1)
    expected = bank.search(asked, expanded)[:2]
    blocks.clear()
    monkeypatch.setattr(row_search, "MAX_BLOCK_ENTRIES", entries)
    monkeypatch.setattr(row_search, "QUERIES_AT_ONCE_ON_CPU", at_once)
    monkeypatch.setattr(row_search, "MAX_DIFFERENCE_ENTRIES", 24)  # three pairs
    distance, index = bank.search(asked, expanded)[:2]
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(distance, expected[0], rtol=1e-6, atol=0)
    whole, rest = divmod(95, queries)
    assert blocks == [queries] * whole + [rest] * (rest > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["cluster", "shell", "far off", "one direction"])
@pytest.mark.parametrize("dim", [3, 64, 700])
def test_rows_that_a_matrix_product_cannot_separate(kind: str, dim: int, device: str) -> None:
    bank, queries = random_rows(400, dim, 2), random_rows(60, dim, 3)
    if kind == "cluster":  # all within the rounding error of their norms
        bank, queries = 1e-4 * bank, 1e-4 * queries
        bank[0] += 10.0
    elif kind == "shell":  # distances equal up to a thousandth
        bank = torch.nn.functional.normalize(bank, dim=1) * (1 + 1e-3 * random_rows(400, 1, 4))
        queries = 1e-3 * queries
    elif kind == "far off":
        queries = queries + 100.0
    else:
        bank, queries = bank[:, :1] * torch.ones(dim), queries[:, :1] * torch.ones(dim)
    bank, queries = bank.to(device), queries.to(device)
    distance, index = MemoryBank(bank).nearest(queries)
    expected_distance, expected_index = exact_nearest(queries, bank)
    torch.testing.assert_close(distance, expected_distance.float(), rtol=2e-6, atol=1e-9)
    assert (index == expected_index).float().mean() > 0.9  # others tie in fp32


def test_product_of_halves_is_within_its_bound() -> None:
    """The GPU's product of bf16 halves leaves out low times low, and its error stays below the proven bound."""
    left, right = 3 + random_rows(50, 700, 0), random_rows(50, 700, 1).exp()
    (high, low), (other_high, other_low) = (
        [half.double() for half in row_search._halves(each)] for each in (left, right)
    )
    product = high @ other_high.T + high @ other_low.T + low @ other_high.T
    bound = 3.03 * 2.0**-16 * left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    error = (product - left.double() @ right.double().T).abs()
    assert (error < bound).all()
    assert error.max() > 1e-3 * bound.min()  # the error is not zero


def test_few_candidates_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly more than one candidate per query is recomputed by direct difference."""
    pairs: list[int] = []
    squared_distances = RowSearch._squared_distances

    def counted(search: RowSearch, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        pairs.append(len(query))
        return squared_distances(search, queries, query, row)

    monkeypatch.setattr(RowSearch, "_squared_distances", counted)
    MemoryBank(random_rows(3000, 64, 0)).nearest(random_rows(500, 64, 1))
    assert 500 <= sum(pairs) < 1500


@pytest.mark.parametrize("expanded", ["nowhere", "cancelling"])
@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 1, 1), (7, 1, 5), (50, 33, 8), (400, 3000, 64)])
def test_bounded_search_finds_the_same_rows(queries: int, rows: int, dim: int, expanded: str) -> None:
    """A tenth of the queries are so close to a row that expanded squares lose digits."""
    bank, asked = MemoryBank(random_rows(rows, dim, 1)), random_rows(queries, dim, 0)
    asked[::10] = bank.rows[0] + 1e-3 * asked[::10]
    tolerance = 5e-3 if expanded == "cancelling" else 0
    expected, found = bank.search(asked, expanded), bank.search(asked, expanded, bounded=True)
    assert expected.complete and found.complete
    assert torch.equal(found.row, expected.row)
    torch.testing.assert_close(found.distance, expected.distance, rtol=1e-6, atol=tolerance)


def test_bounded_search_knows_when_it_is_incomplete() -> None:
    """More rows than a bounded search keeps are equally close to the last query."""
    rows, queries = 10 + random_rows(500, 16, 0), 10 + random_rows(80, 16, 1)
    copies = rows.clone()
    copies[100:120] = queries[-1]
    assert MemoryBank(rows).search(queries, bounded=True).complete
    assert not MemoryBank(copies).search(queries, bounded=True).complete
    group = torch.arange(12) * 32  # of 500 rows, each 32nd is in the same group
    same_group = rows.index_put((group,), queries[-1])
    assert not MemoryBank(same_group).search(queries, bounded=True).complete
    assert MemoryBank(copies).search(queries).complete


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("expanded", row_search.EXPANDED)
def test_rows_of_a_left_out_sample_are_not_searched(expanded: str) -> None:
    """Distances, neighbors and relative distances match those of a bank without the rows."""
    rows, owners = random_rows(60, 5, seed=1), torch.arange(60) % 4 - 1
    bank = MemoryBank(rows, owners=owners).with_spacing()
    queries, left_out = random_rows(12, 5, seed=2), torch.arange(12) % 3
    found = bank.search(queries, expanded, left_out)
    relative = bank.relative_distances(queries, left_out)
    for query, sample, distance, row, other in zip(queries, left_out, found.distance, found.row, relative, strict=True):
        kept = (owners != sample).nonzero()[:, 0]
        others = MemoryBank(rows[kept], spacing=bank.spacing[kept])
        expected, index = others.search(query[None], expanded)[:2]
        assert row == kept[index]
        torch.testing.assert_close(distance, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, others.relative_distances(query[None])[0])
        neighbors = bank.neighbors(row[None], 3, sample[None])[0]
        assert torch.equal(neighbors, kept[others.neighbors(index, 3)[0]])


def test_relative_distances_of_few_rows_use_those_that_are_left() -> None:
    """Without the rows of sample 0, only those at 2 and 5 are left."""
    rows, spacing = torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([4.0, 1.0, 9.0, 16.0])
    bank = MemoryBank(rows, spacing=spacing, owners=torch.tensor([0, 1, -1, 0]))
    relative = bank.relative_distances(torch.tensor([[-1.0]]), torch.tensor([0]))
    assert relative.tolist() == pytest.approx([(3 / 1 * 6 / 3) ** 0.5], rel=1e-5)


def test_bank_of_a_single_sample_keeps_its_rows() -> None:
    for owners in ([7, 7], [7, 7, -1]):
        bank = MemoryBank(random_rows(len(owners), 3, seed=1), owners=torch.tensor(owners))
        assert bank.search(bank.rows, left_out=torch.full((len(owners),), 7)).row.tolist() == list(range(len(owners)))


def test_neighbors_by_hand() -> None:
    """Rows on a line with ties: row 2 at 0 has rows 1 and 3 at distance 1, rows 0 and 4 at 3."""
    bank = MemoryBank(torch.tensor([[-3.0], [1.0], [0.0], [-1.0], [3.0]]))
    expected = [[2, 1, 3, 0, 4], [4, 1, 2, 3, 0]]
    for k in (1, 2, 5):
        assert bank.neighbors(torch.tensor([2, 4]), k).tolist() == [row[:k] for row in expected]
    assert bank.neighbors(torch.tensor([2, 4]), 9).tolist() == expected  # all rows


def test_neighbors_among_copies_have_the_lowest_indices() -> None:
    assert MemoryBank(torch.ones(40, 3)).neighbors(torch.tensor([20]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("rows", "neighbors"), [(40, 10), (5, 4), (2, 1)])
def test_spacing_is_the_mean_distance_to_the_nearest_rows(rows: int, neighbors: int) -> None:
    bank = MemoryBank(random_rows(rows, 6, seed=3) + 50).with_spacing()
    distances = torch.cdist(bank.rows.double(), bank.rows.double()).sort(dim=1).values[:, 1 : neighbors + 1]
    assert bank.spacing is not None
    torch.testing.assert_close(bank.spacing.double(), distances.mean(dim=1), rtol=1e-4, atol=0)


def test_spacing_is_never_zero() -> None:
    """The ten nearest rows of eleven equal ones are at distance 0; the mean spacing is 120 / 12."""
    spacing = MemoryBank(torch.tensor([[0.0]] * 11 + [[120.0]])).with_spacing().spacing
    assert spacing.tolist() == pytest.approx([0.1] * 11 + [120.0], rel=1e-4)
    assert MemoryBank(torch.zeros(3, 2)).with_spacing().spacing.tolist() == [1.0, 1.0, 1.0]
    assert MemoryBank(torch.ones(1, 2)).with_spacing().spacing.tolist() == [1.0]


@pytest.mark.usefixtures("chunks")
def test_relative_distances_by_hand() -> None:
    """Rows at 0, 2, 5 and 100; the third nearest row to a query counts as much as the nearest."""
    spacing = torch.tensor([4.0, 1.0, 9.0, 16.0])
    bank = MemoryBank(torch.tensor([[0.0], [2.0], [5.0], [100.0]]), spacing=spacing)
    relative = bank.relative_distances(torch.tensor([[-1.0], [2.0], [104.0]]))
    first = (1 / 2 * 3 / 1 * 6 / 3) ** (1 / 3)  # distances 1, 3, 6
    last = (4 / 4 * 99 / 3 * 102 / 1) ** (1 / 3)
    assert relative.tolist() == pytest.approx([first, 0.0, last], rel=1e-5)


@pytest.mark.parametrize("step", [1, 7, 40, 1 << 14])
def test_chunked_mean_and_std(step: int) -> None:
    rows = 3.0 + 2.0 * random_rows(40, 11, 4)
    mean, std = mean_and_std(rows, step)
    assert mean == pytest.approx(float(rows.double().mean()), rel=1e-12)
    assert std == pytest.approx(float(rows.double().std(correction=1)), rel=1e-12)


def test_std_by_hand() -> None:
    assert mean_and_std(torch.tensor([[1.0, 2.0], [3.0, 6.0]])) == pytest.approx((3.0, (14 / 3) ** 0.5))


def test_small_spread_around_a_large_mean() -> None:
    """The mean of squares minus the square of the mean would lose every digit here."""
    rows = (1e4 + 1e-2 * random_rows(300, 20, 5)).double()
    assert mean_and_std(rows, 64).std == pytest.approx(float(rows.std(correction=1)), rel=1e-9)


def test_statistics_normalize() -> None:
    assert BankStatistics().normalize(torch.tensor([5.0, -1.0])).tolist() == [5.0, -1.0]
    assert BankStatistics(2.0, 4.0).normalize(torch.tensor([10.0, -2.0])).tolist() == [2.0, -1.0]
    assert MemoryBank(torch.ones(1, 1)).statistics == BankStatistics(0.0, 1.0)


@pytest.mark.parametrize("dim", [3, 250])
def test_coreset_across_chunks(dim: int) -> None:
    """16,500 rows cross the boundary of the chunks in which they are normalized and projected."""
    rows, statistics = 4.0 + random_rows(16_500, dim, 6), BankStatistics(4.0, 0.5)
    rows[-6:] *= 3  # far from all others, and in the second chunk
    projection = random_projection(len(rows), dim, 0.999, 0)
    picks = select_coreset(rows, statistics, 12, 0.999, 0)
    normalized = statistics.normalize(rows).double()
    assert (projection is None) == (dim == 3)
    space = normalized if projection is None else normalized @ projection.double()
    nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    expected = [0]
    while len(expected) < 12:
        nearest = torch.minimum(nearest, (space - space[expected[-1]]).square().sum(dim=1))
        expected.append(int(nearest.argmax()))
    assert picks.tolist() == expected

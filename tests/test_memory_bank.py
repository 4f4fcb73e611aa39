"""The memory bank's search against the full distance matrix, its statistics against torch's own."""

import pytest
import torch
from torch import Tensor

from feature_extractors import memory_bank
from feature_extractors.memory_bank import BankStatistics, MemoryBank, mean_and_std, select_coreset

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random_rows(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def nearest_twin(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The full (M, N) matrix in fp64 and its minimum."""
    distances = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.min(dim=1)


@pytest.fixture(params=["whole", "chunked", "single queries"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search in one block, in several, and query by query."""
    entries = {"whole": memory_bank.MAX_BLOCK_ENTRIES, "chunked": 400, "single queries": 1}[request.param]
    monkeypatch.setattr(memory_bank, "MAX_BLOCK_ENTRIES", entries)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 1, 1), (7, 1, 5), (1, 9, 3), (50, 33, 2), (90, 100, 64)])
def test_nearest_equals_the_full_matrix(queries: int, rows: int, dim: int, device: str) -> None:
    asked, bank = random_rows(queries, dim, 0).to(device), random_rows(rows, dim, 1).to(device)
    distance, index = MemoryBank(bank).nearest(asked)
    expected_distance, expected_index = nearest_twin(asked, bank)
    assert (distance.dtype, index.dtype) == (torch.float32, torch.int64)
    assert index.tolist() == expected_index.tolist()
    torch.testing.assert_close(distance, expected_distance.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_the_bank_is_found_at_distance_zero(device: str) -> None:
    """Exactly zero, where a distance by matrix product would be lost in rounding."""
    bank = (100.0 + random_rows(200, 64, 2)).to(device)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(device)
    distance, index = MemoryBank(bank).nearest(bank[order])
    assert (distance == 0).all()
    assert torch.equal(index, order)


def test_distances_close_to_a_row_keep_their_digits() -> None:
    bank = 10.0 + random_rows(200, 64, 2)
    queries = bank + 1e-3 * random_rows(200, 64, 3)
    distance, _ = MemoryBank(bank).nearest(queries)
    torch.testing.assert_close(distance, nearest_twin(queries, bank)[0].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_nearest_of_rows_a_hair_apart_is_found(device: str) -> None:
    """Families of four rows that differ by less than a product of fp32 keeps; of copies the lowest is taken."""
    family = torch.arange(60).repeat_interleave(4)
    bank = (10.0 + 10 * random_rows(60, 64, 2)[family] + 1e-4 * random_rows(240, 64, 3)).to(device)
    distance, index = MemoryBank(bank).nearest(bank)
    assert (distance == 0).all()
    assert index.tolist() == list(range(240))
    copies = MemoryBank(bank[::4].repeat(3, 1)).nearest(bank[::4])[1]
    assert copies.tolist() == list(range(60))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 1, 1), (7, 1, 5), (1, 30, 3), (90, 100, 64)])
def test_nearest_by_expanded_squares_is_near_the_full_matrix(queries: int, rows: int, dim: int, device: str) -> None:
    """The reference's arithmetic: the same rows, distances that lose digits where they are small."""
    asked, bank = random_rows(queries, dim, 0).to(device), random_rows(rows, dim, 1).to(device)
    distance, index = MemoryBank(bank).nearest(asked, exact=False)
    expected_distance, expected_index = nearest_twin(asked, bank)
    assert (distance.dtype, index.dtype) == (torch.float32, torch.int64)
    assert index.tolist() == expected_index.tolist()
    torch.testing.assert_close(distance, expected_distance.float(), rtol=1e-4, atol=1e-3)


def test_expanded_squares_cancel() -> None:
    """Rows of norm 80 lose 1e-3 and more of their distance, which the exact search keeps."""
    bank = MemoryBank(10.0 + random_rows(200, 64, 2))
    queries = bank.rows + 1e-3 * random_rows(200, 64, 3)
    exact, index = bank.nearest(queries)
    expanded, expanded_index = bank.nearest(queries, exact=False)
    assert torch.equal(index, expanded_index)
    assert 1e-3 < (exact - expanded).abs().max() < 0.5


@pytest.mark.parametrize(("exact", "product"), [(True, "addmm"), (False, "cdist")])
@pytest.mark.parametrize(
    ("most", "least", "per_column", "block"),
    [
        (310, 1 << 21, 1 << 14, 300),  # the upper bound is above all
        (1 << 24, 310, 10, 300),  # 80 entries for 8 columns are below the lower bound
        (1 << 24, 310, 70, 540),  # 560 entries for 8 columns
        (490, 310, 70, 480),  # likewise, but for the upper bound
        (5, 1, 0, 30),  # a query is never cut
    ],
)
def test_no_block_of_distances_is_above_its_bound(
    exact: bool, product: str, most: int, least: int, per_column: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, queries = MemoryBank(random_rows(30, 8, 0)), random_rows(95, 8, 1)
    blocks: list[int] = []
    compute = getattr(torch, product)

    def measured(*args: Tensor, **factors: float) -> Tensor:
        blocks.append(compute(*args, **factors).numel())
        return compute(*args, **factors)

    monkeypatch.setattr(torch, product, measured)
    monkeypatch.setattr(memory_bank, "MAX_BLOCK_ENTRIES", most)
    monkeypatch.setattr(memory_bank, "LEAST_BLOCK_ENTRIES", least)
    monkeypatch.setattr(memory_bank, "BLOCK_ENTRIES_PER_COLUMN", per_column)
    bank.nearest(queries, exact)
    whole, rest = divmod(95 * 30, block)
    assert blocks == [block] * whole + [rest] * (rest > 0)


def test_neighbors_by_hand() -> None:
    """On a line, with ties: row 2 at 0 has rows 1 and 3 at distance 1, rows 0 and 4 at 3."""
    bank = MemoryBank(torch.tensor([[-3.0], [1.0], [0.0], [-1.0], [3.0]]))
    assert bank.neighbors(2, 1).tolist() == [2]
    assert bank.neighbors(2, 2).tolist() == [2, 1]
    assert bank.neighbors(2, 5).tolist() == [2, 1, 3, 0, 4]
    assert bank.neighbors(2, 9).tolist() == [2, 1, 3, 0, 4]  # as many as there are
    assert bank.neighbors(4, 3).tolist() == [4, 1, 2]


def test_neighbors_among_copies_are_the_lowest() -> None:
    assert MemoryBank(torch.ones(40, 3)).neighbors(20, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("step", [1, 7, 40, 1 << 14])
def test_mean_and_std_equal_those_of_all_rows(step: int) -> None:
    rows = 3.0 + 2.0 * random_rows(40, 11, 4)
    mean, std = mean_and_std(rows, step)
    assert mean == pytest.approx(float(rows.double().mean()), rel=1e-12)
    assert std == pytest.approx(float(rows.double().std(correction=1)), rel=1e-12)


def test_std_by_hand() -> None:
    assert mean_and_std(torch.tensor([[1.0, 2.0], [3.0, 6.0]])) == pytest.approx((3.0, (14 / 3) ** 0.5))


def test_small_spread_around_a_large_mean() -> None:
    """Where the mean of squares minus the square of the mean would have no digit left."""
    rows = (1e4 + 1e-2 * random_rows(300, 20, 5)).double()
    assert mean_and_std(rows, 64).std == pytest.approx(float(rows.std(correction=1)), rel=1e-9)


def test_statistics_normalise() -> None:
    assert BankStatistics().normalize(torch.tensor([5.0, -1.0])).tolist() == [5.0, -1.0]
    assert BankStatistics(2.0, 4.0).normalize(torch.tensor([10.0, -2.0])).tolist() == [2.0, -1.0]
    assert MemoryBank(torch.ones(1, 1)).statistics == BankStatistics(0.0, 1.0)


@pytest.mark.parametrize("dim", [3, 250])
def test_coreset_of_more_rows_than_a_chunk(dim: int) -> None:
    """16,500 rows cross the border of the chunks in which they are normalised and projected."""
    rows, statistics = 4.0 + random_rows(16_500, dim, 6), BankStatistics(4.0, 0.5)
    rows[-6:] *= 3  # far from all others, and behind the border
    projection = memory_bank.random_projection(len(rows), dim, 0.999, 0)
    picks = select_coreset(rows, statistics, 12, 0.999, 0)
    normalised = statistics.normalize(rows).double()
    assert (projection is None) == (dim == 3)
    space = normalised if projection is None else normalised @ projection.double()
    nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    expected = [0]
    while len(expected) < 12:
        nearest = torch.minimum(nearest, (space - space[expected[-1]]).square().sum(dim=1))
        expected.append(int(nearest.argmax()))
    assert picks.tolist() == expected

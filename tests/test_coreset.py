"""Greedy k-center and random projection against their plain forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from tiny_networks import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from feature_extractors import coreset, reference
from feature_extractors.coreset import greedy_coreset, random_projection, select_coreset
from feature_extractors.memory_bank import BankStatistics

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def plain_picks(rows: Tensor, n: int, start: int = 0) -> list[int]:
    """Picks of the plain form in double precision."""
    return reference.greedy_coreset(rows.double().cpu(), n, start).tolist()


def random_rows(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def clustered_rows(count: int, dim: int, seed: int) -> Tensor:
    """Seven clusters far from the origin, a hundred times as far from each other as they are wide."""
    generator = torch.Generator().manual_seed(seed)
    of_row = torch.randint(0, 7, (count,), generator=generator)
    return 5.0 + random_rows(7, dim, seed)[of_row] + 0.01 * random_rows(count, dim, seed + 1)


def copied_rows(count: int, dim: int, seed: int) -> Tensor:
    """Rows that each occur about five times, in random order."""
    generator = torch.Generator().manual_seed(seed)
    distinct = max(count // 5, 1)
    return random_rows(distinct, dim, seed)[torch.randint(0, distinct, (count,), generator=generator)]


def grid_rows(count: int, dim: int, seed: int) -> Tensor:
    """Rows of small whole numbers, whose distances are exact and mostly tie."""
    return torch.randint(0, 4, (count, dim), generator=torch.Generator().manual_seed(seed)).float()


KINDS = {"random": random_rows, "clustered": clustered_rows, "copies": copied_rows, "grid": grid_rows}


def set_candidates(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """Set the number of candidates of every pass."""
    for bound in ("FIRST_CANDIDATES", "LEAST_CANDIDATES", "MOST_CANDIDATES"):
        monkeypatch.setattr(coreset, bound, candidates)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of new picks of each pass over all rows."""
    counts: list[int] = []
    update = coreset.Selection.update

    def counting(self: coreset.Selection, picks: Tensor, picked: Tensor, apart: float) -> None:
        counts.append(len(picks))
        update(self, picks, picked, apart)

    monkeypatch.setattr(coreset.Selection, "update", counting)
    return counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("candidates", [1, 3, 20, coreset.FIRST_CANDIDATES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "dim"), [(2, 3), (9, 1), (60, 2), (150, 8), (90, 40)])
def test_picks_equal_the_plain_form(
    kind: str, count: int, dim: int, candidates: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picks and their order equal the plain form, up to all rows, for any number of candidates per pass."""
    set_candidates(monkeypatch, candidates)
    for seed in range(2):
        rows = KINDS[kind](count, dim, seed)
        picks = greedy_coreset(rows.to(device), count)
        assert picks.dtype == torch.int64
        assert picks.device.type == device
        assert picks.tolist() == plain_picks(rows, count)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_picks_and_any_start_equal_the_plain_form(kind: str) -> None:
    rows = KINDS[kind](150, 6, 3)
    for start in (0, 1, 77, 149):
        for n in (1, 2, 3, 40, 149, 150):
            assert greedy_coreset(rows, n, start).tolist() == plain_picks(rows, n, start)


def test_the_selection_takes_few_passes(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """400 of 3000 rows are picked in few passes, in more with few candidates, and no block is above its bound."""
    products: list[int] = []
    addmm = torch.addmm

    def measured(*args: Tensor, **factors: float) -> Tensor:
        products.append(addmm(*args, **factors).numel())
        return addmm(*args, **factors)

    lowered: list[int] = []
    minimum = torch.minimum

    def counted(*args: Tensor, **out: Tensor) -> Tensor:
        lowered.append(len(args[0]))
        return minimum(*args, **out)

    monkeypatch.setattr(torch, "addmm", measured)
    monkeypatch.setattr(torch, "minimum", counted)
    rows = clustered_rows(3000, 24, 5) + 0.3 * random_rows(3000, 24, 6)
    expected = plain_picks(rows, 400)
    assert greedy_coreset(rows, 400).tolist() == expected
    few = len(passes)
    set_candidates(monkeypatch, 20)
    monkeypatch.setattr(coreset, "MAX_BLOCK_ENTRIES", 1000)
    passes.clear()
    products.clear()
    lowered.clear()
    assert greedy_coreset(rows, 400).tolist() == expected
    assert few < 10
    assert 400 / 21 <= len(passes) < 100
    assert max(passes) <= 20 + 1
    assert max(products) <= 1000
    assert max(lowered) * 24 <= 1000  # direct differences of these rows


def test_rows_close_to_the_selection_are_not_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are almost equal, like background patches, are left out of the products after the first pass."""
    generator = torch.Generator().manual_seed(0)
    foreground, background = random_rows(1000, 16, 1), 1e-3 * random_rows(1000, 16, 2)
    rows = torch.cat([background, foreground])[torch.randperm(2000, generator=generator)]
    updated: list[int] = []
    addmm = torch.addmm

    def measured(bias: Tensor, first: Tensor, *rest: Tensor, **factors: float) -> Tensor:
        if first.dtype == torch.float32:  # products of candidates are in fp64
            updated.append(len(first))
        return addmm(bias, first, *rest, **factors)

    monkeypatch.setattr(torch, "addmm", measured)
    set_candidates(monkeypatch, 50)
    assert greedy_coreset(rows, 300).tolist() == plain_picks(rows, 300)
    assert updated[0] == 1999
    assert max(updated[1:]) <= 1001


def test_one_row_is_picked() -> None:
    assert greedy_coreset(torch.ones(1, 4), 1).tolist() == [0]


def test_equal_rows_are_picked_in_order() -> None:
    rows = torch.full((30, 3), 0.1)
    assert greedy_coreset(rows, 30).tolist() == list(range(30))
    assert greedy_coreset(rows, 4, start=2).tolist() == [2, 0, 1, 3]


def test_ties_go_to_the_lowest_index() -> None:
    """From a corner of a square, the opposite corner is picked first, then the two tied corners by index."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert greedy_coreset(corners, 5).tolist() == [0, 3, 1, 2, 4]
    assert greedy_coreset(corners.flip(0), 5).tolist() == [0, 4, 2, 3, 1]


def test_ties_are_exact_although_the_mean_is_rounded() -> None:
    """Subtracting a mean that is no binary fraction does not break ties on small grids."""
    for seed in range(60):
        rows = grid_rows(14, 5, seed)
        assert greedy_coreset(rows, 14).tolist() == plain_picks(rows, 14), f"seed {seed}"


def test_rows_that_differ_in_the_last_digit_are_distinct() -> None:
    base = torch.full((6, 3), 1.0)
    for i, steps in enumerate((0, 1, 5, 2, 9, 3)):
        base[i, 0] += steps * torch.finfo(torch.float32).eps
    assert greedy_coreset(base, 6).tolist() == plain_picks(base, 6)
    far = torch.cat([base, torch.tensor([[1e3, -1e3, 0.0], [-1e3, 2e3, 1.0], [0.0, 3e3, 1.0]])])
    assert greedy_coreset(far, 9).tolist() == plain_picks(far, 9)


def test_rows_are_converted_to_fp32() -> None:
    """Rows of fp16 and fp64 are picked as fp32, and the input is not changed."""
    rows = random_rows(80, 5, 0)
    before = rows.clone()
    expected = plain_picks(rows.half(), 30)
    assert greedy_coreset(rows.half(), 30).tolist() == expected
    assert greedy_coreset(rows.double(), 30).tolist() == greedy_coreset(rows, 30).tolist()
    assert torch.equal(rows, before)


@pytest.mark.parametrize("n", [-1, 0, 6])
def test_a_wrong_number_of_picks_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pick {n} of 5 rows"):
        greedy_coreset(torch.ones(5, 2), n)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_wrong_start_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"start is {start}, expected an index below 5"):
        greedy_coreset(torch.ones(5, 2), 2, start)


@pytest.mark.parametrize(("count", "dim", "eps", "seed"), [(400, 300, 0.9, 0), (50, 200, 0.7, 3), (3000, 1152, 0.9, 7)])
def test_projection_equals_scikit_learn(count: int, dim: int, eps: float, seed: int) -> None:
    rows = random_rows(count, dim, seed)
    projection = random_projection(count, dim, eps, seed)
    assert projection is not None
    assert projection.dtype == torch.float32
    expected = reference.random_projection(rows, eps, seed)
    torch.testing.assert_close(rows @ projection, expected, rtol=1e-4, atol=1e-4)


def test_projection_depends_on_its_seed() -> None:
    assert torch.equal(random_projection(400, 300, 0.9, 1), random_projection(400, 300, 0.9, 1))
    assert not torch.equal(random_projection(400, 300, 0.9, 1), random_projection(400, 300, 0.9, 2))
    np.random.seed(0)  # noqa: NPY002 (without a seed scikit-learn draws from NumPy's global state)
    assert not torch.equal(random_projection(400, 300, 0.9, None), random_projection(400, 300, 0.9, None))


def test_no_projection_if_it_would_be_wider() -> None:
    width = int(johnson_lindenstrauss_min_dim(400, eps=0.9))
    assert random_projection(400, width - 1, 0.9, 0) is None
    # as in scikit-learn, which refuses only a wider one
    assert random_projection(400, width, 0.9, 0).shape == (width, width)
    assert random_projection(400, width + 1, 0.9, 0).shape == (width + 1, width)


def test_rows_are_normalized_and_projected_before_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, statistics = 2.0 + 3.0 * random_rows(350, 250, 1), BankStatistics(1.5, 2.5)
    projected = reference.random_projection((rows - 1.5) / 2.5, 0.9, 4)
    assert projected.shape[1] < 250
    expected = plain_picks(projected, 60)
    assert select_coreset(rows, statistics, 60, 0.9, 4).tolist() == expected
    monkeypatch.setattr(coreset, "random_projection", lambda *_: None)
    assert select_coreset(rows, statistics, 60, 0.9, 4).tolist() == plain_picks((rows - 1.5) / 2.5, 60) != expected


@pytest.mark.golden
def test_recorded_selection(goldens: Path) -> None:
    """The recorded 300 picks of 3000 rows in 30 clusters, projected to 197 columns, are reproduced in order."""
    recorded, meta = np.load(goldens / "unit.npz"), json.loads((goldens / "unit_meta.json").read_text())["coreset"]
    generator = np.random.RandomState(0)
    rows = generator.randn(3000, 1152).astype("f4")
    rows += np.repeat(generator.randn(30, 1152).astype("f4") * 2, 100, axis=0)
    np.testing.assert_array_equal(rows[:4, :16], recorded["coreset_input_rows0_4"])

    projection = random_projection(*rows.shape, meta["eps"], meta["random_state"])
    assert projection is not None
    projected = torch.from_numpy(rows) @ projection
    assert list(projected.shape) == meta["Z_shape"]
    assert int((projection != 0).sum()) == meta["nnz"]
    np.testing.assert_allclose(projected[:8], recorded["coreset_Z_rows0_8"], rtol=1e-5, atol=1e-4)

    picks = select_coreset(torch.from_numpy(rows), BankStatistics(), meta["n"], meta["eps"], meta["random_state"])
    np.testing.assert_array_equal(picks, recorded["coreset_idx_nohalf_float64"])
    assert (picks.numpy() != recorded["coreset_idx_half"]).any()  # the half-precision selection differs


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_rows_are_refused(value: float) -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    rows[7, 1] = value
    with pytest.raises(ValueError, match="a row of the coreset's input holds NaN or infinity"):
        greedy_coreset(rows, 20)

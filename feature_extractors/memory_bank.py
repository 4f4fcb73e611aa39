"""Memory bank of normal patches with exact nearest-neighbor search, and the statistics that normalize it."""

from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.patch_rows import CHUNK, ShardedRows, as_sharded
from models.row_search import FAR, Found, RowSearch

NEAREST_ROWS = 3  # averaged in a relative distance
SPACING_NEIGHBORS = 10  # averaged in the spacing of a row
LEAST_SPACING = 0.01  # share of the mean spacing


class BankStatistics(NamedTuple):
    """Mean and standard deviation that normalize the patches of a bank and the queries."""

    mean: float = 0.0
    std: float = 1.0

    def normalize(self, patches: Tensor) -> Tensor:
        """Patches (N, D) minus the mean, divided by the standard deviation."""
        return (patches - self.mean) / self.std


def mean_and_std(rows: Tensor | ShardedRows, step: int = CHUNK) -> BankStatistics:
    """Mean and unbiased std of all entries of rows (N, D), in float64. Plain form: in `reference.bank_statistics`."""
    rows = as_sharded(rows)
    count = len(rows) * rows.width
    mean = rows.sum(torch.sum, step) / count
    squares = rows.sum(lambda chunk: (chunk - mean).square().sum(), step)
    return BankStatistics(mean, (squares / (count - 1)) ** 0.5)


class MemoryBank:
    """Normalized patches `rows` (N, D) float32, and the `statistics` by which callers normalize the queries.

    `spacing` (N,) float32 is the mean distance of each row to its neighbors, see `with_spacing`. `owners` (N,) int64
    are the numbers of the training samples that the rows are from, -1 for an added row; they are not saved.
    """

    def __init__(
        self,
        rows: Tensor,
        statistics: BankStatistics | None = None,
        *,
        spacing: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> None:
        self.rows, self.statistics = rows, statistics or BankStatistics()
        self.spacing, self.owners = spacing, owners
        self._search = RowSearch(rows, owners)

    def __len__(self) -> int:
        return len(self.rows)

    def with_spacing(self) -> "MemoryBank":
        """Copy with the spacing of each row: its mean distance to the SPACING_NEIGHBORS nearest rows.

        To avoid 0 at equal rows, it is at least LEAST_SPACING of the mean spacing; 1 if all rows are equal.
        """
        neighbors = min(SPACING_NEIGHBORS, len(self) - 1)
        squared, _ = self._search.nearest_few(self.rows, neighbors + 1)  # with the row itself
        spacing = squared.sqrt_()[:, 1:].sum(dim=1) / max(neighbors, 1)
        least = LEAST_SPACING * float(spacing.mean()) or 1.0
        return MemoryBank(self.rows, self.statistics, spacing=spacing.clamp_min(least), owners=self.owners)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (M,), Euclidean (not squared), and index (M,) of the row nearest to each of queries (M, D).

        The queries are normalized with `statistics`. The lowest index wins a tie.
        """
        return self.search(queries)[:2]

    def search(
        self, queries: Tensor, expanded: str = "nowhere", left_out: Tensor | None = None, bounded: bool = False
    ) -> Found:
        """Nearest rows of normalized queries; see RowSearch.nearest.

        The rows of the training samples `left_out` (M,) int64, one for each query, do not count.
        """
        return self._search.nearest(queries, expanded, left_out, bounded)

    def relative_distances(self, queries: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Distances (M,) of normalized queries (M, D) relative to the spacing of the bank around each of them.

        The geometric mean of |q - r| / sqrt(spacing of r) over the NEAREST_ROWS rows r nearest to a query q; 0 for a
        row of the bank. The rows are found by rounded products, so any of nearly equally distant ones may be taken.
        For `left_out` see `search`.
        """
        assert self.spacing is not None
        squared, index = self._search.nearest_few(queries, min(NEAREST_ROWS, len(self)), left_out)
        counts = squared < FAR  # (M, k), False if too few rows are left
        distance = torch.stack([(queries - self.rows[row]).square_().sum(dim=1).sqrt() for row in index.T], dim=1)
        logarithms = (distance / self.spacing[index].sqrt()).log()
        return (torch.where(counts, logarithms, 0.0).sum(dim=1) / counts.sum(dim=1)).exp()

    def neighbors(self, row: Tensor, k: int, left_out: Tensor | None = None) -> Tensor:
        """Indices (B, k), or fewer in a smaller bank, of the bank's rows nearest to its rows `row` (B,) int64.

        The row itself is the first, the lowest index wins a tie. For `left_out` (B,) see `search`.
        """
        distance = torch.cdist(self.rows[row], self.rows, compute_mode="donot_use_mm_for_euclid_dist")  # (B, N)
        if left_out is not None:
            distance.masked_fill_(self._search.is_left_out(left_out), torch.inf)
        return distance.sort(dim=1, stable=True).indices[:, :k]

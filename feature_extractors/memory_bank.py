"""The memory bank: the patches that good parts were seen to have, and the search among them."""

from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.coreset import greedy_coreset, random_projection
from feature_extractors.training_features import Rows

# Bound the distance block of one search: 64 MB at most. The product of narrow rows is done so soon that reading its
# result decides, and that is three times faster from the cache.
MAX_BLOCK_ENTRIES, LEAST_BLOCK_ENTRIES, BLOCK_ENTRIES_PER_COLUMN = 1 << 24, 1 << 21, 1 << 14
# Candidates of the product whose distances are recomputed; near-duplicates differ by less than its rounding.
RECHECKED = 4


class BankStatistics(NamedTuple):
    """The scalars that a bank's patches are normalised with."""

    mean: float = 0.0
    std: float = 1.0

    def normalize(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) / self.std


class MemoryBank:
    """Selected patches of good parts, normalised.

    Args:
        rows: (N, D) float32, already normalised.
        statistics: what they were normalised with, for the queries.
    """

    def __init__(self, rows: Tensor, statistics: BankStatistics | None = None) -> None:
        self.rows = rows
        self.statistics = statistics or BankStatistics()
        self._center = rows.mean(dim=0)
        self._centered = rows - self._center
        self._norms = self._centered.square().sum(dim=1)

    def nearest(self, queries: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
        """The nearest bank row of each query; the full distance matrix never exists.

        Args:
            queries: (M, D) float32, normalised with `statistics`.
            exact: an fp32 matrix product finds the RECHECKED best rows, then their distances are computed by direct
                difference, which loses no digits where query and row are close. Otherwise the product's distance is
                the result, as in the reference: |q|^2 + |r|^2 - 2 q r cancels there. A patch of the bank may be at
                0.02 from itself, which the one-class SVMs, fitted on training samples, notice.

        Returns:
            distance (M,), Euclidean (not squared); index (M,) int64 into `rows`.
        """
        entries = max(LEAST_BLOCK_ENTRIES, BLOCK_ENTRIES_PER_COLUMN * self.rows.shape[1])
        chunks = queries.split(max(1, min(entries, MAX_BLOCK_ENTRIES) // len(self.rows)))
        if not exact:
            minima = [torch.cdist(chunk, self.rows).min(dim=1) for chunk in chunks]
            return torch.cat([each.values for each in minima]), torch.cat([each.indices for each in minima])
        found = [self._nearest_exactly(chunk) for chunk in chunks]
        return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])

    def _nearest_exactly(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        # Centred, norms are small and the product keeps more digits; the query's own norm changes no order.
        products = torch.addmm(self._norms, queries - self._center, self._centered.T, alpha=-2)
        best = products.topk(min(RECHECKED, len(self.rows)), dim=1, largest=False).indices.sort(dim=1).values
        distance = torch.linalg.vector_norm(queries[:, None] - self.rows[best], dim=2)  # (chunk, RECHECKED)
        smallest, position = distance.min(dim=1)
        return smallest, best.gather(1, position[:, None])[:, 0]

    def neighbors(self, row: int | Tensor, k: int) -> Tensor:
        """Indices (k,) of the k rows nearest to a row of the bank, the row itself among them; the lowest wins a tie.

        `row` is its index, or an int64 tensor (1,) of it.
        """
        distance = torch.linalg.vector_norm(self.rows - self.rows[row], dim=1)
        return distance.sort(stable=True).indices[:k]


def mean_and_std(rows: Rows, step: int = 1 << 14) -> BankStatistics:
    """Mean and unbiased standard deviation over all entries of (N, D) rows, accumulated in fp64, chunk by chunk."""
    count = len(rows) * rows.shape[1]
    mean = sum(float(chunk.double().sum()) for chunk in rows.split(step)) / count
    squares = sum(float((chunk.double() - mean).square().sum()) for chunk in rows.split(step))
    return BankStatistics(mean, (squares / (count - 1)) ** 0.5)


def select_coreset(rows: Rows, statistics: BankStatistics, n: int, eps: float, random_state: int | None) -> Tensor:
    """Choose n of the (N, D) raw rows: normalise, project at random, then greedy k-centre from index 0.

    Normalisation and projection work chunk by chunk; besides `rows` only the projected rows exist.

    Returns:
        (n,) int64 indices in order of selection.
    """
    projection = random_projection(len(rows), rows.shape[1], eps, random_state)
    projected = torch.empty(len(rows), rows.shape[1] if projection is None else projection.shape[1], device=rows.device)
    begin = 0
    for chunk in rows.split(1 << 14):
        normalised = statistics.normalize(chunk)
        of_chunk = normalised if projection is None else normalised @ projection.to(rows.device)
        projected[begin : begin + len(chunk)] = of_chunk
        begin += len(chunk)
    return greedy_coreset(projected, n)

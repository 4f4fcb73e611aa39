"""Memory bank of normal patches with exact nearest-neighbor search, and the statistics that normalize it."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.patch_rows import CHUNK, ShardedRows, as_sharded

# Largest block of products: entries, and on a CPU also queries, so that it stays in the cache.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 24, 1 << 28
QUERIES_AT_ONCE_ON_CPU = 256
# Entries of the direct differences computed at once: 64 MB, on a GPU 256 MB.
MAX_DIFFERENCE_ENTRIES, MAX_DIFFERENCE_ENTRIES_ON_GPU = 1 << 24, 1 << 26
# Which distances are computed as |q|^2 + |r|^2 - 2 q r in fp32, to reproduce the rounding of the original: none, those
# that lose most of their digits this way (d^2 is below CANCELLING times |q|^2 + |r|^2), or all.
EXPANDED = ("nowhere", "cancelling", "everywhere")
CANCELLING = 2.0**-9
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
        self._center = rows.mean(dim=0)
        centered = rows - self._center  # products of smaller numbers have smaller rounding errors
        self._norms = centered.square().sum(dim=1)
        self._lengths = self._norms.sqrt()
        # A GPU multiplies bf16 numbers fifteen times as fast as fp32, so there each number is split into two bf16 ones.
        self._halved = rows.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self._factors = centered
        if self._halved:
            high, low = _halves(centered)
            self._factors = torch.cat([high, low, high], dim=1)  # (N, 3 D)
        # Error bounds, unless a square overflows or underflows. A sum of D products is off by less than D 2^-24 |q||r|,
        # and the squared distance that it is compared with by less than D 2^-24 (|q| + |r|)^2. Splitting q and r adds
        # at most 2^-16 |q||r| each, and leaving out the product of their low parts as much again.
        self._rounding = 2 * (self._factors.shape[1] + 64) * 2.0**-24
        self._product_error = 2 * (self._rounding + (3.03 * 2.0**-16 if self._halved else 0.0))

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, sample: int) -> "MemoryBank":
        """Copy without the rows of a training sample; the bank itself if no other sample has any."""
        assert self.owners is not None
        others = self.owners != sample
        if not (self.owners[others] >= 0).any():  # an added row alone is no bank
            return self
        spacing = None if self.spacing is None else self.spacing[others]
        return MemoryBank(self.rows[others], self.statistics, spacing=spacing)

    def with_spacing(self) -> "MemoryBank":
        """Copy with the spacing of each row: its mean distance to the SPACING_NEIGHBORS nearest rows.

        To avoid 0 at equal rows, it is at least LEAST_SPACING of the mean spacing; 1 if all rows are equal.
        """
        neighbors = min(SPACING_NEIGHBORS, len(self) - 1)
        found = []
        for block in self.rows.split(self._queries_at_once(self.rows.device)):
            centered = block - self._center
            squared = torch.add(self._norms, self._products(centered), alpha=-2).add_(centered.square().sum(1)[:, None])
            nearest = squared.clamp_min_(0).topk(neighbors + 1, dim=1, largest=False).values  # with the row itself
            found.append(nearest.sqrt()[:, 1:].sum(dim=1) / max(neighbors, 1))
        spacing = torch.cat(found)
        least = LEAST_SPACING * float(spacing.mean()) or 1.0
        return MemoryBank(self.rows, self.statistics, spacing=spacing.clamp_min(least), owners=self.owners)

    def nearest(self, queries: Tensor, expanded: str = "nowhere") -> tuple[Tensor, Tensor]:
        """Nearest bank row of each query, without the full distance matrix. Fast form of `reference.nearest_rows`.

        1. A matrix product gives approximate squared distances |q|^2 - 2 q r + |r|^2, with a proven error bound.
        2. The exact distance to the row that looks nearest is an upper bound. Rows that may be that close, within the
           error, are candidates. There is rarely more than one per query.
        3. The candidates are compared by |q - r|^2 itself, which loses no digits where query and row are close.

        Args:
            queries: (M, D) float32, normalized with `statistics`. Equal ones, such as background, are searched once.
            expanded: one of EXPANDED. The published code expands every square, so that a patch of the bank can be 0.04
                away from itself; its SVMs are fitted to these errors.

        Returns:
            distance (M,), Euclidean (not squared); index (M,) int64 into `rows`, the lowest where distances tie.
        """
        distinct, inverse = distinct_rows(queries)
        if expanded == "everywhere":
            distance, index = self._nearest_expanded(distinct)
        else:
            distance, index = self._nearest_exact(distinct)
        if expanded == "cancelling":
            norms = distinct.square().sum(dim=1) + self.rows[index].square().sum(dim=1)
            again = (distance.square() < CANCELLING * norms).nonzero()[:, 0]
            distance[again], index[again] = self._nearest_expanded(distinct[again])
        return distance[inverse], index[inverse]

    def relative_distances(self, queries: Tensor) -> Tensor:
        """Distances (M,) of normalized queries (M, D) relative to the spacing of the bank around each of them.

        The geometric mean of |q - r| / sqrt(spacing of r) over the NEAREST_ROWS rows r nearest to a query q; 0 for a
        row of the bank. The rows are found by rounded products, so any of nearly equally distant ones may be taken.
        """
        assert self.spacing is not None
        distinct, inverse = distinct_rows(queries)
        found = []
        for block in self._blocks(distinct):
            partial = torch.add(self._norms, self._products(block - self._center), alpha=-2)  # |q - r|^2 - |q|^2
            index = partial.topk(min(NEAREST_ROWS, len(self)), dim=1, largest=False).indices  # (m, k)
            distance = torch.stack([(block - self.rows[row]).square_().sum(dim=1).sqrt() for row in index.T], dim=1)
            found.append((distance / self.spacing[index].sqrt()).log().mean(dim=1).exp())
        return torch.cat(found)[inverse]

    def neighbors(self, row: int | Tensor, k: int) -> Tensor:
        """Indices (k,), or fewer in a smaller bank, of the rows nearest to a row of the bank, itself included.

        `row` is an index, or an int64 tensor (1,) that holds one. The lowest index wins a tie.
        """
        distance = torch.linalg.vector_norm(self.rows - self.rows[row], dim=1)
        return distance.sort(stable=True).indices[:k]

    def _nearest_exact(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """`nearest` of distinct queries (M, D), by direct differences, block by block."""
        found = [self._nearest_in_block(block) for block in self._blocks(queries)]
        return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])

    def _nearest_expanded(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """`nearest` of distinct queries (M, D), by expanded squares, block by block."""
        rows = torch.cat([self.rows, torch.ones_like(self._norms)[:, None], _squared_norms(self.rows)], dim=1)
        blocks = queries.split(self._queries_at_once(queries.device))
        found = [_expanded_distances(block, rows).min(dim=1) for block in blocks]
        return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])

    def _blocks(self, queries: Tensor) -> tuple[Tensor, ...]:
        """Queries in blocks, on a CPU small enough for its cache."""
        step = self._queries_at_once(queries.device)
        return queries.split(min(step, QUERIES_AT_ONCE_ON_CPU) if queries.device.type == "cpu" else step)

    def _queries_at_once(self, device: torch.device) -> int:
        """Queries whose products with all rows fit in a block."""
        return max(1, (MAX_BLOCK_ENTRIES if device.type == "cpu" else MAX_BLOCK_ENTRIES_ON_GPU) // len(self.rows))

    def _nearest_in_block(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """`_nearest_exact` of queries (M, D) in one block of products."""
        centered = queries - self._center
        squares = centered.square().sum(dim=1)
        partial = torch.add(self._norms, self._products(centered), alpha=-2)  # 1. (M, N): about |q - r|^2 - |q|^2
        closest = partial.argmin(dim=1)
        found = (queries - self.rows[closest]).square().sum(dim=1)  # squared; the nearest row is no farther
        partial.addr_(squares.sqrt(), self._lengths, alpha=-self._product_error).sub_(self._rounding * self._norms)
        limit = found - squares + self._rounding * squares  # `partial` now holds lower bounds
        query, row = (partial <= limit[:, None]).nonzero(as_tuple=True)  # 2. the candidates, (pairs,) each
        squared = self._squared_distances(queries, query, row)  # 3. the lowest index wins a tie
        best = found.scatter_reduce(0, query, squared, "amin")
        among_best = squared == best[query]
        index = torch.where(best < found, len(self.rows), closest)
        index.scatter_reduce_(0, query[among_best], row[among_best], "amin")
        return best.sqrt(), index

    def _products(self, centered: Tensor) -> Tensor:
        """Products (M, N) float32 of centered queries (M, D) and rows."""
        if not self._halved:
            return centered @ self._factors.T
        high, low = _halves(centered)
        return torch.mm(torch.cat([high, high, low], dim=1), self._factors.T, out_dtype=torch.float32)

    def _squared_distances(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Squared distances (pairs,) of queries[query] and rows[row], by direct difference."""
        entries = MAX_DIFFERENCE_ENTRIES_ON_GPU if queries.is_cuda else MAX_DIFFERENCE_ENTRIES
        step = max(1, entries // self.rows.shape[1])
        pairs = zip(query.split(step), row.split(step), strict=True)
        return torch.cat([(queries[of_query] - self.rows[of_row]).square_().sum(dim=1) for of_query, of_row in pairs])


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows (K, D), in no order, of rows (N, D) float32, and the index (N,) int64 of each row among them."""
    if rows.is_cuda:  # torch.unique would take several times as long there as the search
        return _distinct_by_hash(rows)
    return torch.unique(rows, dim=0, return_inverse=True)


def _distinct_by_hash(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`distinct_rows` by 64-bit hashes of the bits. Rows that differ from the first of their hash are all kept."""
    bits = rows.contiguous().view(torch.int32).long()
    hashes = (bits * _hash_factors(rows.shape[1], rows.device)).sum(dim=1)  # modulo 2^64
    groups, inverse = torch.unique(hashes, return_inverse=True)
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(groups, len(rows)).scatter_reduce_(0, inverse, number, "amin")
    unlike = (bits != bits[first[inverse]]).any(dim=1).nonzero()[:, 0]  # rows that differ from the first of their hash
    inverse[unlike] = len(groups) + number[: len(unlike)]
    return rows[torch.cat([first, unlike])], inverse


@lru_cache(maxsize=8)
def _hash_factors(width: int, device: torch.device) -> Tensor:
    ends = torch.iinfo(torch.int64)
    drawn = torch.randint(ends.min, ends.max, (width,), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is `values`, float32, up to a relative error of 2^-16."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True)


def _expanded_distances(queries: Tensor, rows: Tensor) -> Tensor:
    """Distances (M, N) as in torch.cdist, of queries (M, D) and rows (N, D + 2), each with 1 and its squared norm."""
    factors = torch.cat([-2 * queries, _squared_norms(queries), torch.ones_like(queries[:, :1])], dim=1)
    return (factors @ rows.T).clamp_min_(0).sqrt_()

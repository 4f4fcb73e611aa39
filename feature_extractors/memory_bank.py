"""Memory bank of normal patches, its statistics, and the choice of its coreset."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from feature_extractors.coreset import greedy_coreset, random_projection
from feature_extractors.training_features import Rows
from utils.distributed import Group, all_reduce_floats, broadcast_object, shard_offset, world_size

# Bound the block of products of one search. On the CPU few queries at once leave it in the cache.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 24, 1 << 28
QUERIES_AT_ONCE_ON_CPU = 256
# Where a distance is computed by expanded squares, as the reference does: where its square is below this share of the
# squared norms. Below 2^-9 of them it keeps less than four digits there.
EXPANDED_BELOW = {"nowhere": 0.0, "cancelling": 2.0**-9, "everywhere": torch.inf}
# Bound the direct differences that are computed at once: 64 MB, on a GPU 256.
MAX_DIFFERENCE_ENTRIES, MAX_DIFFERENCE_ENTRIES_ON_GPU = 1 << 24, 1 << 26


class BankStatistics(NamedTuple):
    """The scalars that a bank's patches are normalized with."""

    mean: float = 0.0
    std: float = 1.0

    def normalize(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) / self.std


class MemoryBank:
    """Memory bank of normal patches with exact nearest-neighbor search.

    Args:
        rows: (N, D) float32, already normalized.
        statistics: mean and standard deviation that they were normalized with, for the queries.
    """

    def __init__(self, rows: Tensor, statistics: BankStatistics | None = None) -> None:
        self.rows = rows
        self.statistics = statistics or BankStatistics()
        self._center = rows.mean(dim=0)
        centered = rows - self._center  # small norms: the product keeps more digits
        self._norms = centered.square().sum(dim=1)
        self._lengths = self._norms.sqrt()
        # Products in fp32, or on a GPU, which is fifteen times as fast in bf16, of bf16 halves.
        self._halved = rows.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self._factors = centered
        if self._halved:
            high, low = _halves(centered)
            self._factors = torch.cat([high, low, high], dim=1)  # (N, 3 D)
        # A sum of D products in fp32 is wrong by less than D 2^-24 |q| |r|, and so are the squared distances that it is
        # compared with. Of factors in halves the product of both low ones is left out, and each half rounds by 2^-16.
        # The product counts twice in a squared distance. This holds for values whose squares neither overflow nor
        # underflow.
        self._rounding = 2 * (self._factors.shape[1] + 64) * 2.0**-24
        self._product_error = 2 * (self._rounding + (3.03 * 2.0**-16 if self._halved else 0.0))

    def __len__(self) -> int:
        return len(self.rows)

    def _products(self, centered: Tensor) -> Tensor:
        """Products (M, N), float32, of centered queries (M, D) and rows, wrong by at most `_product_error`."""
        if not self._halved:
            return centered @ self._factors.T
        high, low = _halves(centered)
        return torch.mm(torch.cat([high, high, low], dim=1), self._factors.T, out_dtype=torch.float32)

    def nearest(self, queries: Tensor, expanded: str = "nowhere") -> tuple[Tensor, Tensor]:
        """The nearest bank row of each query; the full distance matrix never exists.

        A matrix product tells |q - r|^2 up to a bound that holds for certain. Whatever row may be the nearest by it is
        a candidate, and of the candidates, hardly more than one a query, the distance is computed by direct difference,
        which loses no digits where query and row are close. On a GPU their number is waited for, block by block.

        Args:
            queries: (M, D) float32, normalized with `statistics`. Equal ones, as those of the background, are searched
                for once.
            expanded: a key of EXPANDED_BELOW: where the distance is the reference's instead, |q|^2 + |r|^2 - 2 q r by a
                product in fp32, which cancels. A patch of the bank may be at 0.04 from itself, which the one-class
                SVMs, fitted on training samples, notice; how many epochs they take may hang on the sixth digit.

        Returns:
            distance (M,), Euclidean (not squared); index (M,) int64 into `rows`, the lowest where distances tie.
        """
        on_cpu = queries.device.type == "cpu"
        step = max(1, (MAX_BLOCK_ENTRIES if on_cpu else MAX_BLOCK_ENTRIES_ON_GPU) // len(self.rows))
        distinct, inverse = distinct_rows(queries)
        below = EXPANDED_BELOW[expanded]
        if below < torch.inf:
            chunks = distinct.split(min(step, QUERIES_AT_ONCE_ON_CPU) if on_cpu else step)
            found = [self._nearest_of(chunk) for chunk in chunks]
            distance, index = torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])
            norms = distinct.square().sum(dim=1) + self.rows[index].square().sum(dim=1)
            again = (distance.square() < below * norms).nonzero()[:, 0]
        else:
            distance, index = distinct.new_empty(len(distinct)), inverse.new_empty(len(distinct))
            again = torch.arange(len(distinct), device=queries.device)
        if len(again):
            rows = torch.cat([self.rows, torch.ones_like(self._norms)[:, None], _squared_norms(self.rows)], dim=1)
            for part in again.split(step):
                distance[part], index[part] = _expanded_distances(distinct[part], rows).min(dim=1)
        return distance[inverse], index[inverse]

    def _nearest_of(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """`nearest` of distinct queries (M, D), in one block of products."""
        centered = queries - self._center
        squares = centered.square().sum(dim=1)
        # (M, N): |q - r|^2 - |q|^2, without what changes no order
        partial = self._products(centered).mul_(-2).add_(self._norms)
        closest = partial.argmin(dim=1)
        found = (queries - self.rows[closest]).square().sum(dim=1)  # squared; no nearest row is farther
        limit = torch.addcmul(
            (found - squares + self._rounding * squares)[:, None],
            self._product_error * squares.sqrt()[:, None],
            self._lengths,
        ).add_(self._norms, alpha=self._rounding)
        close = partial <= limit
        query, row = close.nonzero(as_tuple=True)  # (pairs,) each
        squared = self._squared_distances(queries, query, row)
        best = found.scatter_reduce(0, query, squared, "amin")
        among_best = squared == best[query]
        index = torch.where(best < found, len(self.rows), closest)
        index.scatter_reduce_(0, query[among_best], row[among_best], "amin")
        return best.sqrt(), index

    def _squared_distances(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Squared distances (pairs,) of queries[query] and rows[row], by direct difference."""
        entries = MAX_DIFFERENCE_ENTRIES_ON_GPU if queries.is_cuda else MAX_DIFFERENCE_ENTRIES
        step = max(1, entries // self.rows.shape[1])
        pairs = zip(query.split(step), row.split(step), strict=True)
        return torch.cat([(queries[of_query] - self.rows[of_row]).square_().sum(dim=1) for of_query, of_row in pairs])

    def neighbors(self, row: int | Tensor, k: int) -> Tensor:
        """Indices (k,) of the k rows nearest to a row of the bank, the row itself among them; the lowest wins a tie.

        `row` is its index, or an int64 tensor (1,) of it.
        """
        distance = torch.linalg.vector_norm(self.rows - self.rows[row], dim=1)
        return distance.sort(stable=True).indices[:k]

    def neighborhood(self, row: int | Tensor, k: int) -> Tensor:
        """The rows (k, D) at `neighbors`, the nearest first; fewer where the bank has fewer."""
        return self.rows[self.neighbors(row, k)]


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones of (N, D) float32 rows.

    Returns:
        (K, D) rows, in no order; (N,) int64, which of them each row is.
    """
    if rows.is_cuda:  # torch.unique would sort whole rows, which takes several times as long as the search that follows
        return _distinct_by_hash(rows)
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, inverse


def _distinct_by_hash(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`distinct_rows`, to the bit, by a hash of 64 bits; where two kinds share one, copies of the second may stay."""
    bits = rows.contiguous().view(torch.int32).long()
    hashes = (bits * _hash_factors(rows.shape[1], rows.device)).sum(dim=1)  # modulo 2^64
    kinds, inverse = torch.unique(hashes, return_inverse=True)
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(kinds, len(rows)).scatter_reduce_(0, inverse, number, "amin")
    unlike = (bits != bits[first[inverse]]).any(dim=1).nonzero()[:, 0]  # the first one of their hash
    inverse[unlike] = len(kinds) + number[: len(unlike)]
    return rows[torch.cat([first, unlike])], inverse


@lru_cache(maxsize=8)
def _hash_factors(width: int, device: torch.device) -> Tensor:
    """(width,) int64, odd."""
    ends = torch.iinfo(torch.int64)
    drawn = torch.randint(ends.min, ends.max, (width,), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is `values`, float32, but for 2^-16 of it."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True)


def _expanded_distances(queries: Tensor, rows: Tensor) -> Tensor:
    """What torch.cdist gives by its product, (M, N), but for what it makes of its rows anew at each call.

    Args:
        queries: (M, D).
        rows: (N, D + 2), each followed by 1 and by its squared norm.
    """
    factors = torch.cat([-2 * queries, _squared_norms(queries), torch.ones_like(queries[:, :1])], dim=1)
    return (factors @ rows.T).clamp_min_(0).sqrt_()


def mean_and_std(rows: Rows, step: int = 1 << 14, group: Group | None = None) -> BankStatistics:
    """Mean and unbiased standard deviation over all entries of (N, D) rows, accumulated in fp64, chunk by chunk.

    `rows` are those of this process; the result is that of the rows of all processes of the group.
    """
    device = torch.device("cpu")
    total = sum(float(chunk.double().sum()) for chunk in rows.split(step))
    total, count = all_reduce_floats((total, len(rows) * rows.shape[1]), device, group)
    mean = total / count
    squares = sum(float((chunk.double() - mean).square().sum()) for chunk in rows.split(step))
    (squares,) = all_reduce_floats((squares,), device, group)
    return BankStatistics(mean, (squares / (count - 1)) ** 0.5)


def select_coreset(
    rows: Rows, statistics: BankStatistics, n: int, eps: float, random_state: int | None, group: Group | None = None
) -> Tensor:
    """Choose n of the (N, D) raw rows: normalize, project at random, then greedy k-center from index 0.

    Normalization and projection work chunk by chunk; besides `rows` only the projected rows exist. Where several
    processes hold the rows, they are those of this process, and N, n and the indices count those of all.

    Returns:
        (n,) int64 indices in order of selection, the same in all processes of the group.
    """
    if random_state is None and world_size(group) > 1:  # all draw the same projection
        random_state = broadcast_object(int(np.random.default_rng().integers(2**32)), group)
    _, count = shard_offset(len(rows), group)
    projection = random_projection(count, rows.shape[1], eps, random_state)
    if projection is not None:
        projection = projection.to(rows.device)
    projected = torch.empty(len(rows), rows.shape[1] if projection is None else projection.shape[1], device=rows.device)
    begin = 0
    for chunk in rows.split(1 << 14):
        normalized = statistics.normalize(chunk)
        of_chunk = normalized if projection is None else normalized @ projection
        projected[begin : begin + len(chunk)] = of_chunk
        begin += len(chunk)
    return greedy_coreset(projected, n, group=group)

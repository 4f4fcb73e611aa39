"""Memory bank of normal patches with exact nearest-neighbor search, and the statistics that normalize it."""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feature_extractors.patch_rows import CHUNK, ShardedRows, as_sharded

# Largest block of products: entries, and on a CPU also queries, so that it stays in the cache.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 24, 1 << 28
QUERIES_AT_ONCE_ON_CPU = 512
# Entries of the direct differences computed at once: 64 MB, on a GPU 256 MB.
MAX_DIFFERENCE_ENTRIES, MAX_DIFFERENCE_ENTRIES_ON_GPU = 1 << 24, 1 << 26
GROUP_SIZE = 16  # rows of a group, see MemoryBank.nearest
CANDIDATES = 8  # groups, and then rows, that a bounded search compares with a query; one of them must be too far
FAR = 1e38  # half the squared norm of the rows of zeros that fill the last groups, so that these are never found
# Which distances are computed as |q|^2 + |r|^2 - 2 q r in fp32, to reproduce the rounding of the original: none, those
# that lose most of their digits this way (d^2 is below CANCELLING times |q|^2 + |r|^2), or all.
EXPANDED = ("nowhere", "cancelling", "everywhere")
CANCELLING = 2.0**-9
CANCELLING_SHARE = 1 / 8  # largest share of the queries that a bounded search expands for "cancelling"
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


class Found(NamedTuple):
    """Nearest bank rows of M queries."""

    distance: Tensor  # (M,) float32, Euclidean (not squared)
    row: Tensor  # (M,) int64, index into the rows of the bank; the lowest where distances tie
    complete: Tensor  # () bool, False if a bounded search may have missed a row


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
        # Group g holds rows g, g + G, g + 2 G, and so on. Rows of zeros fill the groups.
        self._groups = max(-(-len(rows) // GROUP_SIZE), CANDIDATES)
        added = GROUP_SIZE * self._groups - len(rows)
        centered = F.pad(rows - self._center, (0, 0, 0, added))  # products of smaller numbers have smaller errors
        self._norms = centered.square().sum(dim=1)
        self._lengths = self._norms.sqrt()
        self._half_norms = self._norms / 2
        self._half_norms[len(rows) :] = FAR
        self._group_norms = self._norms.view(GROUP_SIZE, -1).amax(dim=0)  # the largest of each group
        self._group_lengths = self._group_norms.sqrt()
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

    def with_spacing(self) -> "MemoryBank":
        """Copy with the spacing of each row: its mean distance to the SPACING_NEIGHBORS nearest rows.

        To avoid 0 at equal rows, it is at least LEAST_SPACING of the mean spacing; 1 if all rows are equal.
        """
        neighbors = min(SPACING_NEIGHBORS, len(self) - 1)
        found = []
        for block, _ in self._blocks(self.rows):
            centered = block - self._center
            half, _ = self._lowest(self._half_squares(centered), neighbors + 1)  # with the row itself
            squared = half.mul_(2).add_(centered.square().sum(dim=1)[:, None]).clamp_min_(0)
            found.append(squared.sqrt_()[:, 1:].sum(dim=1) / max(neighbors, 1))
        spacing = torch.cat(found)
        least = LEAST_SPACING * float(spacing.mean()) or 1.0
        return MemoryBank(self.rows, self.statistics, spacing=spacing.clamp_min(least), owners=self.owners)

    def nearest(self, queries: Tensor, expanded: str = "nowhere") -> tuple[Tensor, Tensor]:
        """Distance (M,) and index (M,) of the nearest row to each of normalized queries (M, D); see `search`."""
        distance, index, _ = self.search(queries, expanded)
        return distance, index

    def search(
        self, queries: Tensor, expanded: str = "nowhere", left_out: Tensor | None = None, bounded: bool = False
    ) -> Found:
        """Nearest bank rows, without the full distance matrix. Fast form of `reference.nearest_rows`.

        1. A matrix product gives approximate squared distances, with a proven error bound. The smallest of each group
           of GROUP_SIZE rows is found while the block of products is in the cache.
        2. The exact distance to the row that looks nearest is an upper bound. Rows that may be that close, within the
           error, are candidates. There is rarely more than one per query.
        3. The candidates are compared by |q - r|^2 itself, which loses no digits where query and row are close.

        Args:
            queries: (M, D) float32, normalized with `statistics`.
            expanded: one of EXPANDED. The published code expands every square, so that a patch of the bank can be 0.04
                away from itself; its SVMs are fitted to these errors.
            left_out: (M,) int64, a training sample for each query, whose rows are not searched unless there are no
                others.
            bounded: limit the candidates of a query, so that the host need not wait for their number. The result may
                be incomplete; other results are always complete.
        """
        if expanded == "everywhere":
            return self._nearest_expanded(queries, left_out)
        found = _joined(self._nearest_exact(*block, bounded) for block in self._blocks(queries, left_out))
        return self._expand_cancelling(queries, found, left_out, bounded) if expanded == "cancelling" else found

    def relative_distances(self, queries: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Distances (M,) of normalized queries (M, D) relative to the spacing of the bank around each of them.

        The geometric mean of |q - r| / sqrt(spacing of r) over the NEAREST_ROWS rows r nearest to a query q; 0 for a
        row of the bank. The rows are found by rounded products, so any of nearly equally distant ones may be taken.
        For `left_out` see `search`.
        """
        assert self.spacing is not None
        found = []
        for block, samples in self._blocks(queries, left_out):
            _, index = self._lowest(self._half_squares(block - self._center, samples), min(NEAREST_ROWS, len(self)))
            distance = torch.stack([(block - self.rows[row]).square_().sum(dim=1).sqrt() for row in index.T], dim=1)
            found.append((distance / self.spacing[index].sqrt()).log().mean(dim=1).exp())
        return torch.cat(found)

    def neighbors(self, row: Tensor, k: int, left_out: Tensor | None = None) -> Tensor:
        """Indices (B, k), or fewer in a smaller bank, of the bank's rows nearest to its rows `row` (B,) int64.

        The row itself is the first, the lowest index wins a tie. For `left_out` (B,) see `search`.
        """
        distance = torch.cdist(self.rows[row], self.rows, compute_mode="donot_use_mm_for_euclid_dist")  # (B, N)
        if left_out is not None:
            distance.masked_fill_(self._is_left_out(left_out), torch.inf)
        return distance.sort(dim=1, stable=True).indices[:, :k]

    def _blocks(self, queries: Tensor, left_out: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Queries, and their samples that are left out, in blocks; on a CPU small enough for its cache."""
        step = (MAX_BLOCK_ENTRIES_ON_GPU if queries.is_cuda else MAX_BLOCK_ENTRIES) // len(self)
        step = max(1, step if queries.is_cuda else min(step, QUERIES_AT_ONCE_ON_CPU))
        blocks = queries.split(step)
        yield from zip(blocks, [None] * len(blocks) if left_out is None else left_out.split(step), strict=True)

    def _nearest_exact(self, queries: Tensor, left_out: Tensor | None, bounded: bool) -> Found:
        """`search` of a block of queries (M, D), by direct differences."""
        centered = queries - self._center
        squares = centered.square().sum(dim=1)
        lengths = squares.sqrt()
        half = self._half_squares(centered, left_out)  # 1. (M, 16, G)
        lower = half.amin(dim=1)  # (M, G)
        group = lower.argmin(dim=1)
        member = half.gather(2, group[:, None, None].expand(-1, GROUP_SIZE, 1))[..., 0].argmin(dim=1)
        closest = (member * self._groups + group).clamp_max_(len(self) - 1)  # larger if the query is not finite
        found = (queries - self.rows[closest]).square().sum(dim=1)  # squared; the nearest row is no farther
        limit = found - squares + self._rounding * squares  # 2. for lower bounds of |q - r|^2 - |q|^2
        lower.mul_(2).addr_(lengths, self._group_lengths, alpha=-self._product_error)
        lower.sub_(self._rounding * self._group_norms)
        candidates = self._first_candidates if bounded else self._all_candidates
        query, row, complete = candidates(half, lower, lengths, limit)
        squared = self._squared_distances(queries, query, row)  # 3. the lowest index wins a tie
        best = found.scatter_reduce(0, query, squared, "amin")
        index = torch.where(best < found, len(self), closest)
        index.scatter_reduce_(0, query, torch.where(squared == best[query], row, len(self)), "amin")
        return Found(best.sqrt(), index, complete)

    def _all_candidates(
        self, half: Tensor, lower: Tensor, lengths: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and row (pairs,) of each candidate of a block, and True, because these are all.

        `half` (M, 16, G) is of `_half_squares`. `lower` (M, G) are lower bounds of all rows of a group, `lengths` (M,)
        those of the centered queries. Rows whose lower bound is above `limit` (M,) cannot be nearest.
        """
        query, group = (lower <= limit[:, None]).nonzero(as_tuple=True)
        row = self._rows_of(group)  # (pairs, 16)
        bounds = self._lower_bounds(half[query, :, group], row, lengths[query, None])
        pair, place = (bounds <= limit[query, None]).nonzero(as_tuple=True)
        return query[pair], row[pair, place], torch.ones((), dtype=torch.bool, device=half.device)

    def _first_candidates(
        self, half: Tensor, lower: Tensor, lengths: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and row (CANDIDATES * M,) of the first candidates of each query, and True if there are no others.

        Where a query has fewer, other rows take their places. Arguments as of `_all_candidates`.
        """
        bounds, group = lower.topk(CANDIDATES, dim=1, largest=False)
        complete = (bounds[:, -1] > limit).all()
        row = self._rows_of(group).flatten(1)  # (M, CANDIDATES * 16)
        members = half.gather(2, group[:, None].expand(-1, GROUP_SIZE, -1)).mT.flatten(1)
        bounds, place = self._lower_bounds(members, row, lengths[:, None]).topk(CANDIDATES, dim=1, largest=False)
        query = torch.arange(len(half), device=half.device).repeat_interleave(CANDIDATES)
        row = row.gather(1, place).flatten().clamp_max_(len(self) - 1)
        return query, row, complete & (bounds[:, -1] > limit).all()

    def _rows_of(self, group: Tensor) -> Tensor:
        """Indices (..., 16) of the rows of groups (...)."""
        return group[..., None] + torch.arange(GROUP_SIZE, device=group.device) * self._groups

    def _lower_bounds(self, half: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        """Lower bounds of |q - r|^2 - |q|^2 from half of them, for rows r at indices `row` and queries of `lengths`."""
        return 2 * half - self._product_error * lengths * self._lengths[row] - self._rounding * self._norms[row]

    def _half_squares(self, centered: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Half of |q - r|^2 - |q|^2, (M, 16, G) float32, up to rounding, of centered queries (M, D) and all groups.

        FAR for rows of the samples `left_out` (M,) and for those that fill up the groups.
        """
        if self._halved:
            high, low = _halves(centered)
            products = torch.mm(torch.cat([high, high, low], dim=1), self._factors.T, out_dtype=torch.float32)
        else:
            products = centered @ self._factors.T
        torch.sub(self._half_norms, products, out=products)
        if left_out is not None:
            products[:, : len(self)].masked_fill_(self._is_left_out(left_out), FAR)
        return products.view(len(centered), GROUP_SIZE, self._groups)

    def _lowest(self, half: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k lowest of `half` (M, 16, G) for each query, (M, k) ascending, and the indices of their rows."""
        group = half.amin(dim=1).topk(min(k, self._groups), dim=1, largest=False).indices  # they hold the lowest k
        members = half.gather(2, group[:, None].expand(-1, GROUP_SIZE, -1)).mT.flatten(1)
        lowest, place = members.topk(k, dim=1, largest=False)
        return lowest, self._rows_of(group).flatten(1).gather(1, place)

    def _is_left_out(self, left_out: Tensor) -> Tensor:
        """(M, N) bool, True for a row of training sample `left_out` (M,); False if the bank has no others."""
        assert self.owners is not None
        return (self.owners == left_out[:, None]) & (self._only_owner != left_out[:, None])

    @cached_property
    def _only_owner(self) -> int:
        """Training sample of all rows but added ones; -1 if there are several."""
        assert self.owners is not None
        owners = self.owners[self.owners >= 0]
        return int(owners[0]) if len(owners) and (owners == owners[0]).all() else -1

    def _nearest_expanded(self, queries: Tensor, left_out: Tensor | None) -> Found:
        """`search` of queries (M, D) by expanded squares as in torch.cdist; always complete."""
        rows = torch.cat([self.rows, torch.ones_like(self.rows[:, :1]), _squared_norms(self.rows)], dim=1)
        complete = torch.ones((), dtype=torch.bool, device=rows.device)
        found = []
        for block, samples in self._blocks(queries, left_out):
            factors = torch.cat([-2 * block, _squared_norms(block), torch.ones_like(block[:, :1])], dim=1)
            distances = (factors @ rows.T).clamp_min_(0).sqrt_()
            if samples is not None:
                distances.masked_fill_(self._is_left_out(samples), torch.inf)
            found.append(Found(*distances.min(dim=1), complete))
        return _joined(found)

    def _expand_cancelling(self, queries: Tensor, found: Found, left_out: Tensor | None, bounded: bool) -> Found:
        """`found` with expanded squares where these lose most of their digits."""
        distance, row, complete = found
        norms = CANCELLING * (queries.square().sum(dim=1) + self.rows[row].square().sum(dim=1))
        cancelling = distance.square() < norms
        if bounded:
            count = math.ceil(CANCELLING_SHARE * len(queries))
            again = (distance.square() - norms).topk(count, largest=False).indices
            complete = complete & (cancelling.sum() <= count)
        else:
            again = cancelling.nonzero()[:, 0]
        expanded = self._nearest_expanded(queries[again], None if left_out is None else left_out[again])
        distance[again] = torch.where(cancelling[again], expanded.distance, distance[again])
        row[again] = torch.where(cancelling[again], expanded.row, row[again])
        return Found(distance, row, complete)

    def _squared_distances(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Squared distances (pairs,) of queries[query] and rows[row], by direct difference."""
        entries = MAX_DIFFERENCE_ENTRIES_ON_GPU if queries.is_cuda else MAX_DIFFERENCE_ENTRIES
        step = max(1, entries // self.rows.shape[1])
        pairs = zip(query.split(step), row.split(step), strict=True)
        return torch.cat([(queries[of_query] - self.rows[of_row]).square_().sum(dim=1) for of_query, of_row in pairs])


def _joined(blocks: Iterable[Found]) -> Found:
    distance, row, complete = zip(*blocks, strict=True)
    return Found(torch.cat(distance), torch.cat(row), torch.stack(complete).all())


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is `values`, float32, up to a relative error of 2^-16."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True)

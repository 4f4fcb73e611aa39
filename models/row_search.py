"""Exact nearest-neighbor search among the rows of a matrix, at the speed of a matrix product."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Limits of a block of products: entries, and on a CPU also queries, so that it stays in the cache.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 24, 1 << 27
QUERIES_AT_ONCE_ON_CPU = 512
# Limit of direct differences computed at once, in entries: 64 MB on a CPU, 256 MB on a GPU.
MAX_DIFFERENCE_ENTRIES, MAX_DIFFERENCE_ENTRIES_ON_GPU = 1 << 24, 1 << 26
EXPANDED_AT_ONCE = 4096  # queries whose candidates are compared by expanded squares at once
GROUP_SIZE = 16  # rows of a group, see RowSearch
CANDIDATES = 8  # groups, and then rows, that a bounded search keeps for a query; complete if the last is too far away
FAR = 1e38  # half of |q - r|^2 - |q|^2 for a row that must not be found, because it is padding or left out
# Distances computed as |q|^2 + |r|^2 - 2 q r in fp32, to reproduce the rounding of the original: none, those that lose
# most of their digits this way (d^2 is below CANCELLING times |q|^2 + |r|^2), or all.
EXPANDED = ("nowhere", "cancelling", "everywhere")
CANCELLING = 2.0**-9


class Found(NamedTuple):
    """Nearest rows of M queries."""

    distance: Tensor  # (M,) float32, Euclidean (not squared)
    row: Tensor  # (M,) int64, the lowest index where distances tie
    complete: Tensor  # () bool, False if a bounded search may have missed a nearest row
    candidates: Tensor | None = None  # (M, CANDIDATES) int64, rows that may be nearest; bounded search only


class RowSearch:
    """Search among `rows` (N, D) float32 with `labels` (N,) int64. A query can leave out the rows of one label >= 0."""

    def __init__(self, rows: Tensor, labels: Tensor | None = None) -> None:
        self.rows, self.labels = rows, labels
        self._center = rows.mean(dim=0)
        # Of G groups, group g holds rows g, g + G, g + 2 G, and so on. Rows of zeros pad the last groups.
        self._groups = max(-(-len(rows) // GROUP_SIZE), CANDIDATES)
        added = GROUP_SIZE * self._groups - len(rows)
        centered = F.pad(rows - self._center, (0, 0, 0, added))  # products of smaller numbers have smaller errors
        self._norms = centered.square().sum(dim=1)
        self._lengths = self._norms.sqrt()
        self._half_norms = self._norms / 2
        self._half_norms[len(rows) :] = FAR
        self._group_norms = self._norms.view(GROUP_SIZE, -1).amax(dim=0)  # largest of each group
        self._group_lengths = self._group_norms.sqrt()
        # A GPU multiplies bf16 numbers fifteen times as fast as fp32 ones, so it splits each number into two bf16 ones.
        self.halved = rows.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self._factors = centered
        if self.halved:
            high, low = _halves(centered)
            self._factors = torch.cat([high, low, high], dim=1)  # (N, 3 D)
        # Error bounds, unless a square overflows or underflows. A sum of D products is off by less than D 2^-24 |q||r|,
        # and the squared distance that it is compared with by less than D 2^-24 (|q| + |r|)^2. Splitting q and r adds
        # at most 2^-16 |q||r| each, and leaving out the product of their low parts as much again.
        self._rounding = 2 * (self._factors.shape[1] + 64) * 2.0**-24
        self._product_error = 2 * (self._rounding + (3.03 * 2.0**-16 if self.halved else 0.0))

    def nearest(
        self, queries: Tensor, expanded: str = "nowhere", left_out: Tensor | None = None, bounded: bool = False
    ) -> Found:
        """Nearest rows, without the full distance matrix. Fast form of `reference.nearest_rows`.

        1. A matrix product gives approximate squared distances, with a proven error bound. The smallest of each group
           of GROUP_SIZE rows is found while the block of products is in the cache.
        2. The exact distance to the row that looks nearest is an upper bound. Rows that may be that close, within the
           error, are candidates. There is rarely more than one per query.
        3. The candidates are compared by |q - r|^2 itself, which loses no digits where query and row are close.

        Args:
            queries: (M, D) float32.
            expanded: one of EXPANDED. The published code expands every square, so that a patch of the bank can be 0.04
                away from itself; its SVMs are fitted to these errors.
            left_out: (M,) int64, label of the rows that each query leaves out; none if only one label is >= 0.
            bounded: keep CANDIDATES rows for each query, so that the host does not wait for their number. Only a
                bounded search can be incomplete. With "cancelling", it expands squares of the candidates only.
        """
        if expanded == "everywhere":
            return self._nearest_expanded(queries, left_out)
        found = _joined(self._nearest_exact(*block, bounded) for block in self._blocks(queries, left_out))
        return self._expand_cancelling(queries, found, left_out) if expanded == "cancelling" else found

    def nearest_few(self, queries: Tensor, k: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared distances (M, k) up to rounding, ascending, and indices (M, k) of the k rows nearest to each query.

        Among almost equally distant rows, any may be found. If fewer than k rows are left, the last squares are FAR or
        more, and their indices mean nothing. For `left_out` see `nearest`.
        """
        found = [self._nearest_few(*block, k) for block in self._blocks(queries, left_out)]
        return torch.cat([squared for squared, _ in found]), torch.cat([row for _, row in found])

    def is_left_out(self, left_out: Tensor) -> Tensor:
        """Mask (M, N) bool of the rows with the labels `left_out` (M,); all False if only one label is >= 0."""
        assert self.labels is not None
        left_out = left_out.masked_fill(left_out == self._only_label, -2)  # a label that no row has
        return self.labels == left_out[:, None]

    @cached_property
    def _only_label(self) -> int:
        """The only label >= 0; -1 if there are several or none."""
        assert self.labels is not None
        labels = self.labels[self.labels >= 0]
        return int(labels[0]) if len(labels) and (labels == labels[0]).all() else -1

    def _blocks(self, queries: Tensor, left_out: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield blocks of queries and of their `left_out` labels; on a CPU, blocks are small enough for its cache."""
        on_cpu = queries.device.type == "cpu"
        step = (MAX_BLOCK_ENTRIES if on_cpu else MAX_BLOCK_ENTRIES_ON_GPU) // len(self.rows)
        step = max(1, min(step, QUERIES_AT_ONCE_ON_CPU) if on_cpu else step)
        blocks = queries.split(step)
        yield from zip(blocks, [None] * len(blocks) if left_out is None else left_out.split(step), strict=True)

    def _nearest_exact(self, queries: Tensor, left_out: Tensor | None, bounded: bool) -> Found:
        """Nearest rows of a block of queries (M, D), by direct differences, in the steps of `nearest`."""
        centered = queries - self._center
        squares = centered.square().sum(dim=1)
        lengths = squares.sqrt()
        half = self._half_squares(centered, left_out)  # 1. (M, 16, G)
        lower = half.amin(dim=1)  # (M, G)
        group = lower.argmin(dim=1)
        member = half.gather(2, group[:, None, None].expand(-1, GROUP_SIZE, 1))[..., 0].argmin(dim=1)
        closest = (member * self._groups + group).clamp_max_(len(self.rows) - 1)  # larger if a query is not finite
        found = (queries - self.rows[closest]).square().sum(dim=1)  # squared; the nearest row is no farther
        limit = found - squares + self._rounding * squares  # 2. of |q - r|^2 - |q|^2
        lower.mul_(2).addr_(lengths, self._group_lengths, alpha=-self._product_error)
        lower.sub_(self._rounding * self._group_norms)
        candidates = self._first_candidates if bounded else self._all_candidates
        query, row, complete = candidates(half, lower, lengths, limit, closest)
        squared = self._squared_distances(queries, query, row)  # 3. the lowest index wins a tie
        best = found.scatter_reduce(0, query, squared, "amin")
        index = torch.where(best < found, len(self.rows), closest)
        index.scatter_reduce_(0, query, torch.where(squared == best[query], row, len(self.rows)), "amin")
        return Found(best.sqrt(), index, complete, row.view(-1, CANDIDATES) if bounded else None)

    def _all_candidates(
        self, half: Tensor, lower: Tensor, lengths: Tensor, limit: Tensor, closest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and row (pairs,) of each candidate of a block, and True, because no candidate is missing.

        `half` (M, 16, G) comes from `_half_squares`. `lower` (M, G) are lower bounds of |q - r|^2 - |q|^2 for all rows
        of a group. Rows whose lower bound is above `limit` (M,) cannot be nearest. `lengths` (M,) are the lengths of
        the centered queries, and `closest` (M,) are the rows that look nearest.
        """
        query, group = (lower <= limit[:, None]).nonzero(as_tuple=True)
        row = self._rows_of(group)  # (pairs, 16)
        bounds = self._lower_bounds(half[query, :, group], row, lengths[query, None])
        pair, place = (bounds <= limit[query, None]).nonzero(as_tuple=True)
        return query[pair], row[pair, place], torch.ones((), dtype=torch.bool, device=half.device)

    def _first_candidates(
        self, half: Tensor, lower: Tensor, lengths: Tensor, limit: Tensor, closest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and row (CANDIDATES * M,) of the candidates with the lowest bounds, and True if none is missing.

        A query with fewer candidates repeats the row that looks nearest. Arguments as in `_all_candidates`.
        """
        bounds, group = lower.topk(CANDIDATES, dim=1, largest=False)
        complete = (bounds[:, -1] > limit).all()
        row = self._rows_of(group).flatten(1)  # (M, CANDIDATES * 16)
        members = half.gather(2, group[:, None].expand(-1, GROUP_SIZE, -1)).mT.flatten(1)
        bounds, place = self._lower_bounds(members, row, lengths[:, None]).topk(CANDIDATES, dim=1, largest=False)
        query = torch.arange(len(half), device=half.device).repeat_interleave(CANDIDATES)
        row = torch.where(bounds <= limit[:, None], row.gather(1, place), closest[:, None])
        return query, row.flatten(), complete & (bounds[:, -1] > limit).all()

    def _rows_of(self, group: Tensor) -> Tensor:
        """Indices (..., 16) of the rows of groups (...)."""
        return group[..., None] + torch.arange(GROUP_SIZE, device=group.device) * self._groups

    def _lower_bounds(self, half: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        """Lower bounds of |q - r|^2 - |q|^2 from `half` of it, for rows r at indices `row` and queries of `lengths`."""
        return 2 * half - self._product_error * lengths * self._lengths[row] - self._rounding * self._norms[row]

    def _half_squares(self, centered: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Half of |q - r|^2 - |q|^2, (M, 16, G) float32, up to rounding, of centered queries (M, D) and all groups.

        It is FAR for rows that are left out and for padding.
        """
        if self.halved:
            high, low = _halves(centered)
            products = torch.mm(torch.cat([high, high, low], dim=1), self._factors.T, out_dtype=torch.float32)
        else:
            products = centered @ self._factors.T
        torch.sub(self._half_norms, products, out=products)
        if left_out is not None:
            products[:, : len(self.rows)].masked_fill_(self.is_left_out(left_out), FAR)
        return products.view(len(centered), GROUP_SIZE, self._groups)

    def _nearest_few(self, queries: Tensor, left_out: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Result of `nearest_few` for a block of queries."""
        centered = queries - self._center
        half = self._half_squares(centered, left_out)
        group = half.amin(dim=1).topk(min(k, self._groups), dim=1, largest=False).indices  # hold the k nearest rows
        members = half.gather(2, group[:, None].expand(-1, GROUP_SIZE, -1)).mT.flatten(1)
        lowest, place = members.topk(k, dim=1, largest=False)
        squared = (2 * lowest + centered.square().sum(dim=1)[:, None]).clamp_min_(0)
        return squared, self._rows_of(group).flatten(1).gather(1, place).clamp_max_(len(self.rows) - 1)

    def _nearest_expanded(self, queries: Tensor, left_out: Tensor | None) -> Found:
        """Nearest rows of queries (M, D), by expanded squares as in torch.cdist; always complete."""
        rows = torch.cat([self.rows, torch.ones_like(self.rows[:, :1]), _squared_norms(self.rows)], dim=1)
        complete = torch.ones((), dtype=torch.bool, device=rows.device)
        found = []
        for block, labels in self._blocks(queries, left_out):
            factors = torch.cat([-2 * block, _squared_norms(block), torch.ones_like(block[:, :1])], dim=1)
            distances = (factors @ rows.T).clamp_min_(0).sqrt_()
            if labels is not None:
                distances.masked_fill_(self.is_left_out(labels), torch.inf)
            found.append(Found(*distances.min(dim=1), complete))
        return _joined(found)

    def _expand_cancelling(self, queries: Tensor, found: Found, left_out: Tensor | None) -> Found:
        """Replace results in `found` by those of expanded squares where these lose most of their digits."""
        norms = queries.square().sum(dim=1) + self.rows[found.row].square().sum(dim=1)
        cancelling = found.distance.square() < CANCELLING * norms
        if found.candidates is not None:
            distance, row = self._expanded_candidates(queries, found.candidates)
            distance, row = torch.where(cancelling, distance, found.distance), torch.where(cancelling, row, found.row)
            return found._replace(distance=distance, row=row)
        again = cancelling.nonzero()[:, 0]
        expanded = self._nearest_expanded(queries[again], None if left_out is None else left_out[again])
        found.distance[again], found.row[again] = expanded.distance, expanded.row
        return found

    def _expanded_candidates(self, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (M,) and row (M,) of the nearest of `candidates` (M, C) to queries (M, D), by expanded squares."""
        found = []
        for block, rows in zip(queries.split(EXPANDED_AT_ONCE), candidates.split(EXPANDED_AT_ONCE), strict=True):
            others = self.rows[rows]  # (m, C, D)
            products = (others @ block[:, :, None])[..., 0]
            squared = _squared_norms(block) + others.square().sum(dim=2) - 2 * products
            lowest, place = squared.min(dim=1)
            found.append((lowest.clamp_min_(0).sqrt_(), rows.gather(1, place[:, None])[:, 0]))
        distance, row = zip(*found, strict=True)
        return torch.cat(distance), torch.cat(row)

    def _squared_distances(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Squared distances (pairs,) of queries[query] and rows[row], by direct difference."""
        entries = MAX_DIFFERENCE_ENTRIES if queries.device.type == "cpu" else MAX_DIFFERENCE_ENTRIES_ON_GPU
        step = max(1, entries // self.rows.shape[1])
        pairs = zip(query.split(step), row.split(step), strict=True)
        return torch.cat([(queries[of_query] - self.rows[of_row]).square_().sum(dim=1) for of_query, of_row in pairs])


def _joined(blocks: Iterable[Found]) -> Found:
    distance, row, complete, candidates = zip(*blocks, strict=True)
    joined = None if candidates[0] is None else torch.cat(candidates)
    return Found(torch.cat(distance), torch.cat(row), torch.stack(complete).all(), joined)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is `values`, float32, up to a relative error of 2^-16."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True)

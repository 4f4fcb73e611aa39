"""A memory bank whose rows lie spread over several processes: none of them holds it whole."""

import torch
from torch import Tensor

from feature_extractors.memory_bank import BankStatistics, MemoryBank
from utils.distributed import (
    Group,
    all_gather_counts,
    all_gather_rows,
    gather_objects,
    lowest_of_all,
    place_rows,
    shard_offset,
    world_size,
)

# Queries of all processes under way at once: 150 MB of M3DM's xyz patches, of which each process holds four copies.
QUERIES_AT_ONCE = 1 << 15


class ShardedBank:
    """What a MemoryBank of all rows would be, but for the rounding of its products.

    Every method is a collective: all processes of the group call it together, each with queries of its own. A process
    that has none meanwhile calls `take_part` instead.

    Args:
        rows: (n, D) float32, normalized, of this process; n may be 0.
        order: (n,) int64, ascending: the places of these rows in the whole bank. No place is in two processes.
        statistics: what the rows were normalized with, for the queries.
        group: the processes that hold the bank.
    """

    def __init__(self, rows: Tensor, order: Tensor, statistics: BankStatistics, group: Group | None) -> None:
        self.rows, self.order, self.statistics, self.group = rows, order, statistics, group
        self._shard = MemoryBank(rows, statistics) if len(rows) else None
        _, self._count = shard_offset(len(rows), group)

    def __len__(self) -> int:
        return self._count

    def with_rows(self, rows: Tensor) -> "ShardedBank":
        """A bank of other rows in the place of these."""
        return ShardedBank(rows, self.order, self.statistics, self.group)

    def nearest(self, queries: Tensor, expanded: str = "nowhere") -> tuple[Tensor, Tensor]:
        """As MemoryBank.nearest: each process searches its rows for the queries of all, and the least distance counts.

        Args:
            queries: (M, D) float32, M may be another in each process and 0.
            expanded: see MemoryBank.nearest.

        Returns:
            distance (M,); index (M,) int64, places in the whole bank.
        """
        most = max(all_gather_counts(len(queries), self.group))
        step = max(1, QUERIES_AT_ONCE // world_size(self.group))
        # As many parts in every process, of which the last may be empty.
        parts = [self._nearest_of(queries[begin : begin + step], expanded) for begin in range(0, max(most, 1), step)]
        return torch.cat([distance for distance, _ in parts]), torch.cat([index for _, index in parts])

    def _nearest_of(self, queries: Tensor, expanded: str) -> tuple[Tensor, Tensor]:
        asked, begin = all_gather_rows(queries, self.group)
        distance, index = asked.new_full((len(asked),), torch.inf), self.order.new_zeros(len(asked))
        if self._shard is not None and len(asked):
            distance, found = self._shard.nearest(asked, expanded)
            index = self.order[found]
        distance, index = lowest_of_all(distance, index, self.group)
        return distance[begin : begin + len(queries)], index[begin : begin + len(queries)]

    def neighborhood(self, row: Tensor, k: int) -> Tensor:
        """As MemoryBank.neighborhood; `row` is (1,), or (0,) in a process without a query, which gets (0, D)."""
        asked, own = all_gather_rows(row[:, None], self.group)
        centers = self._rows_at(asked[:, 0])
        distance = torch.full((k, len(asked)), torch.inf, device=self.rows.device)
        place = torch.full_like(distance, torch.iinfo(torch.int64).max, dtype=torch.int64)
        for i, center in enumerate(centers if self._shard is not None else ()):
            apart, found = torch.linalg.vector_norm(self.rows - center, dim=1).sort(stable=True)
            distance[: len(apart), i], place[: len(apart), i] = apart[:k], self.order[found[:k]]
        distance, place = all_gather_rows(distance, self.group)[0], all_gather_rows(place, self.group)[0]
        by_place = place.argsort(dim=0)
        nearest = distance.gather(0, by_place).sort(dim=0, stable=True).indices[: min(k, len(self))]
        places = place.gather(0, by_place).gather(0, nearest)  # (k, queries of all): equal distances by their place
        rows = self._rows_at(places.T.flatten()).view(len(asked), min(k, len(self)), self.rows.shape[1])
        return rows[own] if len(row) else self.rows[:0]

    def take_part(self, expanded: str, k: int) -> None:
        """Answer what other processes ask by `nearest` and then `neighborhood`, without a query of one's own."""
        self.nearest(self.rows[:0], expanded)
        self.neighborhood(self.order[:0], k)

    def whole(self) -> MemoryBank | None:
        """The bank in one piece, in the first process of the group; None in the others."""
        shards = gather_objects([(self.order.cpu(), self.rows.cpu())], self.group)
        if not shards:
            return None
        order = torch.cat([places for places, _ in shards]).argsort()
        return MemoryBank(torch.cat([rows for _, rows in shards])[order].to(self.rows.device), self.statistics)

    def _rows_at(self, places: Tensor) -> Tensor:
        """The rows (P, D) at places (P,) of the whole bank, which are the same in every process."""
        found = torch.searchsorted(self.order, places).clamp_(max=max(len(self.order) - 1, 0))
        mine = self.order[found] == places if self._shard is not None else torch.zeros_like(places, dtype=torch.bool)
        return place_rows(self.rows[found[mine]], mine.nonzero()[:, 0], len(places), self.group)

"""Patches of the training samples: their storage, and their distribution over ranks."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import Group, all_gather_counts, all_gather_rows, all_reduce_sum, rank, world_size

CHUNK = 1 << 14  # rows read at once
CHOSEN_AT_ONCE = 512  # rows picked from a mapped file before its pages are released; each may load 64 KB


class PatchRows:
    """Patches (N, D) in memory or in a mapped file, read as float32 to `device`, chunk by chunk.

    `stored` (M, D) has any float dtype, and `kept` (N,) are indices of its rows; None keeps all. `release` is called
    after each chunk, to release the pages of a mapped file.
    """

    def __init__(
        self,
        stored: Tensor,
        device: torch.device | None = None,
        release: Callable[[], None] = lambda: None,
        kept: Tensor | None = None,
    ) -> None:
        self.stored, self.device, self.release, self.kept = stored, device or stored.device, release, kept

    def __len__(self) -> int:
        return len(self.stored if self.kept is None else self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.stored.shape[1]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Copies (K, D) of the rows at int64 indices (K,)."""
        index = index.to(self.stored.device)
        rows = torch.empty(len(index), self.stored.shape[1], device=self.device)
        for begin in range(0, len(index), CHOSEN_AT_ONCE):
            chosen = index[begin : begin + CHOSEN_AT_ONCE]
            rows[begin : begin + len(chosen)] = self._read(chosen)
            self.release()
        return rows

    def split(self, step: int) -> Iterator[Tensor]:
        """All rows in order, (step, D) at a time, read-only; from a mapped file, valid until the next chunk."""
        for begin in range(0, max(len(self), 1), step):  # without rows, one empty chunk, as from a tensor
            yield self._read(slice(begin, begin + step))
            self.release()

    def where(self, condition: Callable[[Tensor], Tensor], step: int = CHUNK) -> "PatchRows":
        """Rows that meet a condition, without a copy; the condition maps (step, D) to bool (step,)."""
        mask = torch.cat([condition(chunk) for chunk in self.split(step)]).to(self.stored.device)
        kept = mask.nonzero()[:, 0] if self.kept is None else self.kept[mask]
        return PatchRows(self.stored, self.device, self.release, kept)

    def _read(self, chosen: Tensor | slice) -> Tensor:
        return self.stored[chosen if self.kept is None else self.kept[chosen]].to(self.device, torch.float32)


class ShardedRows:
    """Rows (N, D) of which each rank of a group holds a shard (n, D), n >= 0, in the order of the ranks.

    Indices count the rows of all shards. All ranks call the constructor and the methods, except `locate`, together.
    """

    def __init__(self, shard: Tensor | PatchRows, group: Group | None = None) -> None:
        counts = all_gather_counts(len(shard), group)
        self.shard, self.group, self.device = shard, group, shard.device
        self.begin, self.total = sum(counts[: rank(group)]), sum(counts)

    def __len__(self) -> int:
        return self.total

    @property
    def width(self) -> int:
        return self.shard.shape[1]

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries of an index (K,) in this shard: their positions in the index, and the rows of the shard."""
        position = ((index >= self.begin) & (index < self.begin + len(self.shard))).nonzero()[:, 0]
        return position, index[position] - self.begin

    def take(self, index: Tensor) -> Tensor:
        """Rows (K, D), float32, at an index (K,), the same on every rank."""
        position, mine = self.locate(index)
        block = torch.zeros(len(index), self.width, device=self.device)
        block[position] = self.shard[mine].float()
        if world_size(self.group) > 1:  # in place, unlike all_reduce_sum
            dist.all_reduce(block, group=self.group)
        return block

    def gather(self, table: Tensor) -> Tensor:
        """Concatenated tables (k, C) of all ranks; k may differ and be 0."""
        return all_gather_rows(table, self.group)[0]

    def where(self, condition: Callable[[Tensor], Tensor]) -> "ShardedRows":
        """See PatchRows.where."""
        assert isinstance(self.shard, PatchRows)
        return ShardedRows(self.shard.where(condition), self.group)

    def map(self, function: Callable[[Tensor], Tensor], width: int) -> "ShardedRows":
        """Apply a function from (CHUNK, D) to (CHUNK, width) to all rows: new rows (N, width)."""
        mapped = torch.empty(len(self.shard), width, device=self.device)
        for block, chunk in zip(mapped.split(CHUNK), self.shard.split(CHUNK), strict=True):
            block[:] = function(chunk)
        return ShardedRows(mapped, self.group)

    def sum(self, function: Callable[[Tensor], Tensor], step: int = CHUNK) -> float:
        """Sum of a function from a float64 chunk (step, D) to a scalar, over all chunks."""
        total = sum(float(function(chunk.double())) for chunk in self.shard.split(step))
        return float(all_reduce_sum(torch.tensor(total, dtype=torch.float64), self.group))

    def mean(self) -> Tensor:
        """Mean row (D,), float64."""
        total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for chunk in self.shard.split(CHUNK):
            total += chunk.sum(dim=0, dtype=torch.float64)
        return all_reduce_sum(total, self.group) / self.total

    def samples(self, index: Tensor, count: int) -> Tensor:
        """Sample numbers (K,) of the rows at an index (K,); all rows are from `count` samples."""
        assert isinstance(self.shard, PatchRows)
        position, mine = self.locate(index)
        stored = all_gather_counts(len(self.shard.stored), self.group)
        kept = self.shard.kept
        numbers = torch.zeros_like(index)
        numbers[position] = sum(stored[: rank(self.group)]) + (mine if kept is None else kept.to(mine.device)[mine])
        return all_reduce_sum(numbers, self.group) // (sum(stored) // count)


def as_sharded(rows: Tensor | ShardedRows) -> ShardedRows:
    """`rows` themselves, or a tensor (N, D) of this process as ShardedRows."""
    return rows if isinstance(rows, ShardedRows) else ShardedRows(rows)

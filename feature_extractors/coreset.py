"""Coreset selection: random projection, then greedy k-center at the speed of a matrix product."""

import logging

import numpy as np
import torch
from torch import Tensor

from feature_extractors.memory_bank import BankStatistics
from feature_extractors.patch_rows import ShardedRows, as_sharded
from utils.distributed import broadcast_object, is_main, progress_bar

logger = logging.getLogger(__name__)

# Number m of candidates in a round: its first, smallest and largest value. m doubles after many picks and halves after
# few. A larger m means fewer rounds, but a larger (m, m) matrix of distances (134 MB in float64 at most).
FIRST_CANDIDATES, LEAST_CANDIDATES, MOST_CANDIDATES = 2048, 256, 4096
# Largest block of distances in an update: 16 MB on a CPU, to stay in the cache; 1 GB on a GPU.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 22, 1 << 28
SAFE_HALF = 0.999  # factor on (r / 2)^2 of greedy_coreset, so that rounding cannot exclude a row that changes


def select_coreset(
    rows: Tensor | ShardedRows, statistics: BankStatistics, n: int, eps: float, random_state: int | None
) -> Tensor:
    """Choose n of the raw rows (N, D): normalize, project at random, then greedy k-center from index 0.

    Only the projected rows are kept in memory. Returns (n,) int64 indices in order of selection, the same on all ranks.
    """
    rows = as_sharded(rows)
    if random_state is None:  # all ranks draw the same projection
        random_state = broadcast_object(int(np.random.default_rng().integers(2**32)), rows.group)
    drawn = random_projection(len(rows), rows.width, eps, random_state)
    if drawn is None:
        return greedy_coreset(rows.map(statistics.normalize, rows.width), n)
    projection = drawn.to(rows.device)
    return greedy_coreset(rows.map(lambda chunk: statistics.normalize(chunk) @ projection, projection.shape[1]), n)


def random_projection(num_rows: int, dim: int, eps: float, random_state: int | None) -> Tensor | None:
    """Sparse random projection of Achlioptas / Li et al., as drawn by scikit-learn.

    Returns (D, K) float32, or None if K would exceed D. The width K for `num_rows` rows of width D = `dim` follows from
    the Johnson-Lindenstrauss lemma with distortion `eps`. Without a random_state, each call draws another projection.
    Fast form of `reference.random_projection`.
    """
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    width = int(johnson_lindenstrauss_min_dim(num_rows, eps=eps))
    if width > dim:
        logger.info("%d rows at eps %g need %d columns but have %d. They are not projected.", num_rows, eps, width, dim)
        return None
    drawn = SparseRandomProjection(n_components=width, eps=eps, random_state=random_state).fit(np.zeros((1, dim)))
    return torch.from_numpy(drawn.components_.toarray().T).float()


def greedy_coreset(rows: Tensor | ShardedRows, n: int, start: int = 0) -> Tensor:
    """Greedy k-center: from `start` on, pick the row farthest from all picked ones; the lowest index wins a tie.

    Fast form of `reference.greedy_coreset`, which updates all N distances after every pick. A round has two steps:

    1. Pick among the m rows farthest from the selection, updating only their distances. Distances only shrink, so the
       farthest of these rows is the farthest of all while it is farther than tau, the largest distance of the others.
    2. Update the distances of all rows with one matrix product. A row x at distance d <= r / 2 is skipped, where r is
       the smallest distance of a new pick c to the picks before it: |c - x| >= r - d >= d.

    The product only finds the nearest new pick. The distance to it is a direct difference, since the order depends on
    digits that fp32 products lose. If clusters are thousands of times farther apart than they are wide, the product may
    find another pick, which can change the order within a cluster; at ten times that ratio, also which rows are picked.

    Each rank offers its farthest rows, the first rank picks, and each rank updates its shard. The traffic of a round
    does not depend on N. Peak memory besides `rows` in fp32: (m, m) float64 and a few blocks of MAX_BLOCK_ENTRIES.

    From rows (N, D) returns (n,) int64, distinct indices in order of selection, the same on all ranks, on the device of
    `rows`. Raises ValueError on all ranks if n or start is out of range, or a row holds NaN or infinity.
    """
    rows = as_sharded(rows)
    if not 1 <= n <= len(rows):
        raise ValueError(f"cannot pick {n} of {len(rows)} rows")
    if not 0 <= start < len(rows):
        raise ValueError(f"start is {start}, expected an index below {len(rows)}")
    selection = Selection(rows)
    picks, least_apart = torch.tensor([start], device=rows.device), 0.0
    picked = rows.take(picks)
    rounds, count, m = [picks], 1, FIRST_CANDIDATES
    with progress_bar(total=n, initial=1, desc="coreset", delay=2) as progress:
        while count < n:
            selection.update(picks, picked, least_apart)
            picks, picked, least_apart = selection.pick_among_farthest(n - count, m)
            rounds.append(picks)
            count += len(picks)
            if len(picks) > m // 2:
                m = min(2 * m, MOST_CANDIDATES)
            elif len(picks) < m // 8:
                m = max(m // 2, LEAST_CANDIDATES)
            progress.update(len(picks))
    return torch.cat(rounds)


class Selection:
    """Squared distance of each row to the selected rows; `nearest` (n,) float32 is -inf for selected rows."""

    def __init__(self, rows: ShardedRows) -> None:
        assert isinstance(rows.shard, Tensor)
        self.rows, self.shard = rows, rows.shard.float()
        self.center = rows.mean().float()  # centered rows have small norms, so products lose fewer digits
        if not torch.isfinite(self.center).all():
            raise ValueError("a row of the coreset's input holds NaN or infinity")
        self.nearest = self.shard.new_full((len(self.shard),), torch.inf)

    def update(self, picks: Tensor, picked: Tensor, least_apart: float) -> None:
        """Lower the distances after new picks: indices (K,), rows (K, D), and `least_apart` as in greedy_among."""
        self.nearest[self.rows.locate(picks)[1]] = -torch.inf
        changing = (self.nearest > SAFE_HALF * least_apart / 4).nonzero()[:, 0]
        if len(changing) == 0:
            return
        centered = picked - self.center
        norms = centered.square().sum(dim=1)
        entries = MAX_BLOCK_ENTRIES_ON_GPU if self.shard.is_cuda else MAX_BLOCK_ENTRIES
        for index in changing.split(max(1, entries // max(len(picks), self.shard.shape[1]))):
            rows = self.shard[index]
            # |x - c|^2 without |x|^2, which does not change the argmin
            closest = torch.addmm(norms, rows - self.center, centered.T, alpha=-2).argmin(dim=1)
            distance = (rows - picked[closest]).square_().sum(dim=1)
            self.nearest[index] = torch.minimum(self.nearest[index], distance)

    def pick_among_farthest(self, wanted: int, candidates: int) -> tuple[Tensor, Tensor, float]:
        """Apply greedy_among to the farthest rows: K picks, 1 <= K <= `wanted`, their rows (K, D), and `least_apart`.

        If every row left is a copy of a selected row, the picks are copies, and their rows are left out: (0, D).
        """
        m = min(candidates, len(self.rows) - 1)
        distance, index = self._farthest(m + 1)
        if distance[0] <= 0:  # only copies of selected rows are left, which change no distance
            copies = (self.nearest == 0).nonzero()[:wanted] + self.rows.begin
            return self.rows.gather(copies)[:wanted, 0], self.shard[:0], 0.0
        tau = distance[m]
        index, by_index = index[:m].sort()
        rows = self.rows.take(index)
        found = greedy_among(rows, distance[:m][by_index], tau, wanted) if is_main(self.rows.group) else None
        positions, least_apart = broadcast_object(found, self.rows.group)  # ranks may round differently
        positions = positions.to(index.device)
        return index[positions], rows[positions], least_apart

    def _farthest(self, m: int) -> tuple[Tensor, Tensor]:
        """Squared distances, descending, and indices (m,) of the rows farthest from the selection.

        Among rows at the largest distance, the one of the lowest index is first.
        """
        values, index = self.nearest.topk(min(m, len(self.nearest)))
        if len(values):  # topk promises no order among ties
            first = (self.nearest == values[0]).nonzero()[0]
            others = index != first
            values, index = torch.cat([values[:1], values[others]]), torch.cat([first, index[others]])
        table = torch.stack([values.double(), (index + self.rows.begin).double()], dim=1)  # both are exact in float64
        offered = self.rows.gather(table)
        order = offered[:, 0].sort(descending=True, stable=True).indices[:m]  # the lowest rank wins a tie
        return offered[order, 0], offered[order, 1].long()


def greedy_among(rows: Tensor, nearest: Tensor, tau: Tensor, wanted: int) -> tuple[Tensor, float]:
    """Apply the greedy rule to candidates while the best of them is the global choice.

    The candidates are `rows` (m, D) float32, the first of which wins a tie, `nearest` (m,) float64 their squared
    distances to the selection, and `tau` the largest such distance of other rows. Returns at most `wanted` positions
    (K,) int64 in `rows`, K >= 1, on the CPU, and `least_apart`, the least squared distance of a pick to earlier ones.
    """
    rows = rows.double()
    rows -= rows[0].clone()  # small norms lose fewer digits; exact in float64
    norms = rows.square().sum(dim=1)
    mutual = torch.addmm(norms, rows, rows.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).cpu().numpy()
    # Rounding error of the product. Distances within it tie, as those of copies must; nearer rows count as copies here.
    rounding = float(norms.max()) * rows.shape[1] * torch.finfo(norms.dtype).eps
    floor = max(float(tau), rounding)
    remaining = nearest.cpu().numpy().copy()
    positions: list[int] = []
    least_apart = best = remaining.max()
    for _ in range(min(wanted, len(remaining))):  # in NumPy: thousands of small steps, too small for threads or a GPU
        tie = best - rounding if positions else best  # the first distance does not come from a product
        positions.append(int((remaining >= tie).argmax()))  # the lowest index
        least_apart = best
        np.minimum(remaining, mutual[positions[-1]], out=remaining)
        remaining[positions[-1]] = -np.inf
        best = remaining.max()
        if best <= floor:
            break
    return torch.tensor(positions), max(float(least_apart) - rounding, 0.0)

"""Coreset selection: random projection, then greedy k-center at the speed of a matrix product."""

import logging

import numpy as np
import torch
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor

from utils.distributed import (
    Group,
    all_gather_rows,
    all_reduce_sum,
    broadcast_object,
    is_main,
    local_indices,
    place_rows,
    progress_bar,
    shard_offset,
)

logger = logging.getLogger(__name__)

# Rows that a pass can pick from: at first, and within which bounds the number follows how many it did pick. More mean
# fewer passes and a larger matrix of mutual distances (134 MB in fp64 at most).
FIRST_CANDIDATES, LEAST_CANDIDATES, MOST_CANDIDATES = 2048, 256, 4096
# Bound the distance block of one update: on a CPU 16 MB, since a larger one leaves the cache; on a GPU 1 GB.
MAX_BLOCK_ENTRIES, MAX_BLOCK_ENTRIES_ON_GPU = 1 << 22, 1 << 28
# Of half the distance between picks; less than 1 for the rounding of distances.
SAFE_HALF = 0.999


def random_projection(num_rows: int, dim: int, eps: float, random_state: int | None) -> Tensor | None:
    """The sparse random projection of Achlioptas / Li et al., as scikit-learn draws it.

    Args:
        num_rows: rows that will be projected; they decide the width (Johnson-Lindenstrauss lemma).
        dim: width D of the rows.
        eps: allowed distortion.
        random_state: seed; None draws another projection each time.

    Returns:
        (D, K) float32 matrix, or None where the lemma asks for more than D columns.
    """
    width = int(johnson_lindenstrauss_min_dim(num_rows, eps=eps))
    if width > dim:
        logger.info("%d rows at eps %g need %d columns, of %d: the coreset is not projected", num_rows, eps, width, dim)
        return None
    drawn = SparseRandomProjection(n_components=width, eps=eps, random_state=random_state).fit(np.zeros((1, dim)))
    return torch.from_numpy(drawn.components_.toarray().T).float()


def greedy_coreset(rows: Tensor, n: int, start: int = 0, group: Group | None = None) -> Tensor:
    """Greedy k-center: from `start` on, pick the row farthest from all picked ones; the lowest index wins a tie.

    Instead of reading all rows once a pick, each pass takes the m rows farthest from the selection and runs the rule
    inside them. Let tau be the largest distance outside them. Distances only ever shrink, so as long as the best
    candidate is farther than tau it is the global choice. When it no longer is, one matrix product against the new
    picks brings all rows up to date.

    Rows close to the selection are left out of that product. A new pick c is at least r from every older one, so a row
    x at distance d <= r / 2 from the selection has |c - x| >= r - d >= d: it cannot come closer. In scans with
    background, whose patches are all alike, and late in the selection that is most of the rows.

    The product only finds the nearest new pick of each row: in fp32 its distances lose digits where rows are close,
    and the order of selection hangs on them. The distance itself is then computed by direct difference, of the rows
    as they are: taking a mean from them first would round, and ties would no longer be ties. Where clusters lie more
    than some thousand times their spread apart, that product may name a pick that is not quite the nearest, and the
    order, at ten times as much the choice, within a cluster is another than the sequential rule's.

    Several processes may hold the rows, each those that follow on the rows of the rank before it. Each offers its
    farthest rows; the m farthest of all are sent to every process, the first one picks from them, and each brings its
    own rows up to date. What is sent a pass does not depend on the number of rows.

    Args:
        rows: (N, D) float, of this process; N may be 0.
        n: number of picks, 1 <= n <= rows of all processes.
        start: index of the first pick.
        group: the processes that hold the rows.

    Returns:
        (n,) int64 indices in order of selection, all different, on the device of `rows`. They count the rows of all
        processes, and are the same in each.

    Raises:
        ValueError: n or start is out of range, or a row holds NaN or infinity; in all processes.

    Peak memory: beside `rows` in fp32 a (m, m) fp64 block and a few blocks of MAX_BLOCK_ENTRIES.
    """
    begin, total = shard_offset(len(rows), group)
    if not 1 <= n <= total:
        raise ValueError(f"cannot pick {n} of {total} rows")
    if not 0 <= start < total:
        raise ValueError(f"start is {start}, expected an index below {total}")
    shard = _Shard(rows.float(), begin, total, group)
    picks, apart = torch.tensor([start], device=rows.device), 0.0
    picked = shard.fetch(picks)
    selected = [picks]
    count, candidates = 1, FIRST_CANDIDATES
    with progress_bar(total=n, initial=1, desc="coreset", delay=2) as progress:
        while count < n:
            shard.update(picks, picked, apart)
            picks, picked, apart = shard.pick_among_farthest(n - count, candidates)
            selected.append(picks)
            count += len(picks)
            if len(picks) > candidates // 2:
                candidates = min(2 * candidates, MOST_CANDIDATES)
            elif len(picks) < candidates // 8:
                candidates = max(candidates // 2, LEAST_CANDIDATES)
            progress.update(len(picks))
    return torch.cat(selected)


class _Shard:
    """The rows that a process holds, and how far each is from the selection. Indices count the rows of all processes.

    Args:
        rows: (N, D) float32, of this process.
        begin: index of the first of them.
        total: number of rows of all processes.
        group: the processes.
    """

    def __init__(self, rows: Tensor, begin: int, total: int, group: Group | None) -> None:
        self.rows, self.begin, self.total, self.group = rows, begin, total, group
        # Without their mean the rows have small norms, which lose fewer digits in the product.
        sums = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        for part in rows.split(1 << 14):  # else all rows would be copied in fp64
            sums += part.sum(dim=0, dtype=torch.float64)
        self.center = (all_reduce_sum(sums, group) / total).float()
        if not torch.isfinite(self.center).all():  # in all processes alike
            raise ValueError("a row of which the coreset is to be chosen holds NaN or infinity")
        # Squared distance to the selection; -inf marks a picked row.
        self.nearest = rows.new_full((len(rows),), torch.inf)

    def fetch(self, index: Tensor) -> Tensor:
        """The rows (K, D) of indices (K,), the same in every process."""
        places, mine = local_indices(index, self.begin, len(self.rows))
        return place_rows(self.rows[mine], places, len(index), self.group)

    def update(self, picks: Tensor, picked: Tensor, apart: float) -> None:
        """Lower `nearest` to the squared distances to the new picks; these become -inf.

        Args:
            picks: (K,) int64.
            picked: (K, D), their rows.
            apart: the least squared distance of a new pick to those before it.
        """
        self.nearest[local_indices(picks, self.begin, len(self.rows))[1]] = -torch.inf
        touched = (self.nearest > SAFE_HALF * apart / 4).nonzero()[:, 0]
        if len(touched) == 0:
            return
        chosen = picked - self.center
        norms = chosen.square().sum(dim=1)
        entries = MAX_BLOCK_ENTRIES_ON_GPU if self.rows.is_cuda else MAX_BLOCK_ENTRIES
        for part in touched.split(max(1, entries // max(len(picks), self.rows.shape[1]))):
            of_part = self.rows[part]
            # the row's own norm changes no order
            closest = torch.addmm(norms, of_part - self.center, chosen.T, alpha=-2).argmin(dim=1)
            distance = (of_part - picked[closest]).square_().sum(dim=1)
            self.nearest[part] = torch.minimum(self.nearest[part], distance)

    def pick_among_farthest(self, wanted: int, candidates: int) -> tuple[Tensor, Tensor, float]:
        """Run the greedy rule among the farthest rows as long as it is the global rule.

        Returns:
            K picks, at least one and at most `wanted`; their rows (K, D), none where all are copies of picked ones; the
            least squared distance of one to those before it.
        """
        m = min(candidates, self.total - 1)
        distance, index = self._farthest(m + 1)
        if distance[0] <= 0:  # every row left is a copy of a picked one
            copies = (self.nearest == 0).nonzero()[:wanted] + self.begin
            picks = all_gather_rows(copies, self.group)[0][:wanted, 0]
            return picks, self.rows[:0], 0.0  # nothing comes closer to anything by a copy
        tau = distance[m]  # the best row outside the candidates
        index, by_index = index[:m].sort()
        among = self.fetch(index)
        found = greedy_among(among, distance[:m][by_index], tau, wanted) if is_main(self.group) else None
        positions, apart = broadcast_object(found, self.group)  # processors may round differently
        positions = positions.to(index.device)
        return index[positions], among[positions], apart

    def _farthest(self, m: int) -> tuple[Tensor, Tensor]:
        """Squared distances and indices (m,) of the rows of all processes farthest from the selection.

        They descend. Of those at the largest distance the lowest index is among them and comes first; topk promises no
        order among ties.
        """
        values, index = self.nearest.topk(min(m, len(self.nearest)))
        if len(values):
            first = (self.nearest == values[0]).nonzero()[0]
            others = index != first
            values, index = torch.cat([values[:1], values[others]]), torch.cat([first, index[others]])
        # Both are exact in float64.
        offered = all_gather_rows(torch.stack([values.double(), (index + self.begin).double()], dim=1), self.group)[0]
        order = offered[:, 0].sort(descending=True, stable=True).indices[:m]  # of equal ones that of the lowest rank
        return offered[order, 0], offered[order, 1].long()


def greedy_among(among: Tensor, nearest: Tensor, tau: Tensor, wanted: int) -> tuple[Tensor, float]:
    """Run the greedy rule among some rows, as long as its choice is the global one.

    Args:
        among: (m, D) float32, in the order that decides ties.
        nearest: (m,) float64, their squared distances to the selection.
        tau: the largest of all other rows.
        wanted: picks at most.

    Returns:
        positions (K,) int64 in `among`, K at least 1, on the CPU; the least squared distance of a pick to those before.
    """
    rows = among.double()
    rows -= rows[0].clone()  # small norms again; in fp64 this rounds nothing
    norms = rows.square().sum(dim=1)
    between = torch.addmm(norms, rows, rows.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).cpu().numpy()
    # What the product may be wrong by. So close, it cannot tell a copy from a neighbor (the next update can), and
    # copies of a row tie only up to it.
    rounding = float(norms.max()) * rows.shape[1] * torch.finfo(norms.dtype).eps
    floor = max(float(tau), rounding)
    remaining = nearest.cpu().numpy().copy()
    positions: list[int] = []
    apart = best = remaining.max()
    # In NumPy: a thousand small steps wait for no pool of threads, and for no GPU.
    for _ in range(min(wanted, len(remaining))):
        # At first nothing is from a product, and the pick is the global one whatever the floor.
        tie = best - rounding if positions else best
        positions.append(int((remaining >= tie).argmax()))  # the first
        apart = best
        np.minimum(remaining, between[positions[-1]], out=remaining)
        remaining[positions[-1]] = -np.inf
        best = remaining.max()
        if best <= floor:
            break
    return torch.tensor(positions), max(float(apart) - rounding, 0.0)

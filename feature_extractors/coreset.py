"""Coreset selection: random projection, then greedy k-centre at the speed of a matrix product."""

import logging

import numpy as np
import torch
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

# Rows that one pass can pick from. More mean fewer passes and a larger matrix of mutual distances (32 MB in fp64).
CANDIDATES = 2048
# Bounds the distance block of one update to 4 million entries (16 MB): a larger one leaves the cache.
MAX_BLOCK_ENTRIES = 1 << 22


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


def greedy_coreset(rows: Tensor, n: int, start: int = 0) -> Tensor:
    """Greedy k-centre: from `start` on, pick the row farthest from all picked ones; the lowest index wins a tie.

    Instead of reading all rows once a pick, each pass takes the m rows farthest from the selection and runs the rule
    inside them. Let tau be the largest distance outside them. Distances only ever shrink, so as long as the best
    candidate is farther than tau it is the global choice. When it no longer is, one matrix product against the new
    picks brings all rows up to date.

    The product only finds the nearest new pick of each row: in fp32 its distances lose digits where rows are close,
    and the order of selection hangs on them. The distance itself is then computed by direct difference, of the rows
    as they are: taking a mean from them first would round, and ties would no longer be ties.

    Args:
        rows: (N, D) float.
        n: number of picks, 1 <= n <= N.
        start: index of the first pick.

    Returns:
        (n,) int64 indices in order of selection, all different, on the device of `rows`.

    Peak memory: `rows` once more in fp32, a (m, m) fp64 block and one block of MAX_BLOCK_ENTRIES distances.
    """
    if not 1 <= n <= len(rows):
        raise ValueError(f"cannot pick {n} of {len(rows)} rows")
    if not 0 <= start < len(rows):
        raise ValueError(f"start is {start}, expected an index below {len(rows)}")
    rows = rows.float()
    centered = rows - rows.mean(dim=0)  # small norms lose fewer digits in the product
    nearest = rows.new_full((len(rows),), torch.inf)  # squared distance to the selection; -inf marks a picked row
    picks = torch.tensor([start], device=rows.device)
    selected = [picks]
    count = 1
    with tqdm(total=n, initial=1, desc="coreset", leave=False, delay=2) as progress:
        while count < n:
            _update_nearest(nearest, rows, centered, picks)
            picks = _pick_among_farthest(nearest, rows, n - count)
            selected.append(picks)
            count += len(picks)
            progress.update(len(picks))
    return torch.cat(selected)


def _update_nearest(nearest: Tensor, rows: Tensor, centered: Tensor, picks: Tensor) -> None:
    """Lower `nearest` to the squared distances to the new picks, in place; `picks` become -inf."""
    chosen = centered[picks]
    norms = chosen.square().sum(dim=1)
    step = max(1, MAX_BLOCK_ENTRIES // max(len(picks), rows.shape[1]))
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        # the row's own norm changes no order
        closest = torch.addmm(norms, centered[part], chosen.T, alpha=-2).argmin(dim=1)
        distance = (rows[part] - rows[picks[closest]]).square_().sum(dim=1)
        torch.minimum(nearest[part], distance, out=nearest[part])
    nearest[picks] = -torch.inf


def _pick_among_farthest(nearest: Tensor, rows: Tensor, wanted: int) -> Tensor:
    """Run the greedy rule among the farthest rows as long as it is the global rule; at least one pick."""
    farthest = nearest.max()
    if farthest <= 0:  # every row left is a copy of a picked one
        return (nearest == 0).nonzero()[:wanted, 0]
    m = min(CANDIDATES, len(nearest) - 1)
    values, index = nearest.topk(m + 1)
    tau = values[m]  # the best row outside the candidates
    first = (nearest == farthest).nonzero()[0]  # topk promises no order among ties
    index = torch.cat([index[:m][index[:m] != first], first]).sort().values
    candidates, remaining = rows[index].double(), nearest[index].double()
    candidates -= candidates[0].clone()  # small norms again; in fp64 this rounds nothing
    norms = candidates.square().sum(dim=1)
    between = torch.addmm(norms, candidates, candidates.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
    # What the product may be wrong by. So close, it cannot tell a copy from a neighbour (the next update can), and
    # copies of a row tie only up to it.
    rounding = norms.max() * rows.shape[1] * torch.finfo(norms.dtype).eps
    floor = torch.maximum(tau.double(), rounding)
    picks: list[int] = []
    while len(picks) < wanted:
        best = remaining.max()
        if picks and not best > floor:
            break
        tied = remaining >= best - rounding if picks else remaining == best  # at first nothing comes from the product
        position = int(tied.nonzero()[0])
        picks.append(position)
        torch.minimum(remaining, between[position], out=remaining)
        remaining[position] = -torch.inf
    return index[picks]

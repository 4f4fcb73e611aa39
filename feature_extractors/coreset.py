"""Coreset selection: random projection, then greedy k-centre at the speed of a matrix product."""

import logging

import numpy as np
import torch
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

# Rows that a pass can pick from: at first, and within which bounds the number follows how many it did pick. More mean
# fewer passes and a larger matrix of mutual distances (134 MB in fp64 at most).
FIRST_CANDIDATES, LEAST_CANDIDATES, MOST_CANDIDATES = 2048, 256, 4096
# Picks between two looks at how far the rule may go: each look waits for a GPU.
PICKS_PER_LOOK = 32
# Bounds the distance block of one update to 4 million entries (16 MB): a larger one leaves the cache.
MAX_BLOCK_ENTRIES = 1 << 22
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


def greedy_coreset(rows: Tensor, n: int, start: int = 0) -> Tensor:
    """Greedy k-centre: from `start` on, pick the row farthest from all picked ones; the lowest index wins a tie.

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

    Args:
        rows: (N, D) float.
        n: number of picks, 1 <= n <= N.
        start: index of the first pick.

    Returns:
        (n,) int64 indices in order of selection, all different, on the device of `rows`.

    Peak memory: beside `rows` in fp32 a (m, m) fp64 block and a few blocks of MAX_BLOCK_ENTRIES.
    """
    if not 1 <= n <= len(rows):
        raise ValueError(f"cannot pick {n} of {len(rows)} rows")
    if not 0 <= start < len(rows):
        raise ValueError(f"start is {start}, expected an index below {len(rows)}")
    rows = rows.float()
    center = rows.mean(dim=0)
    nearest = rows.new_full((len(rows),), torch.inf)  # squared distance to the selection; -inf marks a picked row
    picks, apart = torch.tensor([start], device=rows.device), 0.0
    selected = [picks]
    count, candidates = 1, FIRST_CANDIDATES
    with tqdm(total=n, initial=1, desc="coreset", leave=False, delay=2) as progress:
        while count < n:
            _update_nearest(nearest, rows, center, picks, apart)
            picks, apart = _pick_among_farthest(nearest, rows, n - count, candidates)
            selected.append(picks)
            count += len(picks)
            if len(picks) > candidates // 2:
                candidates = min(2 * candidates, MOST_CANDIDATES)
            elif len(picks) < candidates // 8:
                candidates = max(candidates // 2, LEAST_CANDIDATES)
            progress.update(len(picks))
    return torch.cat(selected)


def _update_nearest(nearest: Tensor, rows: Tensor, center: Tensor, picks: Tensor, apart: float) -> None:
    """Lower `nearest` to the squared distances to the new picks, in place; `picks` become -inf.

    `center` is the mean of the rows: without it norms are small and lose fewer digits in the product. `apart` is the
    least squared distance of a new pick to those before it.
    """
    chosen = rows[picks] - center
    norms = chosen.square().sum(dim=1)
    nearest[picks] = -torch.inf
    touched = (nearest > SAFE_HALF * apart / 4).nonzero()[:, 0]
    for part in touched.split(max(1, MAX_BLOCK_ENTRIES // max(len(picks), rows.shape[1]))):
        of_part = rows[part]
        # the row's own norm changes no order
        closest = torch.addmm(norms, of_part - center, chosen.T, alpha=-2).argmin(dim=1)
        distance = (of_part - rows[picks[closest]]).square_().sum(dim=1)
        nearest[part] = torch.minimum(nearest[part], distance)


def _pick_among_farthest(nearest: Tensor, rows: Tensor, wanted: int, candidates: int) -> tuple[Tensor, float]:
    """Run the greedy rule among the farthest rows as long as it is the global rule.

    Returns:
        at least one and at most `wanted` picks, and the least squared distance of one to those before it.
    """
    farthest = nearest.max()
    if farthest <= 0:  # every row left is a copy of a picked one
        return (nearest == 0).nonzero()[:wanted, 0], 0.0
    m = min(candidates, len(nearest) - 1)
    values, index = nearest.topk(m + 1)
    tau = values[m]  # the best row outside the candidates
    first = (nearest == farthest).nonzero()[0]  # topk promises no order among ties
    index = torch.cat([index[:m][index[:m] != first], first]).sort().values
    among, remaining = rows[index].double(), nearest[index].double()
    among -= among[0].clone()  # small norms again; in fp64 this rounds nothing
    norms = among.square().sum(dim=1)
    between = torch.addmm(norms, among, among.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
    # What the product may be wrong by. So close, it cannot tell a copy from a neighbour (the next update can), and
    # copies of a row tie only up to it.
    rounding = norms.max() * rows.shape[1] * torch.finfo(norms.dtype).eps
    floor = torch.maximum(tau.double(), rounding)
    limit = min(wanted, len(index))
    positions: list[Tensor] = []
    distances: list[Tensor] = []
    while len(positions) < limit:
        for _ in range(min(PICKS_PER_LOOK, limit - len(positions))):
            best = remaining.max()
            tie = remaining >= best - rounding if positions else remaining == best  # at first nothing is from a product
            position = tie.to(torch.uint8).argmax(dim=0, keepdim=True)  # the first
            positions.append(position)
            distances.append(best)
            torch.minimum(remaining, between.index_select(0, position)[0], out=remaining)
            remaining.index_fill_(0, position, -torch.inf)
        if distances[-1] <= floor:
            break
    # Distances descend: those above the floor come first. The first pick is the global one whatever the floor.
    squared = torch.stack(distances)
    good = max(1, int((squared > floor).sum()))
    return index[torch.cat(positions)[:good]], float((squared[good - 1] - rounding).clamp_(min=0))

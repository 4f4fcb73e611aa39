"""Contrastive loss of UFF training, and the retrieval accuracy that shows its effect.

q are the outputs of the rgb head and k those of the xyz head, both L2-normalized. Row i of q belongs to row i of k.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.distributed import all_gather_rows, world_size
from utils.errors import InputError

MAX_BLOCK_ENTRIES = 1 << 24  # similarities in memory at a time (64 MB)


def contrastive_loss(xyz_head_out: Tensor, rgb_head_out: Tensor, negatives: str = "local") -> Tensor:
    """Patch-wise contrastive loss L_con of M3DM over all patches of a batch.

    2 * mean_i(-log(exp(q_i . k_i) / sum_t exp(q_i . k_t))), about 2 ln N before training. Computed in
    float32 or better. Peak memory: blocks of MAX_BLOCK_ENTRIES similarities. Plain form: `reference.contrastive_loss`.

    The heads' outputs are (N, head_dim) each; row i of one belongs to row i of the other. `negatives` chooses the k_t:
    "local" those of this rank, "global" those of all ranks. Averaged over the ranks, as in DDP, the global loss and
    gradient equal those of a single process with all rows. Raises InputError if N is 0; with "global", on every rank.
    """
    dtype = torch.promote_types(xyz_head_out.dtype, torch.float32)
    q = F.normalize(rgb_head_out.to(dtype), dim=-1)
    k = F.normalize(xyz_head_out.to(dtype), dim=-1)
    first, ranks = 0, 1
    if negatives == "global":
        k, first = all_gather_rows(k)
        ranks = world_size()
    rows = len(k)
    if rows == 0:
        raise InputError("Every xyz patch of this batch holds a zero. Remove samples without valid points.")
    summed: Tensor = _SummedCrossEntropy.apply(q, k, first)
    return summed * (2 * ranks / rows)


def retrieval(xyz_head_out: Tensor, rgb_head_out: Tensor) -> tuple[int, float]:
    """Number of xyz patches whose nearest rgb patch in the image is their own, and the number expected by chance.

    Arguments as in `contrastive_loss`, for one image. Xyz patches that share an rgb patch are counted separately.
    """
    q, k = F.normalize(rgb_head_out.float(), dim=-1), F.normalize(xyz_head_out.float(), dim=-1)
    distinct = len(torch.unique((q * 1e5).round(), dim=0))
    hits = 0
    for first in range(0, len(k), step := max(1, MAX_BLOCK_ENTRIES // max(1, len(k)))):
        similarity = k[first : first + step] @ q.T  # (chunk, N)
        own = similarity.diagonal(first)
        hits += int((own >= similarity.amax(dim=1) - 1e-6).sum())  # equal patches differ by rounding
    return hits, len(k) / max(1, distinct)


class _SummedCrossEntropy(torch.autograd.Function):
    """sum_i(logsumexp_t(q_i . k_t) - q_i . k_{first + i}) for q (M, D) and k (N, D), in blocks of rows of q.

    The backward pass recomputes the similarities. Only one logsumexp per row is kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, first: int) -> Tensor:
        logsumexp = torch.cat([q.new_empty(0), *((block @ k.T).logsumexp(dim=1) for block in _blocks(q, k))])
        ctx.save_for_backward(q, k, logsumexp)
        ctx.own = slice(first, first + len(q))
        return logsumexp.sum() - (q * k[ctx.own]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, logsumexp = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
        blocks = _blocks(q, k)
        for block, summed, grad_block in zip(blocks, _blocks(logsumexp, k), _blocks(grad_q, k), strict=True):
            share = torch.addmm(-summed[:, None], block, k.T).exp_()  # softmax of the block's rows
            torch.matmul(share, k, out=grad_block)
            grad_k.addmm_(share.T, block)
        grad_q -= k[ctx.own]
        grad_k[ctx.own] -= q
        return grad_q * grad, grad_k * grad, None


def _blocks(rows: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, MAX_BLOCK_ENTRIES // len(k))) if len(rows) else ()

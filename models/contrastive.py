"""The contrastive loss of UFF training, and a measure of how well it has been learned.

q are the rgb heads' outputs and k the xyz heads', both L2-normalized: each rgb patch has to find its xyz patch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.distributed import all_gather_rows, world_size
from utils.errors import InputError

MAX_BLOCK_ENTRIES = 1 << 24  # similarities that exist at a time (64 MB)


def contrastive_loss(xyz_head_out: Tensor, rgb_head_out: Tensor, negatives: str = "local") -> Tensor:
    """The patch-wise contrastive loss L_con of M3DM over all patches of a batch.

    2 * mean_i(-log(exp(q_i . k_i) / sum_t exp(q_i . k_t))), about 2 ln N before anything is learned. The temperature
    is 1. Computed in float32 or better whatever the input's dtype. Peak memory: blocks of MAX_BLOCK_ENTRIES
    similarities, forward and backward; never the (N, N) matrix.
    Plain form: `contrastive_loss` in feature_extractors/reference.py.

    Args:
        xyz_head_out: (N, head_dim) outputs of the xyz head.
        rgb_head_out: (N, head_dim) outputs of the rgb head; the partner of row i is row i.
        negatives: the k of the sum: "local" are those of this rank, "global" those of all ranks, which may hold
            different numbers of rows. The mean over the ranks of the global value and gradient, as
            DistributedDataParallel takes it, equals a single process with all rows.

    Returns:
        () loss.

    Raises:
        InputError: N is 0; with "global", in all ranks together.
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
        raise InputError("No patch of this batch is free of zeros in xyz. Remove samples that hold no valid point.")
    summed: Tensor = _SummedCrossEntropy.apply(q, k, first)
    return summed * (2 * ranks / rows)


def retrieval(xyz_head_out: Tensor, rgb_head_out: Tensor) -> tuple[int, float]:
    """Number of xyz patches whose rgb patch is the nearest of the image, found and expected by chance.

    Several xyz patches may share one rgb patch, and each of them counts. The arguments, as for `contrastive_loss`, are
    those of one image.
    """
    q, k = F.normalize(rgb_head_out.float(), dim=-1), F.normalize(xyz_head_out.float(), dim=-1)
    distinct = len(torch.unique((q * 1e5).round(), dim=0))
    hits = 0
    for first in range(0, len(k), step := max(1, MAX_BLOCK_ENTRIES // max(1, len(k)))):
        similarity = k[first : first + step] @ q.T  # (chunk, N)
        own = similarity.diagonal(first)
        hits += int((own >= similarity.amax(dim=1) - 1e-6).sum())  # copies of one patch differ by rounding
    return hits, len(k) / max(1, distinct)


class _SummedCrossEntropy(torch.autograd.Function):
    """sum_i(logsumexp_t(q_i . k_t) - q_i . k_{first + i}) for q (M, D) and k (N, D), in blocks of rows of q.

    The backward pass computes the similarities again; one logsumexp per row is kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, first: int) -> Tensor:
        logsumexp = torch.cat([q.new_empty(0), *((block @ k.T).logsumexp(dim=1) for block in _blocks(q, k))])
        ctx.save_for_backward(q, k, logsumexp)
        ctx.first = first
        return logsumexp.sum() - (q * k[first : first + len(q)]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, logsumexp = ctx.saved_tensors
        own = slice(ctx.first, ctx.first + len(q))
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
        begin = 0
        for block in _blocks(q, k):
            part = slice(begin, begin + len(block))
            share = torch.addmm(-logsumexp[part, None], block, k.T).exp_()  # softmax of the block's rows
            torch.matmul(share, k, out=grad_q[part])
            grad_k.addmm_(share.T, block)
            begin += len(block)
        grad_q -= k[own]
        grad_k[own] -= q
        return grad_q * grad, grad_k * grad, None


def _blocks(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return q.split(max(1, MAX_BLOCK_ENTRIES // len(k))) if len(q) else ()

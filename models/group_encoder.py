"""Group encoder (mini-PointNet): the points of a group become one token.

Fast form of `reference.GroupEncoder`. It saves work in three ways:

1. The 512-wide layer is W_m maximum + W_f local, where `maximum` is the same for all points of a group: W_m maximum is
   computed once per group. `local` is linear in 128 hidden values, A hidden + a, so W_f A is applied to these directly.
2. Each batch norm is folded into the linear layer y = W x + b before it. The statistics of y over the current cloud
   follow from those of x, in double precision: mean(y) = W mean(x) + b, var(y) = diag(W cov(x) W^T).
3. Groups pass through the wide layers in small blocks, which fit in the cache of a CPU.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.choices import POINT_NORMS

BLOCK_GROUPS = 16  # groups per block on a CPU: 4 MB of hidden values


class GroupEncoder(nn.Module):
    """Conv1d 3-128, BN, ReLU, 128-256; group maximum prepended (512); Conv1d 512-512, BN, ReLU, 512-C; maximum.

    `out_dim` is C, the width of the token. `point_norm` chooses the BatchNorm statistics: "cloud" takes those of the
    current cloud's groups, as the published results do, "running" those of the checkpoint.
    """

    def __init__(self, out_dim: int, point_norm: str = "cloud") -> None:
        super().__init__()
        if point_norm not in POINT_NORMS:
            raise ValueError(f"point_norm is {point_norm!r}, expected one of {POINT_NORMS}")
        self.point_norm = point_norm
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        layers = nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, out_dim, 1)
        self.second_conv = nn.Sequential(*layers)

    def forward(self, groups: Tensor) -> Tensor:
        """Encode groups (G, K, 3) float32, in meters relative to their centers, as tokens (G, C) float32."""
        device = groups.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else groups.dtype
        blocks = groups.split(BLOCK_GROUPS if device == "cpu" else len(groups))
        with torch.autocast(device, enabled=False):
            weight, bias = (each.to(groups.dtype) for each in self._first_layer(groups))
            hidden = [F.linear(block, weight, bias).relu_().to(dtype) for block in blocks]  # (B, K, 128) each
            maximum = _group_maxima(hidden, self.first_conv[3])  # (G, 256)
            weight, of_group = (each.to(dtype) for each in self._mixing_layer(hidden, maximum))  # (512, 128), (G, 512)
            pairs = zip(hidden, of_group.split([len(block) for block in hidden]), strict=True)
            mixed = (F.linear(block, weight).add_(once[:, None]).relu_() for block, once in pairs)  # (B, K, 512) each
            return _group_maxima(mixed, self.second_conv[3]).to(groups.dtype)

    def _first_layer(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (128, 3) and bias (128,) float64 of the first layer with its batch norm."""
        weight, bias = _linear(self.first_conv[0])
        if self.point_norm == "running":
            return _fold(self.first_conv[1], weight, bias)
        points = groups.flatten(0, 1).double()
        mean = points.mean(dim=0)
        points -= mean
        covariance = points.T @ points / len(points)
        return _fold(self.first_conv[1], weight, bias, weight @ mean + bias, _variance(weight, covariance))

    def _mixing_layer(self, hidden: Sequence[Tensor], maximum: Tensor) -> tuple[Tensor, Tensor]:
        """The 512-wide layer with its batch norm: weight (512, 128) on hidden values and offset (G, 512) of groups.

        `hidden` are blocks (B, K, 128) of the first layer's output, `maximum` (G, 256) their group maxima. float64.
        """
        weight, bias = _linear(self.second_conv[0])
        on_maximum, on_local = weight.chunk(2, dim=1)  # (512, 256) each
        local_weight, local_bias = _linear(self.first_conv[3])
        on_hidden = on_local @ local_weight  # (512, 128)
        of_group = maximum.double() @ on_maximum.T + (on_local @ local_bias + bias)  # (G, 512)
        if self.point_norm == "running":
            return _fold(self.second_conv[1], on_hidden, of_group)
        group_means = torch.cat([block.mean(dim=1, dtype=torch.float32) for block in hidden]).double()  # (G, 128)
        mean = group_means.mean(dim=0)
        around = mean.to(hidden[0].dtype)  # subtracted before the products, so that they do not cancel
        products = sum((x.T @ x).double() for x in (block.flatten(0, 1) - around for block in hidden))
        rounding = mean - around  # its effect is subtracted from the covariance
        covariance = products / (len(maximum) * hidden[0].shape[1]) - rounding.outer(rounding)  # (128, 128)
        offset = of_group.mean(dim=0)
        centered = of_group - offset
        between = centered.T @ (group_means - mean) / len(maximum)  # (512, 128)
        # Variance of a sum: both variances and twice the covariance.
        variance = _variance(on_hidden, covariance) + 2 * (on_hidden * between).sum(dim=1)
        variance = variance + centered.square().mean(dim=0)
        return _fold(self.second_conv[1], on_hidden, of_group, on_hidden @ mean + offset, variance)


def _linear(conv: Any) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias (C_out,), float64, of a Conv1d of kernel 1."""
    return conv.weight.squeeze(-1).double(), conv.bias.double()


def _fold(
    norm: Any, weight: Tensor, bias: Tensor, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fold batch norm into weight (C, D) and bias (..., C); its running statistics are used if none are given."""
    mean = norm.running_mean if mean is None else mean
    variance = norm.running_var if variance is None else variance
    # Rounding in bf16 can make a small variance negative.
    scale = norm.weight / torch.sqrt(variance.double().clamp_min(0) + norm.eps)
    return scale[:, None] * weight, scale * (bias - mean) + norm.bias


def _variance(weight: Tensor, covariance: Tensor) -> Tensor:
    """Variances (C,) of W x, for W (C, D) and the covariance (D, D) of x."""
    return ((weight @ covariance) * weight).sum(dim=1)


def _group_maxima(blocks: Iterable[Tensor], conv: Any) -> Tensor:
    """Maximum of a linear layer's output over each group's points: blocks (B, K, D) -> (G, C) float64."""
    weight, bias = _linear(conv)
    return torch.cat([F.linear(block, weight.to(block.dtype)).amax(dim=1) for block in blocks]).double() + bias

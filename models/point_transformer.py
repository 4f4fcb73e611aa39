"""Point-MAE and Point-BERT as feature extractors: a cloud becomes groups, groups become tokens.

Point-MAE: Pang et al., ECCV 2022. Point-BERT: Yu et al., CVPR 2022. Module names are those of the published
checkpoints. Coordinates are raw meters: nothing is scaled to the unit sphere.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.point_ops import farthest_point_sample, knn
from models.transformer import TransformerEncoder

POINT_NORMS = ("cloud", "running")
# Groups that go through the wide layers of the group encoder together on the CPU: 4 MB of hidden values.
BLOCK_GROUPS = 16


class PointFeatures(NamedTuple):
    """Features of a cloud, at group centers or at every point."""

    features: Tensor  # (G, C), or (N, C) where centers is None
    centers: Tensor | None  # (G, 3) meters; None: one feature row for each point, in the points' order


class PointBackbone(nn.Module):
    """A network of the 3D branch: clouds of valid points (N, 3) float32, meters, N >= min_points -> PointFeatures each.

    N may be another in each cloud; what is said of a cloud does not depend on the others but for rounding.
    """

    embed_dim: int
    min_points: int


class GroupEncoder(nn.Module):
    """Mini-PointNet: the points of a group become one token.

    Conv1d 3-128, BN, ReLU, 128-256; the group's maximum in front of each point's feature (512); Conv1d 512-512, BN,
    ReLU, 512-C; maximum. It is computed with fewer products and without a tensor of 512 values a point:

    - The half of the 512-wide layer that acts on the group's maximum is computed once a group. The other half follows
      the 128-256 layer with nothing in between, so both are one matrix, 128-512.
    - Both batch norms are folded into the layer before them. Where they use the cloud's own statistics, mean and
      variance of a linear layer follow from those of its input, in double precision.
    - Blocks of groups go through the wide layers one after another and stay in the cache.

    Args:
        out_dim: C, width of the token.
        point_norm: "cloud" normalizes with the statistics of the current cloud's groups, as the reference does (it
            leaves batch norm in training mode); "running" with the checkpoint's running statistics.
    """

    def __init__(self, out_dim: int, point_norm: str = "cloud") -> None:
        super().__init__()
        if point_norm not in POINT_NORMS:
            raise ValueError(f"point_norm is {point_norm!r}, expected one of {POINT_NORMS}")
        self.point_norm = point_norm
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, out_dim, 1)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Encode groups.

        Args:
            groups: (G, K, 3) float32, meters, relative to each group's center.

        Returns:
            (G, C) float32 tokens.
        """
        dtype = _product_dtype(groups)
        blocks = groups.split(BLOCK_GROUPS if groups.device.type == "cpu" else len(groups))
        with torch.autocast(groups.device.type, enabled=False):
            weight, bias = (each.to(groups.dtype) for each in self._first_layer(groups))
            hidden = [F.linear(block, weight, bias).relu_().to(dtype) for block in blocks]  # (B, K, 128) each
            weight, bias = _linear(self.first_conv[3])
            maximum = _group_maxima(hidden, weight, bias)  # (G, 256)
            on_hidden, per_group = (each.to(dtype) for each in self._mixing_layer(hidden, maximum))
            mixed = (
                F.linear(block, on_hidden).add_(of_group[:, None]).relu_()  # (B, K, 512)
                for block, of_group in zip(hidden, per_group.split([len(block) for block in hidden]), strict=True)
            )
            weight, bias = _linear(self.second_conv[3])
            return _group_maxima(mixed, weight, bias).to(groups.dtype)

    def _first_layer(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (128, 3) and bias (128,) float64 of the first layer with its batch norm."""
        weight, bias = _linear(self.first_conv[0])
        if self.point_norm == "running":
            return _fold(self.first_conv[1], weight, bias, *_running_statistics(self.first_conv[1]))
        points = groups.flatten(0, 1).double()
        mean = points.mean(dim=0)
        points -= mean
        covariance = points.T @ points / len(points)
        return _fold(self.first_conv[1], weight, bias, weight @ mean + bias, _variance(weight, covariance))

    def _mixing_layer(self, hidden: Sequence[Tensor], maximum: Tensor) -> tuple[Tensor, Tensor]:
        """What the 512-wide layer and its batch norm add up: from the hidden points, and once a group.

        Args:
            hidden: blocks (B, K, 128), output of the first layer.
            maximum: (G, 256) of each group.

        Returns:
            weight (512, 128) on the hidden points, and (G, 512); float64.
        """
        weight, bias = _linear(self.second_conv[0])
        on_maximum, on_local = weight.chunk(2, dim=1)  # (512, 256) each
        inner_weight, inner_bias = _linear(self.first_conv[3])
        on_hidden = on_local @ inner_weight  # (512, 128)
        per_group = maximum.double() @ on_maximum.T + (on_local @ inner_bias + bias)  # (G, 512)
        if self.point_norm == "running":
            return _fold(self.second_conv[1], on_hidden, per_group, *_running_statistics(self.second_conv[1]))
        # Of the sum x W^T + g over all points of all groups: the variances of both and twice their covariance.
        group_means = torch.cat([block.mean(dim=1, dtype=torch.float32) for block in hidden]).double()  # (G, 128)
        mean = group_means.mean(dim=0)
        # Around the mean, rounded to the precision of the products: nothing cancels.
        around = mean.to(hidden[0].dtype)
        products = sum((x.T @ x).double() for x in (block.flatten(0, 1) - around for block in hidden))
        rounding = mean - around
        covariance = products / (len(maximum) * hidden[0].shape[1]) - rounding.outer(rounding)
        offset = per_group.mean(dim=0)
        between = (per_group - offset).T @ (group_means - mean) / len(maximum)  # (512, 128)
        variance = (
            _variance(on_hidden, covariance)
            + 2 * (on_hidden * between).sum(dim=1)
            + (per_group - offset).square().mean(dim=0)
        )
        return _fold(self.second_conv[1], on_hidden, per_group, on_hidden @ mean + offset, variance)


def _fold(norm: nn.Module, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (..., C) of a linear layer followed by batch norm with this mean and variance."""
    assert isinstance(norm, nn.BatchNorm1d)
    # A variance summed up from products in bf16 may come out below zero where it is small.
    scale = norm.weight / torch.sqrt(variance.double().clamp_min(0) + norm.eps)
    return scale[:, None] * weight, scale * (bias - mean) + norm.bias


def _running_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) that the checkpoint brought along."""
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast has matrix products computed in, here where it is switched off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _linear(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias (C_out,), float64, of a Conv1d of kernel 1."""
    assert isinstance(conv, nn.Conv1d)
    assert conv.bias is not None
    return conv.weight.squeeze(-1).double(), conv.bias.double()


def _group_maxima(blocks: Iterable[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The maximum over each group's points of a linear layer: blocks (B, K, D) -> (G, C) float64."""
    maxima = [F.linear(block, weight.to(block.dtype)).amax(dim=1) for block in blocks]
    return torch.cat(maxima).double() + bias


def _variance(weight: Tensor, covariance: Tensor) -> Tensor:
    """The variances (C,) of x W^T, for W (C, D) and the covariance (D, D) of x."""
    return ((weight @ covariance) * weight).sum(dim=1)


class PointTransformer(PointBackbone):
    """Point-MAE, or with `class_token` Point-BERT, up to the tokens that M3DM uses.

    Args:
        num_group: number of groups (tokens) per cloud.
        group_size: points per group.
        width: transformer width; three blocks' outputs are concatenated, so `embed_dim` is three times that.
        encoder_dim: width of the group encoder's token; a Linear maps it to `width` where the two differ.
        class_token: prepend a class token with its own position, and drop it at the end (Point-BERT).
        point_norm: see GroupEncoder.
        point_ops: back-end of the point searches, see models.point_ops.
    """

    def __init__(
        self,
        num_group: int = 1024,
        group_size: int = 128,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        encoder_dim: int = 384,
        class_token: bool = False,
        point_norm: str = "cloud",
        point_ops: str = "auto",
    ) -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size
        self.point_ops = point_ops
        self.min_points = max(num_group, group_size)
        self.taken = (depth // 3 - 1, 2 * depth // 3 - 1, depth - 1)  # blocks 4, 8 and 12 of twelve
        self.embed_dim = width * len(self.taken)
        self.encoder = GroupEncoder(encoder_dim, point_norm)
        self.reduce_dim = nn.Linear(encoder_dim, width) if encoder_dim != width else nn.Identity()
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = TransformerEncoder(width, depth, num_heads)
        self.norm = nn.LayerNorm(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None

    def group(self, clouds: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Divide each cloud (N, 3) into groups (G, K, 3), relative to their centers (G, 3); meters.

        Raises:
            ValueError: a cloud has fewer points than `min_points`.
        """
        for points in clouds:
            if len(points) < self.min_points:
                raise ValueError(
                    f"{len(points)} valid points, but {self.num_group} groups of {self.group_size} points need at "
                    f"least {self.min_points}"
                )
        padded = pad_sequence(list(clouds), batch_first=True)  # with points that are never picked: zeros
        divided = []
        for points, picks in zip(clouds, farthest_point_sample(padded, self.num_group, self.point_ops), strict=True):
            centers = points[picks]
            _, neighbors = knn(centers[None], points[None], self.group_size, self.point_ops)
            divided.append((points[neighbors[0]] - centers[:, None], centers))
        return divided

    def forward(self, clouds: Sequence[Tensor]) -> list[PointFeatures]:
        """Extract the tokens of some clouds, which go through the blocks together.

        Args:
            clouds: (N, 3) float32 each, meters, camera frame, valid points only.

        Returns:
            of each cloud, features (num_group, embed_dim): outputs of the three taken blocks through the final norm,
            concatenated; centers (num_group, 3).
        """
        groups, centers = zip(*self.group(clouds), strict=True)
        tokens = torch.stack([self.reduce_dim(self.encoder(of_cloud)) for of_cloud in groups])  # (B, G, width)
        with torch.autocast(tokens.device.type, enabled=False):  # in bf16 the centers would move by a millimeter
            position = self.pos_embed(torch.stack(centers))
        if self.cls_token is not None and self.cls_pos is not None:
            size = (len(groups), -1, -1)
            tokens = torch.cat([self.cls_token.expand(size), tokens], dim=1)
            position = torch.cat([self.cls_pos.expand(size), position], dim=1)
        outputs = [self.norm(output)[:, -self.num_group :] for output in self.blocks(tokens, position, self.taken)]
        return [PointFeatures(*each) for each in zip(torch.cat(outputs, dim=2), centers, strict=True)]

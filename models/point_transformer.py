"""Point-MAE and Point-BERT as feature extractors: a cloud becomes groups, groups become tokens.

Point-MAE: Pang et al., ECCV 2022. Point-BERT: Yu et al., CVPR 2022. Module names are those of the published
checkpoints. Coordinates are raw metres: nothing is scaled to the unit sphere.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.point_ops import farthest_point_sample, knn
from models.transformer import TransformerEncoder

POINT_NORMS = ("cloud", "running")


class PointFeatures(NamedTuple):
    """Features of a cloud, at group centres or at every point."""

    features: Tensor  # (G, C), or (N, C) where centers is None
    centers: Tensor | None  # (G, 3) metres; None: one feature row for each point, in the points' order


class PointBackbone(nn.Module):
    """A network of the 3D branch: valid points (N, 3) float32, metres, N >= min_points -> PointFeatures."""

    embed_dim: int
    min_points: int


class GroupEncoder(nn.Module):
    """Mini-PointNet: the points of a group become one token.

    Conv1d 3-128, BN, ReLU, 128-256; the group's maximum in front of each point's feature (512); Conv1d 512-512, BN,
    ReLU, 512-C; maximum. The first half of the 512-wide layer acts on the group maximum, which is one vector a
    group, so it is computed once a group instead of once a point.

    Args:
        out_dim: C, width of the token.
        point_norm: "cloud" normalises with the statistics of the current cloud's groups, as the reference does (it
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
            groups: (G, K, 3) float32, metres, relative to each group's centre.

        Returns:
            (G, C) tokens.
        """
        per_group = groups.shape[:2]
        # Channels first, (C, G * K): there batch norm accumulates its statistics in double precision on the CPU.
        hidden = self._norm_relu(_pointwise(self.first_conv[0], groups.flatten(0, 1).T), self.first_conv[1])
        local = _pointwise(self.first_conv[3], hidden)  # (256, G * K)
        mixing = self.second_conv[0]
        assert isinstance(mixing, nn.Conv1d)
        assert mixing.bias is not None
        on_maximum, on_local = mixing.weight.squeeze(-1).chunk(2, dim=1)  # (512, 256) each
        maximum = local.unflatten(1, per_group).amax(dim=2)  # (256, G)
        from_maximum = torch.addmm(mixing.bias[:, None], on_maximum, maximum)  # (512, G)
        hidden = (on_local @ local).unflatten(1, per_group).add_(from_maximum[:, :, None]).flatten(1)  # (512, G * K)
        hidden = self._norm_relu(hidden, self.second_conv[1])
        return _pointwise(self.second_conv[3], hidden).unflatten(1, per_group).amax(dim=2).T  # (C, G) -> (G, C)

    def _norm_relu(self, values: Tensor, norm: nn.Module) -> Tensor:
        assert isinstance(norm, nn.BatchNorm1d)
        mean, variance = (None, None) if self.point_norm == "cloud" else (norm.running_mean, norm.running_var)
        normalised = F.batch_norm(
            values[None], mean, variance, norm.weight, norm.bias, training=mean is None, eps=norm.eps
        )
        return normalised[0].relu_()


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

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Divide a cloud (N, 3) into groups (G, K, 3), relative to their centres (G, 3); metres.

        Raises:
            ValueError: the cloud has fewer points than `min_points`.
        """
        if len(points) < self.min_points:
            raise ValueError(
                f"{len(points)} valid points, but {self.num_group} groups of {self.group_size} points need at least "
                f"{self.min_points}"
            )
        picks = farthest_point_sample(points[None], self.num_group, self.point_ops)[0]
        centers = points[picks]
        _, neighbors = knn(centers[None], points[None], self.group_size, self.point_ops)
        return points[neighbors[0]] - centers[:, None], centers

    def forward(self, points: Tensor) -> PointFeatures:
        """Extract the tokens of one cloud.

        Args:
            points: (N, 3) float32, metres, camera frame, valid points only.

        Returns:
            features (num_group, embed_dim): outputs of the three taken blocks through the final norm, concatenated;
            centers (num_group, 3).
        """
        groups, centers = self.group(points)
        tokens = self.reduce_dim(self.encoder(groups))[None]
        position = self.pos_embed(centers)[None]
        if self.cls_token is not None and self.cls_pos is not None:
            tokens = torch.cat([self.cls_token, tokens], dim=1)
            position = torch.cat([self.cls_pos, position], dim=1)
        outputs = [self.norm(output)[0, -self.num_group :] for output in self.blocks(tokens, position, self.taken)]
        return PointFeatures(torch.cat(outputs, dim=1), centers)


def _pointwise(conv: nn.Module, columns: Tensor) -> Tensor:
    """A Conv1d of kernel 1 on columns (C_in, R) -> (C_out, R)."""
    assert isinstance(conv, nn.Conv1d)
    assert conv.bias is not None
    return torch.addmm(conv.bias[:, None], conv.weight.squeeze(-1), columns)

"""Point-MAE (Pang et al., ECCV 2022) and Point-BERT (Yu et al., CVPR 2022): transformers on groups of points.

Module names are those of the published checkpoints. Coordinates are raw meters, not scaled to the unit sphere.
Plain form: `reference.PointTransformer`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.group_encoder import GroupEncoder
from models.point_ops import farthest_point_sample, knn

FAR = 1e4  # meters; coordinates of padding points, which are too far away to be neighbors of any center


class PointFeatures(NamedTuple):
    """Features of a cloud, at group centers or at every point."""

    features: Tensor  # (G, C), or (N, C) where centers is None
    centers: Tensor | None  # (G, 3) meters; None: one feature row for each point, in the points' order


class PointBackbone(nn.Module):
    """Network of the 3D branch: clouds of valid points (N, 3) float32, meters, N >= min_points -> PointFeatures each.

    N may differ between clouds, and features do not depend on the other clouds of the batch, up to rounding.
    """

    embed_dim: int
    min_points: int


class PointTransformer(PointBackbone):
    """Point-MAE, or with `class_token` Point-BERT, up to the tokens that M3DM uses.

    `num_group` groups of `group_size` points become tokens, which `depth` blocks of `num_heads` heads transform. Three
    blocks' outputs are concatenated, so `embed_dim` is 3 * `width`. The group encoder's token is `encoder_dim` wide; a
    Linear maps it to `width` where the two differ. For `point_norm` see GroupEncoder, for `point_ops` models.point_ops.
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
        from timm.models.vision_transformer import Block

        super().__init__()
        self.num_group, self.group_size, self.point_ops = num_group, group_size, point_ops
        self.min_points = max(num_group, group_size)
        self.taken = (depth // 3 - 1, 2 * depth // 3 - 1, depth - 1)  # blocks 4, 8 and 12 of twelve
        self.embed_dim = width * len(self.taken)
        self.encoder = GroupEncoder(encoder_dim, point_norm)
        self.reduce_dim = nn.Linear(encoder_dim, width) if encoder_dim != width else nn.Identity()
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        blocks = (Block(width, num_heads, mlp_ratio=4.0, qkv_bias=False, norm_layer=nn.LayerNorm) for _ in range(depth))
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.norm = nn.LayerNorm(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None

    def forward(self, clouds: Sequence[Tensor]) -> list[PointFeatures]:
        """Extract features (num_group, embed_dim) of three blocks and centers (num_group, 3) of clouds (N, 3)."""
        return self.encode(*self.group(clouds))

    def encode(self, groups: Tensor, centers: Tensor) -> list[PointFeatures]:
        """Extract the features of `forward` from the groups (B, G, K, 3) and centers (B, G, 3) of B clouds."""
        tokens = torch.stack([self.reduce_dim(self.encoder(of_cloud)) for of_cloud in groups])  # (B, G, width)
        with torch.autocast(tokens.device.type, enabled=False):  # in bf16 the centers would move by a millimeter
            position = self.pos_embed(centers)  # (B, G, width)
        if self.cls_token is not None and self.cls_pos is not None:
            size = (len(groups), -1, -1)
            tokens = torch.cat([self.cls_token.expand(size), tokens], dim=1)  # (B, 1 + G, width)
            position = torch.cat([self.cls_pos.expand(size), position], dim=1)
        outputs = []
        for index, block in enumerate(self.blocks["blocks"].children()):
            tokens = block(tokens + position)
            if index in self.taken:
                outputs.append(self.norm(tokens)[:, -self.num_group :])
        features = torch.cat(outputs, dim=2)  # (B, G, 3 * width)
        return [PointFeatures(*each) for each in zip(features, centers, strict=True)]

    def group(self, clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Divide B clouds (N, 3) into groups (B, G, K, 3), relative to centers (B, G, 3).

        N may differ between clouds. Raises ValueError if a cloud has fewer than `min_points` points.
        """
        if (fewest := min(map(len, clouds))) < self.min_points:
            needed = f"{self.num_group} groups of {self.group_size} points need at least {self.min_points}"
            raise ValueError(f"{fewest} valid points, but {needed}")
        points = pad_sequence(list(clouds), batch_first=True)  # padded with zeros, which are never picked
        picks = farthest_point_sample(points, self.num_group, self.point_ops)
        batch = torch.arange(len(clouds), device=points.device)
        centers = points[batch[:, None], picks]
        points = pad_sequence(list(clouds), batch_first=True, padding_value=FAR)
        _, neighbors = knn(centers, points, self.group_size, self.point_ops)
        return points[batch[:, None, None], neighbors] - centers[:, :, None], centers

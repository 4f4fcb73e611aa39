"""Reading checkpoints as their authors publish them: find the file, read it safely, load it strictly.

Nothing is unpickled but tensors, plain containers, argparse.Namespace and NumPy scalars (which published files
contain beside the weights); a key that is missing or left over is an error that names it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import InputError

State = dict[str, Tensor]


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load `state` into `module`; every key must fit.

    Raises:
        InputError: keys are missing, left over or of another shape; names them and the file.
    """
    expected = module.state_dict()
    problems = [
        _listed("missing", expected.keys() - state.keys()),
        _listed("left over", state.keys() - expected.keys()),
        _listed(
            "of another shape",
            {
                f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
                for key, value in expected.items()
                if key in state and state[key].shape != value.shape
            },
        ),
    ]
    if any(problems):
        raise InputError(
            f"{path} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}. "
            "Check that the file belongs to the chosen backbone."
        )
    module.load_state_dict(dict(state))


def weights_checksum(module: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a network's weights: names, dtypes, shapes and bytes of its state dict, by name.

    It depends on the weights alone, not on the name and format of their file.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def point_transformer_state(raw: Any, path: Path, prefix: str, left_out: Sequence[str]) -> State:
    """Weights whose keys have the prefix, which is removed; keys that begin like one of `left_out` then are not used.

    A file holds more: the decoder of Point-MAE; the momentum copy, queue and class head of Point-BERT.
    """
    tensors = _tensors(raw, path, ("base_model",))
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not state:
        some = ", ".join(sorted(tensors)[:3])
        raise InputError(f"{path} has no key that starts with {prefix!r} (but {some}, …). It is another model's file.")
    return {key: value for key, value in state.items() if not key.startswith(tuple(left_out))}


def vision_transformer_state(raw: Any, path: Path) -> State:
    """Weights in timm names: flat, or under `state_dict` or `teacher`; heads and their pooling are left out."""
    state = {
        key.removeprefix("backbone."): value for key, value in _tensors(raw, path, ("teacher", "state_dict")).items()
    }
    return {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist.", "attn_pool."))}


def feature_fusion_state(raw: Any, path: Path) -> State:
    """Weights of a UFF checkpoint, under `model`."""
    return _tensors(raw, path, ("model",))


def _tensors(raw: Any, path: Path, containers: Sequence[str]) -> State:
    """The state dict inside one of `containers`, or `raw` itself; prefixes of parallel training are removed."""
    if isinstance(raw, Mapping):
        raw = next((raw[name] for name in containers if name in raw), raw)
    if (
        not isinstance(raw, Mapping)
        or not raw
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in raw.items())
    ):
        raise InputError(
            f"{path} holds no state dict, flat or under {' or '.join(map(repr, containers))}. "
            "Check that it is the published file."
        )
    return {key.removeprefix("module."): value for key, value in raw.items()}


def _listed(what: str, keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"{what}: {shown}" if keys else ""

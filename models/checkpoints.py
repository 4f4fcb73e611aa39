"""Reading checkpoints as their authors publish them: find the file, read it safely, load it strictly.

Nothing is unpickled but tensors, plain containers, argparse.Namespace and NumPy scalars (which published files
contain beside the weights); a key that is missing or left over is an error that names it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError

State = dict[str, Tensor]


class CheckpointFiles(NamedTuple):
    """The names a file goes by in the checkpoint folder, and where its authors publish it."""

    names: tuple[str, ...]
    source: str

    def find(self, folder: Path) -> Path | None:
        """The first of the names that is a file in `folder`; None where none is."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def missing(self, folder: Path, tried: str = "") -> InputError:
        """The error that none is there: which names were looked for, where, and where the authors publish the file.

        `tried` says what else was done to get it.
        """
        return InputError(
            f"no checkpoint {' or '.join(self.names)} in {folder}{tried}: "
            f"download it from {self.source} and put it there"
        )

    def __str__(self) -> str:
        return f"{' or '.join(self.names)}, from {self.source}"


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


def point_mae_state(raw: Any, path: Path) -> State:
    """Encoder weights of a Point-MAE file: prefix `MAE_encoder.`; the decoder's keys are left out."""
    return _with_prefix(_tensors(raw, path, ("base_model",)), "MAE_encoder.", path)


def point_bert_state(raw: Any, path: Path) -> State:
    """Weights of a Point-BERT file: prefix `transformer_q.`; the momentum copy, queue and class head are left out."""
    state = _with_prefix(_tensors(raw, path, ("base_model",)), "transformer_q.", path)
    return {key: value for key, value in state.items() if not key.startswith("cls_head.")}


def vision_transformer_state(raw: Any, path: Path) -> State:
    """Weights in timm names: flat, or under `state_dict` or `teacher`; heads and their pooling are left out."""
    state = {
        key.removeprefix("backbone."): value for key, value in _tensors(raw, path, ("teacher", "state_dict")).items()
    }
    return {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist.", "attn_pool."))}


def feature_fusion_state(raw: Any, path: Path) -> State:
    """Weights of a UFF checkpoint, under `model`."""
    return _tensors(raw, path, ("model",))


def load_from(path: Path, module: nn.Module, state_of: Callable[[Any, Path], State]) -> None:
    """Read `path`, pick the module's weights with `state_of` and load them strictly."""
    load_strict(module, state_of(read_checkpoint(path), path), path)


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


def _with_prefix(state: State, prefix: str, path: Path) -> State:
    chosen = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not chosen:
        some = ", ".join(sorted(state)[:3])
        raise InputError(f"{path} has no key that starts with {prefix!r} (but {some}, …). It is another model's file.")
    return chosen


def _listed(what: str, keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"{what}: {shown}" if keys else ""

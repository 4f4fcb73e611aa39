"""Reader of checkpoint files that only unpickles tensors and plain values."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError

# Published files also contain argparse.Namespace and NumPy scalars, whose constructor has another name in NumPy 1.
_NUMPY_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")),
]
_FIX = "Download it again, or write it again if it is your own."


def check_checkpoint(path: Path) -> None:
    """Raise InputError unless `path` is a file; for use before a network is built, which may take a minute."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"Checkpoint {path} {problem}. Check the path or train it first.")


def read_checkpoint(path: Path) -> Any:
    """Read a file written by torch.save, with weights_only=True, or a .safetensors file onto the CPU.

    Raises InputError if the file is absent, damaged, no checkpoint, or holds objects that are not allowed.
    """
    check_checkpoint(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only the name is shown: torch's message also explains how to unpickle everything.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it holds a {named[1]}" if named else "it is damaged or not a checkpoint"
        allowed = "only tensors, plain containers, argparse.Namespace and NumPy scalars are unpickled"
        raise InputError(f"{path} is refused: {found}, and {allowed}. {_FIX}") from None
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint ({reason}). {_FIX}") from None

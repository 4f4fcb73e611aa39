"""Checkpoints of UFF training, from which an interrupted run continues to the same end."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from runner.pretrain_config import Progress
from utils.checkpoint_files import read_checkpoint
from utils.errors import InputError
from utils.scans.files import atomic_path


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, args: argparse.Namespace
) -> None:
    """Write the original's {'model', 'optimizer', 'epoch', 'scaler', 'args'}, and in addition 'progress' and 'rng'.

    'epoch' is the last one finished, -1 within the first. 'scaler' is empty, for readers of the original's files.
    """
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": progress.epoch - 1}
    checkpoint |= {"scaler": {}, "args": args, "progress": asdict(progress), "rng": torch.get_rng_state()}
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    binding: Sequence[str] = (),
) -> Progress:
    """Restore model, optimizer and random numbers of a checkpoint, and return its progress.

    A checkpoint of the original code, which has no progress, continues after its epoch. The settings `args` of this run
    have to equal those of the checkpoint in the names of `binding`, on which the rest of an epoch depends.

    Raises:
        InputError: no such file, a damaged one, one of another model, or one written with other settings.
    """
    checkpoint = read_checkpoint(Path(path))
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if "progress" not in checkpoint:
            return Progress(epoch=int(checkpoint["epoch"]) + 1)
        progress = Progress(**checkpoint["progress"])
        torch.set_rng_state(checkpoint["rng"])
        written = vars(checkpoint["args"])
    except RuntimeError as error:
        raise InputError(f"{path} does not fit this model: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no checkpoint of this training: {error!r}. Check the path.") from None
    for name in binding:
        if written.get(name) != getattr(args, name):
            raise InputError(
                f"{path} was written with --{name} {written.get(name)}, not {getattr(args, name)}. "
                "Resume with the flags that it was written with."
            )
    return progress

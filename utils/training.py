"""The training loop of UFF: learning-rate schedule, loader, one epoch, checkpoints. The model comes as an argument."""

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from utils.checkpoint_files import read_checkpoint
from utils.distributed import Ranks, all_reduce_mean, is_main
from utils.errors import InputError
from utils.files import atomic_path

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
BETAS = (0.9, 0.95)  # of AdamW, as in masked autoencoders, from which the recipe comes

Batches = DataLoader[tuple[Tensor, Tensor]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Linear from 0 to `peak_lr` over the warm-up, then half a cosine down to `min_lr` at the last epoch's end."""

    peak_lr: float
    min_lr: float
    warmup_epochs: int
    epochs: int

    def learning_rate(self, epoch: float) -> float:
        """Learning rate at a fractional epoch in [0, epochs)."""
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Step(NamedTuple):
    """What happened in one micro-batch."""

    epoch: float  # fractional, at the begin of the micro-batch
    lr: float
    loss: float  # mean over the processes, not divided by accum_iter
    rows: int  # patches contrasted in this process
    grad_norm: float | None  # L2, of the accumulated gradient; None where the accumulation group goes on


def make_loader(
    dataset: Dataset[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    accum_iter: int,
    ranks: Ranks,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> Batches:
    """Shuffled whole batches of this process's share of the dataset; the order depends on `seed` and epoch alone.

    Raises:
        InputError: an epoch would hold no batch, or too few of them for a single update.
    """
    files = len(dataset)  # type: ignore[arg-type]
    share = math.ceil(files / ranks.world_size)
    steps = share // batch_size
    if steps == 0:
        raise InputError(
            f"found {files} patch files for {ranks.world_size} process(es), fewer than one batch of {batch_size} each: "
            f"give --batch_size {share} or less"
        )
    if steps < accum_iter:
        raise InputError(
            f"an epoch has {steps} batches ({files} files, batch size {batch_size}, {ranks.world_size} process(es)), "
            f"fewer than the {accum_iter} that make one update: give --accum_iter {steps} or less"
        )
    if steps % accum_iter and is_main():
        logger.warning(
            "the last %d of %d batches of an epoch make no whole accumulation group of %d and lead to no update",
            *(steps % accum_iter, steps, accum_iter),
        )
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(
        dataset, num_replicas=ranks.world_size, rank=ranks.rank, shuffle=True, seed=seed
    )
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters alike. Its learning rate is 0 until `train_epoch` sets the schedule's."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=weight_decay)


def train_epoch(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epoch: int,
    *,
    accum_iter: int,
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[Step]:
    """Train for one epoch, one `Step` per micro-batch; nothing happens but what is iterated over.

    Gradients of `accum_iter` micro-batches are averaged into one update. Batches at the epoch's end that make no
    whole group lead to no update: their gradient is dropped when the next epoch begins, as in the reference.

    Args:
        model: (xyz (B, P, C_xyz), rgb (B, P, C_rgb)) -> the two arguments of `loss_of`; may be wrapped for DDP, then
            each process contrasts its own rows and the gradients are averaged.
        loss_of: gives the () loss, called outside of autocast.
        precision: "fp32" or "bf16" (autocast of the model).

    Raises:
        InputError: the loss is not finite; in all processes alike.
    """
    model.train()
    optimizer.zero_grad()
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    for index, (xyz, rgb) in enumerate(_batches(loader)):
        progress = index / len(loader) + epoch
        if index % accum_iter == 0:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(progress)
        lr = optimizer.param_groups[0]["lr"]
        update = (index + 1) % accum_iter == 0
        with _gradient_sync(model, update):
            with torch.autocast(device.type, AUTOCAST[precision], enabled=AUTOCAST[precision] is not None):
                heads = model(xyz.to(device, non_blocking=True), rgb.to(device, non_blocking=True))
            loss = loss_of(*heads)
            mean_loss = all_reduce_mean(loss)
            if not math.isfinite(mean_loss):
                raise InputError(
                    f"the loss is {mean_loss} at epoch {epoch}, batch {index}, learning rate {lr:g}: "
                    "training has diverged; lower --lr or --blr"
                )
            (loss / accum_iter).backward()
        grad_norm = None
        if update:
            grad_norm = _gradient_norm(model)
            optimizer.step()
            optimizer.zero_grad()
        yield Step(progress, lr, mean_loss, len(heads[0]), grad_norm)


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    args: argparse.Namespace,
) -> None:
    """Write {'model', 'optimizer', 'epoch', 'scaler', 'args'}, the original's layout; epoch is the last one run."""
    # Nothing here scales a loss: the entry is there for readers of the original's files.
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "scaler": {},
        "args": args,
    }
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put model and optimizer back to where `save_checkpoint` met them.

    Returns:
        The epoch to go on with.

    Raises:
        InputError: no such file, a damaged one, or one of another model.
    """
    checkpoint = read_checkpoint(Path(path))
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return int(checkpoint["epoch"]) + 1
    except RuntimeError as error:
        raise InputError(f"{path} cannot be resumed from: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no checkpoint of this training: {error!r}") from None


def _batches(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader`, on whose way an error of a worker process loses the traceback inside its message."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None


def _gradient_sync(model: nn.Module, update: bool) -> AbstractContextManager[None]:
    """Average gradients between processes only in the micro-batch that leads to an update."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not update else nullcontext()


def _gradient_norm(model: nn.Module) -> float:
    norms = [torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)).item()

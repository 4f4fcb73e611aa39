"""Steps of UFF training: learning rate, loader, one epoch. runner/pretraining.py puts them together."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from runner.pretrain_config import PretrainConfig, Progress
from utils.distributed import Ranks, all_reduce_sum, broadcast_object, gather_objects, world_size
from utils.errors import InputError
from utils.precision import autocast

BETAS = (0.9, 0.95)  # of AdamW, as in masked autoencoders, the source of the recipe

FIX_DIVERGENCE = "Lower --lr or --blr, and continue from the last checkpoint with --resume."

Batches = DataLoader[tuple[Tensor, Tensor, int]]  # collated: (B, P, C) patches, and the indices (B,) of their files


class Step(NamedTuple):
    """Result of one micro-batch."""

    epoch: float  # fractional, at the start of the micro-batch
    lr: float
    loss: float  # mean over the ranks, not divided by the size of the accumulation group
    rows: int  # patches contrasted in this process
    grad_norm: float | None  # L2, of the accumulated gradient; None if no update was made
    mean_lr: float  # over the micro-batches of this epoch so far
    mean_loss: float
    last: bool  # of the epoch


class _EpochBatches(BatchSampler):
    """Whole batches of a DistributedSampler; an epoch can start at any batch, and then reads nothing twice."""

    first = 0

    def start(self, epoch: int, batch: int) -> None:
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(epoch)
        self.first = batch

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.first, None)


def split_files(count: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the files to train on and to validate on, each ascending; the choice depends on `seed` alone.

    Raises:
        InputError: one of the two would be empty.
    """
    held_out = round(count * val_fraction)
    if val_fraction > 0 and not 0 < held_out < count:
        raise InputError(
            f"--val_fraction {val_fraction} of {count} patch files is {held_out}. Choose a fraction that leaves files "
            "on both sides, or 0 for no validation."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def make_loader(
    dataset: Dataset[tuple[Tensor, Tensor, int]], config: PretrainConfig, ranks: Ranks, pin_memory: bool = False
) -> Batches:
    """Shuffled whole batches of this rank's share of the dataset; the order depends on `seed` and epoch alone.

    Raises:
        InputError: an epoch would hold no batch, or with --drop_last_group too few for a single update.
    """
    files, size = len(dataset), config.batch_size  # type: ignore[arg-type]
    share = math.ceil(files / ranks.world_size)
    batches = share // size
    if batches == 0:
        raise InputError(
            f"{files} patch files for {ranks.world_size} process(es) are fewer than one batch of {size} each. "
            f"Give --batch_size {share} or less."
        )
    if config.drop_last_group and batches < config.accum_iter:
        raise InputError(
            f"An epoch has {batches} batches ({files} files, batch size {size}, {ranks.world_size} process(es)), "
            f"fewer than the {config.accum_iter} of one update. Give --accum_iter {batches} or less."
        )
    sampler: DistributedSampler[tuple[Tensor, Tensor, int]] = DistributedSampler(
        dataset, ranks.world_size, ranks.rank, shuffle=True, seed=config.seed
    )
    return DataLoader(
        dataset,
        batch_sampler=_EpochBatches(sampler, size, drop_last=True),  # type: ignore[arg-type]
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        persistent_workers=config.num_workers > 0,
    )


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters alike. Its learning rate is 0 until `Trainer` sets the schedule's."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=weight_decay)


@dataclass
class Trainer:
    """One epoch after another of UFF training."""

    config: PretrainConfig
    model: nn.Module  # (xyz (B, P, C_xyz), rgb (B, P, C_rgb)) -> arguments of `loss_of`; in DDP for several ranks
    loss_of: Callable[[Tensor, Tensor], Tensor]  # () loss, computed outside of autocast
    loader: Batches  # of `make_loader`
    optimizer: torch.optim.Optimizer
    progress: Progress  # where to begin; kept up to date
    device: torch.device
    name_of: Callable[[int], str] = str  # name of the file of an index, for messages

    def train_epoch(self) -> Iterator[Step]:
        """Train for the rest of an epoch, one `Step` per micro-batch.

        Gradients of `accum_iter` micro-batches are averaged into one update, with the learning rate at the start of
        the group. Training advances only as the steps are taken: after a `Step` with a gradient norm, model, optimizer
        and `progress` fit together and can be saved.

        Raises:
            InputError: the loss or the gradient is not finite; in all ranks alike.
        """
        progress, count, accum_iter = self.progress, len(self.loader), self.config.accum_iter
        schedule = self.config.schedule
        group_files: list[str] = []
        assert isinstance(self.loader.batch_sampler, _EpochBatches)
        self.loader.batch_sampler.start(progress.epoch, progress.batch)
        self.model.train()
        self.optimizer.zero_grad()
        for index, (xyz, rgb, indices) in enumerate(_batches(self.loader), start=progress.batch):
            epoch, place = index / count + progress.epoch, index % accum_iter
            if place == 0:  # a new accumulation group
                group_files = []
                lr = schedule.learning_rate(progress.updates if schedule.in_updates else epoch)
                for parameters in self.optimizer.param_groups:
                    parameters["lr"] = lr
            files = [self.name_of(int(each)) for each in indices]
            group_files += files
            size = accum_iter if self.config.drop_last_group else min(accum_iter, count - index + place)
            update = place == size - 1
            with _gradient_sync(self.model, update):
                with autocast(self.device, self.config.precision):
                    heads = self.model(*(each.to(self.device, non_blocking=True) for each in (xyz, rgb)))
                loss = self.loss_of(*heads)
                mean_loss = all_reduce_sum(loss.detach()).item() / world_size()
                self._check_loss(mean_loss, index, [] if torch.isfinite(loss) else files)
                (loss / size).backward()
            progress.loss_sum += mean_loss
            progress.lr_sum += lr
            grad_norm = self._update(index, group_files) if update else None
            means = progress.lr_sum / (index + 1), progress.loss_sum / (index + 1)
            yield Step(epoch, lr, mean_loss, len(heads[0]), grad_norm, *means, last=index + 1 == count)
        progress.epoch, progress.batch, progress.loss_sum, progress.lr_sum = progress.epoch + 1, 0, 0.0, 0.0

    def _check_loss(self, loss: float, index: int, suspects: list[str]) -> None:
        if math.isfinite(loss):
            return
        lr = self.optimizer.param_groups[0]["lr"]
        files = broadcast_object(gather_objects(suspects))
        raise InputError(
            f"The loss is {loss} at epoch {self.progress.epoch}, batch {index}, learning rate {lr:g}: training has "
            f"diverged, or one of these files is bad: {', '.join(files)}. {FIX_DIVERGENCE}"
        )

    def _update(self, index: int, group_files: list[str]) -> float:
        """Let the optimizer take a step after micro-batch `index`; returns the L2 norm of the gradient."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients])).item()
        if not math.isfinite(norm):
            files = broadcast_object(gather_objects(group_files))
            raise InputError(
                f"The gradient is not finite at epoch {self.progress.epoch}, batch {index}, though the loss is. Check "
                f"the values of these files, or lower --lr or --blr: {', '.join(files)}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.grad_norm = norm
        self.progress.batch = index + 1
        self.progress.updates += 1
        return norm


def _batches(loader: Batches) -> Iterator[Any]:
    """The batches of `loader`. An error in a worker process is raised without the traceback in its message."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None


def _gradient_sync(model: nn.Module, update: bool) -> AbstractContextManager[None]:
    """Average gradients between ranks only in the micro-batch that leads to an update."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not update else nullcontext()

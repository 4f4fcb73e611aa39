"""Steps of UFF training: loader, optimizer, one epoch, checkpoints. runner/pretraining.py puts them together."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from runner.pretrain_config import FIX_DIVERGENCE, PretrainConfig, Progress
from utils.checkpoint_files import read_checkpoint
from utils.distributed import Ranks, all_reduce_sum, broadcast_object, gather_objects, world_size
from utils.errors import InputError
from utils.precision import autocast
from utils.scans.files import atomic_path

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
    """Batches of a DistributedSampler that can start in the middle of an epoch without reading the earlier files."""

    first = 0

    def start(self, epoch: int, batch: int) -> None:
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(epoch)
        self.first = batch

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.first, None)


def split_files(count: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the files to train on and to validate on, each ascending; the choice depends on `seed` alone.

    Raises InputError if one of the two would be empty.
    """
    held_out = round(count * val_fraction)
    if val_fraction > 0 and not 0 < held_out < count:
        problem = f"--val_fraction {val_fraction} of {count} patch files is {held_out}"
        raise InputError(f"{problem}. Choose 0, or a share that leaves files for both training and validation.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def make_loader(
    dataset: Dataset[tuple[Tensor, Tensor, int]], config: PretrainConfig, ranks: Ranks, pin_memory: bool = False
) -> Batches:
    """Shuffled whole batches of this rank's share of the dataset; the order depends on `seed` and epoch alone.

    Raises InputError if an epoch would hold no batch, or with --drop_last_group too few for a single update.
    """
    files, size = len(dataset), config.batch_size  # type: ignore[arg-type]
    share = math.ceil(files / ranks.world_size)
    batches = share // size
    if batches == 0:
        problem = f"{files} patch files for {ranks.world_size} process(es) are fewer than one batch of {size} each"
        raise InputError(f"{problem}. Give --batch_size {share} or less.")
    if config.drop_last_group and batches < config.accum_iter:
        problem = f"An epoch has {batches} batches, fewer than the {config.accum_iter} of one update"
        raise InputError(f"{problem}. Give --accum_iter {batches} or less.")
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks.world_size, ranks.rank, seed=config.seed)
    epoch, workers = _EpochBatches(sampler, size, drop_last=True), config.num_workers
    return DataLoader(
        dataset, batch_sampler=epoch, num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0
    )


def make_optimizer(model: nn.Module, weight_decay: float) -> AdamW:
    """AdamW over all parameters, with the betas of masked autoencoders. `Trainer` sets the learning rate."""
    return AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)


@dataclass
class Trainer:
    """UFF training, one epoch at a time."""

    config: PretrainConfig
    model: nn.Module  # (xyz (B, P, C_xyz), rgb (B, P, C_rgb)) -> arguments of `loss_of`; DDP for several ranks
    loss_of: Callable[[Tensor, Tensor], Tensor]  # returns the scalar loss; called outside of autocast
    loader: Batches  # of `make_loader`
    optimizer: Optimizer
    progress: Progress  # starting point; kept up to date
    device: torch.device
    name_of: Callable[[int], str] = str  # file name for an index of the dataset, for messages

    def train_epoch(self) -> Iterator[Step]:
        """Train for the rest of an epoch, one `Step` per micro-batch.

        Gradients of `accum_iter` micro-batches are averaged into one update, with the learning rate at the start of the
        group. After a `Step` with a gradient norm, model, optimizer and `progress` can be saved. Raises InputError if
        the loss or the gradient is not finite, on every rank.
        """
        progress, count, accum_iter = self.progress, len(self.loader), self.config.accum_iter
        schedule = self.config.schedule
        replica = self.model if isinstance(self.model, DistributedDataParallel) else None
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
            with replica.no_sync() if replica and not update else nullcontext():  # ranks average at the update
                with autocast(self.device, self.config.precision):
                    heads = self.model(*(each.to(self.device, non_blocking=True) for each in (xyz, rgb)))
                loss = self.loss_of(*heads)
                mean_loss = all_reduce_sum(loss.detach()).item() / world_size()
                if not math.isfinite(mean_loss):
                    suspects = broadcast_object(gather_objects([] if torch.isfinite(loss) else files))
                    where = f"epoch {progress.epoch}, batch {index}, learning rate {lr:g}"
                    reasons = f"Training has diverged, or one of these files is bad: {', '.join(suspects)}"
                    raise InputError(f"The loss is {mean_loss} at {where}. {reasons}. {FIX_DIVERGENCE}")
                (loss / size).backward()
            progress.loss_sum += mean_loss
            progress.lr_sum += lr
            grad_norm = self._update(index, group_files) if update else None
            means = progress.lr_sum / (index + 1), progress.loss_sum / (index + 1)
            yield Step(epoch, lr, mean_loss, len(heads[0]), grad_norm, *means, last=index + 1 == count)
        progress.epoch, progress.batch, progress.loss_sum, progress.lr_sum = progress.epoch + 1, 0, 0.0, 0.0

    def _update(self, index: int, group_files: list[str]) -> float:
        """Update the weights after micro-batch `index`, and return the L2 norm of the gradient."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(norm):
            files = ", ".join(broadcast_object(gather_objects(group_files)))
            problem = f"The gradient is not finite at epoch {self.progress.epoch}, batch {index}, though the loss is"
            raise InputError(f"{problem}. Lower --lr or --blr, or check the values of {files}.")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.grad_norm, self.progress.batch = norm, index + 1
        self.progress.updates += 1
        return norm


def _batches(loader: Batches) -> Iterator[Any]:
    """The batches of `loader`. An error in a worker process is raised without the traceback in its message."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, args: argparse.Namespace
) -> None:
    """Write the entries of the original, 'model', 'optimizer', 'epoch', 'scaler' and 'args', and 'progress' and 'rng'.

    'epoch' is the last one finished, -1 within the first. 'scaler' is empty; readers of the original's files expect it.
    """
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": progress.epoch - 1}
    checkpoint |= {"scaler": {}, "args": args, "progress": asdict(progress), "rng": torch.get_rng_state()}
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(
    path: Path | str, model: nn.Module, optimizer: Optimizer, args: argparse.Namespace, fixed: Sequence[str] = ()
) -> Progress:
    """Restore model, optimizer and random numbers of a checkpoint, and return its progress.

    A checkpoint of the original code, which holds no progress, continues after its epoch. Raises InputError if the file
    is missing, damaged or of another model, or its args differ from `args` in a name of `fixed`.
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
        problem = f"{path} does not fit this model: {' '.join(str(error).split()).rstrip('.')}"
        raise InputError(f"{problem}. Check the path.") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a checkpoint of this training: {error!r}. Check the path.") from None
    for name in fixed:
        before, now = written.get(name), getattr(args, name)
        if before != now:
            problem = f"{path} was written with --{name} {before}, not {now}"
            raise InputError(f"{problem}. Resume with the flags that it was written with.")
    return progress

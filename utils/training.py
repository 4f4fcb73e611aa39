"""The training loop of UFF: learning-rate schedule, loader, one epoch, checkpoints. The model comes as an argument."""

import argparse
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from utils.checkpoint_files import read_checkpoint
from utils.distributed import Ranks, all_reduce_mean, gather_names
from utils.errors import InputError
from utils.precision import autocast
from utils.scans.files import atomic_path

BETAS = (0.9, 0.95)  # of AdamW, as in masked autoencoders, from which the recipe comes

Batches = DataLoader[tuple[Tensor, Tensor, int]]  # collated: (B, P, C) patches, and the indices (B,) of their files
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Linear from 0 to `peak_lr` over the warm-up, then half a cosine down to `min_lr` at the end.

    Warm-up and total are counted in epochs, or in updates where `in_updates` is set.
    """

    peak_lr: float
    min_lr: float
    warmup: float
    total: float
    in_updates: bool = False

    def learning_rate(self, progress: float) -> float:
        """Learning rate at a fractional epoch, or number of updates made, in [0, total)."""
        if progress < self.warmup:
            return self.peak_lr * progress / self.warmup
        rest = (progress - self.warmup) / (self.total - self.warmup)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * rest))


@dataclass
class Progress:
    """How far training has come; a checkpoint holds it, and `train_epoch` goes on from it."""

    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch that an update has made use of
    updates: int = 0
    loss_sum: float = 0.0  # over the micro-batches of this epoch, for the mean in the log
    lr_sum: float = 0.0
    grad_norm: float | None = None  # of the last update
    best: float = -math.inf  # the highest figure of merit at the end of an epoch
    processes: int = 1
    files: int = 0  # patch files of the run, those to validate on included


class Step(NamedTuple):
    """What happened in one micro-batch."""

    epoch: float  # fractional, at the begin of the micro-batch
    lr: float
    loss: float  # mean over the processes, not divided by the size of the accumulation group
    rows: int  # patches contrasted in this process
    grad_norm: float | None  # L2, of the accumulated gradient; None where the accumulation group goes on


class _BatchesOfEpoch(BatchSampler):
    """Whole batches of a sampler, from batch number `first` on: an epoch that was interrupted reads nothing twice."""

    first = 0

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
            f"--val_fraction {val_fraction} of {count} patch files is {held_out}: choose a fraction that leaves files "
            "on both sides, or 0 for no validation"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def make_loader(
    dataset: Dataset[tuple[Tensor, Tensor, int]],
    *,
    batch_size: int,
    accum_iter: int,
    ranks: Ranks,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    drop_last_group: bool = False,
) -> Batches:
    """Shuffled whole batches of this process's share of the dataset; the order depends on `seed` and epoch alone.

    Raises:
        InputError: an epoch would hold no batch, or with `drop_last_group` too few of them for a single update.
    """
    files = len(dataset)  # type: ignore[arg-type]
    share = math.ceil(files / ranks.world_size)
    steps = share // batch_size
    if steps == 0:
        raise InputError(
            f"found {files} patch files for {ranks.world_size} process(es), fewer than one batch of {batch_size} each: "
            f"give --batch_size {share} or less"
        )
    if drop_last_group and steps < accum_iter:
        raise InputError(
            f"an epoch has {steps} batches ({files} files, batch size {batch_size}, {ranks.world_size} process(es)), "
            f"fewer than the {accum_iter} that make one update: give --accum_iter {steps} or less"
        )
    sampler: DistributedSampler[tuple[Tensor, Tensor, int]] = DistributedSampler(
        dataset, num_replicas=ranks.world_size, rank=ranks.rank, shuffle=True, seed=seed
    )
    return DataLoader(
        dataset,
        batch_sampler=_BatchesOfEpoch(sampler, batch_size, drop_last=True),  # type: ignore[arg-type]
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
    progress: Progress,
    *,
    accum_iter: int,
    device: torch.device,
    precision: str = "fp32",
    drop_last_group: bool = False,
    name_of: Callable[[int], str] = str,
) -> Iterator[Step]:
    """Train for one epoch, or for what is left of it, one `Step` per micro-batch.

    Gradients of `accum_iter` micro-batches are averaged into one update, before which the learning rate of the
    group's begin is set. Nothing happens but what is iterated over: after a `Step` with a gradient norm, model,
    optimizer and `progress` fit together and can be saved.

    Args:
        model: (xyz (B, P, C_xyz), rgb (B, P, C_rgb)) -> the two arguments of `loss_of`; may be wrapped for DDP, which
            averages the gradients of the processes.
        loss_of: gives the () loss, called outside of autocast.
        loader: see `make_loader`.
        schedule: of the learning rate.
        progress: where to begin; kept up to date.
        precision: "fp32" or "bf16" (autocast of the model).
        drop_last_group: batches at the epoch's end that make no whole group lead to no update, as in the reference;
            otherwise they are a smaller group.
        name_of: name of the file of an index, for messages.

    Raises:
        InputError: the loss is not finite; in all processes alike.
    """
    model.train()
    optimizer.zero_grad()
    batches = loader.batch_sampler
    assert isinstance(batches, _BatchesOfEpoch)
    assert isinstance(batches.sampler, DistributedSampler)
    count = len(batches)
    batches.sampler.set_epoch(progress.epoch)
    batches.first = progress.batch
    named: list[str] = []  # files of the accumulation group
    for index, (xyz, rgb, files) in enumerate(_batches(loader), start=progress.batch):
        epoch = index / count + progress.epoch
        group = index - index % accum_iter  # where this accumulation group began
        size = accum_iter if drop_last_group else min(accum_iter, count - group)
        if index == group:
            for parameters in optimizer.param_groups:
                parameters["lr"] = schedule.learning_rate(progress.updates if schedule.in_updates else epoch)
        lr = optimizer.param_groups[0]["lr"]
        update = index == group + size - 1
        with _gradient_sync(model, update):
            with autocast(device, precision):
                heads = model(xyz.to(device, non_blocking=True), rgb.to(device, non_blocking=True))
            loss = loss_of(*heads)
            mean_loss = all_reduce_mean(loss)
            if not math.isfinite(mean_loss):
                bad = [] if torch.isfinite(loss) else [name_of(int(file)) for file in files]
                raise InputError(
                    f"the loss is {mean_loss} at epoch {progress.epoch}, batch {index}, learning rate {lr:g}: training "
                    f"has diverged, or one of these files is bad: {', '.join(gather_names(bad))}; lower --lr or "
                    "--blr, and go on from the last checkpoint with --resume"
                )
            (loss / size).backward()
        progress.loss_sum += mean_loss
        progress.lr_sum += lr
        grad_norm = None
        named += [name_of(int(file)) for file in files]
        if update:
            grad_norm = _gradient_norm(model)
            if not math.isfinite(grad_norm):
                raise InputError(
                    f"the gradient is not finite at epoch {progress.epoch}, batch {index}, though the loss is: look at "
                    f"the values of these files, or lower --lr or --blr: {', '.join(gather_names(named))}"
                )
            named = []
            optimizer.step()
            optimizer.zero_grad()
            progress.grad_norm = grad_norm
            progress.batch = index + 1
            progress.updates += 1
        yield Step(epoch, lr, mean_loss, len(heads[0]), grad_norm)
    progress.epoch, progress.batch, progress.loss_sum, progress.lr_sum = progress.epoch + 1, 0, 0.0, 0.0


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    args: argparse.Namespace,
) -> None:
    """Write {'model', 'optimizer', 'epoch', 'scaler', 'args'}, the original's layout, and 'progress' and 'rng' beside.

    'epoch' is the last one finished, -1 within the first.
    """
    # Nothing here scales a loss: that entry is there for readers of the original's files.
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch - 1,
        "scaler": {},
        "args": args,
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    binding: Sequence[str] = (),
) -> Progress:
    """Put model, optimizer and random numbers back to where `save_checkpoint` met them.

    A checkpoint of the original code, which knows no progress, goes on after its epoch.

    Args:
        args: the settings of this run.
        binding: names of settings that have to be those of the checkpoint, or the rest of an epoch would be another.

    Returns:
        where to go on.

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
        raise InputError(f"{path} cannot be resumed from: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no checkpoint of this training: {error!r}") from None
    for name in binding:
        if written.get(name) != getattr(args, name):
            raise InputError(
                f"{path} was written with --{name} {written.get(name)}, not {getattr(args, name)}: "
                "resume with the flags that it was written with"
            )
    return progress


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C and SIGTERM only set a flag, so that training ends after a whole update.

    Yields:
        whether one of them came. The second Ctrl-C ends the process at once.
    """
    requested: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requested.append(number)
        signal.signal(number, former[number])

    former: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _batches(loader: Batches) -> Iterator[Any]:
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

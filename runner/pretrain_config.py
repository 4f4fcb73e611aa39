"""Settings of UFF training (the flags of fusion_pretrain.py), its learning-rate schedule, and its progress."""

import math
from dataclasses import dataclass, replace

from utils.errors import InputError

FIX_DIVERGENCE = "Lower --lr or --blr, and continue from the last checkpoint with --resume."


@dataclass(frozen=True)
class Schedule:
    """Learning rates: linear from 0 to `peak_lr` in the warm-up, then half a cosine down to `min_lr`."""

    peak_lr: float
    min_lr: float
    warmup: float
    total: float
    in_updates: bool = False  # warm-up and total are counted in updates, not in epochs

    def learning_rate(self, progress: float) -> float:
        """Learning rate at a fractional epoch, or after so many updates, in [0, total)."""
        if progress < self.warmup:
            return self.peak_lr * progress / self.warmup
        rest = (progress - self.warmup) / (self.total - self.warmup)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * rest))


@dataclass
class Progress:
    """State of a training run, besides the model and the optimizer."""

    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch whose gradients are in the weights
    updates: int = 0
    loss_sum: float = 0.0  # over the micro-batches of this epoch, for the mean in the log
    lr_sum: float = 0.0
    grad_norm: float | None = None  # of the last update
    best: float = -math.inf  # highest figure of merit at the end of an epoch
    processes: int = 1
    files: int = 0  # patch files of the run, those for validation included


@dataclass(frozen=True)
class PretrainConfig:
    """The flags of fusion_pretrain.py, checked; see its --help."""

    batch_size: int
    epochs: int
    accum_iter: int
    weight_decay: float
    lr: float | None  # None until `with_lr` derives it from `blr`
    blr: float
    min_lr: float
    warmup_epochs: int
    max_steps: int | None
    warmup_steps: int | None
    drop_last_group: bool
    negatives: str
    val_fraction: float
    data_path: str
    output_dir: str
    save_steps: int
    log_dir: str | None
    device: str
    seed: int
    resume: str | None
    start_epoch: int | None
    num_workers: int
    pin_mem: bool
    world_size: int | None
    local_rank: int | None
    dist_on_itp: bool
    dist_url: str
    uff_pairing: str | None  # None: the pairing that the patch files ask for
    xyz_dim: int | None
    precision: str
    input_size: int

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.max_steps is None:
            raise InputError("--warmup_steps only applies with --max_steps. Give both, or use --warmup_epochs.")
        if self.resume and self.start_epoch is not None:
            raise InputError("--start_epoch contradicts --resume, which continues after its checkpoint. Remove one.")

    def with_lr(self, world_size: int) -> "PretrainConfig":
        """Copy with `lr` filled in: blr * effective batch size / 256 if it is not given."""
        lr = self.blr * (self.batch_size * self.accum_iter * world_size) / 256 if self.lr is None else self.lr
        if self.min_lr > lr:
            raise InputError(f"--min_lr {self.min_lr} is above the peak learning rate {lr}. Lower it.")
        return replace(self, lr=lr)

    @property
    def schedule(self) -> Schedule:
        """Schedule in updates with --max_steps, by default a third of them warm-up; in epochs otherwise."""
        assert self.lr is not None
        if self.max_steps is None:
            return Schedule(self.lr, self.min_lr, self.warmup_epochs, self.epochs)
        warmup = self.max_steps // 3 if self.warmup_steps is None else self.warmup_steps
        return Schedule(self.lr, self.min_lr, warmup, self.max_steps, in_updates=True)

    def is_finished(self, progress: Progress) -> bool:
        """True once all epochs are trained, or all updates with --max_steps."""
        return progress.epoch >= self.epochs if self.max_steps is None else progress.updates >= self.max_steps

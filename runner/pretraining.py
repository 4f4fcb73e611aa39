"""UFF training from patch files to checkpoints: the loop of fusion_pretrain.py.

The loss is `contrastive_loss` in feature_extractors/reference.py; its fast form is in models/contrastive.py.
"""

import argparse
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from tqdm import tqdm

from models.contrastive import contrastive_loss, retrieval
from models.feature_fusion import FeatureFusion
from runner.training import FIX_DIVERGENCE, Schedule, Step, Trainer, make_loader, make_optimizer, split_files
from runner.training_state import Progress, load_checkpoint, save_checkpoint
from utils.distributed import (
    Ranks,
    all_reduce_any,
    all_reduce_floats,
    choose_device,
    find_mpirun_ranks,
    find_ranks,
    is_main,
    process_group,
)
from utils.errors import InputError
from utils.feature_store import PatchFileDataset
from utils.precision import autocast
from utils.scans.files import make_folder

LR_BATCH = 256  # the effective batch size of --blr
# The rest of an interrupted epoch depends on these flags.
BINDING = (
    *("batch_size", "accum_iter", "seed", "val_fraction"),
    *("drop_last_group", "negatives", "uff_pairing", "precision"),
)
STOPPED = 130  # exit code after Ctrl-C, as in shells
LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """The flags of fusion_pretrain.py, checked; their meaning is in its --help."""

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
        for name in ("batch_size", "epochs", "accum_iter", "blr", "lr", "max_steps", "save_steps", "xyz_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} is {value}. Give a number above 0.")
        for name in ("weight_decay", "min_lr", "warmup_epochs", "warmup_steps", "num_workers", "start_epoch"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"--{name} is {value}. Give 0 or more.")
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"--val_fraction is {self.val_fraction}. Give 0 or more and below 1.")
        if self.warmup_steps is not None and self.max_steps is None:
            raise InputError("--warmup_steps only applies with --max_steps. Give both, or use --warmup_epochs.")
        if self.resume and self.start_epoch is not None:
            raise InputError("--start_epoch contradicts --resume, which continues after its checkpoint. Remove one.")

    def with_lr(self, world_size: int) -> "PretrainConfig":
        """The same with the peak learning rate filled in: blr * effective batch size / 256 if lr is not given."""
        effective_batch = self.batch_size * self.accum_iter * world_size
        lr = self.blr * effective_batch / LR_BATCH if self.lr is None else self.lr
        if self.min_lr > lr:
            raise InputError(f"--min_lr {self.min_lr} is above the peak learning rate {lr}. Lower it.")
        return replace(self, lr=lr)

    @property
    def schedule(self) -> Schedule:
        """Learning rates in updates with --max_steps, a third of them warm-up by default; in epochs otherwise."""
        assert self.lr is not None
        if self.max_steps is None:
            return Schedule(self.lr, self.min_lr, self.warmup_epochs, self.epochs)
        warmup = self.max_steps // 3 if self.warmup_steps is None else self.warmup_steps
        return Schedule(self.lr, self.min_lr, warmup, self.max_steps, in_updates=True)

    def is_finished(self, progress: Progress) -> bool:
        """True once all epochs are trained, or all updates with --max_steps."""
        return progress.epoch >= self.epochs if self.max_steps is None else progress.updates >= self.max_steps


def run(config: PretrainConfig) -> None:
    """Train on the device of this process, connected to the other ranks."""
    if config.dist_on_itp:
        ranks = find_mpirun_ranks(config.dist_url)
    else:
        ranks = find_ranks(config.local_rank, config.world_size, config.dist_url)
    logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.ERROR, format="%(message)s")
    config = config.with_lr(ranks.world_size)
    device = choose_device(config.device, ranks.local_rank)
    if config.precision == "auto":
        config = replace(config, precision="bf16" if device.type == "cuda" else "fp32")
    with process_group(ranks, device, config.dist_url):
        pretrain(config, ranks, device)


def pretrain(config: PretrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Train to the last epoch or update; the main process writes checkpoints and log lines.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM, once checkpoint-last.pth is written.
    """
    dataset = PatchFileDataset(config.data_path, config.uff_pairing, xyz_dim=config.xyz_dim)
    training, validation = split_files(len(dataset), config.val_fraction, config.seed)
    loader = make_loader(
        Subset(dataset, training),
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        ranks=ranks,
        seed=config.seed,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and device.type == "cuda",
        drop_last_group=config.drop_last_group,
    )
    torch.manual_seed(config.seed)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    progress = first_progress(config, ranks, model, optimizer, len(dataset))
    gpu = [device.index] if device.type == "cuda" else None
    trainer = Trainer(
        DistributedDataParallel(model, device_ids=gpu) if ranks.world_size > 1 else model,
        partial(contrastive_loss, negatives=config.negatives),
        loader,
        optimizer,
        config.schedule,
        progress,
        config.accum_iter,
        device,
        config.precision,
        config.drop_last_group,
        name_of=lambda index: str(dataset.files[index].path),
    )
    with open_tensorboard(config.log_dir) as board, stop_requests() as stop_requested:
        output = Output(config, model, optimizer, progress, board)
        while not config.is_finished(progress):
            epoch = progress.epoch
            steps = trainer.train_epoch()
            bar = tqdm(steps, f"epoch {epoch}", len(loader), initial=progress.batch, disable=not is_main())
            for step in bar:
                if step.grad_norm is None:
                    continue
                bar.set_postfix(loss=f"{step.loss:.3f}")
                output.log_step(step)
                if step.last:
                    continue  # what follows is done below, once the epoch is complete
                if all_reduce_any(stop_requested(), device):
                    output.save(LAST)
                    output.stop()
                if progress.updates % config.save_steps == 0:
                    output.save(LAST)
                if config.is_finished(progress):
                    break
            figures = {"train_lr": step.mean_lr, "train_loss": step.mean_loss, "train_grad_norm": progress.grad_norm}
            figures |= validate(model, dataset, validation, ranks, device, config.precision)
            output.end_epoch(epoch, figures)
            if not config.is_finished(progress) and all_reduce_any(stop_requested(), device):
                output.stop()


def first_progress(
    config: PretrainConfig, ranks: Ranks, model: FeatureFusion, optimizer: torch.optim.Optimizer, files: int
) -> Progress:
    """The start of training: at --resume, at --start_epoch, or at 0.

    Raises:
        InputError: nothing is left to do, or the checkpoint of --resume was written mid-epoch in another setting.
    """
    progress = Progress(epoch=config.start_epoch or 0)
    if config.resume:
        progress = load_checkpoint(config.resume, model, optimizer, argparse.Namespace(**asdict(config)), BINDING)
        for parameters in optimizer.param_groups:
            parameters["weight_decay"] = config.weight_decay
        for name, now in (("files", files), ("processes", ranks.world_size)):
            before = getattr(progress, name)
            if progress.batch and before != now:
                raise InputError(
                    f"{config.resume} was written mid-epoch with {before} {name}, not {now}. Resume with as many, or "
                    "from the end of an epoch."
                )
    progress.processes, progress.files = ranks.world_size, files
    if config.max_steps is None and config.is_finished(progress):
        raise InputError(f"Training would begin at epoch {progress.epoch}, but --epochs is {config.epochs}. Raise it.")
    if config.is_finished(progress):
        raise InputError(f"{progress.updates} updates are done, but --max_steps is {config.max_steps}. Raise it.")
    return progress


class Output:
    """Checkpoints, log lines and TensorBoard events of a run, written by the main process."""

    def __init__(
        self,
        config: PretrainConfig,
        model: FeatureFusion,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        board: Any,  # SummaryWriter or None
    ) -> None:
        self.config, self.model, self.optimizer, self.progress, self.board = config, model, optimizer, progress, board
        self.folder = make_folder(config.output_dir, "--output_dir")

    def save(self, name: str) -> None:
        """Write a checkpoint of the present state."""
        if is_main():
            args = argparse.Namespace(**asdict(self.config))
            save_checkpoint(self.folder / name, self.model, self.optimizer, self.progress, args)

    def stop(self) -> NoReturn:
        """Exit before the end of the training."""
        logger.info("Stopped. Continue with --resume %s", self.folder / LAST)
        raise SystemExit(STOPPED)

    def log_step(self, step: Step) -> None:
        """Add an update to TensorBoard, at thousandths of an epoch: curves of different batch sizes overlay."""
        if self.board:
            for name in ("loss", "lr", "grad_norm"):
                self.board.add_scalar(f"train_{name}", getattr(step, name), int(step.epoch * 1000))

    def end_epoch(self, epoch: int, figures: dict[str, Any]) -> None:
        """Write the epoch's checkpoints, its line of log.txt, and its summary."""
        validated = {name: value for name, value in figures.items() if name.startswith("val_")}
        merit = validated["val_retrieval"] - validated["val_chance"] if validated else -figures["train_loss"]
        better, self.progress.best = merit > self.progress.best, max(merit, self.progress.best)
        if self.config.max_steps is None or self.config.is_finished(self.progress):
            self.save(f"checkpoint-{epoch}.pth")
        self.save(LAST)
        if better:
            self.save(BEST)
        if not is_main():
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures | {"epoch": epoch, "updates": self.progress.updates}) + "\n")
        for name, value in validated.items():
            if self.board:
                self.board.add_scalar(name, value, self.progress.epoch * 1000)
        summary = [f"epoch {epoch}: mean loss {figures['train_loss']:.4f}"]
        summary += [f"{name} {value:.4f}" for name, value in validated.items()]
        logger.info(", ".join([*summary, "the best"] if better else summary))


@torch.no_grad()
def validate(
    model: FeatureFusion,
    dataset: PatchFileDataset,
    files: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    precision: str,
) -> dict[str, float]:
    """Loss and retrieval accuracy on held-out files, each file by itself; empty without such files.

    val_retrieval is the share of xyz patches for which the rgb patch of the same place is the nearest in its image,
    val_chance the share that random guesses would reach.
    """
    if not files:
        return {}
    model.eval()
    rows = hits = chance = loss = 0.0
    for index in files[ranks.rank :: ranks.world_size]:
        xyz, rgb, _ = dataset[index]
        with autocast(device, precision):
            heads = model(xyz[None].to(device), rgb[None].to(device))
        if len(heads[0]) == 0:
            continue
        found, by_chance = retrieval(*heads)
        rows, hits, chance = rows + len(heads[0]), hits + found, chance + by_chance
        loss += len(heads[0]) * float(contrastive_loss(*heads))
    rows, hits, chance, loss = all_reduce_floats((rows, hits, chance, loss), device)
    if rows == 0:
        raise InputError("No file of the validation split has a patch free of zeros in xyz. Lower --val_fraction.")
    if not math.isfinite(loss):
        raise InputError(f"The loss of the validation files is not finite: training has diverged. {FIX_DIVERGENCE}")
    return {"val_loss": loss / rows, "val_retrieval": hits / rows, "val_chance": chance / rows}


def open_tensorboard(log_dir: str | None) -> AbstractContextManager[Any]:
    """A SummaryWriter in the main process if a folder is given, else a context of None."""
    if not log_dir or not is_main():
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log_dir needs TensorBoard. Run pip install tensorboard, or remove the flag.") from None
    return SummaryWriter(make_folder(log_dir, "--log_dir"))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM only set a flag while the block runs, so that training ends after a whole update.

    Yields a function that tells if one of them came. A second Ctrl-C ends the process at once.
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

"""UFF training from patch files to checkpoints, for fusion_pretrain.py. The loss is in models/contrastive.py."""

import argparse
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from models.contrastive import contrastive_loss, retrieval
from models.feature_fusion import FeatureFusion
from runner.pretrain_config import FIX_DIVERGENCE, PretrainConfig, Progress
from runner.training import Trainer, load_checkpoint, make_loader, make_optimizer, save_checkpoint, split_files
from utils.distributed import (
    Ranks,
    all_reduce_any,
    all_reduce_sum,
    choose_device,
    find_ranks,
    is_main,
    process_group,
    progress_bar,
)
from utils.errors import InputError
from utils.feature_store import PatchFileDataset
from utils.precision import autocast
from utils.scans.files import atomic_path, locked, make_folder

# Flags that a resumed run cannot change.
FIXED = ("batch_size", "accum_iter", "seed", "val_fraction", "drop_last_group", "negatives", "uff_pairing", "precision")
STOPPED = 130  # exit code after Ctrl-C, as in shells
LAST, BEST, LOG = "checkpoint-last.pth", "checkpoint-best.pth", "log.txt"
logger = logging.getLogger(__name__)


def run(config: PretrainConfig) -> None:
    """Train on the device of this process, connected to the other ranks."""
    ranks = find_ranks(config.local_rank, config.world_size, config.dist_url, config.dist_on_itp)
    logging.disable(logging.NOTSET if ranks.rank == 0 else logging.WARNING)
    config = config.with_lr(ranks.world_size)
    device = choose_device(config.device, ranks.local_rank)
    if config.precision == "auto":
        config = replace(config, precision="bf16" if device.type == "cuda" else "fp32")
    folder = make_folder(config.output_dir, "--output_dir")
    lock = locked(folder, "--output_dir", [folder / LOG, folder / BEST, folder / LAST, *folder.glob("*.pth")])
    with lock if ranks.rank == 0 else nullcontext(), process_group(ranks, device, config.dist_url):
        pretrain(config, ranks, device)


def pretrain(config: PretrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Train to the last epoch or update; the main process writes checkpoints and log lines.

    SystemExit after Ctrl-C or SIGTERM, once checkpoint-last.pth is written.
    """
    dataset = PatchFileDataset(config.data_path, config.uff_pairing, config.xyz_dim)
    training, validation = split_files(len(dataset), config.val_fraction, config.seed)
    loader = make_loader(Subset(dataset, training), config, ranks, config.pin_mem and device.type == "cuda")
    torch.manual_seed(config.seed)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    progress = first_progress(config, ranks, model, optimizer, len(dataset))
    gpu = [device.index] if device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids=gpu) if ranks.world_size > 1 else model
    loss_of = partial(contrastive_loss, negatives=config.negatives)
    names = [str(file.path) for file in dataset.files]
    trainer = Trainer(config, replica, loss_of, loader, optimizer, progress, device, names.__getitem__)
    with open_tensorboard(config.log_dir) as board, stop_requests() as stop_requested:
        output = Output(trainer, model, board)
        while not config.is_finished(progress):
            epoch, stop = progress.epoch, False
            steps = trainer.train_epoch()
            bar = progress_bar(steps, desc=f"epoch {epoch}", total=len(loader), initial=progress.batch, unit="batch")
            for step in bar:
                if step.grad_norm is None:
                    continue
                bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
                if board:  # in thousandths of an epoch, so that curves of different batch sizes match
                    for name in ("loss", "lr", "grad_norm"):
                        board.add_scalar(f"train_{name}", getattr(step, name), int(step.epoch * 1000))
                if step.last:
                    continue  # saved below, once the epoch is complete
                stop = all_reduce_any(stop_requested(), device)
                if stop or progress.updates % config.save_steps == 0:
                    output.save(LAST)
                if stop or config.is_finished(progress):
                    break
            if not stop:
                norm = progress.grad_norm
                figures = {"train_lr": step.mean_lr, "train_loss": step.mean_loss, "train_grad_norm": norm}
                if validation:
                    own = validation[ranks.rank :: ranks.world_size]
                    figures |= validate(model, dataset, own, device, config.precision)
                output.end_epoch(epoch, figures)
                stop = not config.is_finished(progress) and all_reduce_any(stop_requested(), device)
            if stop:
                logger.info("Stopped. Continue with --resume %s", output.folder / LAST)
                raise SystemExit(STOPPED)


def first_progress(
    config: PretrainConfig, ranks: Ranks, model: FeatureFusion, optimizer: torch.optim.Optimizer, files: int
) -> Progress:
    """Starting point of training: the checkpoint of --resume, else --start_epoch, else 0.

    Raises InputError if nothing is left to do, or the checkpoint does not fit this run.
    """
    progress = Progress(epoch=config.start_epoch or 0)
    if config.resume:
        progress = load_checkpoint(config.resume, model, optimizer, argparse.Namespace(**asdict(config)), FIXED)
        for parameters in optimizer.param_groups:
            parameters["weight_decay"] = config.weight_decay
        for name, now in (("files", files), ("processes", ranks.world_size)):
            before = getattr(progress, name)
            if progress.batch and before != now:
                problem = f"{config.resume} was written mid-epoch with {before} {name}, not {now}"
                raise InputError(f"{problem}. Resume with as many, or from a checkpoint of the end of an epoch.")
    progress.processes, progress.files = ranks.world_size, files
    if config.is_finished(progress):
        done = f"{progress.epoch} epochs and {progress.updates} updates"
        raise InputError(f"Nothing is left to train after {done}. Raise --epochs or --max_steps.")
    return progress


class Output:
    """Checkpoints, log lines and TensorBoard events of a run, written by the main process."""

    def __init__(self, trainer: Trainer, model: FeatureFusion, board: Any) -> None:
        self.config, self.optimizer, self.progress = trainer.config, trainer.optimizer, trainer.progress
        self.model, self.board = model, board  # board: SummaryWriter or None
        self.folder = Path(self.config.output_dir)

    def save(self, name: str) -> None:
        """Write a checkpoint of the current state."""
        if is_main():
            args = argparse.Namespace(**asdict(self.config))
            save_checkpoint(self.folder / name, self.model, self.optimizer, self.progress, args)

    def end_epoch(self, epoch: int, figures: dict[str, Any]) -> None:
        """Write the epoch's line of log.txt, its checkpoints (the one to resume from comes last), and its summary."""
        validated = {name: value for name, value in figures.items() if name.startswith("val_")}
        merit = validated["val_retrieval"] - validated["val_chance"] if validated else -figures["train_loss"]
        better, self.progress.best = merit > self.progress.best, max(merit, self.progress.best)
        if not is_main():
            return
        updates, path = self.progress.updates, self.folder / LOG
        line = json.dumps(figures | {"epoch": epoch, "updates": updates}) + "\n"
        older = path.read_text("utf-8", "backslashreplace").splitlines(keepends=True) if path.exists() else []
        # A run that was killed before it wrote checkpoint-last.pth repeats the epoch.
        ending = f'"updates": {updates}}}\n' if self.config.resume else line
        with atomic_path(path) as temporary:
            temporary.write_text("".join([each for each in older if not each.endswith(ending)] + [line]), "utf-8")
        if self.config.max_steps is None or self.config.is_finished(self.progress):
            self.save(f"checkpoint-{epoch}.pth")
        if better:
            self.save(BEST)
        self.save(LAST)
        for name, value in validated.items():
            if self.board:
                self.board.add_scalar(name, value, self.progress.epoch * 1000)
        summary = [f"epoch {epoch}: mean loss {figures['train_loss']:.4f}"]
        summary += [f"{name} {value:.4f}" for name, value in validated.items()]
        logger.info(", ".join([*summary, "the best"] if better else summary))


@torch.no_grad()
def validate(
    model: FeatureFusion, dataset: PatchFileDataset, files: Sequence[int], device: torch.device, precision: str
) -> dict[str, float]:
    """Loss and retrieval accuracy on the held-out files of all ranks, each file by itself; `files` are this rank's.

    val_retrieval is the share of xyz patches whose nearest rgb patch in the image is that of the same place, val_chance
    the share that random guesses would reach.
    """
    model.eval()
    rows = hits = chance = loss = 0.0
    for index in files:
        xyz, rgb, _ = dataset[index]
        with autocast(device, precision):
            heads = model(xyz[None].to(device), rgb[None].to(device))
        if len(heads[0]) == 0:
            continue
        found, by_chance = retrieval(*heads)
        rows, hits, chance = rows + len(heads[0]), hits + found, chance + by_chance
        loss += len(heads[0]) * float(contrastive_loss(*heads))
    sums = torch.tensor((rows, hits, chance, loss), dtype=torch.float64, device=device)
    rows, hits, chance, loss = all_reduce_sum(sums).tolist()
    if rows == 0:
        raise InputError("Every xyz patch of the validation files holds a zero. Change --val_fraction.")
    if not math.isfinite(loss):
        raise InputError(f"The loss of the validation files is not finite. Training has diverged. {FIX_DIVERGENCE}")
    return {"val_loss": loss / rows, "val_retrieval": hits / rows, "val_chance": chance / rows}


def open_tensorboard(log_dir: str | None) -> AbstractContextManager[Any]:
    """SummaryWriter in the main process if a folder is given, else a context that yields None."""
    if not log_dir or not is_main():
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log_dir needs TensorBoard. Run pip install tensorboard, or remove the flag.") from None
    return SummaryWriter(make_folder(log_dir, "--log_dir"))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch Ctrl-C and SIGTERM. The yielded function returns True after one; a second Ctrl-C ends the process."""
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

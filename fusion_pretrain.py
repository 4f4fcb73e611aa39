"""Train the Unsupervised Feature Fusion (UFF) on the patch features of good training samples.

Three steps lead to the triple method; this script is the second:

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature \
        --save_feature_path datasets/patch_lib
    OMP_NUM_THREADS=1 python fusion_pretrain.py --accum_iter 16 --lr 0.003 --batch_size 16 \
        --data_path datasets/patch_lib --output_dir checkpoints
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \
        --fusion_module_path checkpoints/checkpoint-2.pth

Several processes, one per GPU (or `python -m torch.distributed.launch --nproc_per_node=4`):

    torchrun --nproc_per_node=4 fusion_pretrain.py --data_path datasets/patch_lib --output_dir checkpoints

The paper's length: --max_steps 750 --warmup_steps 250 --lr 0.003. With --val_fraction 0.1 a tenth of the files shows
after each epoch how often the rgb patch of the same place is found, which tells whether anything is learned.

--output_dir receives checkpoint-<epoch>.pth, checkpoint-last.pth (also within an epoch, and on Ctrl-C),
checkpoint-best.pth and log.txt. After an interruption: --resume checkpoints/checkpoint-last.pth, all other flags as
before.
"""

import argparse
import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from tqdm import tqdm

from models.contrastive import contrastive_loss, retrieval
from models.feature_fusion import FeatureFusion
from utils.choices import NEGATIVES, PAIRINGS
from utils.distributed import (
    Ranks,
    all_reduce_any,
    all_reduce_floats,
    choose_device,
    find_ranks,
    is_main,
    process_group,
)
from utils.errors import InputError, exit_on_input_error
from utils.feature_store import PatchFileDataset
from utils.precision import DTYPES, autocast
from utils.scans.files import make_folder
from utils.training import (
    Progress,
    Schedule,
    load_checkpoint,
    make_loader,
    make_optimizer,
    save_checkpoint,
    split_files,
    stop_requests,
    train_epoch,
)

LR_BATCH = 256  # the effective batch size that --blr is for
# What the rest of an interrupted epoch depends on.
BINDING = (
    "batch_size",
    "accum_iter",
    "seed",
    "val_fraction",
    "drop_last_group",
    "negatives",
    "uff_pairing",
    "precision",
)
STOPPED = 130  # exit code after Ctrl-C, as shells have it
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainSettings:
    """The flags, checked. `lr` is None until `with_lr` derives it from `blr`."""

    batch_size: int
    epochs: int
    accum_iter: int
    weight_decay: float
    lr: float | None
    blr: float
    min_lr: float
    warmup_epochs: int
    data_path: str
    output_dir: str
    log_dir: str | None
    device: str
    seed: int
    resume: str | None
    start_epoch: int | None
    num_workers: int
    pin_mem: bool
    world_size: int | None
    local_rank: int | None
    dist_url: str
    uff_pairing: str | None  # None: what the patch files ask for
    precision: str
    max_steps: int | None
    warmup_steps: int | None
    negatives: str
    val_fraction: float
    drop_last_group: bool
    save_steps: int
    xyz_dim: int | None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "accum_iter", "blr", "lr", "max_steps", "save_steps", "xyz_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value}: expected a number above 0")
        for name in ("weight_decay", "min_lr", "warmup_epochs", "warmup_steps", "num_workers", "start_epoch"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"--{name} {value}: expected 0 or more")
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"--val_fraction {self.val_fraction}: expected 0 or more and below 1")
        if self.warmup_steps is not None and self.max_steps is None:
            raise InputError("--warmup_steps counts updates of a run of --max_steps: give both, or use --warmup_epochs")
        if self.resume and self.start_epoch is not None:
            raise InputError("--start_epoch contradicts --resume, which goes on after the epoch of its file: drop one")

    def schedule(self, lr: float) -> Schedule:
        """In updates where --max_steps is given, with a third of them as warm-up; in epochs otherwise."""
        if self.max_steps is None:
            return Schedule(lr, self.min_lr, self.warmup_epochs, self.epochs)
        warmup = self.max_steps // 3 if self.warmup_steps is None else self.warmup_steps
        return Schedule(lr, self.min_lr, warmup, self.max_steps, in_updates=True)

    def with_lr(self, world_size: int) -> "PretrainSettings":
        """The same with the peak learning rate filled in: blr * effective batch size / 256 where lr is not given."""
        effective_batch = self.batch_size * self.accum_iter * world_size
        lr = self.blr * effective_batch / LR_BATCH if self.lr is None else self.lr
        if self.min_lr > lr:
            raise InputError(f"--min_lr {self.min_lr} lies above the peak learning rate {lr}")
        return replace(self, lr=lr)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="samples per process and micro-batch (16)")
    add("--epochs", type=int, default=3, help="(3)")
    add("--accum_iter", type=int, default=16, help="micro-batches per update (16)")
    add("--weight_decay", type=float, default=1.5e-6, help="of AdamW, on all parameters (1.5e-6)")
    add("--lr", type=float, help="peak learning rate (blr * batch_size * accum_iter * processes / 256)")
    add("--blr", type=float, default=0.002, help="peak learning rate for an effective batch of 256 (0.002)")
    add("--min_lr", type=float, default=0.0, help="learning rate the cosine ends at (0)")
    add("--warmup_epochs", type=int, default=1, help="epochs of linear rise from 0 (1)")
    add("--max_steps", type=int, help="train for this many updates instead of --epochs; the paper: 750")
    add("--warmup_steps", type=int, help="updates of linear rise from 0 (a third of --max_steps); the paper: 250")
    add("--drop_last_group", action="store_true", help="the original's: batches that fill no --accum_iter are lost")
    add("--negatives", choices=NEGATIVES, default="local", help="contrast with the rows of this process, or of all")
    add("--val_fraction", type=float, default=0.0, help="share of the files to validate on (0)")
    add("--data_path", default="datasets/patch_lib", help="folder of patch files (datasets/patch_lib)")
    add("--output_dir", default="./output_dir", help="receives checkpoints and log.txt (./output_dir)")
    add("--save_steps", type=int, default=100, help="updates between writings of checkpoint-last.pth (100)")
    add("--log_dir", help="receives TensorBoard events (none are written)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (auto: a GPU where there is one)")
    add("--seed", type=int, default=0, help="of the initial weights and the order of samples (0)")
    add("--resume", metavar="CHECKPOINT", help="go on where this checkpoint was written")
    add("--start_epoch", type=int, help="epoch to begin at without --resume (0)")
    # A batch of 16 takes 385 MB and each worker holds two: the original's 10 workers would hold 7.7 GB.
    workers = min(4, os.cpu_count() or 1)
    add("--num_workers", type=int, default=workers, help="reading processes per process (4, or the number of cores)")
    add("--pin_mem", action=argparse.BooleanOptionalAction, default=True, help="page-locked batches for a GPU (on)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="the other spelling of --no-pin_mem")
    add("--world_size", type=int, help="number of processes where no launcher says it (1)")
    add("--local_rank", "--local-rank", type=int, help="this process's number on its machine; launchers set it")
    add("--dist_url", default="env://", help="where processes meet (env://: as the launcher says)")
    add("--uff_pairing", choices=PAIRINGS, help="reference: the original's wrong order (as the patch files ask)")
    add("--xyz_dim", type=int, help="width of the xyz part of the original's .pt files (found from the background)")
    add(
        "--precision",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the networks; the loss is computed in fp32 (auto: bf16 on a GPU, fp32 on a CPU)",
    )
    return parser.parse_args(argv)


def wrap_for_ranks(model: FeatureFusion, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model, in several processes inside DistributedDataParallel, which averages their gradients."""
    if ranks.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def open_tensorboard(log_dir: str | None) -> AbstractContextManager[Any]:
    """A SummaryWriter in the main process when a folder is given, else a context that yields None."""
    if not log_dir or not is_main():
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError:
        raise InputError("--log_dir needs TensorBoard: pip install tensorboard, or drop the flag") from None
    return SummaryWriter(make_folder(log_dir, "--log_dir"))


def append_log(path: Path, entry: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pretrain(settings: PretrainSettings, ranks: Ranks, device: torch.device) -> None:
    """Train to the last epoch or update; the main process leaves checkpoints and log lines.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM, once checkpoint-last.pth is written.
    """
    assert settings.lr is not None
    dataset = PatchFileDataset(settings.data_path, settings.uff_pairing, xyz_dim=settings.xyz_dim)
    to_train, to_validate = split_files(len(dataset), settings.val_fraction, settings.seed)
    loader = make_loader(
        Subset(dataset, to_train),
        batch_size=settings.batch_size,
        accum_iter=settings.accum_iter,
        ranks=ranks,
        seed=settings.seed,
        num_workers=settings.num_workers,
        pin_memory=settings.pin_mem and device.type == "cuda",
        drop_last_group=settings.drop_last_group,
    )
    torch.manual_seed(settings.seed)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim).to(device)
    optimizer = make_optimizer(model, settings.weight_decay)
    args = argparse.Namespace(**asdict(settings))
    progress = first_progress(settings, ranks, model, optimizer, args, len(dataset))
    replica = wrap_for_ranks(model, ranks, device)
    folder = make_folder(settings.output_dir, "--output_dir")

    def save(name: str) -> None:
        if is_main():
            save_checkpoint(folder / name, model, optimizer, progress, args)

    def stop() -> NoReturn:
        logger.info("stopped; go on with --resume %s", folder / "checkpoint-last.pth")
        raise SystemExit(STOPPED)

    def finished() -> bool:
        if settings.max_steps is None:
            return progress.epoch >= settings.epochs
        return progress.updates >= settings.max_steps

    with open_tensorboard(settings.log_dir) as board, stop_requests() as stop_requested:
        while not finished():
            epoch = progress.epoch
            steps = train_epoch(
                replica,
                partial(contrastive_loss, negatives=settings.negatives),
                loader,
                optimizer,
                settings.schedule(settings.lr),
                progress,
                accum_iter=settings.accum_iter,
                device=device,
                precision=settings.precision,
                drop_last_group=settings.drop_last_group,
                name_of=lambda index: str(dataset.files[index].path),
            )
            batches = len(loader)
            bar = tqdm(steps, total=batches, initial=progress.batch, desc=f"epoch {epoch}", disable=not is_main())
            means: dict[str, float] = {}
            for number, step in enumerate(bar, start=progress.batch + 1):
                means |= {"train_lr": progress.lr_sum / number, "train_loss": progress.loss_sum / number}
                if step.grad_norm is None:
                    continue
                bar.set_postfix(loss=f"{step.loss:.3f}")
                if board:
                    # Thousandths of an epoch, so that curves of different batch sizes lie over each other.
                    for name in ("loss", "lr", "grad_norm"):
                        board.add_scalar(f"train_{name}", getattr(step, name), int(step.epoch * 1000))
                if number == batches:
                    continue  # what follows is done below, once the epoch is complete
                if all_reduce_any(stop_requested(), device):
                    save("checkpoint-last.pth")
                    stop()
                if progress.updates % settings.save_steps == 0:
                    save("checkpoint-last.pth")
                if settings.max_steps is not None and finished():
                    break
            if progress.grad_norm is not None:
                means["train_grad_norm"] = progress.grad_norm
            found = validate(model, dataset, to_validate, ranks, device, settings.precision)
            figure = found["val_retrieval"] - found["val_chance"] if found else -means["train_loss"]
            better = figure > progress.best
            progress.best = max(figure, progress.best)
            if settings.max_steps is None or finished():
                save(f"checkpoint-{epoch}.pth")
            save("checkpoint-last.pth")
            if better:
                save("checkpoint-best.pth")
            if is_main():
                entry = means | found | {"epoch": epoch, "updates": progress.updates}
                append_log(folder / "log.txt", entry)
                for name, value in found.items():
                    if board:
                        board.add_scalar(name, value, progress.epoch * 1000)
                told = "".join(f", {name} {value:.4f}" for name, value in found.items())
                logger.info("epoch %d: mean loss %.4f%s%s", epoch, means["train_loss"], told, ", the best" * better)
            if not finished() and all_reduce_any(stop_requested(), device):
                stop()


def first_progress(
    settings: PretrainSettings,
    ranks: Ranks,
    model: FeatureFusion,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    files: int,
) -> Progress:
    """Where training begins: at --resume, at --start_epoch, or at 0; refused where nothing would be left to do."""
    progress = Progress(epoch=settings.start_epoch or 0, processes=ranks.world_size, files=files)
    if settings.resume:
        progress = load_checkpoint(settings.resume, model, optimizer, args, BINDING)
        for parameters in optimizer.param_groups:
            parameters["weight_decay"] = settings.weight_decay
        if progress.batch and progress.files != files:
            raise InputError(
                f"{settings.resume} was written in mid-epoch on {progress.files} patch files, and {settings.data_path} "
                f"holds {files}: resume with the same files, or from the end of an epoch"
            )
        if progress.batch and progress.processes != ranks.world_size:
            raise InputError(
                f"{settings.resume} was written in mid-epoch by {progress.processes} processes, not "
                f"{ranks.world_size}: resume with as many, or from the end of an epoch"
            )
        progress.processes, progress.files = ranks.world_size, files
    if settings.max_steps is None and progress.epoch >= settings.epochs:
        raise InputError(f"training would begin at epoch {progress.epoch}, but --epochs is {settings.epochs}: raise it")
    if settings.max_steps is not None and progress.updates >= settings.max_steps:
        raise InputError(f"{progress.updates} updates are made, but --max_steps is {settings.max_steps}: raise it")
    return progress


@torch.no_grad()
def validate(
    model: FeatureFusion,
    dataset: PatchFileDataset,
    files: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    precision: str,
) -> dict[str, float]:
    """Loss and retrieval accuracy on held-out files, each file for itself; nothing where there are none.

    val_retrieval is the share of xyz patches for which the rgb patch of the same place is the nearest of its image,
    val_chance what guessing would reach.
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
        raise InputError("no file of the validation split has a patch free of exact zeros in xyz: lower --val_fraction")
    if not math.isfinite(loss):
        raise InputError(
            "the loss of the validation files is not finite: training has diverged; lower --lr or --blr, and go on "
            "from the last checkpoint with --resume"
        )
    return {"val_loss": loss / rows, "val_retrieval": hits / rows, "val_chance": chance / rows}


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        settings = PretrainSettings(**vars(parse_args(argv)))
        ranks = find_ranks(settings.local_rank, settings.world_size, settings.dist_url)
        logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.ERROR, format="%(message)s")
        settings = settings.with_lr(ranks.world_size)
        device = choose_device(settings.device, ranks.local_rank)
        if settings.precision == "auto":
            settings = replace(settings, precision="bf16" if device.type == "cuda" else "fp32")
        with process_group(ranks, device, settings.dist_url):
            pretrain(settings, ranks, device)


if __name__ == "__main__":
    main()

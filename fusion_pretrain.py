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

Go on after an interruption: --resume checkpoints/checkpoint-0.pth, all other flags as before.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models.feature_fusion import FeatureFusion, contrastive_loss
from utils.distributed import Ranks, choose_device, find_ranks, is_main, process_group
from utils.errors import InputError, exit_on_input_error
from utils.feature_store import PAIRINGS, PatchFileDataset
from utils.files import make_folder
from utils.training import (
    AUTOCAST,
    Schedule,
    load_checkpoint,
    make_loader,
    make_optimizer,
    save_checkpoint,
    train_epoch,
)

LR_BATCH = 256  # the effective batch size that --blr is for
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

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "accum_iter", "blr", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value}: expected a number above 0")
        for name in ("weight_decay", "min_lr", "warmup_epochs", "num_workers", "start_epoch"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"--{name} {value}: expected 0 or more")
        if self.resume and self.start_epoch is not None:
            raise InputError("--start_epoch contradicts --resume, which goes on after the epoch of its file: drop one")

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
    add("--data_path", default="datasets/patch_lib", help="folder of patch files (datasets/patch_lib)")
    add("--output_dir", default="./output_dir", help="receives checkpoint-<epoch>.pth and log.txt (./output_dir)")
    add("--log_dir", help="receives TensorBoard events (none are written)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (auto: a GPU where there is one)")
    add("--seed", type=int, default=0, help="of the initial weights and the order of samples (0)")
    add("--resume", metavar="CHECKPOINT", help="go on after this checkpoint's epoch")
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
    add("--precision", choices=list(AUTOCAST), default="fp32", help="of the forward pass (fp32)")
    return parser.parse_args(argv)


def wrap_for_ranks(model: FeatureFusion, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model, in several processes inside DistributedDataParallel: own rows as negatives, averaged gradients."""
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
    return SummaryWriter(log_dir)


def append_log(path: Path, entry: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pretrain(settings: PretrainSettings, ranks: Ranks, device: torch.device) -> None:
    """Train from the first to the last epoch; the main process leaves a checkpoint and a log line after each."""
    assert settings.lr is not None
    dataset = PatchFileDataset(settings.data_path, settings.uff_pairing)
    loader = make_loader(
        dataset,
        batch_size=settings.batch_size,
        accum_iter=settings.accum_iter,
        ranks=ranks,
        seed=settings.seed,
        num_workers=settings.num_workers,
        pin_memory=settings.pin_mem and device.type == "cuda",
    )
    schedule = Schedule(settings.lr, settings.min_lr, settings.warmup_epochs, settings.epochs)
    torch.manual_seed(settings.seed)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim).to(device)
    optimizer = make_optimizer(model, settings.weight_decay)
    first = load_checkpoint(settings.resume, model, optimizer) if settings.resume else settings.start_epoch or 0
    if first >= settings.epochs:
        raise InputError(f"training would begin at epoch {first}, but --epochs is {settings.epochs}: raise it")
    replica = wrap_for_ranks(model, ranks, device)
    folder = make_folder(settings.output_dir, "--output_dir")
    with open_tensorboard(settings.log_dir) as board:
        for epoch in range(first, settings.epochs):
            steps = train_epoch(
                replica,
                contrastive_loss,
                loader,
                optimizer,
                schedule,
                epoch,
                accum_iter=settings.accum_iter,
                device=device,
                precision=settings.precision,
            )
            done = []
            for step in tqdm(steps, total=len(loader), desc=f"epoch {epoch}", disable=not is_main()):
                done.append(step)
                if board and step.grad_norm is not None:
                    # Thousandths of an epoch, so that curves of different batch sizes lie over each other.
                    for name in ("loss", "lr", "grad_norm"):
                        board.add_scalar(f"train_{name}", getattr(step, name), int(step.epoch * 1000))
            if is_main():
                path = folder / f"checkpoint-{epoch}.pth"
                save_checkpoint(path, model, optimizer, epoch, argparse.Namespace(**asdict(settings)))
                means = {f"train_{name}": sum(getattr(s, name) for s in done) / len(done) for name in ("lr", "loss")}
                append_log(folder / "log.txt", means | {"epoch": epoch})
                logger.info("epoch %d: mean loss %.4f, wrote %s", epoch, means["train_loss"], path)


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        settings = PretrainSettings(**vars(parse_args(argv)))
        ranks = find_ranks(settings.local_rank, settings.world_size, settings.dist_url)
        logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.ERROR, format="%(message)s")
        settings = settings.with_lr(ranks.world_size)
        device = choose_device(settings.device, ranks.local_rank)
        with process_group(ranks, device, settings.dist_url):
            pretrain(settings, ranks, device)


if __name__ == "__main__":
    main()

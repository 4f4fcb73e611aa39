"""Helpers for the tests of UFF training: made-up samples, a model of one parameter, runs of the script."""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion_pretrain
from runner.pretrain_config import PretrainConfig, Progress, Schedule
from runner.training import Batches, Trainer, make_loader
from utils.distributed import Ranks
from utils.feature_store import PatchFileDataset, pair_rgb, resize_patches, write_features
from utils.records import PatchFeatures

ROOT = Path(fusion_pretrain.__file__).resolve().parent
CPU = torch.device("cpu")
BACKBONES = {"xyz_backbone": "Point_MAE", "rgb_backbone": "vit_base_patch8_224_dino"}
XYZ_GRID, RGB_GRID, XYZ_DIM, RGB_DIM = 8, 4, 12, 10
SMALL = ["--batch_size", "2", "--accum_iter", "2", "--epochs", "2", "--lr", "0.01", "--num_workers", "0"]


def related_features(seed: int) -> PatchFeatures:
    """Features whose rgb patches are a noisy fixed linear map of the common part of the xyz patches at their place."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(RGB_DIM, XYZ_DIM, generator=torch.Generator().manual_seed(12345))
    cause = torch.randn(RGB_GRID**2, XYZ_DIM, generator=generator)
    xyz = resize_patches(cause, XYZ_GRID) + 0.1 * torch.randn(XYZ_GRID**2, XYZ_DIM, generator=generator)
    xyz[:XYZ_GRID] = 0.0  # background along the upper border
    return PatchFeatures(rgb=cause @ mixing.T + 0.1 * torch.randn(RGB_GRID**2, RGB_DIM, generator=generator), xyz=xyz)


def write_samples(folder: Path, count: int, first_seed: int = 0) -> Path:
    for index in range(count):
        features = related_features(first_seed + index)
        write_features(folder, ("bagel", "dowel")[index % 2], f"{index:03d}", features, **BACKBONES)
    return folder


def write_original(folder: Path, name: str, features: PatchFeatures) -> Path:
    """Write a sample's file as the original code does: xyz and rgb side by side, rgb in its scrambled order."""
    path = folder / f"{name}.pt"
    torch.save(torch.cat([features.xyz, pair_rgb(features.rgb, len(features.xyz), "reference")], dim=1), path)
    return path


def constant_samples(folder: Path, count: int) -> PatchFileDataset:
    """Dataset whose sample n is filled with n + 1."""
    for index in range(count):
        features = PatchFeatures(rgb=torch.full((4, 1), index + 1.0), xyz=torch.full((16, 1), index + 1.0))
        write_features(folder, "bagel", f"{index:03d}", features, **BACKBONES)
    return PatchFileDataset(folder)


class Slope(nn.Module):
    """Model of one parameter with a known gradient: the loss is w * mean(rgb). It records the samples that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []  # values of `constant_samples`

    def forward(self, xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += [int(value) for value in xyz[:, 0, 0]]
        return xyz.flatten(0, 1), self.w * rgb.mean()


def config(**changed: Any) -> PretrainConfig:
    """Default configuration of the script with a learning rate and the changed fields."""
    return replace(PretrainConfig(**vars(fusion_pretrain.parse_args([]))), **({"lr": 0.5, "num_workers": 0} | changed))


def loader_of(
    dataset: PatchFileDataset,
    batch_size: int,
    accum_iter: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    **settings: Any,
) -> Batches:
    return make_loader(dataset, config(batch_size=batch_size, accum_iter=accum_iter, **settings), ranks)


def trainer_of(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    progress: Progress,
    accum_iter: int,
    drop_last_group: bool = False,
    name_of: Callable[[int], str] = str,
) -> Trainer:
    """Trainer on the CPU whose configuration has this schedule."""
    names = ("max_steps", "warmup_steps") if schedule.in_updates else ("epochs", "warmup_epochs")
    length = dict(zip(names, (schedule.total, schedule.warmup), strict=True))
    rates = {"lr": schedule.peak_lr, "min_lr": schedule.min_lr}
    settings = config(accum_iter=accum_iter, drop_last_group=drop_last_group, precision="fp32", **length, **rates)
    assert settings.schedule == schedule
    return Trainer(settings, model, loss_of, loader, optimizer, progress, CPU, name_of)


def read(checkpoint: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(checkpoint, weights_only=True)


def model_of(checkpoint: Path) -> dict[str, Tensor]:
    return read(checkpoint)["model"]


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def run_main(lib: Path, out: Path, *flags: object, base: Sequence[str] = SMALL) -> Path:
    """Call the script's main in this process."""
    fixed = [*base, "--device", "cpu", "--data_path", str(lib), "--output_dir", str(out)]
    fusion_pretrain.main([*fixed, *map(str, flags)])
    return out


def launch(*command: object) -> "subprocess.Popen[str]":
    """Start Python from the repository root, on one thread and without a launcher's variables."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: "subprocess.Popen[str]", code: int = 0) -> list[str]:
    """Wait until the processes end with this exit code, and return their stderr."""
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=120)[1])
        finally:
            process.kill()  # if it hangs
        assert process.returncode == code, errors[-1]
    return errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def assert_equal_training(ours: Path, expected: Path) -> None:
    """Assert that two checkpoints have bit-equal models and optimizer states, and the same progress."""
    ours_, expected_ = read(ours), read(expected)
    assert ours_["progress"] == expected_["progress"]
    for name, value in expected_["model"].items():
        assert torch.equal(value, ours_["model"][name]), name
    assert ours_["optimizer"]["param_groups"] == expected_["optimizer"]["param_groups"]
    assert ours_["optimizer"]["state"].keys() == expected_["optimizer"]["state"].keys()
    for index, state in expected_["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, ours_["optimizer"]["state"][index][name]), (index, name)

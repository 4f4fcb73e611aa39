"""UFF training loop: schedule, order, updates, checkpoints, and the recorded run."""

import argparse
import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GoldenFeatures
from torch import nn
from uff_runs import (
    BACKBONES,
    RGB_DIM,
    RGB_GRID,
    XYZ_DIM,
    XYZ_GRID,
    Slope,
    constant_samples,
    loader_of,
    related_features,
    trainer_of,
    write_samples,
)

from models.contrastive import contrastive_loss
from models.feature_fusion import FeatureFusion
from runner.pretrain_config import Progress, Schedule
from runner.pretraining import stop_requests
from runner.training import Batches, Step, load_checkpoint, make_optimizer, save_checkpoint, split_files
from utils.distributed import Ranks
from utils.errors import InputError
from utils.feature_store import PatchFileDataset, resize_patches, write_features
from utils.records import PatchFeatures

STEADY = Schedule(0.5, 0.5, warmup=0, total=2)


def run_slope(
    loader: Batches,
    model: Slope,
    progress: Progress,
    accum_iter: int,
    schedule: Schedule = STEADY,
    drop_last_group: bool = False,
) -> list[Step]:
    """One epoch of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"accum_iter": accum_iter, "drop_last_group": drop_last_group}
    trainer = trainer_of(model, lambda _, y: y, loader, optimizer, schedule, progress, **settings)
    return list(trainer.train_epoch())


# Schedule


def test_schedule_by_hand() -> None:
    schedule = Schedule(peak_lr=0.8, min_lr=0.2, warmup=2, total=6)
    rates = [schedule.learning_rate(epoch) for epoch in (0, 0.5, 1, 2, 3, 4, 5, 6)]
    cosine = [0.2 + 0.3 * (1 + math.cos(math.pi * t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, *cosine])
    assert cosine[0] == 0.8
    assert cosine[-1] == pytest.approx(0.2)
    assert Schedule(0.8, 0.2, warmup=0, total=4).learning_rate(0) == 0.8
    assert Schedule(0.8, 0.2, warmup=4, total=2).learning_rate(1.5) == pytest.approx(0.3)


def test_schedule_in_updates_counts_updates_across_epochs(tmp_path: Path) -> None:
    loader, model, progress = loader_of(constant_samples(tmp_path, 5), 1, 2), Slope(), Progress()
    schedule = Schedule(0.8, 0.2, warmup=2, total=6, in_updates=True)
    rates = []
    for _ in range(2):
        rates += [step.lr for step in run_slope(loader, model, progress, 2, schedule)]
    assert progress.updates == 6
    by_update = [schedule.learning_rate(update) for update in range(6)]
    assert rates == pytest.approx([by_update[update] for update in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)])
    in_epochs = run_slope(loader, Slope(), Progress(epoch=1), 2, replace(schedule, in_updates=False))
    assert [step.lr for step in in_epochs] == pytest.approx([0.4, 0.4, 0.56, 0.56, 0.72])


# One epoch


def test_gradients_are_averaged_per_group_and_drop_last_group_drops_the_rest(tmp_path: Path) -> None:
    dataset = constant_samples(tmp_path, 5)
    loader, model, progress = loader_of(dataset, 1, 2, drop_last_group=True), Slope(), Progress()
    expected = 0.0
    for epoch in range(2):
        steps = run_slope(loader, model, progress, 2, drop_last_group=True)
        values = model.seen[-5:]
        assert [step.grad_norm is None for step in steps] == [True, False, True, False, True]
        means = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2]
        assert [steps[1].grad_norm, steps[3].grad_norm] == pytest.approx(means)
        expected -= 0.5 * sum(means)
        assert model.w.item() == pytest.approx(expected)
        assert [step.epoch for step in steps] == pytest.approx([epoch + i / 5 for i in range(5)])
        assert {step.rows for step in steps} == {16}
        assert (progress.epoch, progress.batch, progress.updates) == (epoch + 1, 0, 2 * epoch + 2)


@pytest.mark.parametrize("accum_iter", [2, 3, 7])
def test_last_group_is_averaged_over_its_own_size(tmp_path: Path, accum_iter: int) -> None:
    model, progress = Slope(), Progress()
    steps = run_slope(loader_of(constant_samples(tmp_path, 5), 1, accum_iter), model, progress, accum_iter)
    groups = [model.seen[first : first + accum_iter] for first in range(0, 5, accum_iter)]
    means = [sum(group) / len(group) for group in groups]
    assert [step.grad_norm for step in steps if step.grad_norm] == pytest.approx(means)
    assert steps[-1].grad_norm
    assert model.w.item() == pytest.approx(-0.5 * sum(means))
    assert progress == Progress(epoch=1, updates=len(groups), grad_norm=steps[-1].grad_norm)


def test_progress_counts_updates_and_sums_losses(tmp_path: Path) -> None:
    model, progress = Slope(), Progress()
    model.w.data.fill_(1.0)
    steps = trainer_of(
        model,
        lambda _, y: y,
        loader_of(constant_samples(tmp_path, 5), 1, 2),
        torch.optim.SGD(model.parameters(), lr=0.0),
        Schedule(1e-30, 1e-30, 0, 1),  # w stays 1, so the losses are the values
        progress,
        accum_iter=2,
    ).train_epoch()
    for number, step in enumerate(steps, start=1):
        assert step.loss == model.seen[-1]
        assert progress.loss_sum == sum(model.seen)
        if step.grad_norm is not None:
            assert (progress.epoch, progress.batch, progress.updates) == (0, number, (number + 1) // 2)
    assert progress == Progress(epoch=1, updates=3, grad_norm=progress.grad_norm)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_epoch_continues_at_its_next_batch(tmp_path: Path, num_workers: int) -> None:
    dataset = constant_samples(tmp_path, 7)
    whole, rest = Slope(), Slope()
    run_slope(loader_of(dataset, 1, 2), whole, Progress(epoch=3), 2)
    (tmp_path / "bagel" / f"{whole.seen[0] - 1:03d}.safetensors").unlink()  # already seen, so not read again
    progress = Progress(epoch=3, batch=4, updates=2)
    loader = loader_of(dataset, 1, 2, num_workers=num_workers)
    steps = run_slope(loader, rest, progress, 2)
    assert rest.seen == whole.seen[4:]
    assert [step.epoch for step in steps] == pytest.approx([3 + i / 7 for i in (4, 5, 6)])
    assert [step.grad_norm is None for step in steps] == [True, False, False]
    assert progress == Progress(epoch=4, updates=4, grad_norm=progress.grad_norm)
    with pytest.raises(InputError, match="can no longer be read"):
        run_slope(loader, rest, progress, 2)  # the next epoch reads all files


def test_order_depends_on_epoch_and_seed(tmp_path: Path) -> None:
    dataset = constant_samples(tmp_path, 6)
    orders = set()
    for seed in (0, 10):
        model, progress = Slope(), Progress()
        for _ in range(2):
            run_slope(loader_of(dataset, 2, 1, seed=seed), model, progress, 1)
            order = tuple(model.seen[-6:])
            assert sorted(order) == [1, 2, 3, 4, 5, 6]
            orders.add(order)
    assert len(orders) == 4


def test_ranks_share_the_files(tmp_path: Path) -> None:
    dataset = constant_samples(tmp_path, 6)
    shares = [
        [int(value) for xyz, _, _ in loader_of(dataset, 1, 1, Ranks(rank, 2)) for value in xyz[:, 0, 0]]
        for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == [1, 2, 3, 4, 5, 6]


def test_too_few_files_are_refused(tmp_path: Path) -> None:
    dataset = constant_samples(tmp_path, 5)
    with pytest.raises(InputError, match=r"5 patch files.*batch of 6.*--batch_size 5 or less"):
        loader_of(dataset, 6, 1)
    with pytest.raises(InputError, match=r"5 patch files for 3 process.*--batch_size 2 or less"):
        loader_of(dataset, 4, 1, Ranks(1, 3))
    with pytest.raises(InputError, match=r"2 batches.*--accum_iter 2 or less"):
        loader_of(dataset, 2, 3, drop_last_group=True)
    assert len(loader_of(dataset, 2, 3)) == 2
    assert len(loader_of(dataset, 1, 2, drop_last_group=True)) == 5


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_file_is_refused_in_one_line(tmp_path: Path, num_workers: int) -> None:
    dataset = constant_samples(tmp_path, 2)
    (tmp_path / "bagel" / "001.safetensors").unlink()
    loader = loader_of(dataset, 2, 1, num_workers=num_workers)
    with pytest.raises(InputError, match=r"^\S*bagel/001\.safetensors can no longer be read \([^\n]*$"):
        run_slope(loader, Slope(), Progress(), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_files_of_its_batch(tmp_path: Path, bad: float) -> None:
    dataset = constant_samples(tmp_path, 6)
    model, progress = Slope(), Progress()
    run_slope(loader_of(dataset, 2, 1), model, Progress(), 1)
    order, model = model.seen, Slope()
    steps = trainer_of(
        model,
        lambda xyz, y: y * (bad if order[3] in xyz else 1.0),
        loader_of(dataset, 2, 1),
        torch.optim.SGD(model.parameters(), lr=0.0),
        STEADY,
        progress,
        accum_iter=1,
        name_of=lambda index: f"file{index + 1}.",
    ).train_epoch()
    next(steps)
    w = model.w.item()
    with pytest.raises(InputError) as error:
        next(steps)
    assert f"one of these files is bad: file{order[2]}., file{order[3]}.. Lower --lr" in str(error.value)
    assert f"The loss is {'nan' if math.isnan(bad) else '-inf'} at epoch 0, batch 1, learning rate 0.5" in str(
        error.value
    )
    assert (model.w.item(), progress.updates, progress.batch) == (w, 1, 1)


# Validation split


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(10, 0.1, 1), (10, 0.34, 3), (7, 0.5, 4), (2, 0.5, 1)])
def test_split_is_disjoint_complete_and_of_the_requested_size(count: int, fraction: float, held_out: int) -> None:
    train, validation = split_files(count, fraction, seed=3)
    assert sorted(train + validation) == list(range(count))
    assert (train, validation) == (sorted(train), sorted(validation))
    assert len(validation) == held_out


def test_split_depends_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = split_files(100, 0.2, seed=3)
    state = torch.get_rng_state()
    assert split_files(100, 0.2, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert split_files(100, 0.2, seed=4) != first
    assert first[1] != list(range(20))
    assert split_files(5, 0.0, seed=3) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(4, 0.1, 0), (4, 0.9, 4), (1, 0.5, 0)])
def test_split_with_an_empty_side_is_refused(count: int, fraction: float, held_out: int) -> None:
    with pytest.raises(InputError, match=rf"^--val_fraction {fraction} of {count} patch files is {held_out}\. [^\n]*$"):
        split_files(count, fraction, seed=0)


# Checkpoints

ARGS = argparse.Namespace(batch_size=2, seed=0, lr=0.1)


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after one update of AdamW."""
    torch.manual_seed(0)
    model = FeatureFusion(5, 3, head_dim=4)
    optimizer = make_optimizer(model, 0.1)
    contrastive_loss(*model(torch.randn(6, 5), torch.randn(6, 3))).backward()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    return model, optimizer


def test_optimizer_settings() -> None:
    (parameters,) = make_optimizer(nn.Linear(2, 2), 0.1).param_groups
    assert (parameters["betas"], parameters["weight_decay"]) == ((0.9, 0.95), 0.1)


def test_round_trip_of_a_checkpoint(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    model, optimizer = trained
    progress = Progress(epoch=2, batch=6, updates=11, loss_sum=0.1 + 0.2, lr_sum=0.3, best=0.7, processes=3)
    save_checkpoint(tmp_path / "last.pth", model, optimizer, progress, ARGS)
    numbers = torch.rand(3)
    other = FeatureFusion(5, 3, head_dim=4)
    restored = make_optimizer(other, 0.1)
    assert load_checkpoint(tmp_path / "last.pth", other, restored, ARGS, ("batch_size", "seed")) == progress
    assert torch.equal(torch.rand(3), numbers)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert restored.param_groups[0]["lr"] == 0.01
    for ours, theirs in zip(restored.state_dict()["state"].values(), optimizer.state_dict()["state"].values()):  # noqa: B905
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_resume_compares_the_given_settings(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, *trained, Progress(), ARGS)
    changed = argparse.Namespace(batch_size=2, seed=1, lr=0.2)
    assert load_checkpoint(path, *trained, changed, ("batch_size",)) == Progress()
    message = rf"^{path} was written with --seed 0, not 1\. Resume with the flags that it was written with\.$"
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, *trained, changed, ("batch_size", "seed"))


def test_checkpoint_of_the_original_resumes_after_its_epoch(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    model, optimizer = trained
    original = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4, "scaler": {}}
    torch.save(original | {"args": argparse.Namespace(batch_size=77)}, tmp_path / "checkpoint-4.pth")
    assert load_checkpoint(tmp_path / "checkpoint-4.pth", *trained, ARGS, ("batch_size",)) == Progress(epoch=5)


@pytest.mark.parametrize("kind", ["cut", "widths", "no optimizer", "progress of another version", "a tensor", "a list"])
def test_invalid_checkpoints_are_refused(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], kind: str
) -> None:
    path = tmp_path / "bad.pth"
    save_checkpoint(path, *trained, Progress(), ARGS)
    model = FeatureFusion(*((4, 3) if kind == "widths" else (5, 3)), head_dim=4)
    with torch.serialization.safe_globals([argparse.Namespace]):
        good = torch.load(path, weights_only=True)
    bad = {
        "no optimizer": {"model": good["model"]},
        "progress of another version": good | {"progress": asdict(Progress()) | {"step": 1}},
        "a tensor": torch.ones(3),
        "a list": [1, 2],
    }
    if kind in bad:
        torch.save(bad[kind], path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"^{path} [^\n]*$"):
        load_checkpoint(path, model, make_optimizer(model, 0.0), ARGS)


def test_failed_write_keeps_the_older_checkpoint(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, *trained, Progress(), ARGS)
    before = path.read_bytes()

    def disk_full(_: object, temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(InputError, match=r"last\.pth cannot be written \(disk full\)"):
        save_checkpoint(path, *trained, Progress(epoch=1), ARGS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_has_its_original_handler(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with stop_requests() as requested:
            assert not requested()
            os.kill(os.getpid(), number)
            assert requested()
            assert not came
            os.kill(os.getpid(), number)
            assert came == [1]
        os.kill(os.getpid(), number)
        assert came == [1, 1]
    finally:
        signal.signal(number, before)


# Recorded run


@pytest.mark.golden
def test_recorded_order_rates_and_updates(goldens: Path, tmp_path: Path) -> None:
    recorded = json.loads((goldens / "uff_train.json").read_text())["bagel"]
    dataset = constant_samples(tmp_path, 6)  # file n stands for the n-th recorded file
    loader, model, progress = loader_of(dataset, 2, 2, drop_last_group=True), Slope(), Progress()
    steps = []
    for _ in range(2):
        steps += run_slope(loader, model, progress, 2, Schedule(0.002 * 2 * 2 / 256, 0.0, 1, 2), drop_last_group=True)
    assert [recorded["listdir_order"][value - 1] for value in model.seen] == recorded["sample_order"]
    assert [step.lr for step in steps] == pytest.approx([step["lr"] for step in recorded["steps"]], rel=1e-12, abs=0)
    assert [step.grad_norm is not None for step in steps] == [step["update"] for step in recorded["steps"]]


@pytest.mark.golden
def test_recorded_training(goldens: Path, tmp_path: Path, golden_features: GoldenFeatures) -> None:
    recorded = json.loads((goldens / "uff_train.json").read_text())["bagel"]
    parameters = np.load(goldens / "uff_train_params.npz")
    for place, name in enumerate(recorded["listdir_order"]):  # names that sort in the order of the original listing
        features = golden_features(f"train/good/{int(name.removeprefix('bagel').removesuffix('.pt')):03d}")
        write_features(tmp_path, "bagel", f"{place:03d}", features, **BACKBONES, dtype=torch.float32)
    dataset = PatchFileDataset(tmp_path, "reference")
    schedule, progress = Schedule(0.002 * 2 * 2 / 256, 0.0, 1, 2), Progress()
    loader = loader_of(dataset, 2, 2, drop_last_group=True)
    torch.manual_seed(0)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim)
    optimizer = make_optimizer(model, 0.01)
    settings = {"accum_iter": 2, "drop_last_group": True}
    steps: list[Step] = []
    for epoch in range(2):
        steps += trainer_of(model, contrastive_loss, loader, optimizer, schedule, progress, **settings).train_epoch()
        for name, value in model.state_dict().items():
            ours = value[:16, :16] if value.ndim == 2 else value[:64]
            np.testing.assert_allclose(ours, parameters[f"bagel|epoch{epoch}|{name}"], rtol=0, atol=2e-6)
            norm = recorded[f"final_epoch{epoch}"][name]["norm"]
            assert float(value.double().norm()) == pytest.approx(norm, rel=1e-5, abs=1e-5)
    for step, original in zip(steps, recorded["steps"], strict=True):
        assert step.rows == original["n_rows"]
        assert step.lr == pytest.approx(original["lr"], rel=1e-12)
        assert step.loss == pytest.approx(original["loss"], rel=1e-5)
        assert step.grad_norm == (original["grad_norm"] and pytest.approx(original["grad_norm"], rel=1e-3))


# Learning


def retrieval_accuracy(model: FeatureFusion, held_out: list[PatchFeatures]) -> float:
    """Fraction of rgb patches whose nearest xyz patch of the same sample lies inside the rgb patch."""
    cell = resize_patches(torch.arange(RGB_GRID**2).float()[:, None], XYZ_GRID)[:, 0]
    hits = []
    for features in held_out:
        valid = (features.xyz != 0).all(dim=1)
        with torch.inference_mode():
            k, q = (F.normalize(x, dim=1) for x in model(features.xyz, resize_patches(features.rgb, XYZ_GRID)))
        hits.append(cell[valid][(q @ k.T).argmax(dim=1)] == cell[valid])
    return torch.cat(hits).float().mean().item()


@pytest.mark.parametrize("pairing", ["aligned", "reference"])
def test_aligned_pairs_are_learned_but_not_scrambled_ones(tmp_path: Path, pairing: str) -> None:
    dataset = PatchFileDataset(write_samples(tmp_path, 32), pairing)
    held_out = [related_features(seed) for seed in range(1000, 1008)]
    loader, schedule, progress = loader_of(dataset, 8, 1), Schedule(3e-3, 0.0, 1, 12), Progress()
    torch.manual_seed(0)
    model = FeatureFusion(XYZ_DIM, RGB_DIM)
    before = retrieval_accuracy(model, held_out)
    optimizer = make_optimizer(model, 1.5e-6)
    losses: list[float] = []
    while progress.epoch < schedule.total:
        trainer = trainer_of(model, contrastive_loss, loader, optimizer, schedule, progress, 1)
        losses += [step.loss for step in trainer.train_epoch()]
    after = retrieval_accuracy(model, held_out)
    chance = 1 / RGB_GRID**2
    assert before < 2.5 * chance
    if pairing == "aligned":
        assert after > 8 * chance
        assert losses[-1] < losses[0] - 0.5
    else:
        assert after < 2.5 * chance

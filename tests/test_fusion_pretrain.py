"""UFF training: the recorded run, what it learns, and the script under every launcher and flag."""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_pretrain
from models import build_feature_fusion
from models.feature_fusion import FeatureFusion, contrastive_loss
from utils.distributed import Ranks, choose_device, find_ranks, is_main
from utils.errors import InputError
from utils.feature_store import PatchFileDataset, resize_patches, write_features
from utils.records import PatchFeatures
from utils.training import Batches, Schedule, Step, load_checkpoint, make_loader, make_optimizer, train_epoch

ROOT = Path(fusion_pretrain.__file__).resolve().parent
CPU = torch.device("cpu")
BACKBONES = {"xyz_backbone": "Point_MAE", "rgb_backbone": "vit_base_patch8_224_dino"}
XYZ_GRID, RGB_GRID, XYZ_DIM, RGB_DIM = 8, 4, 12, 10
SMALL = ["--batch_size", "2", "--accum_iter", "2", "--epochs", "2", "--lr", "0.01", "--num_workers", "0"]


def related_features(seed: int) -> PatchFeatures:
    """A part whose rgb patches are one fixed linear map of what its xyz patches have in common at the same place."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(RGB_DIM, XYZ_DIM, generator=torch.Generator().manual_seed(12345))
    cause = torch.randn(RGB_GRID**2, XYZ_DIM, generator=generator)
    xyz = resize_patches(cause, XYZ_GRID) + 0.1 * torch.randn(XYZ_GRID**2, XYZ_DIM, generator=generator)
    xyz[:XYZ_GRID] = 0.0  # background along the upper border
    return PatchFeatures(rgb=cause @ mixing.T + 0.1 * torch.randn(RGB_GRID**2, RGB_DIM, generator=generator), xyz=xyz)


def write_parts(folder: Path, count: int, first_seed: int = 0) -> Path:
    for index in range(count):
        features = related_features(first_seed + index)
        write_features(folder, ("bagel", "dowel")[index % 2], f"{index:03d}", features, **BACKBONES)
    return folder


def loader_of(dataset: PatchFileDataset, batch_size: int, accum_iter: int, ranks: Ranks = Ranks()) -> Batches:  # noqa: B008
    fixed = {"seed": 0, "num_workers": 0, "pin_memory": False}
    return make_loader(dataset, batch_size=batch_size, accum_iter=accum_iter, ranks=ranks, **fixed)


def model_of(checkpoint: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(checkpoint, weights_only=True)["model"]


def run_main(lib: Path, out: Path, *flags: str, base: Sequence[str] = SMALL) -> Path:
    fusion_pretrain.main([*base, "--device", "cpu", "--data_path", str(lib), "--output_dir", str(out), *flags])
    return out


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("patch_lib"), 8)


@pytest.fixture(scope="module")
def baseline(lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the script with the flags SMALL."""
    return run_main(lib, tmp_path_factory.mktemp("baseline"))


# ---------------------------------------------------------------------------------------------- schedule and loop


def test_schedule_by_hand() -> None:
    schedule = Schedule(peak_lr=0.8, min_lr=0.2, warmup_epochs=2, epochs=6)
    rates = [schedule.learning_rate(epoch) for epoch in (0, 0.5, 1, 2, 3, 4, 5, 6)]
    cosine = [0.2 + 0.3 * (1 + math.cos(math.pi * t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, *cosine])
    assert cosine[0] == 0.8
    assert cosine[-1] == pytest.approx(0.2)
    assert Schedule(0.8, 0.2, warmup_epochs=0, epochs=4).learning_rate(0) == 0.8
    assert Schedule(0.8, 0.2, warmup_epochs=4, epochs=2).learning_rate(1.5) == pytest.approx(0.3)


class Slope(nn.Module):
    """A model of one parameter, whose gradient one knows: the loss is w * mean(rgb)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
        return xyz.flatten(0, 1), self.w * rgb.mean()


def constant_parts(folder: Path, count: int) -> PatchFileDataset:
    """Part number n holds n + 1 everywhere."""
    for index in range(count):
        features = PatchFeatures(rgb=torch.full((4, 1), index + 1.0), xyz=torch.full((16, 1), index + 1.0))
        write_features(folder, "bagel", f"{index:03d}", features, **BACKBONES)
    return PatchFileDataset(folder)


def test_gradients_are_averaged_over_the_group_and_a_rest_is_dropped(tmp_path: Path) -> None:
    loader = loader_of(constant_parts(tmp_path, 5), batch_size=1, accum_iter=2)
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = Schedule(0.5, 0.5, warmup_epochs=0, epochs=2)
    expected = 0.0
    for epoch in range(2):
        steps = list(
            train_epoch(model, lambda _, y: y, loader, optimizer, schedule, epoch, accum_iter=2, device=CPU),
        )
        values = [float(xyz[0, 0, 0]) for xyz, _ in loader]  # the sampler still stands at this epoch
        assert [step.grad_norm is None for step in steps] == [True, False, True, False, True]
        means = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2]
        assert [steps[1].grad_norm, steps[3].grad_norm] == pytest.approx(means)
        expected -= 0.5 * sum(means)
        assert model.w.item() == pytest.approx(expected)
        assert [step.epoch for step in steps] == pytest.approx([epoch + i / 5 for i in range(5)])
        assert {step.rows for step in steps} == {16}


def test_every_epoch_and_seed_has_its_own_order(tmp_path: Path) -> None:
    dataset = constant_parts(tmp_path, 6)
    orders = set()
    for seed in (0, 10):
        loader = make_loader(
            dataset, batch_size=2, accum_iter=1, ranks=Ranks(), seed=seed, num_workers=0, pin_memory=False
        )
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            order = tuple(torch.cat([xyz[:, 0, 0] for xyz, _ in loader]).int().tolist())
            assert sorted(order) == [1, 2, 3, 4, 5, 6]
            orders.add(order)
    assert len(orders) == 4


def test_ranks_share_the_files(tmp_path: Path) -> None:
    dataset = constant_parts(tmp_path, 6)
    shares = [
        [int(value) for xyz, _ in loader_of(dataset, 1, 1, Ranks(rank, 2)) for value in xyz[:, 0, 0]] for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == [1, 2, 3, 4, 5, 6]


def test_too_few_files_are_told_with_the_mend(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = constant_parts(tmp_path, 5)
    with pytest.raises(InputError, match=r"found 5 patch files.*batch of 6.*--batch_size 5 or less"):
        loader_of(dataset, 6, 1)
    with pytest.raises(InputError, match=r"found 5 patch files for 3 process.*--batch_size 2 or less"):
        loader_of(dataset, 4, 1, Ranks(1, 3))
    with pytest.raises(InputError, match=r"2 batches.*--accum_iter 2 or less"):
        loader_of(dataset, 2, 3)
    assert not caplog.records
    assert len(loader_of(dataset, 1, 2)) == 5
    assert "last 1 of 5 batches" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, num_workers: int) -> None:
    dataset = constant_parts(tmp_path, 2)
    (tmp_path / "bagel" / "001.safetensors").unlink()
    loader = make_loader(
        dataset, batch_size=2, accum_iter=1, ranks=Ranks(), seed=0, num_workers=num_workers, pin_memory=False
    )
    model = Slope()
    steps = train_epoch(
        model,
        lambda _, y: y,
        loader,
        make_optimizer(model, 0.0),
        Schedule(1, 0, 0, 1),
        0,
        accum_iter=1,
        device=CPU,
    )
    with pytest.raises(InputError, match=r"^\S*bagel/001\.safetensors can no longer be read: [^\n]*$"):
        next(steps)


# ------------------------------------------------------------------------------------------------ the recorded run


@pytest.mark.golden
def test_order_rates_and_updates_are_those_of_the_original(goldens: Path, tmp_path: Path) -> None:
    recorded = json.loads((goldens / "uff_train.json").read_text())["bagel"]
    dataset = constant_parts(tmp_path, 6)  # file number n stands for the n-th of the recorded listing
    loader, model, schedule = loader_of(dataset, 2, 2), Slope(), Schedule(0.002 * 2 * 2 / 256, 0.0, 1, 2)
    optimizer = make_optimizer(model, 0.01)
    steps, order = [], []
    for epoch in range(2):
        steps += train_epoch(model, lambda _, y: y, loader, optimizer, schedule, epoch, accum_iter=2, device=CPU)
        order += [recorded["listdir_order"][int(value) - 1] for xyz, _ in loader for value in xyz[:, 0, 0]]
    assert order == recorded["sample_order"]
    assert [step.lr for step in steps] == pytest.approx([step["lr"] for step in recorded["steps"]], rel=1e-12, abs=0)
    assert [step.grad_norm is not None for step in steps] == [step["update"] for step in recorded["steps"]]


@pytest.mark.golden
@pytest.mark.slow
def test_training_is_that_of_the_original(
    goldens: Path, tmp_path: Path, golden_double_features: list[PatchFeatures]
) -> None:
    recorded = json.loads((goldens / "uff_train.json").read_text())["bagel"]
    parameters = np.load(goldens / "uff_train_params.npz")
    for place, name in enumerate(recorded["listdir_order"]):  # ours sorts: names that sort as the original listed
        features = golden_double_features[int(name.removeprefix("bagel").removesuffix(".pt"))]
        write_features(tmp_path, "bagel", f"{place:03d}", features, **BACKBONES, dtype=torch.float32)
    dataset = PatchFileDataset(tmp_path, "reference")
    loader, schedule = loader_of(dataset, 2, 2), Schedule(0.002 * 2 * 2 / 256, 0.0, 1, 2)
    torch.manual_seed(0)
    model = FeatureFusion(dataset.xyz_dim, dataset.rgb_dim)
    optimizer = make_optimizer(model, 0.01)
    steps: list[Step] = []
    for epoch in range(2):
        steps += train_epoch(model, contrastive_loss, loader, optimizer, schedule, epoch, accum_iter=2, device=CPU)
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


# -------------------------------------------------------------------------------------------------- does it learn


def retrieval_accuracy(model: FeatureFusion, held_out: list[PatchFeatures]) -> float:
    """How often the xyz patch nearest to an rgb patch, among those of its part, lies inside that rgb patch."""
    cell = resize_patches(torch.arange(RGB_GRID**2).float()[:, None], XYZ_GRID)[:, 0]
    hits = []
    for features in held_out:
        valid = (features.xyz != 0).all(dim=1)
        with torch.inference_mode():
            k, q = (F.normalize(x, dim=1) for x in model(features.xyz, resize_patches(features.rgb, XYZ_GRID)))
        hits.append(cell[valid][(q @ k.T).argmax(dim=1)] == cell[valid])
    return torch.cat(hits).float().mean().item()


@pytest.mark.parametrize("pairing", ["aligned", "reference"])
def test_aligned_pairs_are_learnt_and_scrambled_ones_are_not(tmp_path: Path, pairing: str) -> None:
    dataset = PatchFileDataset(write_parts(tmp_path, 32), pairing)
    held_out = [related_features(seed) for seed in range(1000, 1008)]
    loader, schedule = loader_of(dataset, 8, 1), Schedule(3e-3, 0.0, 1, 12)
    torch.manual_seed(0)
    model = FeatureFusion(XYZ_DIM, RGB_DIM)
    before = retrieval_accuracy(model, held_out)
    optimizer = make_optimizer(model, 1.5e-6)
    losses = [
        step.loss
        for epoch in range(schedule.epochs)
        for step in train_epoch(model, contrastive_loss, loader, optimizer, schedule, epoch, accum_iter=1, device=CPU)
    ]
    after = retrieval_accuracy(model, held_out)
    chance = 1 / RGB_GRID**2
    assert before < 2.5 * chance
    if pairing == "aligned":
        assert after > 8 * chance
        assert losses[-1] < losses[0] - 0.5
    else:
        assert after < 2.5 * chance


# ------------------------------------------------------------------------------------------------------ the script


def test_every_epoch_leaves_a_checkpoint_in_the_published_layout(baseline: Path) -> None:
    assert sorted(path.name for path in baseline.iterdir()) == ["checkpoint-0.pth", "checkpoint-1.pth", "log.txt"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(baseline / "checkpoint-1.pth", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "epoch", "scaler", "args"}
    assert checkpoint["epoch"] == 1
    assert (checkpoint["args"].lr, checkpoint["args"].batch_size) == (0.01, 2)
    model = build_feature_fusion(baseline / "checkpoint-1.pth", xyz_dim=XYZ_DIM, rgb_dim=RGB_DIM)
    assert (model.xyz_dim, model.rgb_dim, model.head_dim) == (XYZ_DIM, RGB_DIM, 256)


def test_log_holds_one_line_per_epoch(baseline: Path) -> None:
    entries = [json.loads(line) for line in (baseline / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert [entry["train_lr"] for entry in entries] == pytest.approx([0.01 * (0 + 0.5) / 2, 0.01 * (1 + 0.5) / 2])
    assert entries[1]["train_loss"] < entries[0]["train_loss"]


def test_the_same_flags_give_the_same_weights(lib: Path, baseline: Path, tmp_path: Path) -> None:
    again = model_of(run_main(lib, tmp_path) / "checkpoint-1.pth")
    for name, value in model_of(baseline / "checkpoint-1.pth").items():
        assert torch.equal(value, again[name])


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", "4", "--accum_iter", "1"],
        ["--accum_iter", "1"],
        ["--epochs", "3"],
        ["--weight_decay", "0.5"],
        ["--lr", "0.02"],
        ["--min_lr", "0.005"],
        ["--warmup_epochs", "0"],
        ["--seed", "1"],
        ["--start_epoch", "1"],
        ["--uff_pairing", "reference"],
        ["--precision", "bf16"],
    ],
    ids=lambda flags: flags[0],
)
def test_the_flag_changes_the_weights(lib: Path, baseline: Path, tmp_path: Path, flags: list[str]) -> None:
    changed = model_of(run_main(lib, tmp_path, *flags) / "checkpoint-1.pth")
    original = model_of(baseline / "checkpoint-1.pth")
    assert any(not torch.equal(value, changed[name]) for name, value in original.items())


def test_blr_scales_with_the_effective_batch(lib: Path, baseline: Path, tmp_path: Path) -> None:
    base = [*SMALL[: SMALL.index("--lr")], "--num_workers", "0"]
    same = run_main(lib, tmp_path / "same", "--blr", str(0.01 * 256 / 4), base=base)
    other = run_main(lib, tmp_path / "other", "--blr", "1.0", base=base)
    expected = model_of(baseline / "checkpoint-1.pth")["rgb_head.weight"]
    torch.testing.assert_close(model_of(same / "checkpoint-1.pth")["rgb_head.weight"], expected, rtol=0, atol=1e-6)
    assert not torch.equal(model_of(other / "checkpoint-1.pth")["rgb_head.weight"], expected)
    assert fusion_pretrain.PretrainSettings(**vars(fusion_pretrain.parse_args([]))).with_lr(3).lr == 0.002 * 3


def test_defaults_are_those_of_the_original() -> None:
    args = fusion_pretrain.parse_args([])
    assert (args.batch_size, args.epochs, args.accum_iter, args.weight_decay) == (16, 3, 16, 1.5e-6)
    assert (args.lr, args.blr, args.min_lr, args.warmup_epochs, args.seed) == (None, 0.002, 0.0, 1, 0)
    assert (args.data_path, args.output_dir) == ("datasets/patch_lib", "./output_dir")
    assert fusion_pretrain.parse_args(["--local_rank", "2"]).local_rank == 2
    assert fusion_pretrain.parse_args(["--local-rank=2"]).local_rank == 2


def test_resuming_continues_exactly(lib: Path, baseline: Path, tmp_path: Path) -> None:
    run_main(lib, tmp_path, "--resume", str(baseline / "checkpoint-0.pth"))
    assert not (tmp_path / "checkpoint-0.pth").exists()
    with torch.serialization.safe_globals([argparse.Namespace]):
        resumed, straight = (torch.load(d / "checkpoint-1.pth", weights_only=True) for d in (tmp_path, baseline))
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name])
    for index, state in straight["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, resumed["optimizer"]["state"][index][name])


def test_log_dir_receives_tensorboard_events(lib: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_main(lib, tmp_path / "out", "--log_dir", str(tmp_path / "log"))
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [250, 750, 1250, 1750]
    assert [event.value for event in events.Scalars("train_lr")] == pytest.approx([0, 0.005, 0.01, 0.005])
    assert all(event.value > 0 for event in events.Scalars("train_grad_norm"))


@pytest.mark.parametrize(
    ("flags", "workers", "pinned"),
    [([], 3, True), (["--no_pin_mem"], 3, False), (["--no-pin_mem", "--pin_mem", "--num_workers", "1"], 1, True)],
)
def test_reading_flags_reach_the_loader(
    lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], workers: int, pinned: bool
) -> None:
    seen = {}

    def stop(dataset: PatchFileDataset, **settings: object) -> Batches:
        seen.update(settings)
        raise InputError("seen enough")

    monkeypatch.setattr(fusion_pretrain, "make_loader", stop)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(fusion_pretrain, "choose_device", lambda *_, name=device: torch.device(name, 0))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        with pytest.raises(SystemExit):
            run_main(lib, tmp_path, "--num_workers", "3", *flags)
        assert (seen["num_workers"], seen["pin_memory"]) == (workers, pinned and device == "cuda")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "nowhere"], "nowhere is no folder"),
        (["--batch_size", "9"], "found 8 patch files"),
        (["--accum_iter", "5"], "--accum_iter 4 or less"),
        (["--batch_size", "0"], "--batch_size 0: expected a number above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--warmup_epochs", "-1"], "--warmup_epochs -1: expected 0 or more"),
        (["--min_lr", "0.5"], "--min_lr 0.5 lies above the peak learning rate 0.01"),
        (["--device", "quantum"], "unknown device 'quantum'"),
        (["--device", "cuda:77"], "cuda:77 was asked for"),
        (["--resume", "nowhere.pth"], "checkpoint nowhere.pth does not exist"),
        (["--resume", "x.pth", "--start_epoch", "1"], "--start_epoch contradicts --resume"),
        (["--start_epoch", "2"], "training would begin at epoch 2, but --epochs is 2"),
        (["--world_size", "2"], "needs --local_rank 0 ... 1"),
        (["--lr", "1e30", "--warmup_epochs", "0"], "the loss is nan at epoch 0, batch 2"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(
    lib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lib, tmp_path, *flags)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in line
    assert message in line


def test_files_that_cannot_be_resumed_from(baseline: Path, tmp_path: Path) -> None:
    model = FeatureFusion(XYZ_DIM, RGB_DIM)
    wrong, cut = tmp_path / "wrong.pth", tmp_path / "cut.pth"
    torch.save({"model": model.state_dict()}, wrong)
    cut.write_bytes((baseline / "checkpoint-1.pth").read_bytes()[:1000])
    for path, widths in [
        (wrong, (XYZ_DIM, RGB_DIM)),
        (cut, (XYZ_DIM, RGB_DIM)),
        (baseline / "checkpoint-1.pth", (3, 4)),
    ]:
        model = FeatureFusion(*widths)
        with pytest.raises(InputError, match=rf"^{path} [^\n]*$"):
            load_checkpoint(path, model, make_optimizer(model, 0.0))


# --------------------------------------------------------------------------------------------------- the launchers


def test_ranks_come_from_the_environment_or_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert is_main()
    assert find_ranks() == find_ranks(local_rank=-1) == find_ranks(world_size=1) == Ranks(0, 1, 0)
    assert find_ranks(local_rank=1) == Ranks(0, 1, 1)  # alone, on the second GPU
    assert find_ranks(1, 2, "tcp://localhost:29500") == Ranks(1, 2, 1)
    for flags in [(None, 2, "tcp://localhost:1"), (2, 2, "tcp://localhost:1"), (1, 2, "env://")]:
        with pytest.raises(InputError, match="without torchrun"):
            find_ranks(*flags)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(InputError, match="has RANK but not both"):
        find_ranks()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_ranks(local_rank=1) == Ranks(5, 8, 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_ranks(local_rank=1, world_size=8) == Ranks(5, 8, 3)
    with pytest.raises(InputError, match="--world_size 2, but the launcher started 8"):
        find_ranks(world_size=2)


def test_device_follows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 1) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == choose_device("cuda:1", 0) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == CPU
    with pytest.raises(InputError, match="cuda:2 was asked for"):
        choose_device("cuda", 2)


def launch(*command: str | Path) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def assert_same_run(ours: Path, expected: Path) -> None:
    weights = model_of(ours / "checkpoint-1.pth")
    for name, value in model_of(expected / "checkpoint-1.pth").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-5)
    losses = [json.loads(line)["train_loss"] for line in (ours / "log.txt").read_text().splitlines()]
    known = [json.loads(line)["train_loss"] for line in (expected / "log.txt").read_text().splitlines()]
    assert losses == pytest.approx(known, rel=1e-4)


def test_the_readme_commands_train_in_one_process(lib: Path, baseline: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--device", "cpu", "--data_path", str(lib)]
    plain = launch("fusion_pretrain.py", *flags, "--output_dir", str(tmp_path / "plain"))
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=1", f"--master_port={free_port()}"]
    launched = launch(*launcher, "fusion_pretrain.py", *flags, "--output_dir", str(tmp_path / "launched"))
    finish(plain, launched)
    assert_same_run(tmp_path / "plain", baseline)
    assert_same_run(tmp_path / "launched", baseline)


def test_two_processes_average_the_gradients_of_their_own_batches(lib: Path, tmp_path: Path) -> None:
    """Two processes that see every other file take the steps of one process that accumulates two files."""
    expected = run_main(lib, tmp_path / "expected", "--batch_size", "1", "--accum_iter", "4")
    flags = [*SMALL, "--batch_size", "1", "--accum_iter", "2", "--device", "cpu", "--data_path", str(lib)]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finish(launch(*runner, "fusion_pretrain.py", *flags, "--output_dir", str(tmp_path / "torchrun")))
    assert_same_run(tmp_path / "torchrun", expected)
    by_hand = ["--dist_url", f"file://{tmp_path / 'meet'}", "--world_size", "2", "--output_dir", str(tmp_path / "hand")]
    finish(*(launch("fusion_pretrain.py", *flags, *by_hand, "--local_rank", rank) for rank in ("0", "1")))
    assert_same_run(tmp_path / "hand", expected)

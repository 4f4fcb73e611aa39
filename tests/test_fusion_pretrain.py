"""fusion_pretrain.py in one process: its output, every flag, validation and bad input."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from uff_runs import (
    BACKBONES,
    RGB_DIM,
    SMALL,
    XYZ_DIM,
    log_of,
    model_of,
    read,
    related_features,
    run_main,
    write_original,
    write_samples,
)

import fusion_pretrain
from models import build_feature_fusion
from models.contrastive import contrastive_loss, retrieval
from runner import pretraining
from runner.pretrain_config import PretrainConfig, Progress, Schedule
from runner.training import Batches, split_files
from utils.distributed import Ranks
from utils.errors import InputError
from utils.feature_store import PatchFileDataset, write_features
from utils.records import PatchFeatures


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("patch_lib"), 8)


@pytest.fixture(scope="module")
def baseline(lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the script with the flags SMALL: 2 epochs of 4 batches, 2 batches per update."""
    return run_main(lib, tmp_path_factory.mktemp("baseline"))


def differ(ours: Path, others: Path) -> bool:
    weights = model_of(others)
    return any(not torch.equal(value, weights[name]) for name, value in model_of(ours).items())


# Output


def test_every_epoch_saves_a_checkpoint_in_the_published_layout(baseline: Path) -> None:
    names = [f"checkpoint-{name}.pth" for name in ("0", "1", "best", "last")]
    assert sorted(path.name for path in baseline.iterdir()) == [*names, "log.txt"]
    checkpoint = read(baseline / "checkpoint-1.pth")
    assert set(checkpoint) == {"model", "optimizer", "epoch", "scaler", "args", "progress", "rng"}
    assert checkpoint["epoch"] == 1
    assert (checkpoint["args"].lr, checkpoint["args"].batch_size) == (0.01, 2)
    model = build_feature_fusion(baseline / "checkpoint-1.pth", xyz_dim=XYZ_DIM, rgb_dim=RGB_DIM)
    assert (model.xyz_dim, model.rgb_dim, model.head_dim) == (XYZ_DIM, RGB_DIM, 256)
    assert not differ(baseline / "checkpoint-1.pth", baseline / "checkpoint-last.pth")
    assert differ(baseline / "checkpoint-0.pth", baseline / "checkpoint-last.pth")


def test_the_log_has_one_line_per_epoch(baseline: Path) -> None:
    entries = log_of(baseline)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert [entry["updates"] for entry in entries] == [2, 4]
    assert [entry["train_lr"] for entry in entries] == pytest.approx([0.01 * (0 + 0.5) / 2, 0.01 * (1 + 0.5) / 2])
    assert entries[1]["train_loss"] < entries[0]["train_loss"]
    assert all(entry["train_grad_norm"] > 0 for entry in entries)
    assert not any(name.startswith("val_") for entry in entries for name in entry)


def test_the_same_flags_give_the_same_weights(lib: Path, baseline: Path, tmp_path: Path) -> None:
    again = run_main(lib, tmp_path)
    assert not differ(again / "checkpoint-1.pth", baseline / "checkpoint-1.pth")
    assert log_of(again) == log_of(baseline)


def test_log_dir_receives_tensorboard_events(lib: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_main(lib, tmp_path / "out", "--log_dir", tmp_path / "log", "--val_fraction", "0.5", "--batch_size", "1")
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [250, 750, 1250, 1750]
    assert [event.value for event in events.Scalars("train_lr")] == pytest.approx([0, 0.005, 0.01, 0.005])
    assert all(event.value > 0 for event in events.Scalars("train_grad_norm"))
    assert [event.step for event in events.Scalars("val_retrieval")] == [1000, 2000]
    logged = [entry["val_loss"] for entry in log_of(tmp_path / "out")]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(logged)


# Flags


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
        ["--max_steps", "4"],
        ["--val_fraction", "0.25"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_changes_the_weights(lib: Path, baseline: Path, tmp_path: Path, flags: list[str]) -> None:
    changed = run_main(lib, tmp_path, *flags)
    assert differ(changed / "checkpoint-1.pth", baseline / "checkpoint-1.pth")


def test_blr_scales_with_the_effective_batch(lib: Path, baseline: Path, tmp_path: Path) -> None:
    base = [*SMALL[: SMALL.index("--lr")], "--num_workers", "0"]
    same = run_main(lib, tmp_path / "same", "--blr", str(0.01 * 256 / 4), base=base)
    other = run_main(lib, tmp_path / "other", "--blr", "1.0", base=base)
    expected = model_of(baseline / "checkpoint-1.pth")["rgb_head.weight"]
    torch.testing.assert_close(model_of(same / "checkpoint-1.pth")["rgb_head.weight"], expected, rtol=0, atol=1e-6)
    assert not torch.equal(model_of(other / "checkpoint-1.pth")["rgb_head.weight"], expected)
    assert PretrainConfig(**vars(fusion_pretrain.parse_args([]))).with_lr(3).lr == 0.002 * 3


def test_defaults_equal_the_original() -> None:
    args = fusion_pretrain.parse_args([])
    assert (args.batch_size, args.epochs, args.accum_iter, args.weight_decay) == (16, 3, 16, 1.5e-6)
    assert (args.lr, args.blr, args.min_lr, args.warmup_epochs, args.seed) == (None, 0.002, 0.0, 1, 0)
    assert (args.data_path, args.output_dir) == ("datasets/patch_lib", "./output_dir")
    assert (args.negatives, args.val_fraction, args.max_steps, args.warmup_steps) == ("local", 0.0, None, None)
    assert fusion_pretrain.parse_args(["--local_rank", "2"]).local_rank == 2
    assert fusion_pretrain.parse_args(["--local-rank=2"]).local_rank == 2


def test_dist_on_itp_reads_the_ranks_of_mpirun(lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank and world size come from mpirun's variables, and --blr scales with the world size."""
    seen: list[object] = []
    for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.setattr(pretraining, "process_group", lambda ranks, device, url: seen.append(url) or nullcontext())
    monkeypatch.setattr(pretraining, "pretrain", lambda config, ranks, _: seen.extend((config.lr, ranks)))
    base = ["--batch_size", "16", "--accum_iter", "8", "--blr", "0.002"]
    run_main(lib, tmp_path, "--dist_on_itp", "--dist_url", "tcp://host:1234", base=base)
    assert seen == ["tcp://host:1234", 0.002, Ranks(rank=1, world_size=2, local_rank=0)]


def test_input_size_has_no_effect(lib: Path, baseline: Path, tmp_path: Path) -> None:
    assert fusion_pretrain.parse_args([]).input_size == 224
    run_main(lib, tmp_path, "--input_size", "512")
    assert not differ(tmp_path / "checkpoint-1.pth", baseline / "checkpoint-1.pth")


def test_precision_auto_is_full_precision_on_a_cpu(lib: Path, baseline: Path, tmp_path: Path) -> None:
    run_main(lib, tmp_path, "--precision", "fp32")
    assert not differ(tmp_path / "checkpoint-1.pth", baseline / "checkpoint-1.pth")
    assert read(baseline / "checkpoint-1.pth")["args"].precision == "fp32"


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_precision_auto_follows_the_device(
    lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    seen = []
    monkeypatch.setattr(pretraining, "pretrain", lambda config, *_: seen.append(config.precision))
    monkeypatch.setattr(pretraining, "choose_device", lambda *_: torch.device(device, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    run_main(lib, tmp_path)
    run_main(lib, tmp_path, "--precision", "fp32")
    assert seen == [precision, "fp32"]


@pytest.mark.parametrize(
    ("flags", "workers", "pinned"),
    [([], 3, True), (["--no_pin_mem"], 3, False), (["--no-pin_mem", "--pin_mem", "--num_workers", "1"], 1, True)],
)
def test_loader_flags_reach_the_loader(
    lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], workers: int, pinned: bool
) -> None:
    seen = {}

    def stop(dataset: PatchFileDataset, config: PretrainConfig, ranks: Ranks, pin_memory: bool) -> Batches:
        seen.update(num_workers=config.num_workers, pin_memory=pin_memory)
        raise InputError("loader reached")

    monkeypatch.setattr(pretraining, "make_loader", stop)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(pretraining, "choose_device", lambda *_, name=device: torch.device(name, 0))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        with pytest.raises(SystemExit):
            run_main(lib, tmp_path, "--num_workers", "3", *flags)
        assert (seen["num_workers"], seen["pin_memory"]) == (workers, pinned and device == "cuda")


def test_files_of_the_original_train_like_those_of_main(tmp_path: Path) -> None:
    """Both formats give the same weights in both pairings, whether the xyz width is detected or given."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    for index in range(4):
        features = related_features(index)
        write_features(ours, "bagel", f"{index:03d}", features, **BACKBONES, dtype=torch.float32)
        write_original(theirs, f"bagel{index}", features)
    for pairing in ("aligned", "reference"):
        flags = ["--uff_pairing", pairing, "--epochs", "1"]
        expected = run_main(ours, tmp_path / f"ours_{pairing}", *flags)
        for width in ([], ["--xyz_dim", XYZ_DIM]):
            found = run_main(theirs, tmp_path / f"theirs_{pairing}_{len(width)}", *flags, *width)
            assert not differ(found / "checkpoint-0.pth", expected / "checkpoint-0.pth")
            assert log_of(found) == log_of(expected)


# Length of the training


@pytest.mark.parametrize(("steps", "epoch"), [(1, 0), (3, 0), (4, 1), (7, 2)])
def test_max_steps_ends_after_that_many_updates(tmp_path: Path, steps: int, epoch: int) -> None:
    """Seven batches make three updates an epoch; training ends within an epoch, at its end, or in a later one."""
    seven = write_samples(tmp_path / "seven", 7)
    flags = ["--batch_size", "1", "--accum_iter", "3", "--max_steps", steps, "--warmup_steps", "0"]
    out = run_main(seven, tmp_path / "out", *flags)
    last = read(out / "checkpoint-last.pth")
    assert last["progress"]["updates"] == steps
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {steps}
    logged = [entry["updates"] for entry in log_of(out)]
    assert logged == [*range(3, steps, 3), steps]
    assert (out / f"checkpoint-{epoch}.pth").exists()  # only the last epoch has a checkpoint
    assert len(list(out.glob("checkpoint-[0-9]*.pth"))) == 1
    assert not differ(out / f"checkpoint-{epoch}.pth", out / "checkpoint-last.pth")


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [([], 4), (["--warmup_steps", "2"], 2), (["--warmup_steps", "0"], 0)],
    ids=["default", "2", "0"],
)
def test_max_steps_sets_the_learning_rate_schedule(lib: Path, tmp_path: Path, flags: list[str], warmup: int) -> None:
    """With --max_steps the schedule counts updates, not epochs; one update an epoch logs each rate."""
    length = ["--max_steps", "12", "--warmup_epochs", "7", "--accum_iter", "4", "--min_lr", "0.001"]
    rates = [entry["train_lr"] for entry in log_of(run_main(lib, tmp_path, *length, *flags))]
    expected = Schedule(0.01, 0.001, warmup, 12)
    assert rates == pytest.approx([expected.learning_rate(update) for update in range(12)])


def test_warmup_is_a_third_of_max_steps_by_default() -> None:
    config = PretrainConfig(**vars(fusion_pretrain.parse_args(["--max_steps", "750", "--lr", "0.003"])))
    assert config.schedule == Schedule(0.003, 0.0, 250, 750, in_updates=True)
    in_epochs = PretrainConfig(**vars(fusion_pretrain.parse_args(["--lr", "0.003"])))
    assert in_epochs.schedule == Schedule(0.003, 0.0, 1, 3)


def test_drop_last_group_skips_an_incomplete_group_of_batches(tmp_path: Path) -> None:
    seven = write_samples(tmp_path / "seven", 7)
    flags = ["--batch_size", "1", "--accum_iter", "3"]
    kept = run_main(seven, tmp_path / "kept", *flags)
    dropped = run_main(seven, tmp_path / "dropped", *flags, "--drop_last_group")
    assert [entry["updates"] for entry in log_of(kept)] == [3, 6]
    assert [entry["updates"] for entry in log_of(dropped)] == [2, 4]
    assert differ(kept / "checkpoint-0.pth", dropped / "checkpoint-0.pth")


def test_save_steps_writes_within_an_epoch(lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []
    save = pretraining.save_checkpoint

    def note(path: Path, model: object, optimizer: object, progress: Progress, args: object) -> None:
        written.append((path.name, progress.updates))
        save(path, model, optimizer, progress, args)

    monkeypatch.setattr(pretraining, "save_checkpoint", note)
    flags = ["--batch_size", "1", "--accum_iter", "1", "--epochs", "1"]
    run_main(lib, tmp_path, *flags, "--save_steps", "3")
    assert [updates for name, updates in written if name == "checkpoint-last.pth"] == [3, 6, 8]


# Validation


@pytest.mark.parametrize("pairing", ["aligned", "reference"])
def test_validation_distinguishes_aligned_from_scrambled_pairs(tmp_path: Path, pairing: str) -> None:
    lib = write_samples(tmp_path / "lib", 40)
    flags = ["--batch_size", "8", "--accum_iter", "1", "--epochs", "12", "--lr", "0.003", "--val_fraction", "0.2"]
    out = run_main(lib, tmp_path / "out", *flags, "--uff_pairing", pairing)
    entries = log_of(out)
    chance = {entry["val_chance"] for entry in entries}
    assert len(chance) == 1
    # 56 valid xyz patches; 16 distinct rgb patches, all of which occur in both orders.
    assert chance.pop() == pytest.approx(1 / 16)
    if pairing == "aligned":
        assert entries[-1]["val_retrieval"] > 8 / 16
        assert entries[-1]["val_loss"] < entries[0]["val_loss"] - 0.3
    else:
        assert entries[-1]["val_retrieval"] < 2.5 / 16
    # The best checkpoint is the first of those with the largest margin above chance.
    figures = [entry["val_retrieval"] - entry["val_chance"] for entry in entries]
    best = figures.index(max(figures))
    progress = read(out / "checkpoint-best.pth")["progress"]
    assert (progress["epoch"], progress["best"]) == (best + 1, max(figures))
    assert not differ(out / "checkpoint-best.pth", out / f"checkpoint-{best}.pth")


def test_validation_uses_only_the_held_out_files(lib: Path, tmp_path: Path) -> None:
    """Validation metrics are means over the rows of the held-out files, which do not affect training."""
    out = run_main(lib, tmp_path / "out", "--val_fraction", "0.25", "--batch_size", "1", "--accum_iter", "3")
    train, validation = split_files(8, 0.25, 0)
    assert len(validation) == 2
    model = build_feature_fusion(out / "checkpoint-1.pth", xyz_dim=XYZ_DIM, rgb_dim=RGB_DIM)
    dataset = PatchFileDataset(lib)
    with torch.no_grad():
        heads = [model(*dataset[index][:2]) for index in validation]
        rows = sum(len(xyz) for xyz, _ in heads)
        loss = sum(len(pair[0]) * contrastive_loss(*pair).item() for pair in heads) / rows
        hits = sum(retrieval(*pair)[0] for pair in heads) / rows
    entry = log_of(out)[1]
    assert (entry["val_loss"], entry["val_retrieval"]) == (pytest.approx(loss), pytest.approx(hits))
    assert [entry["updates"] for entry in log_of(out)] == [2, 4]  # of 6 files
    # With other held-out files, training is the same: it does not use them.
    for index in validation:
        changed = dataset.files[index]
        features = related_features(777 + index)
        write_features(tmp_path / "lib", changed.class_name, changed.stem, features, **BACKBONES)
    for index in train:
        kept = dataset.files[index].path
        target = tmp_path / "lib" / kept.relative_to(lib)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(kept.read_bytes())
    flags = ["--val_fraction", "0.25", "--batch_size", "1", "--accum_iter", "3"]
    other = run_main(tmp_path / "lib", tmp_path / "other", *flags)
    assert not differ(other / "checkpoint-1.pth", out / "checkpoint-1.pth")
    assert log_of(other)[1]["val_loss"] != entry["val_loss"]


def test_without_validation_the_lowest_loss_is_the_best(
    lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts = iter([0.0] * 4 + [-5.0] * 4 + [-3.0] * 4)  # 4 batches an epoch

    def shifted(xyz: torch.Tensor, rgb: torch.Tensor, negatives: str) -> torch.Tensor:
        return contrastive_loss(xyz, rgb, negatives) + next(shifts)

    monkeypatch.setattr(pretraining, "contrastive_loss", shifted)
    losses = [entry["train_loss"] for entry in log_of(run_main(lib, tmp_path, "--epochs", "3"))]
    assert min(losses) == losses[1]
    progress = read(tmp_path / "checkpoint-best.pth")["progress"]
    assert (progress["epoch"], progress["best"]) == (2, -losses[1])


def test_validation_without_a_valid_patch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lib = write_samples(tmp_path / "lib", 4)
    _, (held_out,) = split_files(4, 0.25, 0)
    file = PatchFileDataset(lib).files[held_out]
    empty = PatchFeatures(rgb=related_features(0).rgb, xyz=torch.zeros(64, XYZ_DIM))
    write_features(lib, file.class_name, file.stem, empty, **BACKBONES)
    assert_refused(capsys, lib, tmp_path / "out", ["--val_fraction", "0.25", "--batch_size", "1"], "validation files")


# Bad input


def assert_refused(capsys: pytest.CaptureFixture[str], lib: Path, out: Path, flags: list[str], message: str) -> None:
    """Assert that the script ends with exit code 2 and this message on the last line of stderr."""
    with pytest.raises(SystemExit) as stop:
        run_main(lib, out, *flags)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    line = stderr.splitlines()[-1]
    assert ": error: " in line
    assert message in line
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data_path", "nowhere"],
            "nowhere is not a folder. Give the folder that main.py --save_feature_path wrote.",
        ),
        (["--batch_size", "9"], "8 patch files"),
        (["--drop_last_group", "--accum_iter", "5"], "--accum_iter 4 or less"),
        (["--batch_size", "0"], "--batch_size is 0. Give a number from 1 to 1000000000."),
        (["--max_steps", "0"], "--max_steps is 0. Give a number from 1 to 1000000000."),
        (["--save_steps", "0"], "--save_steps is 0. Give a number from 1 to 1000000000."),
        (["--xyz_dim", "0"], "--xyz_dim is 0. Give a number from 1 to 1000000000."),
        (["--lr", "nan"], "--lr is nan"),
        (["--warmup_epochs", "-1"], "--warmup_epochs is -1. Give a number from 0 to 1000000000."),
        (["--max_steps", "9", "--warmup_steps", "-1"], "--warmup_steps is -1. Give a number from 0 to 1000000000."),
        (["--warmup_steps", "3"], "--warmup_steps only applies with --max_steps. Give both"),
        (["--val_fraction", "1.5"], "--val_fraction is 1.5. Give a number from 0 to 0.999."),
        (["--val_fraction", "-0.1"], "--val_fraction is -0.1. Give a number from 0 to 0.999."),
        (["--val_fraction", "nan"], "--val_fraction is nan. Give a number from 0 to 0.999."),
        (["--val_fraction", "0.01"], "--val_fraction 0.01 of 8 patch files is 0"),
        (["--val_fraction", "0.99"], "--val_fraction 0.99 of 8 patch files is 8"),
        (["--min_lr", "0.5"], "--min_lr 0.5 is above the peak learning rate 0.01"),
        (["--device", "quantum"], "--device 'quantum' is unknown"),
        (["--device", "cuda:77"], "There is no cuda:77, only"),
        (["--resume", "nowhere.pth"], "Checkpoint nowhere.pth does not exist"),
        (["--resume", "x.pth", "--start_epoch", "1"], "--start_epoch contradicts --resume"),
        (["--start_epoch", "2"], "Nothing is left to train after 2 epochs and 0 updates. Raise --epochs"),
        (["--world_size", "2"], "Give --local_rank 0 ... 1"),
        (["--dist_on_itp"], "Start with mpirun"),
        (["--lr", "1e30", "--warmup_epochs", "0"], "The loss is nan at epoch 0, batch 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line_and_exit_code_2(
    lib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert_refused(capsys, lib, tmp_path, flags, message)


@pytest.mark.parametrize("num_workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty folder", "holds no <class>/<stem>.safetensors"),
        ("truncated", "dowel/001.safetensors is truncated or not a patch file"),
        ("widths", "The patch files differ in"),
        ("nan rows", "dowel/001.safetensors: 2 of 64 xyz patches hold NaN or infinite values"),
        ("no valid point", "without valid points"),
        ("truncated .pt", "dowel1.pt cannot be read"),
        ("nan in rgb of .pt", "rgb patches hold NaN or infinite values"),
        ("both formats", "holds 4 patch files and 1 .pt files"),
    ],
)
def test_bad_files_end_with_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str, num_workers: str
) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    if damage.endswith(".pt"):
        for index, name in enumerate(("bagel0", "dowel1")):
            write_original(lib, name, related_features(index))
        bad = lib / "dowel1.pt"
        if damage == "truncated .pt":
            bad.write_bytes(bad.read_bytes()[:-500])
        else:
            features = related_features(1)
            features.rgb[3, 2] = torch.nan
            write_original(lib, "dowel1", features)
    elif damage != "empty folder":
        bad = write_samples(lib, 4) / "dowel" / "001.safetensors"
        if damage == "truncated":
            bad.write_bytes(bad.read_bytes()[:-1])
        elif damage == "widths":
            wide = PatchFeatures(rgb=related_features(1).rgb, xyz=torch.ones(64, XYZ_DIM + 1))
            write_features(lib, "dowel", "001", wide, **BACKBONES)
        elif damage == "nan rows":
            with safe_open(bad, framework="pt") as file:
                metadata = file.metadata()
            tensors = load_file(bad)
            tensors["xyz"][20:22, 1] = torch.nan
            save_file(tensors, bad, metadata)
        elif damage == "no valid point":
            empty = related_features(1)._replace(xyz=torch.zeros(64, XYZ_DIM))
            write_features(lib, "dowel", "001", empty, **BACKBONES)
        else:
            write_original(lib, "bagel7", related_features(7))
    flags = ["--batch_size", "1", "--num_workers", num_workers]
    assert_refused(capsys, lib, tmp_path / "out", flags, message)


def test_files_with_huge_values_are_named_and_the_last_checkpoint_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lib = write_samples(tmp_path / "lib", 8)
    dataset = PatchFileDataset(lib)
    # The bad file is in the third update of the first epoch.
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=0)
    order = list(sampler)
    bad, partner = dataset.files[order[4]], dataset.files[order[5]]
    features = related_features(0)._replace(rgb=torch.full((16, RGB_DIM), 3e38))
    write_features(lib, bad.class_name, bad.stem, features, **BACKBONES, dtype=torch.float32)
    written: list[bytes] = []
    save = pretraining.save_checkpoint

    def keep(path: Path, *args: object) -> None:
        save(path, *args)
        written.append(path.read_bytes())

    monkeypatch.setattr(pretraining, "save_checkpoint", keep)
    flags = ["--accum_iter", "1", "--save_steps", "1"]
    assert_refused(capsys, lib, tmp_path / "out", flags, f"{bad.path}, {partner.path}")
    last = tmp_path / "out" / "checkpoint-last.pth"
    assert last.read_bytes() == written[-1]
    assert len(written) == 2
    checkpoint = read(last)
    assert checkpoint["progress"]["updates"] == 2
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert [path.name for path in last.parent.iterdir()] == [last.name]
    # With the file repaired, training resumes from there.
    write_features(lib, bad.class_name, bad.stem, related_features(0), **BACKBONES)
    run_main(lib, tmp_path / "out", *flags, "--resume", last)
    assert [entry["updates"] for entry in log_of(tmp_path / "out")] == [4, 8]


def test_divergence_names_its_batch_and_keeps_the_last_checkpoint(
    lib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lr", "1e30", "--min_lr", "1e30", "--warmup_epochs", "0", "--accum_iter", "1", "--save_steps", "1"]
    assert_refused(capsys, lib, tmp_path, flags, "at epoch 0, batch 1, learning rate 1e+30. Training has diverged")
    assert read(tmp_path / "checkpoint-last.pth")["progress"]["updates"] == 1

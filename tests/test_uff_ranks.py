"""UFF training in several processes: collectives, global negatives, launchers, and stops."""

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from process_runs import run_processes, saved
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from uff_runs import (
    CPU,
    SMALL,
    assert_equal_training,
    finish,
    free_port,
    launch,
    log_of,
    model_of,
    read,
    run_main,
    write_samples,
)

from models.contrastive import contrastive_loss
from models.feature_fusion import FeatureFusion
from runner.training import make_optimizer
from utils.distributed import (
    Ranks,
    all_gather_rows,
    all_reduce_any,
    choose_device,
    find_ranks,
    is_main,
    process_group,
    world_size,
)
from utils.errors import InputError

# Valid patches per process: unequal, and one process without any.
COUNTS = {2: [[5, 2], [0, 4]], 3: [[5, 1, 7], [3, 0, 4]]}


# Single process


def test_ranks_come_from_the_environment_or_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert is_main()
    assert find_ranks() == find_ranks(local_rank=-1) == find_ranks(world_size=1) == Ranks(0, 1, 0)
    assert find_ranks(local_rank=1) == Ranks(0, 1, 1)  # single process on the second GPU
    assert find_ranks(1, 2, "tcp://localhost:29500") == Ranks(1, 2, 1, 2)
    for flags in [(None, 2, "tcp://localhost:1"), (2, 2, "tcp://localhost:1"), (1, 2, "env://")]:
        with pytest.raises(InputError, match="without torchrun"):
            find_ranks(*flags)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(InputError, match="sets only one of RANK and WORLD_SIZE"):
        find_ranks()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_ranks(local_rank=1) == Ranks(5, 8, 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_ranks(local_rank=1, world_size=8) == Ranks(5, 8, 3)
    with pytest.raises(InputError, match="--world_size is 2, but the launcher started 8"):
        find_ranks(world_size=2)


def test_ranks_of_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "LOCAL_RANK"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "5")
    with pytest.raises(InputError, match="needs OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK in"):
        find_ranks(mpirun=True)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert find_ranks(dist_url="tcp://host:1234", mpirun=True) == Ranks(5, 8, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    assert find_ranks(dist_url="tcp://host:1234", mpirun=True) == Ranks(5, 8, 1, 4)
    monkeypatch.setenv("MASTER_ADDR", "host")
    with pytest.raises(InputError, match="Set MASTER_ADDR and MASTER_PORT, or give --dist_url"):
        find_ranks(mpirun=True)
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert find_ranks(mpirun=True) == Ranks(5, 8, 1, 4)


def test_ranks_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    open_mpi = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    for names in (torchrun, open_mpi):
        for wrong in names:
            for name in names:
                monkeypatch.setenv(name, "one" if name == wrong else "1")
            with pytest.raises(InputError, match=f"sets {wrong} to 'one', not a number. Start with"):
                find_ranks(dist_url="tcp://host:1234", mpirun=names == open_mpi)


def test_device_depends_on_rank_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 1) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == choose_device("cuda:1", 0) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == CPU
    with pytest.raises(InputError, match="There is no cuda:2, only"):
        choose_device("cuda", 2)


def test_collectives_of_one_process() -> None:
    rows = torch.randn(3, 2)
    assert world_size() == 1
    assert all_gather_rows(rows) == (rows, 0)
    assert all_reduce_any(True, CPU)
    assert not all_reduce_any(False, CPU)


# Two and three processes


def patches(counts: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """Input of one process: `counts[rank]` valid patches between two invalid ones."""
    generator = torch.Generator().manual_seed(rank)
    xyz = torch.randn(counts[rank] + 2, 5, generator=generator, dtype=torch.float64)
    xyz[[0, -1]] = 0.0
    return xyz, torch.randn(counts[rank] + 2, 3, generator=generator, dtype=torch.float64)


def small_model() -> FeatureFusion:
    torch.manual_seed(0)
    return FeatureFusion(5, 3, head_dim=4).double()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def work(rank: int, count: int, folder: str) -> None:
    """Save the results of one process as <rank>.pth."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with process_group(Ranks(rank, count, rank), CPU, f"file://{folder}/meet"):
        found["place"] = (is_main(), world_size())
        own = torch.arange(2.0 * rank).reshape(rank, 2) + 10 * rank  # rank 0 has no row
        own.requires_grad_()
        gathered, first = all_gather_rows(own)
        (gathered * torch.arange(len(gathered))[:, None] * (rank + 1)).sum().backward()
        found["rows"] = (gathered.detach(), first, own.detach(), own.grad)
        found["any"] = [all_reduce_any(rank == place, CPU) for place in range(count + 1)]
        for negatives in ("local", "global"):
            for number, counts in enumerate(COUNTS[count]):
                if negatives == "local" and 0 in counts:
                    continue
                model = DistributedDataParallel(small_model())
                loss = contrastive_loss(*model(*patches(counts, rank)), negatives)
                loss.backward()
                found[f"{negatives} {number}"] = (loss.detach(), gradients(model.module))
        try:
            contrastive_loss(*small_model()(*patches([0] * count, rank)), "global")
        except InputError as error:
            found["nothing"] = str(error)
        make_optimizer(model, weight_decay=0.0)  # imports much of torch while the ranks are connected
    del model, loss
    gc.collect()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    found["gloo threads"] = [name for name in names if "gloo" in name]
    torch.save(found, f"{folder}/{rank}.pth")


class Found(NamedTuple):
    count: int
    by_rank: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("work")
    count = request.param
    assert run_processes([(work, (rank, count, str(folder))) for rank in range(count)]) == [0] * count
    return Found(count, [saved(folder, rank) for rank in range(count)])


def test_no_thread_of_the_backend_outlives_the_group(found: Found) -> None:
    """One that waits for the interpreter lock when Python ends would abort the process."""
    assert [each["gloo threads"] for each in found.by_rank] == [[]] * found.count


def test_rows_are_gathered_in_order_and_gradients_flow_back(found: Found) -> None:
    count, by_rank = found
    assert [each["place"] for each in by_rank] == [(rank == 0, count) for rank in range(count)]
    union = torch.cat([each["rows"][2] for each in by_rank])
    assert len(union) == count * (count - 1) // 2
    for rank, each in enumerate(by_rank):
        gathered, first, own, grad = each["rows"]
        assert torch.equal(gathered, union)
        assert torch.equal(gathered[first : first + rank], own)
        # The weights of row t in all processes sum to t (1 + 2 + ...).
        expected = torch.arange(first, first + rank) * sum(range(1, count + 1))
        assert torch.equal(grad, expected[:, None].expand(-1, 2).float())


def test_any_reaches_all_processes(found: Found) -> None:
    count, by_rank = found
    for each in by_rank:
        assert each["any"] == [True] * count + [False]


@pytest.mark.parametrize("number", [0, 1])
def test_global_negatives_match_one_process_with_all_patches(found: Found, number: int) -> None:
    count, by_rank = found
    inputs = [patches(COUNTS[count][number], rank) for rank in range(count)]
    model = small_model()
    loss = contrastive_loss(*model(torch.cat([xyz for xyz, _ in inputs]), torch.cat([rgb for _, rgb in inputs])))
    loss.backward()
    losses = [each[f"global {number}"][0] for each in by_rank]
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-10, atol=0)
    for each in by_rank:
        for name, grad in gradients(model).items():
            torch.testing.assert_close(each[f"global {number}"][1][name], grad, rtol=1e-8, atol=1e-12)


def test_local_negatives_average_the_gradients_of_single_processes(found: Found) -> None:
    count, by_rank = found
    losses, alone = [], []
    for rank in range(count):
        model = small_model()
        loss = contrastive_loss(*model(*patches(COUNTS[count][0], rank)))
        loss.backward()
        losses.append(loss.detach())
        alone.append(gradients(model))
    torch.testing.assert_close(torch.stack([each["local 0"][0] for each in by_rank]), torch.stack(losses))
    for name in alone[0]:
        mean = torch.stack([grads[name] for grads in alone]).mean(dim=0)
        for each in by_rank:
            torch.testing.assert_close(each["local 0"][1][name], mean, rtol=1e-8, atol=1e-12)
    differences = [by_rank[0]["local 0"][1][name] - by_rank[0]["global 0"][1][name] for name in alone[0]]
    assert max(float(difference.abs().max()) for difference in differences) > 1e-3


def test_missing_patches_are_an_error_in_all_processes(found: Found) -> None:
    assert all("without valid points" in each["nothing"] for each in found.by_rank)


# Script under its launchers

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("patch_lib"), 8)


def assert_same_run(ours: Path, expected: Path) -> None:
    weights = model_of(ours / "checkpoint-1.pth")
    for name, value in model_of(expected / "checkpoint-1.pth").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-5)
    entries, known = log_of(ours), log_of(expected)
    assert len(entries) == len(known)
    for entry, other in zip(entries, known, strict=True):
        assert entry == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_commands_of_the_readme(lib: Path, tmp_path: Path) -> None:
    expected = run_main(lib, tmp_path / "expected")
    flags = [*SMALL, "--device", "cpu", "--data_path", lib]
    plain = launch("fusion_pretrain.py", *flags, "--output_dir", tmp_path / "plain")
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=1", f"--master_port={free_port()}"]
    launched = launch(*launcher, "fusion_pretrain.py", *flags, "--output_dir", tmp_path / "launched")
    finish(plain, launched)
    assert_same_run(tmp_path / "plain", expected)
    assert_same_run(tmp_path / "launched", expected)


@pytest.mark.slow
def test_two_processes_match_one_with_accumulation(lib: Path, tmp_path: Path) -> None:
    """Two processes with every other file take the steps of one process that accumulates two files."""
    expected = run_main(lib, tmp_path / "expected", "--batch_size", "1", "--accum_iter", "4")
    flags = [*SMALL, "--batch_size", "1", "--accum_iter", "2", "--device", "cpu", "--data_path", lib]
    finish(launch(*TORCHRUN, "fusion_pretrain.py", *flags, "--output_dir", tmp_path / "torchrun"))
    assert_same_run(tmp_path / "torchrun", expected)
    by_hand = ["--dist_url", f"file://{tmp_path / 'meet'}", "--world_size", "2", "--output_dir", tmp_path / "hand"]
    finish(*(launch("fusion_pretrain.py", *flags, *by_hand, "--local_rank", rank) for rank in (0, 1)))
    assert_same_run(tmp_path / "hand", expected)


@pytest.mark.slow
def test_mpirun_matches_torchrun(lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SMALL, "--batch_size", "1", "--device", "cpu", "--data_path", lib]
    finish(launch(*TORCHRUN, "fusion_pretrain.py", *flags, "--output_dir", tmp_path / "torchrun"))
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "OMPI_COMM_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    processes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", rank)
        processes.append(launch("fusion_pretrain.py", *flags, "--dist_on_itp", "--output_dir", tmp_path / "mpirun"))
    finish(*processes)
    assert_same_run(tmp_path / "mpirun", tmp_path / "torchrun")


@pytest.mark.slow
def test_global_negatives_match_a_batch_of_twice_the_size(tmp_path: Path) -> None:
    """The last group is smaller (5 batches, accum_iter 2), and the processes share the validation."""
    lib = write_samples(tmp_path / "lib", 13)
    both = ["--accum_iter", "2", "--val_fraction", "0.2"]
    expected = run_main(lib, tmp_path / "expected", *both, "--batch_size", "2")
    local = run_main(lib, tmp_path / "local", *both, "--batch_size", "1", "--accum_iter", "4")
    flags = [*SMALL, "--device", "cpu", "--data_path", lib, *both, "--batch_size", "1", "--negatives", "global"]
    finish(launch(*TORCHRUN, "fusion_pretrain.py", *flags, "--output_dir", tmp_path / "torchrun"))
    assert_same_run(tmp_path / "torchrun", expected)
    assert log_of(local)[0]["train_loss"] != pytest.approx(log_of(expected)[0]["train_loss"], rel=1e-2)
    assert {"val_loss", "val_retrieval", "val_chance"} < log_of(expected)[0].keys()


@pytest.mark.slow
def test_signal_to_one_process_stops_both_and_loses_nothing(tmp_path: Path) -> None:
    lib = write_samples(tmp_path / "lib", 40)
    flags = [*SMALL, "--batch_size", "1", "--accum_iter", "1", "--save_steps", "1", "--device", "cpu"]
    flags += ["--data_path", str(lib), "--world_size", "2"]

    def start(name: str, *more: object) -> list[Any]:
        meet = ["--dist_url", f"file://{tmp_path / name}.meet", "--output_dir", tmp_path / name.split("+")[0]]
        return [launch("fusion_pretrain.py", *flags, *meet, *more, "--local_rank", rank) for rank in (0, 1)]

    whole = start("whole")
    processes = start("stopped")
    last = tmp_path / "stopped" / "checkpoint-last.pth"
    deadline = time.monotonic() + 60
    while not last.exists():
        assert processes[1].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGTERM)
    finish(*processes, code=130)
    assert read(last)["progress"]["batch"] not in (0, 20)
    finish(*whole)
    # A checkpoint within an epoch needs the same number of processes.
    (stderr,) = finish(launch("fusion_pretrain.py", *flags[:-2], "--output_dir", last.parent, "--resume", last), code=2)
    assert "was written mid-epoch with 2 processes, not 1" in stderr.splitlines()[-1]
    finish(*start("stopped+again", "--resume", last))
    assert_equal_training(last, tmp_path / "whole" / "checkpoint-last.pth")
    assert log_of(last.parent) == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_nan_loss_ends_both_processes_and_names_the_files(tmp_path: Path) -> None:
    """The learning rate makes the second batch diverge in both; each process names its own files."""
    lib = write_samples(tmp_path / "lib", 8)
    flags = [*SMALL, "--batch_size", "1", "--accum_iter", "1", "--lr", "1e30", "--warmup_epochs", "0"]
    meet = ["--dist_url", f"file://{tmp_path / 'meet'}", "--world_size", "2", "--output_dir", tmp_path / "out"]
    command = ["fusion_pretrain.py", *flags, "--device", "cpu", "--data_path", lib, *meet, "--local_rank"]
    outputs = finish(*(launch(*command, rank) for rank in (0, 1)), code=2)
    for stderr in outputs:
        line = stderr.splitlines()[-1]
        assert "The loss is nan at epoch 0, batch " in line
        assert line.count(".safetensors") == 2

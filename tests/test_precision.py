"""Precision of the networks, and the memory of a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from utils import memory, precision
from utils.memory import default_memory_budget, peak_memory_mb
from utils.precision import DTYPES, autocast, choose_precision, round_weights, whole_factors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("info", "chosen"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", "bf16"),
        ("flags\t\t: fpu amx_tile amx_bf16", "bf16"),
        ("Features\t: fp asimd bf16", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "fp32"),
        (None, "fp32"),  # no such file: not on Linux
    ],
)
def test_auto_on_a_cpu_asks_for_its_instructions(
    info: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "CPU_INFO", path)
    if info is not None:
        path.write_text(f"processor\t: 0\n{info}\n")
    assert choose_precision("auto", CPU) == chosen


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_asks_for_real_support(supported: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", torch.device("cuda")) == chosen


def test_a_named_precision_is_itself() -> None:
    for name in DTYPES:
        assert choose_precision(name, CPU) == name


def test_what_autocast_computes_in() -> None:
    matrix = torch.ones(2, 2)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, name):
            assert (matrix @ matrix).dtype == dtype


def test_layers_that_compute_with_their_weights_keep_them_whole() -> None:
    class Standardised(nn.Conv2d):
        pass

    layer = Standardised(3, 8, 2)
    round_weights(nn.Sequential(layer), "bf16")
    assert layer.weight.dtype == torch.float32


def test_convolutions_are_not_rounded_for_a_while() -> None:
    before = torch.backends.cudnn.allow_tf32
    with whole_factors():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default, which the searches count on


@pytest.mark.parametrize("name", DTYPES)
def test_rounded_weights_change_no_bit(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(9, 16), nn.LayerNorm(16))
    network.eval()
    image = torch.randn(2, 3, 4, 4)
    with torch.inference_mode(), autocast(CPU, name):
        expected = network(image)
        round_weights(network, name)
        assert torch.equal(network(image), expected)
    dtypes = {type(layer): parameter.dtype for layer in network for parameter in layer.parameters()}
    half = DTYPES[name]
    assert dtypes == {nn.Conv2d: half, nn.BatchNorm2d: torch.float32, nn.Linear: half, nn.LayerNorm: torch.float32}


def test_the_budget_is_half_of_what_the_container_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    limit = tmp_path_factory.mktemp("cgroup") / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    of_the_machine = default_memory_budget(CPU)
    assert of_the_machine > 0.1
    limit.write_text("max\n")
    assert default_memory_budget(CPU) == of_the_machine
    limit.write_text("200000000\n")
    assert default_memory_budget(CPU) == 0.1


@pytest.mark.slow
def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_mb(CPU)
    kept = torch.ones(int(before + 64) << 18)  # MB: more than there ever was
    assert peak_memory_mb(CPU) >= before + 64 > 114
    assert kept[-1] == 1

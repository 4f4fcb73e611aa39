"""Precision of the networks, and memory budget and peak usage."""

from pathlib import Path

import pytest
import torch
from torch import nn

from utils import memory, precision
from utils.memory import default_memory_budget, peak_memory_mb
from utils.precision import DTYPES, autocast, choose_precision, round_weights, without_tf32

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("info", "chosen"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", "bf16"),
        ("flags\t\t: fpu amx_tile amx_bf16", "bf16"),
        ("Features\t: fp asimd bf16", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "fp32"),
        (None, "fp32"),  # no such file outside Linux
    ],
)
def test_auto_on_a_cpu_depends_on_its_instructions(
    info: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "CPU_INFO", path)
    if info is not None:
        path.write_text(f"processor\t: 0\n{info}\n")
    assert choose_precision("auto", CPU) == chosen


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_requires_native_support(supported: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", torch.device("cuda")) == chosen


def test_named_precision_is_kept() -> None:
    for name in DTYPES:
        assert choose_precision(name, CPU) == name


def test_autocast_dtype() -> None:
    matrix = torch.ones(2, 2)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, name):
            assert (matrix @ matrix).dtype == dtype


def test_other_layer_types_keep_fp32_weights() -> None:
    class Standardized(nn.Conv2d):
        pass

    layer = Standardized(3, 8, 2)
    round_weights(nn.Sequential(layer), "bf16")
    assert layer.weight.dtype == torch.float32


def test_without_tf32_disables_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default, which the searches rely on


@pytest.mark.parametrize("name", DTYPES)
def test_rounded_weights_give_bit_equal_results(name: str) -> None:
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


def test_default_budget_is_half_of_the_container_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    limit = tmp_path_factory.mktemp("cgroup") / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    machine_budget = default_memory_budget(CPU)
    assert machine_budget > 0.1
    limit.write_text("max\n")
    assert default_memory_budget(CPU) == machine_budget
    limit.write_text("200000000\n")
    assert default_memory_budget(CPU) == 0.1


@pytest.mark.slow
def test_peak_memory_includes_new_allocations() -> None:
    before = peak_memory_mb(CPU)
    kept = torch.ones(int(before + 64) << 18)  # MB, above the previous peak
    assert peak_memory_mb(CPU) >= before + 64 > 114
    assert kept[-1] == 1

"""Precision of the networks: fp32 or bf16."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of processors that multiply in bf16: x86, x86, Arm


def choose_precision(name: str, device: torch.device) -> str:
    """Key of DTYPES: `name` itself, or for "auto" bf16 where the device has instructions for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = CPU_INFO.is_file() and not BF16_FLAGS.isdisjoint(CPU_INFO.read_text().split())
    return "bf16" if supported else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a forward pass; `precision` is a key of DTYPES."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Turn off TF32 in the block. With it, cuDNN rounds factors to 10 bits, which changes ViT patches by 3e-4."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def round_weights(network: nn.Module, precision: str) -> None:
    """Convert the weights of linear and convolution layers in place, as autocast does at every call."""
    for layer in network.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):  # subclasses may use their weights in other computations
            layer.to(DTYPES[precision])

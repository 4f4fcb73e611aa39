"""Which numbers the networks compute in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = (*DTYPES, "auto")
# Of the time of a product in fp32: processors without instructions for bf16 take longer, others less than half.
WORTHWHILE = 0.67
MEASURED_SIDE = 1024  # of the product: some 20 ms in all


def choose_precision(name: str, device: torch.device) -> str:
    """A key of DTYPES: `name` itself, or for "auto" bf16 where the device computes products faster in it.

    On a CPU that is measured, since no list of processors would be complete.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_is_fast_in_bf16() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What the forward pass runs in; `precision` is a key of DTYPES."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def whole_factors() -> Iterator[None]:
    """Convolutions in fp32 on a GPU are that.

    Else PyTorch lets cuDNN round their factors to 10 bits (TF32): by its first layer alone, patches of the ViT were
    3e-4 off.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def round_weights(network: nn.Module, precision: str) -> None:
    """Convert the weights of matrix products once, in place, where autocast would at every call.

    The results are the same to the bit, and the weights take half the memory. Parameters of other layers stay in fp32.
    """
    for layer in network.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):  # derived ones may compute with their weights first
            layer.to(DTYPES[precision])


@cache
def _cpu_is_fast_in_bf16() -> bool:
    return _product_seconds(torch.bfloat16) < WORTHWHILE * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(MEASURED_SIDE, MEASURED_SIDE, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first prepares the kernel
        begin = time.perf_counter()
        _ = matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

"""Time and peak memory of the contrastive loss, forward and backward, against the plain form, in fresh processes.

    python benchmarks/uff_loss.py                      # 8 x 3136 rows, as a batch of 8 full scans
    python benchmarks/uff_loss.py --rows 50176 --skip_plain

Prints a table and writes it as JSON. Memory is the peak of resident memory above what the process held before.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import in_fresh_process, median_seconds, write_json
from models.contrastive import contrastive_loss
from utils.memory import peak_memory_mb

HEAD_DIM = 256
REPEATS = 3


class Measured(NamedTuple):
    seconds: float  # median of a step
    peak_mb: float
    loss: float
    gradient_norm: float


def plain_loss(xyz: Tensor, rgb: Tensor) -> Tensor:
    """The same with the whole matrix of similarities."""
    logits = F.normalize(rgb, dim=-1) @ F.normalize(xyz, dim=-1).T
    return 2 * F.cross_entropy(logits, torch.arange(len(logits)))


def measure(loss_of: Callable[[Tensor, Tensor], Tensor], rows: int, repeats: int) -> Measured:
    generator = torch.Generator().manual_seed(0)
    xyz, rgb = (torch.randn(rows, HEAD_DIM, generator=generator).requires_grad_() for _ in range(2))

    losses = []

    def step() -> None:
        xyz.grad = rgb.grad = None
        loss = loss_of(xyz, rgb)
        loss.backward()
        losses.append(loss.item())

    before = peak_memory_mb()
    seconds = median_seconds({"step": step}, repeats, warm_up=False)["step"]
    peak = peak_memory_mb()
    assert xyz.grad is not None
    return Measured(seconds, peak - before, losses[-1], float(xyz.grad.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=8 * 3136, help="patches of a batch")
    parser.add_argument("--skip_plain", action="store_true", help="do not run the plain form, which takes 3 N^2 floats")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_uff_loss.json"))
    args = parser.parse_args()
    results = {"ours": in_fresh_process(measure, contrastive_loss, args.rows, REPEATS)}
    if not args.skip_plain:
        results["plain"] = in_fresh_process(measure, plain_loss, args.rows, REPEATS)
    print(f"{args.rows} rows of {HEAD_DIM}, {torch.get_num_threads()} threads, median of {REPEATS} steps")
    for name, measured in results.items():
        print(f"{name:6} {measured.seconds:7.2f} s {measured.peak_mb:8.0f} MB   loss {measured.loss:.6f}")
    if not args.skip_plain:
        ours, plain = results["ours"], results["plain"]
        print(f"time {ours.seconds / plain.seconds:.2f}, memory {ours.peak_mb / plain.peak_mb:.3f} of the plain form")
    record = {"rows": args.rows, **{name: measured._asdict() for name, measured in results.items()}}
    write_json(args.output, record)


if __name__ == "__main__":
    main()

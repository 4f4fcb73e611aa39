"""Time and peak memory of the contrastive loss, forward and backward, beside its plain form.

    python benchmarks/uff_loss.py                      # 8 x 3136 rows, a batch of 8 clouds without background
    python benchmarks/uff_loss.py --rows 50176 --skip_plain

Each form runs in its own process. Memory is the peak of resident memory beyond that at the start. The script prints a
table and writes JSON.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import in_fresh_process, make_parser, median_seconds_of, write_record
from feature_extractors import reference
from models.contrastive import contrastive_loss
from utils.memory import peak_memory_mb

HEAD_DIM = 256
REPEATS = 3


class Measured(NamedTuple):
    """Cost and results of a step."""

    seconds: float  # median
    peak_mb: float
    loss: float
    gradient_norm: float


def measure(loss_of: Callable[[Tensor, Tensor], Tensor], rows: int) -> Measured:
    generator = torch.Generator().manual_seed(0)
    xyz, rgb = (torch.randn(rows, HEAD_DIM, generator=generator).requires_grad_() for _ in range(2))
    losses = []

    def step() -> None:
        xyz.grad = rgb.grad = None
        loss = loss_of(xyz, rgb)
        loss.backward()
        losses.append(loss.item())

    before = peak_memory_mb()
    seconds = median_seconds_of(step, REPEATS)
    assert xyz.grad is not None
    return Measured(seconds, peak_memory_mb() - before, losses[-1], float(xyz.grad.norm()))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "uff_loss")
    parser.add_argument("--rows", type=int, default=8 * 3136, help="patches of a batch")
    parser.add_argument("--skip_plain", action="store_true", help="leave out the plain form, which takes 3 N^2 floats")
    args = parser.parse_args(argv)
    forms = {"fast": contrastive_loss} | ({} if args.skip_plain else {"plain": reference.contrastive_loss})
    results = {name: in_fresh_process(measure, loss_of, args.rows) for name, loss_of in forms.items()}
    print(f"{args.rows} rows of {HEAD_DIM}, {torch.get_num_threads()} threads, median of {REPEATS} steps")
    for name, found in results.items():
        print(f"{name:6} {found.seconds:7.2f} s {found.peak_mb:8.0f} MB   loss {found.loss:.6f}")
    if "plain" in results:
        fast, plain = results["fast"], results["plain"]
        print(f"time {fast.seconds / plain.seconds:.2f}, memory {fast.peak_mb / plain.peak_mb:.3f} of the plain form")
    write_record(args, {name: found._asdict() for name, found in results.items()})


if __name__ == "__main__":
    main()

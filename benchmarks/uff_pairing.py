"""Validation retrieval during UFF training, with the aligned pairing and with the original's scrambled one.

    python benchmarks/uff_pairing.py --figure docs/uff_pairing.png

The script runs fusion_pretrain.py on synthetic features. The xyz patches of a place are a random vector plus noise, and
its rgb patch is a fixed linear map of this vector plus noise. Retrieval is measured on held-out samples.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fusion_pretrain
from benchmarks.figures import new_axes, save_figure
from utils.command_line import Parser
from utils.feature_store import PAIRINGS, resize_patches, write_features
from utils.records import PatchFeatures

XYZ_GRID, RGB_GRID, XYZ_DIM, RGB_DIM = 28, 14, 48, 32
SAMPLES, NOISE = 40, 0.5
FLAGS = {"batch_size": 4, "accum_iter": 1, "epochs": 12, "lr": 0.003, "num_workers": 0, "val_fraction": 0.2}


def related_features(seed: int) -> PatchFeatures:
    """Features of a synthetic sample whose upper quarter is background."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(RGB_DIM, XYZ_DIM, generator=torch.Generator().manual_seed(12345)) / XYZ_DIM**0.5
    cause = torch.randn(RGB_GRID**2, XYZ_DIM, generator=generator)
    xyz = resize_patches(cause, XYZ_GRID) + NOISE * torch.randn(XYZ_GRID**2, XYZ_DIM, generator=generator)
    xyz[: XYZ_GRID**2 // 4] = 0.0
    return PatchFeatures(rgb=cause @ mixing.T + NOISE * torch.randn(RGB_GRID**2, RGB_DIM, generator=generator), xyz=xyz)


def train(pairing: str) -> list[dict[str, float]]:
    """The lines of log.txt of a run."""
    with tempfile.TemporaryDirectory() as folder:
        lib, out = Path(folder, "lib"), Path(folder, "out")
        for index in range(SAMPLES):
            write_features(lib, "cookie", f"{index:03d}", related_features(index), xyz_backbone="", rgb_backbone="")
        flags = [each for name, value in FLAGS.items() for each in (f"--{name}", str(value))]
        flags += ["--device", "cpu", "--data_path", str(lib), "--output_dir", str(out), "--uff_pairing", pairing]
        fusion_pretrain.main(flags)
        return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def draw(path: Path, logs: dict[str, list[dict[str, float]]]) -> None:
    (axes,) = new_axes(6.4, 3.6)
    for pairing, lines in logs.items():
        axes.plot([each["updates"] for each in lines], [each["val_retrieval"] for each in lines], "o-", label=pairing)
    chance = next(iter(logs.values()))[0]["val_chance"]
    axes.axhline(chance, color="0.5", linestyle="--", label=f"chance ({chance:.3f})")
    axes.set(xlabel="updates", ylabel="retrieval accuracy on held-out samples", ylim=(0, None))
    axes.legend(title="--uff_pairing", frameon=False)
    save_figure(axes, path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--figure", type=Path, default=Path("results/uff_pairing.png"))
    args = parser.parse_args(argv)
    logs = {pairing: train(pairing) for pairing in PAIRINGS}
    for pairing, lines in logs.items():
        last = lines[-1]
        print(f"{pairing}: retrieval {last['val_retrieval']:.3f} after {last['updates']} updates")
    print(f"chance: {last['val_chance']:.3f}")
    draw(args.figure, logs)


if __name__ == "__main__":
    main()

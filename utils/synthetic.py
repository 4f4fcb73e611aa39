"""Make a dataset of synthetic parts in the layout of MVTec 3D-AD: image and organized point cloud of each sample.

    python utils/synthetic.py datasets/synthetic                        # three classes, 44 samples each, 400 x 400
    python utils/synthetic.py datasets/tiny --size 224 --train 4 --validation 1 --test_good 2 --test_defective 1
    python utils/synthetic.py datasets/gaskets --classes gasket --size 800 --train 200 --seed 7

The script writes raw scans (OUTPUT_DIR/<class>/{train,validation,test}/<defect>/{rgb,xyz,gt}/NNN.*, gt in test only)
and preview.png, a contact sheet. Clean the scans with utils/preprocessing.py like real ones, if they have at least 224
pixels a side: in smaller ones the cleaning mistakes the borders of a part for noise.

The clouds have the faults of a structured-light scanner: noise, shadows of the projector, and losses at edges and steep
walls. Dents, bumps and holes hardly show in the image, and stains and contaminations not at all in the cloud. With the
same versions of the libraries, a seed gives the same files for any number of workers and of other scans.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

if __name__ == "__main__":  # run by path: utils/ itself must not be searched for modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils.command_line import Parser, from_flags
from utils.errors import InputError, exit_on_input_error
from utils.scans.files import atomic_path, make_folder
from utils.scans.organized_pc import read_organized_pc, valid_mask, write_organized_pc
from utils.synthetic_data.parts import DEFECTS, PARTS
from utils.synthetic_data.scanner import make_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (64, 2048)  # pixels; in a smaller image a defect is less than a pixel
MOST_SCANS = 1000  # of one folder: the names have three digits
MOST_SEEDS = 2**64 - 1


@dataclass(frozen=True)
class Plan:
    """Numbers and size of the scans to make, named like the flags. The constructor raises InputError."""

    output_dir: Path
    classes: Sequence[str] = tuple(PARTS)
    train: int = 16
    validation: int = 2
    test_good: int = 8
    test_defective: int = 3  # of each type of defect
    size: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.classes:
            if name not in PARTS:
                raise InputError(f"--classes names {name!r}. Give any of {', '.join(PARTS)}.")
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"--classes names a class twice: {' '.join(self.classes)}. Remove one.")
        counts = dict.fromkeys(("train", "validation", "test_good", "test_defective"), (0, MOST_SCANS))
        for flag, (low, high) in {**counts, "size": SIZES, "seed": (0, MOST_SEEDS)}.items():
            if not low <= getattr(self, flag) <= high:
                raise InputError(f"--{flag} is {getattr(self, flag)}. Give a number from {low} to {high}.")
        if not self.scans():
            raise InputError("There is nothing to make. Give at least one class and one count above 0.")

    def scans(self) -> list[tuple[str, str]]:
        """Class and path ("test/dent/003") of every scan to make."""
        counts = {"train/good": self.train, "validation/good": self.validation, "test/good": self.test_good}
        counts |= {f"test/{defect}": self.test_defective for defect in DEFECTS}
        return [(c, f"{folder}/{i:03d}") for c in self.classes for folder, n in counts.items() for i in range(n)]


def make_dataset(plan: Plan, num_workers: int = 1) -> None:
    """Write the scans of a plan, `num_workers` at a time; InputError if a folder cannot be made or is not empty."""
    folders = [plan.output_dir / name for name in plan.classes]
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty. Give another OUTPUT_DIR or remove that folder.")
    for folder in folders:
        make_folder(folder, "OUTPUT_DIR")
    scans, write = plan.scans(), partial(_write_scan, plan)
    if num_workers == 1:
        for scan in tqdm(scans, unit="scan"):
            write(scan)
    else:
        with ProcessPoolExecutor(num_workers) as pool:
            for _ in tqdm(pool.map(write, scans), total=len(scans), unit="scan"):
                pass


def _write_scan(plan: Plan, scan: tuple[str, str]) -> None:
    part_class, path = scan
    rgb, xyz, gt = make_scan(part_class, path, plan.size, plan.seed)
    group, stem = (plan.output_dir / part_class / path).parent, Path(path).name
    write_organized_pc(group / "xyz" / f"{stem}.tiff", xyz)
    images = {"rgb": rgb, "gt": gt} if path.startswith("test/") else {"rgb": rgb}
    for folder, image in images.items():
        with atomic_path(group / folder / f"{stem}.png") as temporary:
            Image.fromarray(image).save(temporary)


def write_preview(output_dir: Path, classes: Sequence[str]) -> None:
    """Draw `preview.png`: the first good scan of each class and the first with each defect, as image and relief."""
    from matplotlib.figure import Figure

    defects = ["good", *DEFECTS]
    figure = Figure(figsize=(2 * len(defects), 4 * len(classes) + 0.4), layout="constrained")
    axes = figure.subplots(2 * len(classes), len(defects), squeeze=False)
    for part_class, images, reliefs in zip(classes, axes[::2], axes[1::2], strict=True):
        images[0].set_ylabel(f"{part_class}: image")
        reliefs[0].set_ylabel("relief")
        for image, relief, defect in zip(images, reliefs, defects, strict=True):
            folders = [output_dir / part_class / split / defect for split in ("test", "train", "validation")]
            found = [folder for folder in folders if (folder / "xyz" / "000.tiff").is_file()]
            if found:
                _draw_scan(image, relief, found[0])
    for ax, defect in zip(axes[0], defects, strict=True):
        ax.set_title(defect)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    with atomic_path(output_dir / "preview.png") as temporary:
        figure.savefig(temporary, dpi=125, pil_kwargs={"compress_level": 1})  # three times as fast as the default


def _draw_scan(image: Axes, relief: Axes, folder: Path) -> None:
    """Draw scan 000 of a folder on two axes, with the outline of the ground truth if there is one.

    The relief is lit from the upper left, and black where there is no measurement.
    """
    from matplotlib.colors import LightSource

    xyz = read_organized_pc(folder / "xyz" / "000.tiff")
    valid = valid_mask(xyz)
    spacing = float(np.ptp(xyz[valid][:, 0])) / xyz.shape[1]
    sigma = 0.0006 / spacing  # takes the noise out of the slopes
    weight = np.maximum(ndimage.gaussian_filter(valid.astype(float), sigma), 1e-6)
    height = -ndimage.gaussian_filter(xyz[..., 2].astype(float), sigma) / weight
    shade = LightSource(azdeg=315, altdeg=45).hillshade(height, dx=spacing, dy=spacing, vert_exag=2)
    relief.imshow(np.where(valid, shade, 0), cmap="gray")
    with Image.open(folder / "rgb" / "000.png") as rgb:
        image.imshow(rgb)
    if (folder / "gt" / "000.png").is_file():
        with Image.open(folder / "gt" / "000.png") as gt:
            mask = np.asarray(gt) > 0
        if mask.any():
            for ax in (image, relief):
                ax.contour(mask, [0.5], colors="#2fe3f5", linewidths=1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and make the dataset."""
    parser = Parser((__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder that receives the class folders")
    add("--classes", nargs="+", default=Plan.classes, metavar="CLASS", help="classes to make")
    add("--train", type=int, default=Plan.train, metavar="N", help="good scans to train on")
    add("--validation", type=int, default=Plan.validation, metavar="N", help="good scans for validation")
    add("--test_good", type=int, default=Plan.test_good, metavar="N", help="good scans for testing")
    add("--test_defective", type=int, default=Plan.test_defective, metavar="N", help="scans of each type of defect")
    add("--size", type=int, default=Plan.size, metavar="PIXELS", help="side of the square images")
    add("--seed", type=int, default=Plan.seed, help="seed of all random numbers")
    add("--num_workers", type=int, default=os.cpu_count() or 1, metavar="N", help="number of processes")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        plan = from_flags(Plan, args)
        if args.num_workers < 1:
            raise InputError(f"--num_workers is {args.num_workers}. Give at least 1.")
        make_dataset(plan, args.num_workers)
    write_preview(plan.output_dir, plan.classes)
    print(f"{len(plan.scans())} scans in {plan.output_dir}, a contact sheet in {plan.output_dir / 'preview.png'}")


if __name__ == "__main__":
    main()

"""Make a dataset of synthetic parts in the layout of MVTec 3D-AD: image and organized point cloud of each sample.

    python utils/synthetic.py datasets/synthetic                        # three classes, 44 samples each, 400 x 400
    python utils/synthetic.py datasets/tiny --size 224 --train 4 --validation 1 --test_good 2 --test_defective 1
    python utils/synthetic.py datasets/gaskets --classes gasket --size 800 --train 200 --seed 7
    python utils/synthetic.py datasets/subtle --classes gasket carrot peach rope --defect_strength 0.5

The script writes raw scans (OUTPUT_DIR/<class>/{train,validation,test}/<defect>/{rgb,xyz,gt}/NNN.*, gt in test only)
and preview.png, a contact sheet. Clean the scans with utils/preprocessing.py like real ones, if they have at least 224
pixels a side: in smaller ones the cleaning mistakes the borders of a part for noise.

The clouds have the faults of a structured-light scanner: noise, shadows of the projector, and losses at edges and steep
walls. Dents, bumps and holes hardly show in the image, and stains and contaminations not at all in the cloud. Good
samples of gasket and bracket are nearly alike; cookie, carrot, peach and rope vary. With the same library versions, a
seed gives the same files, whatever the number of workers and of other samples.
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

if __name__ == "__main__":  # run by path: utils/ itself must not be searched for modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils.cleaning.cloud_cleaning import CleaningRule, fit_border_plane
from utils.command_line import MOST_WORKERS, Parser, from_flags
from utils.errors import Bounds, InputError
from utils.reporting.messages import exit_on_error, show, start_messages
from utils.reporting.progress import progress_bar
from utils.scans.files import atomic_path, make_folder
from utils.scans.organized_pc import read_organized_pc, valid_mask, write_organized_pc
from utils.synthetic_data.defects import DEFECTS
from utils.synthetic_data.fields import TOP
from utils.synthetic_data.parts import PARTS
from utils.synthetic_data.scanner import make_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS = dict.fromkeys(("train", "validation", "test_good", "test_defective"), (0, 1000))  # names have three digits
BOUNDS: Bounds = {
    **COUNTS,
    "defect_strength": (0.3, 1.0),  # weaker defects vanish in the noise
    "size": (64, 2048),  # in a smaller image a defect is less than a pixel
    "seed": (0, 2**64 - 1),
}
COLORS = "cividis"  # of the heights in the preview


@dataclass(frozen=True)
class Plan:
    """Numbers and size of the samples to make, named like the flags. The constructor raises InputError."""

    output_dir: Path
    classes: Sequence[str] = ("gasket", "bracket", "cookie")
    train: int = 16
    validation: int = 2
    test_good: int = 8
    test_defective: int = 3  # of each type of defect
    defect_strength: float = 1.0
    size: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.classes:
            if name not in PARTS:
                raise InputError(f"--classes names {name!r}. Give any of {', '.join(PARTS)}.")
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"--classes names a class twice: {' '.join(self.classes)}. Remove one.")
        if not self.samples():
            raise InputError("There is nothing to make. Give at least one class and one count above 0.")

    def samples(self) -> list[tuple[str, str]]:
        """Class and path ("test/dent/003") of every sample to make."""
        counts = {"train/good": self.train, "validation/good": self.validation, "test/good": self.test_good}
        counts |= {f"test/{defect}": self.test_defective for defect in DEFECTS}
        return [(c, f"{folder}/{i:03d}") for c in self.classes for folder, n in counts.items() for i in range(n)]


def make_dataset(plan: Plan, num_workers: int = 1) -> None:
    """Write the samples of a plan, `num_workers` at a time; InputError if a folder cannot be made or is not empty."""
    folders = [plan.output_dir / name for name in plan.classes]
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty. Give another OUTPUT_DIR or remove that folder.")
    for folder in folders:
        make_folder(folder, "OUTPUT_DIR")
    samples, write = plan.samples(), partial(_write_sample, plan)
    with ProcessPoolExecutor(num_workers) as pool:
        for _ in progress_bar(pool.map(write, samples), total=len(samples), unit="sample"):
            pass


def _write_sample(plan: Plan, sample: tuple[str, str]) -> None:
    part_class, path = sample
    rgb, xyz, gt = make_scan(part_class, path, plan.size, plan.seed, strength=plan.defect_strength)
    group, stem = (plan.output_dir / part_class / path).parent, Path(path).name
    write_organized_pc(group / "xyz" / f"{stem}.tiff", xyz)
    images = {"rgb": rgb, "gt": gt} if path.startswith("test/") else {"rgb": rgb}
    for folder, image in images.items():
        with atomic_path(group / folder / f"{stem}.png") as temporary:
            Image.fromarray(image).save(temporary)


def write_preview(output_dir: Path, classes: Sequence[str]) -> None:
    """Draw `preview.png`: the first good sample of each class and the first with each defect, as image and height."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    defects = ["good", *DEFECTS]
    figure = Figure(figsize=(2 * len(defects) + 0.8, 4 * len(classes) + 0.6), layout="constrained")
    axes = figure.subplots(2 * len(classes), len(defects), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for part_class, images, heights in zip(classes, axes[::2], axes[1::2], strict=True):
        images[0].set_ylabel(f"{part_class}: image")
        heights[0].set_ylabel(f"{part_class}: height")
        for image, height, defect in zip(images, heights, defects, strict=True):
            for path in sorted((output_dir / part_class).glob(f"*/{defect}/xyz/000.tiff"))[:1]:
                _draw_sample(image, height, path.parents[1])
    for ax, defect in zip(axes[0], defects, strict=True):
        ax.set_title(defect)
    bar = figure.colorbar(ScalarMappable(cmap=COLORS), ax=axes, aspect=60, pad=0.01)
    bar.mappable.set_clim(0, 1000 * TOP)
    bar.set_label("height above the table in mm")
    figure.supxlabel("dashed line: around a defect; black in the height: no measurement", fontsize=10)
    with atomic_path(output_dir / "preview.png") as temporary:
        figure.savefig(temporary, dpi=125, pil_kwargs={"compress_level": 1})  # three times as fast as the default


def _draw_sample(image: Axes, relief: Axes, folder: Path) -> None:
    """Draw sample 000 of a folder on two axes, cropped to the part, with a line 2 mm around its defects."""
    from matplotlib import colormaps
    from matplotlib.colors import LightSource

    xyz = read_organized_pc(folder / "xyz" / "000.tiff")
    valid = valid_mask(xyz)
    plane, _ = fit_border_plane(xyz, np.random.default_rng(0), CleaningRule())
    spacing = float(np.ptp(xyz[valid][:, 0])) / xyz.shape[1]
    height = np.where(valid, np.abs(xyz @ plane[:3] + plane[3]), 0)
    rows, columns = np.nonzero(ndimage.median_filter(height, 5) > 0.005)
    sigma = 0.0006 / spacing  # takes the noise out of the slopes
    smooth = ndimage.gaussian_filter(height, sigma) / np.maximum(ndimage.gaussian_filter(valid * 1.0, sigma), 1e-6)
    shade = LightSource().hillshade(smooth, vert_exag=2, dx=spacing, dy=spacing)
    shade = np.where(valid, shade / np.median(shade), 0)  # 1 on level ground, whose color matches the color bar
    relief.imshow(np.clip(colormaps[COLORS](smooth / TOP)[..., :3] * shade[..., None], 0, 1))
    with Image.open(folder / "rgb" / "000.png") as rgb:
        image.imshow(rgb)
    x, y, reach = np.ptp(columns) / 2 + columns.min(), np.ptp(rows) / 2 + rows.min(), 0.066 / spacing
    for ax in (image, relief):
        ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
        if folder.name in DEFECTS:
            with Image.open(folder / "gt" / "000.png") as gt:
                around = ndimage.distance_transform_edt(np.asarray(gt) == 0) * spacing
            ax.contour(around, [0.002], colors="#2fe3f5", linewidths=1.0, linestyles="dashed")


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and make the dataset."""
    parser = Parser((__doc__ or "").split("\n\n")[0], {**BOUNDS, "num_workers": (1, MOST_WORKERS)})
    add = parser.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder that receives the class folders")
    add("--classes", nargs="+", default=Plan.classes, metavar="CLASS", help=f"any of {', '.join(PARTS)}")
    add("--train", type=int, default=Plan.train, metavar="N", help="good samples to train on")
    add("--validation", type=int, default=Plan.validation, metavar="N", help="good samples for validation")
    add("--test_good", type=int, default=Plan.test_good, metavar="N", help="good samples for testing")
    add("--test_defective", type=int, default=Plan.test_defective, metavar="N", help="samples of each type of defect")
    strength = "factor on the depth, contrast and area of defects"
    add("--defect_strength", type=float, default=Plan.defect_strength, help=strength)
    add("--size", type=int, default=Plan.size, metavar="PIXELS", help="side of the square images")
    add("--seed", type=int, default=Plan.seed, help="seed of all random numbers")
    add("--num_workers", type=int, default=os.cpu_count() or 1, metavar="N", help="number of processes")
    args = parser.parse_args(argv)
    start_messages("%(message)s")
    plan = from_flags(Plan, args)
    make_dataset(plan, args.num_workers)
    write_preview(plan.output_dir, plan.classes)
    show(f"{len(plan.samples())} samples in {plan.output_dir}, a contact sheet in {plan.output_dir / 'preview.png'}")


if __name__ == "__main__":
    main()

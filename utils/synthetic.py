"""Make a dataset of synthetic parts in the layout of MVTec 3D-AD: image and organized point cloud of each sample.

    python utils/synthetic.py datasets/synthetic                        # three classes, 44 samples each, 400 x 400
    python utils/synthetic.py datasets/tiny --size 224 --train 4 --validation 1 --test_good 2 --test_defective 1
    python utils/synthetic.py datasets/gaskets --classes gasket --size 800 --train 200 --seed 7

Written are raw scans (OUTPUT_DIR/<class>/{train,validation,test}/<defect>/{rgb,xyz,gt}/NNN.*, gt in test only), to be
cleaned by utils/preprocessing.py like real ones, and preview.png, a contact sheet. Below 224 pixels a side, points lie
too far apart for that cleaning, which then takes the borders of a part for noise.

A structured-light scanner hangs half a meter above a slightly tilted table. Its cloud has depth noise, pixels without a
value, shadows of the projector, and losses at edges and steep walls. The light is diffuse and frontal and the parts are
matt, so that dents, bumps and holes appear in the image as faint shading at most. Stains and contaminations leave the
cloud unchanged. The same seed gives the same files under the same versions of the libraries, for any number of workers,
and a scan does not depend on the others made with it.
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
from utils.scans.files import atomic_path
from utils.scans.organized_pc import read_organized_pc, valid_mask, write_organized_pc
from utils.synthetic_data.parts import DEFECTS, PARTS
from utils.synthetic_data.scanner import make_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (64, 2048)  # pixels; on a smaller image a defect is less than a pixel
RELIEF_COLORS = ("#2b3446", "#5f7f95", "#cfb98c", "#fff0cf")  # from the table up
MOST_SCANS = 1000  # of one folder: the names have three digits


@dataclass(frozen=True)
class Plan:
    """Number and size of the scans to make, with the names of the flags. The constructor raises InputError."""

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
                raise InputError(f"--classes names {name!r}, expected any of {', '.join(PARTS)}.")
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"--classes names a class twice: {' '.join(self.classes)}. Remove one.")
        for flag in ("train", "validation", "test_good", "test_defective"):
            if not 0 <= getattr(self, flag) <= MOST_SCANS:
                raise InputError(f"--{flag} is {getattr(self, flag)}, expected 0 to {MOST_SCANS} scans.")
        if not SIZES[0] <= self.size <= SIZES[1]:
            raise InputError(f"--size is {self.size}, expected {SIZES[0]} to {SIZES[1]} pixels.")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}, expected 0 or more.")
        if not self.scans():
            raise InputError("There is nothing to make. Give at least one class and one count above 0.")

    def scans(self) -> list[tuple[str, str]]:
        """Class and path ("test/dent/003") of every scan to make."""
        counts = {"train/good": self.train, "validation/good": self.validation, "test/good": self.test_good}
        counts |= {f"test/{defect}": self.test_defective for defect in DEFECTS}
        return [(c, f"{folder}/{i:03d}") for c in self.classes for folder, n in counts.items() for i in range(n)]


def make_dataset(plan: Plan, num_workers: int = 1) -> None:
    """Write the scans of a plan, `num_workers` at a time.

    Raises:
        InputError: a class folder cannot be made or holds files already.
    """
    folders = [plan.output_dir / name for name in plan.classes]
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty. Give another OUTPUT_DIR or remove that folder.")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}). Give another OUTPUT_DIR.") from None
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
    """Draw `preview.png`: of each class the first good scan and the first with each defect, as image and as relief."""
    import matplotlib
    from matplotlib.figure import Figure

    defects = ["good", *DEFECTS]
    with matplotlib.rc_context({"font.size": 11, "text.color": "0.9", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(2 * len(defects) + 0.5, 4 * len(classes) + 0.8), facecolor="0.11")
        axes = figure.subplots(2 * len(classes), len(defects), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for part_class, images, reliefs in zip(classes, axes[::2], axes[1::2], strict=True):
            for image, relief, defect in zip(images, reliefs, defects, strict=True):
                folders = [output_dir / part_class / split / defect for split in ("test", "train", "validation")]
                found = [folder for folder in folders if (folder / "xyz" / "000.tiff").is_file()]
                if found:
                    _draw_pair(image, relief, found[0])
            for ax, name in ((images[0], f"{part_class}: image"), (reliefs[0], "relief")):
                ax.text(-0.06, 0.5, name, rotation=90, ha="right", va="center", transform=ax.transAxes)
        for ax, defect in zip(axes[0], defects, strict=True):
            ax.set_title(defect, color="0.9")
        figure.text(0.5, 0.008, "dashed: ground truth   black in the relief: no measurement", ha="center", color="0.6")
        top, bottom = 0.4 / figure.get_figheight(), 0.35 / figure.get_figheight()
        figure.subplots_adjust(0.03, bottom, 0.995, 1 - top, wspace=0.03, hspace=0.03)
        with atomic_path(output_dir / "preview.png") as temporary:
            light = {"compress_level": 1}  # three times as fast
            figure.savefig(temporary, dpi=125, facecolor=figure.get_facecolor(), pil_kwargs=light)


def _draw_pair(image: Axes, relief: Axes, folder: Path) -> None:
    """Draw scan 000 of a folder, cut to the part, on two axes, with the ground truth where there is one."""
    height, spacing = _height_above_table(read_organized_pc(folder / "xyz" / "000.tiff"))
    above = (np.nan_to_num(height) > 0.005).astype(float)
    rows, columns = np.nonzero(ndimage.uniform_filter(above, 5) > 0.5)  # most pixels around: no single outliers
    center, reach = ((np.ptp(rows) / 2 + rows.min()), (np.ptp(columns) / 2 + columns.min())), 0.066 / spacing
    with Image.open(folder / "rgb" / "000.png") as picture:
        image.imshow(picture, interpolation="antialiased")
    relief.imshow(_shaded(height, spacing), interpolation="antialiased")
    for ax in (image, relief):
        ax.set(xlim=(center[1] - reach, center[1] + reach), ylim=(center[0] + reach, center[0] - reach))
    if (folder / "gt" / "000.png").is_file():
        with Image.open(folder / "gt" / "000.png") as picture:
            mask = np.asarray(picture) > 0
        if mask.any():
            around = ndimage.distance_transform_edt(~mask) * spacing
            for ax in (image, relief):
                ax.contour(around, [0.002], colors="#2fe3f5", linewidths=1.0, linestyles="dashed")


def _height_above_table(xyz: np.ndarray) -> tuple[np.ndarray, float]:
    """Height (H, W) over the plane of the outermost pixels, meters, NaN where missing; and the spacing of pixels."""
    valid = valid_mask(xyz)
    frame = valid.copy()
    margin = len(xyz) // 20
    frame[margin:-margin, margin:-margin] = False
    plane, *_ = np.linalg.lstsq(np.c_[xyz[frame][:, :2], np.ones(frame.sum())], xyz[frame][:, 2], rcond=None)
    height = xyz[..., :2] @ plane[:2] + plane[2] - xyz[..., 2]
    return np.where(valid, height, np.nan), float(np.ptp(xyz[frame][:, 0])) / xyz.shape[1]


def _shaded(height: np.ndarray, spacing: float) -> np.ndarray:
    """Color a height map (H, W), meters, by height, lit from the upper left, black where NaN; result (H, W, 3)."""
    from matplotlib.colors import LightSource, LinearSegmentedColormap

    known = np.isfinite(height)
    sigma = 0.0006 / spacing  # takes the noise out of the slopes
    weight = np.maximum(ndimage.gaussian_filter(known.astype(float), sigma), 1e-6)
    smooth = ndimage.gaussian_filter(np.nan_to_num(height), sigma) / weight
    tones = LinearSegmentedColormap.from_list("relief", RELIEF_COLORS)(np.clip(smooth / 0.028, 0, 1))[..., :3]
    lit = LightSource(azdeg=315, altdeg=45).hillshade(smooth, dx=spacing, dy=spacing, vert_exag=2)
    return np.where(known[..., None], tones * (0.2 + 0.95 * lit[..., None]), 0).clip(0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and make the dataset."""
    parser = Parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder that receives the class folders")
    add = parser.add_argument
    add("--classes", nargs="+", default=Plan.classes, metavar="CLASS", help="classes to make")
    add("--train", type=int, default=Plan.train, metavar="N", help="good scans to train on")
    add("--validation", type=int, default=Plan.validation, metavar="N", help="good scans")
    add("--test_good", type=int, default=Plan.test_good, metavar="N", help="good scans")
    text = f"scans of each defect: {', '.join(DEFECTS)}"
    add("--test_defective", type=int, default=Plan.test_defective, metavar="N", help=text)
    add("--size", type=int, default=Plan.size, metavar="PIXELS", help="side of the square images")
    add("--seed", type=int, default=Plan.seed, help="seed of all random numbers")
    add("--num_workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        plan = from_flags(Plan, args)
        if args.num_workers < 1:
            raise InputError(f"--num_workers is {args.num_workers}, expected at least 1.")
        make_dataset(plan, args.num_workers)
    write_preview(plan.output_dir, plan.classes)
    print(f"{len(plan.scans())} scans in {plan.output_dir}, a contact sheet in {plan.output_dir / 'preview.png'}")


if __name__ == "__main__":
    main()

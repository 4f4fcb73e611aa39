"""Predict new samples with a saved detector: score, decision, anomaly map and overlay for each.

    python predict.py --detector detectors/bagel --rgb part.png --xyz part.tiff
    python predict.py --detector detectors/bagel --rgb images/ --xyz scans/ --preprocess --output_dir predictions/monday
    python predict.py --detector detectors/bagel --rgb "line/rgb/*.png" --xyz "line/depth/*.png" \\
        --intrinsics camera.json

It writes to --output_dir: <name>.tiff (anomaly map, float32, at the resolution of the cloud), <name>_overlay.png, and
predictions.jsonl with a line of JSON for each sample. An interrupted run keeps its lines. If a sample cannot be
predicted, its line has "error" instead of a score, and the run continues with the next one.

Exit code: 0 all samples predicted, 1 at least one could not be predicted, 2 the run could not start or stopped early,
130 interrupted, 141 the reader of stdout closed the pipe.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.choices import CLEANING_FLAGS
from utils.command_line import FILE_BOUNDS, MOST_WORKERS, Parser, add_file_flags
from utils.errors import InputError, exit_on_error, show
from utils.scans.images import set_max_megapixels

if TYPE_CHECKING:
    from feature_extractors.detector import Detector
    from utils.scans.sample_files import FoundSamples

logger = logging.getLogger("predict")


@dataclass(frozen=True)
class PredictSettings:
    """The flags, checked as far as possible without the detector."""

    detector: Path
    rgb: str | None
    xyz: str | None
    intrinsics: Path | None
    xyz_unit: str | None  # None: that of the detector, as for missing_value
    missing_value: float | None
    preprocess: bool
    keep_rgb: bool
    mask_unmeasured: bool
    empty_margins: bool
    output_dir: Path
    append: bool
    no_images: bool
    device: str
    checkpoint_dir: Path
    rgb_checkpoint: Path | None
    xyz_checkpoint: Path | None
    batch_size: int | None
    num_workers: int
    max_megapixels: int

    def __post_init__(self) -> None:
        if self.rgb is None and self.xyz is None:
            raise InputError("There is nothing to predict. Give --rgb, --xyz or both.")
        needed = dict.fromkeys(CLEANING_FLAGS, "preprocess")
        needed |= dict.fromkeys(("preprocess", "intrinsics", "xyz_unit", "missing_value"), "xyz")
        for flag, other in needed.items():
            if getattr(self, flag) not in (None, False) and getattr(self, other) in (None, False):
                raise InputError(f"--{flag} only applies to --{other}. Give both, or leave it out.")

    def check_detector(self, detector: "Detector") -> None:
        """Refuse files that the detector does not use, and missing ones."""
        modalities, method = detector.config.method.modalities, detector.config.method_name
        for modality, files in (("rgb", self.rgb), ("xyz", self.xyz)):
            if modality in modalities and files is None:
                raise InputError(f"{self.detector} ({method}) uses {modality} files. Give --{modality} as well.")
        if self.xyz is not None and "xyz" not in modalities and not self.preprocess:
            raise InputError(f"--xyz is not used: {self.detector} ({method}) uses images alone. Leave it out.")

    def check_files(self, found: "FoundSamples") -> None:
        """Refuse flags that apply to none of the files, and an --output_dir where results could replace other files."""
        from runner.prediction import PREDICTIONS, output_paths
        from utils.scans.sample_files import check_camera_flags

        clouds = [each.xyz for each in found.samples if each.xyz is not None and self.intrinsics is not None]
        if clouds:
            check_camera_flags(clouds, self.xyz_unit)
        folder = Path(realpath(self.output_dir))  # unlike resolve(), it accepts a link to itself
        for files in (*found.samples, *(files for files, _ in found.incomplete)):
            for path in (files.rgb, files.xyz):
                if path is not None and folder in (Path(realpath(path)).parent, Path(realpath(path.parent))):
                    raise InputError(f"{path} is in --output_dir, where its map could replace it. Choose another one.")
        if self.no_images or (self.output_dir / PREDICTIONS).exists():
            return
        for path in (path for files in found.samples for path in output_paths(self.output_dir, files.path)):
            if path.exists():
                raise InputError(f"{path} exists, with no {PREDICTIONS} beside it. Choose another --output_dir.")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits on --help, --version and wrong flags."""
    parser = Parser(__doc__, {**FILE_BOUNDS, "batch_size": (1, 1024), "num_workers": (0, MOST_WORKERS)})
    add = parser.add_argument_group("samples").add_argument
    add("--detector", type=Path, required=True, help="fitted detector; sets defaults of --xyz_unit, --missing_value")
    add("--rgb", help="image, folder of images, or quoted pattern: .png, .jpg, .bmp, .webp, .tif")
    add("--xyz", help="organized point cloud, folder or pattern: .tiff, .npy, .pcd, .ply, or depth .png (--intrinsics)")
    add("--intrinsics", type=Path, help="JSON file with the camera's fx, fy, cx, cy, depth_scale, see docs/DATA.md")
    add_file_flags(add, None)
    add("--preprocess", action="store_true", help="first clean raw scans as utils/preprocessing.py does")
    for flag, text in CLEANING_FLAGS.items():
        add(f"--{flag}", action="store_true", help=f"with --preprocess: {text}")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("predictions"), help="folder of maps, overlays and predictions.jsonl")
    add("--append", action="store_true", help="add to an existing predictions.jsonl instead of replacing it")
    add("--no_images", action="store_true", help="write neither maps nor overlays")
    add = parser.add_argument_group("computation").add_argument
    add("--device", default="auto", help="cpu, cuda, or cuda:<number>; auto takes a GPU where there is one")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--rgb_checkpoint", type=Path, help="checkpoint of the RGB backbone, instead of a file in --checkpoint_dir")
    add("--xyz_checkpoint", type=Path, help="checkpoint of the 3D backbone, instead of a file in --checkpoint_dir")
    add("--batch_size", type=int, help="samples that go through the networks together; by default 4 on CPU, 16 on GPU")
    add("--num_workers", type=int, default=2, help="threads that read files ahead")
    return parser.parse_args(argv)


def predict(settings: PredictSettings, locks: ExitStack) -> int:
    """Predict all samples, write the predictions, and return the exit code. `locks` gets the lock of --output_dir."""
    from tqdm import tqdm

    from feature_extractors.persistence import load_detector
    from runner.prediction import LoadedSample, Outcome, PredictionWriter, SampleReader, output_paths, predict_samples
    from utils.cleaning.cloud_cleaning import CleaningRule
    from utils.scans.depth_camera import read_camera
    from utils.scans.files import locked, make_folder
    from utils.scans.sample_files import find_samples

    begin = time.perf_counter()
    rule = CleaningRule(**{flag: getattr(settings, flag) for flag in CLEANING_FLAGS}) if settings.preprocess else None
    set_max_megapixels(settings.max_megapixels)
    camera = None if settings.intrinsics is None else read_camera(settings.intrinsics)
    found = find_samples(settings.rgb, settings.xyz, depth=camera is not None)
    settings.check_files(found)
    weights: dict[str, Any] = {"checkpoint_dir": settings.checkpoint_dir}
    weights |= {"rgb_checkpoint": settings.rgb_checkpoint, "xyz_checkpoint": settings.xyz_checkpoint}
    detector = load_detector(settings.detector, settings.device, **weights)
    settings.check_detector(detector)
    config, thresholds = detector.config, detector.thresholds
    if thresholds is None:
        logger.warning("%s has no thresholds: there are scores but no decisions", settings.detector)
    modalities, size = config.method.modalities, config.img_size
    given: dict[str, Any] = {"unit": settings.xyz_unit, "missing_value": settings.missing_value}
    form = replace(detector.clouds, **{name: value for name, value in given.items() if value is not None})
    reader = SampleReader([each._replace(form=form) for each in found.samples], modalities, size, camera, rule)
    folder = make_folder(settings.output_dir, "--output_dir")
    images = (path for each in found.samples if not settings.no_images for path in output_paths(folder, each.path))
    locks.enter_context(locked(folder, "--output_dir", images))
    writer = PredictionWriter(folder, thresholds, not settings.no_images, settings.append)
    records = []
    for files, problem in found.incomplete:
        records.append(writer.add(Outcome(LoadedSample(files), problem=problem)))
        print_line(records[-1])
    batch_size = settings.batch_size or detector.extractor.batch_size
    outcomes = predict_samples(detector, reader, batch_size, settings.num_workers)
    width = max(len(each.path) for each in found.samples)
    for outcome in tqdm(outcomes, total=len(reader), desc="samples", unit="sample", leave=False, disable=None):
        records.append(writer.add(outcome))
        with tqdm.external_write_mode():
            print_line(records[-1], width)
    predicted = [each for each in records if "error" not in each]
    summary = f"{len(predicted)} samples predicted in {time.perf_counter() - begin:.1f} s"
    if thresholds is not None:
        anomalous = sum(each["anomalous"] for each in predicted)
        summary += f": {anomalous} anomalous, {len(predicted) - anomalous} good"
    if len(predicted) < len(records):
        summary += f"; {len(records) - len(predicted)} could not be predicted"
    show(f"{summary}; written to {writer.path}")
    return int(len(predicted) < len(records))


def print_line(record: dict[str, Any], width: int = 0) -> None:
    """Print a sample on one line of stdout in aligned columns, or its problem on stderr."""
    name = record["name"]
    if "error" in record:
        return show(f"predict.py: {name} could not be predicted: {record['error']}", sys.stderr)
    decision = {True: "anomalous", False: "good", None: "no threshold"}[record["anomalous"]]
    severity = "" if record["severity"] is None else f"{record['severity']:.2f}"
    scores = f"{record['score']:12.6g}  {severity:>7}"
    show(f"{name:{width}}  {scores}  {decision:12}  {record['seconds']:.3f} s")


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, predict, and exit."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    with ExitStack() as locks:
        raise SystemExit(predict(PredictSettings(**vars(parse_args(argv))), locks))


if __name__ == "__main__":
    main()

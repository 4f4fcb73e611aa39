"""Flags of predict.py, and the frozen settings that they become. Importing this module does not import torch."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from glob import has_magic
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.choices import CLEANING_FLAGS
from utils.command_line import FILE_BOUNDS, MOST_WORKERS, Parser, add_file_flags
from utils.errors import Bounds, InputError
from utils.reporting.messages import show

if TYPE_CHECKING:
    from feature_extractors.detector import Detector
    from feature_extractors.thresholds import Thresholds
    from utils.records import CloudForm, SampleFiles
    from utils.scans.sample_files import FoundSamples

BOUNDS: Bounds = FILE_BOUNDS | {"batch_size": (1, 1024), "num_workers": (0, MOST_WORKERS)}
BOUNDS |= {"settle": (0, 3600), "partner_timeout": (0, 10**6), "target_fpr": (1e-6, 1 - 1e-6)}
BOUNDS |= {"image_threshold": (1e-30, 1e30), "pixel_threshold": (1e-30, 1e30)}


@dataclass(frozen=True)
class PredictSettings:
    """The flags, checked as far as possible without the detector."""

    detector: Path
    rgb: str | None
    xyz: str | None
    intrinsics: Path | None
    xyz_unit: str | None  # None: that of the detector, as for missing_value
    missing_value: float | None
    preprocess: bool | None  # None: as the training samples
    keep_rgb: bool
    mask_unmeasured: bool
    empty_margins: bool
    watch: bool
    stdin: bool
    settle: float
    partner_timeout: float
    target_fpr: float | None
    image_threshold: float | None
    pixel_threshold: float | None
    output_dir: Path
    append: bool
    no_images: bool
    fail_on_anomaly: bool
    device: str
    checkpoint_dir: Path
    rgb_checkpoint: Path | None
    xyz_checkpoint: Path | None
    batch_size: int | None
    num_workers: int
    max_megapixels: int

    def __post_init__(self) -> None:
        given = self.rgb is not None or self.xyz is not None
        if self.stdin and (given or self.watch):
            raise InputError("The lines of --stdin name the files. Leave out --rgb, --xyz and --watch.")
        if not self.stdin and not given:
            raise InputError("There is nothing to predict. Give --rgb, --xyz or both.")
        if self.fail_on_anomaly and (self.stdin or self.watch):
            raise InputError("--fail_on_anomaly has no effect with --watch or --stdin. Leave it out.")
        needed = dict.fromkeys(CLEANING_FLAGS, "preprocess")
        if not self.stdin:
            needed |= dict.fromkeys(("preprocess", "intrinsics", "xyz_unit", "missing_value"), "xyz")
        for flag, other in needed.items():
            if getattr(self, flag) not in (None, False) and getattr(self, other) in (None, False):
                raise InputError(f"--{flag} only applies to --{other}. Give both, or leave it out.")

    def check_detector(self, detector: "Detector") -> None:
        """Refuse files that the detector does not use, and missing ones."""
        modalities, method = detector.config.method.modalities, detector.config.method_name
        if self.stdin:
            return
        for modality, files in (("rgb", self.rgb), ("xyz", self.xyz)):
            if modality in modalities and files is None:
                raise InputError(f"{self.detector} ({method}) uses {modality} files. Give --{modality} as well.")
        cleans = self.cleaning_flags(detector) is not None
        if self.xyz is None and cleans:
            problem = f"{self.detector} ({method}) was fitted on images that were cleaned with their clouds"
            raise InputError(f"{problem}. Give --xyz as well, or --no-preprocess if the images are cleaned already.")
        if self.xyz is not None and "xyz" not in modalities and not cleans:
            raise InputError(f"--xyz is not used: {self.detector} ({method}) uses images alone. Leave it out.")

    def form(self, detector: "Detector") -> "CloudForm":
        """Form of the clouds: that of the detector, changed by the flags."""
        given: dict[str, Any] = {"unit": self.xyz_unit, "missing_value": self.missing_value}
        return replace(detector.clouds, **{name: value for name, value in given.items() if value is not None})

    def cleaning_flags(self, detector: "Detector") -> dict[str, bool] | None:
        """Cleaning flags for new samples; None if they are not cleaned."""
        if self.preprocess is False or (self.preprocess is None and detector.cleaned is None):
            return None
        return {flag: getattr(self, flag) or (detector.cleaned or {}).get(flag, False) for flag in CLEANING_FLAGS}

    def thresholds(self, detector: "Detector") -> "Thresholds | None":
        """Thresholds of this run: those of the detector, changed by the flags. Prints both if they differ."""
        from feature_extractors.thresholds import warn_of_few_samples

        old = detector.thresholds
        given: dict[str, Any] = {"image": self.image_threshold, "pixel": self.pixel_threshold}
        changes = {name: value for name, value in given.items() if value is not None}
        changed = bool(changes) or self.target_fpr is not None
        if old is None:
            if changed or self.fail_on_anomaly:
                raise InputError(f"{self.detector} has no thresholds. Leave out flags that change or need them.")
            return None
        new = old
        if self.target_fpr is not None:
            if detector.calibration is None:
                raise InputError(f"{self.detector} has no calibration. Leave out --target_fpr.")
            new = detector.calibration.thresholds(self.target_fpr)
            if self.image_threshold is None:
                warn_of_few_samples({self.detector.name: new.parts}, self.target_fpr)
        new = replace(new, **changes)
        if changed:
            image, pixel = (f"{getattr(old, name):.6g}, now {getattr(new, name):.6g}" for name in ("image", "pixel"))
            show(f"image threshold {image}; pixel threshold {pixel}")
        return new

    def check_files(self, found: "FoundSamples") -> None:
        """Refuse flags that apply to none of the files, and an --output_dir where results could replace other files."""
        from runner.prediction import PREDICTIONS, output_paths
        from utils.scans.sample_files import check_camera_flags

        for flag, given in (("rgb", self.rgb), ("xyz", self.xyz)):
            if not self.watch or given is None:
                continue
            if not given or not (has_magic(given) or Path(given).exists()):
                raise InputError(f"--{flag} {given!r} does not exist. Create the folder, or quote a pattern.")
            if realpath(given) == realpath(self.output_dir):
                raise InputError(f"--{flag} is --output_dir, so its maps would be watched too. Separate them.")
        self.check_output(found.files)
        clouds = [each.xyz for each in found.samples if each.xyz is not None and self.intrinsics is not None]
        if clouds:
            check_camera_flags(clouds, self.xyz_unit)
        if self.no_images or (self.output_dir / PREDICTIONS).exists():
            return
        for path in (path for files in found.samples for path in output_paths(self.output_dir, files.path)):
            if path.exists():
                raise InputError(f"{path} exists, but not {PREDICTIONS} beside it. Choose another --output_dir.")

    def check_output(self, samples: "Iterable[SampleFiles]") -> None:
        """Refuse files in --output_dir."""
        folder = Path(realpath(self.output_dir))  # unlike resolve(), it accepts a link to itself
        for path in (path for files in samples for path in (files.rgb, files.xyz) if path is not None):
            if folder in (Path(realpath(path)).parent, Path(realpath(path.parent))):
                raise InputError(f"{path} is in --output_dir, where its map could replace it. Choose another folder.")


def make_parser(description: str | None) -> Parser:
    """Make the parser of predict.py; it exits on --help, --version and wrong flags."""
    parser = Parser(description, BOUNDS)
    add = parser.add_argument_group("samples").add_argument
    add("--detector", type=Path, required=True, help="saved detector; sets defaults of --xyz_unit and --missing_value")
    add("--rgb", help="image, folder of images, or quoted pattern: .png, .jpg, .bmp, .webp, .tif")
    add("--xyz", help="organized point cloud, folder or pattern: .tiff, .npy, .pcd, .ply, or depth .png (--intrinsics)")
    add("--intrinsics", type=Path, help="JSON file with the camera's fx, fy, cx, cy, depth_scale, see docs/DATA.md")
    add_file_flags(add, None)
    text = "first clean raw scans as utils/preprocessing.py does; by default if the training samples were cleaned"
    add("--preprocess", action=argparse.BooleanOptionalAction, help=text)
    for flag, text in CLEANING_FLAGS.items():
        add(f"--{flag}", action="store_true", help=f"with --preprocess: {text}")
    add = parser.add_argument_group("new samples as they arrive").add_argument
    add("--watch", action="store_true", help="also predict new files in --rgb and --xyz, until Ctrl-C or SIGTERM")
    add("--settle", type=float, default=1.0, help="with --watch: seconds that a sample's files must be unchanged")
    text = "with --watch: seconds until an image without a cloud, or a cloud without an image, is reported"
    add("--partner_timeout", type=float, default=60.0, help=text)
    add("--stdin", action="store_true", help="read requests as lines of JSON from stdin, and answer with lines of JSON")
    add = parser.add_argument_group("decision").add_argument
    add("--target_fpr", type=float, help="false-alarm rate of this run's thresholds, from the detector's calibration")
    add("--image_threshold", type=float, help="score above which a sample is anomalous, in this run")
    add("--pixel_threshold", type=float, help="value above which a pixel of a map is anomalous, in this run")
    add("--fail_on_anomaly", action="store_true", help="end with exit code 3 if a sample is anomalous")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("predictions"), help="folder of maps, overlays and predictions")
    add("--append", action="store_true", help="add to existing predictions instead of replacing them")
    add("--no_images", action="store_true", help="write neither maps nor overlays")
    add = parser.add_argument_group("computation").add_argument
    add("--device", default="auto", help="cpu, cuda, or cuda:<number>; auto takes a GPU if there is one")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--rgb_checkpoint", type=Path, help="checkpoint of the RGB backbone, instead of a file in --checkpoint_dir")
    add("--xyz_checkpoint", type=Path, help="checkpoint of the 3D backbone, instead of a file in --checkpoint_dir")
    add("--batch_size", type=int, help="samples that go through the networks together; by default 4 on CPU, 16 on GPU")
    add("--num_workers", type=int, default=2, help="threads that read files ahead")
    return parser

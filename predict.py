"""Judge new parts with a saved detector: score, decision, anomaly map and overlay of each.

    python predict.py --detector detectors/bagel --rgb part.png --xyz part.tiff
    python predict.py --detector detectors/bagel --rgb photos/ --xyz scans/ --preprocess --output_dir predictions/monday
    python predict.py --detector detectors/bagel --rgb "line/rgb/*.png" --xyz "line/depth/*.png" \\
        --intrinsics camera.json

Writes to --output_dir: <name>.tiff (float32 anomaly map, size and pixels of the scan), <name>_overlay.png and
predictions.jsonl, a line of JSON per part, written as soon as its batch is judged: a run that was interrupted leaves a
whole line for each part so far. A part that cannot be judged has a line with "error" instead of a score; the others go
on.

Exit code: 0 all parts judged, 1 at least one could not be judged, 2 the run stopped or never began, 130 interrupted,
141 the reader of stdout is gone.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tqdm import tqdm

from feature_extractors.detector import Detector
from feature_extractors.persistence import load_detector
from runner.dataset_check import CLEANING_COMMAND
from runner.prediction import PREDICTIONS, LoadedPart, Output, PartReader, Reading, Verdict, judge_parts, output_paths
from utils.errors import InputError, exit_on_input_error
from utils.scans.depth_camera import read_camera
from utils.scans.files import make_folder
from utils.scans.sample_files import DEPTH_SUFFIXES, UNITS, FoundSamples, cloud_suffixes, find_samples

logger = logging.getLogger("predict")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("which parts").add_argument
    add("--detector", type=Path, required=True, help="folder of a fitted detector (main.py --save_detector)")
    add("--rgb", help="photo, folder of photos, or pattern in quotes: .png, .jpg")
    add("--xyz", help="organized point cloud, folder or pattern: .tiff, .npy, .pcd, .ply, or depth .png (--intrinsics)")
    add(
        "--intrinsics", type=Path, help="of the camera of depth pictures, see docs/DATA.md: fx, fy, cx, cy, depth_scale"
    )
    add(
        "--xyz_unit", default="m", choices=UNITS, help="of the coordinates in point clouds; depth pictures: depth_scale"
    )
    add("--preprocess", action="store_true", help="clean raw scans first as utils/preprocessing.py does")
    add("--keep_rgb", action="store_true", help="with --preprocess: only pad the photos, as in utils/preprocessing.py")

    add = parser.add_argument_group("what a run leaves").add_argument
    add("--output_dir", type=Path, default=Path("predictions"), help="folder of maps, overlays and predictions.jsonl")
    add("--append", action="store_true", help="add to the predictions.jsonl that is there instead of replacing it")
    add("--no_images", action="store_true", help="write neither maps nor overlays")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--rgb_checkpoint", type=Path, help="checkpoint of the RGB backbone, wherever it lies and whatever its name")
    add("--xyz_checkpoint", type=Path, help="checkpoint of the 3D backbone, likewise")
    add("--batch_size", type=int, help="parts that go through the networks together; by default 4 on CPU, 16 on GPU")
    add("--num_workers", type=int, default=2, help="threads that read files ahead")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """What can be told without the detector; raises InputError."""
    if args.rgb is None and args.xyz is None:
        raise InputError("there is no part to judge: give --rgb, --xyz or both")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"batch_size is {args.batch_size}, expected at least 1")
    if args.num_workers < 0:
        raise InputError(f"num_workers is {args.num_workers}, expected 0 or more")
    if args.keep_rgb and not args.preprocess:
        raise InputError("--keep_rgb is about the photos that --preprocess cleans: give both, or leave it out")
    if args.preprocess and args.xyz is None:
        raise InputError("--preprocess looks at the point clouds: give --xyz as well")
    for flag, given in (("--intrinsics", args.intrinsics is not None), ("--xyz_unit", args.xyz_unit != "m")):
        if given and args.xyz is None:
            raise InputError(f"{flag} is about the files of --xyz: give both, or leave it out")


def check_flags_of(detector: Detector, args: argparse.Namespace) -> None:
    """Whether the flags give what the detector looks at, and nothing that has no use; raises InputError."""
    modalities, method = detector.config.method.modalities, detector.config.method_name
    for modality in sorted(modalities):
        if getattr(args, modality) is None:
            raise InputError(f"{args.detector} ({method}) looks at {modality} files: give --{modality} as well")
    if args.xyz is not None and "xyz" not in modalities and not args.preprocess:
        raise InputError(f"--xyz is not used: {args.detector} ({method}) looks at photos alone; leave it out")


def check_found(found: FoundSamples, args: argparse.Namespace) -> None:
    """Whether the flags about point clouds are about any of those that were found; raises InputError."""
    of_depth = {part.xyz.suffix.lower() in DEPTH_SUFFIXES for part in found.samples if part.xyz is not None}
    if args.intrinsics is not None and True not in of_depth:
        raise InputError("--intrinsics is of depth pictures, and --xyz names none: leave it out, or name some")
    if args.xyz_unit != "m" and False not in of_depth:
        raise InputError("--xyz_unit is of point clouds, and --xyz names none: depth pictures have a depth_scale")


def check_output(found: FoundSamples, output_dir: Path) -> None:
    """Refuse a folder with files, of these parts or of others, that maps would replace; raises InputError."""
    folder = output_dir.resolve()
    for part in (*found.samples, *(part for part, _ in found.incomplete)):
        for path in (part.rgb, part.xyz):
            if path is not None and folder in (path.resolve().parent, path.parent.resolve()):
                raise InputError(f"{path} lies in --output_dir, where its map could take its place: choose another one")
    if (folder / PREDICTIONS).exists():
        return
    for path in (path for part in found.samples for path in output_paths(folder, part.path)):
        if path.exists():
            raise InputError(
                f"{path} is in the way, and without a {PREDICTIONS} beside it was not written by this script: choose "
                "another --output_dir"
            )


def write_parts(
    judged: Iterable[tuple[LoadedPart, Verdict | str]], output: Output, count: int, width: int
) -> list[bool]:
    """Write and print each part as it is judged.

    Returns:
        of those that could be judged, which are anomalous; without thresholds none is.
    """
    decisions, warned = [], False
    for part, verdict in tqdm(judged, total=count, desc="parts", unit="part", leave=False, disable=None):
        name = part.files.path
        if isinstance(verdict, str):
            output.add_fault(part.files, verdict)
            print_fault(name, verdict)
            continue
        record = output.add(part, verdict)
        decisions.append(bool(record["anomalous"]))
        with tqdm.external_write_mode():
            print(part_line(record, width), flush=True)
        if part.shows_table and not warned:
            warned = True
            logger.warning(
                "%s shows the table that the part lies on, which a detector of cleaned scans takes for a defect: give "
                "--preprocess, or clean the scans first (%s)",
                *(part.files.xyz, CLEANING_COMMAND),
            )
    return decisions


def part_line(record: dict[str, Any], width: int) -> str:
    """A part on one line; the decision last but one, so that columns stay aligned."""
    decision = {True: "anomalous", False: "good", None: "no threshold"}[record["anomalous"]]
    normalized = "" if record["normalised"] is None else f"{record['normalised']:.3f}"
    return (
        f"{record['name']:{width}}  {record['score']:12.6g}  {normalized:5}  {decision:12}  {record['seconds']:.3f} s"
    )


def print_fault(name: str, fault: str) -> None:
    with tqdm.external_write_mode():
        print(f"predict.py: {name} could not be judged: {fault}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    begin = time.perf_counter()
    check_args(args)
    camera = None if args.intrinsics is None else read_camera(args.intrinsics)
    found = find_samples(args.rgb, args.xyz, cloud_suffixes(camera))
    check_found(found, args)
    check_output(found, args.output_dir)
    detector = load_detector(
        args.detector,
        args.device,
        checkpoint_dir=args.checkpoint_dir,
        rgb_checkpoint=args.rgb_checkpoint,
        xyz_checkpoint=args.xyz_checkpoint,
    )
    check_flags_of(detector, args)
    if detector.thresholds is None:
        logger.warning(
            "%s was saved without thresholds: there are scores but no decisions, and each overlay has its own colors",
            args.detector,
        )
    config = detector.config
    reading = Reading(
        config.method.modalities,
        config.img_size,
        camera,
        args.xyz_unit,
        args.preprocess,
        args.keep_rgb,
        photos=not args.no_images,
    )
    folder = make_folder(args.output_dir, "--output_dir")
    output = Output(folder, detector.thresholds, not args.no_images, args.append)
    for part, fault in found.incomplete:
        output.add_fault(part, fault)
        print_fault(part.path, fault)
    batch_size = args.batch_size or detector.extractor.batch_size
    judged = judge_parts(detector, PartReader(found.samples, reading), batch_size, args.num_workers)
    decisions = write_parts(judged, output, len(found.samples), max(len(part.path) for part in found.samples))
    failed = len(found.samples) + len(found.incomplete) - len(decisions)
    summary = f"{len(decisions)} parts judged in {time.perf_counter() - begin:.1f} s"
    if detector.thresholds is not None:
        summary += f": {sum(decisions)} anomalous, {len(decisions) - sum(decisions)} good"
    if failed:
        summary += f"; {failed} could not be judged"
    print(f"{summary}; written to {output.path}")
    return 1 if failed else 0


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):  # names of files that its encoding lacks end no run
        sys.stdout.reconfigure(errors="backslashreplace")
    with exit_on_input_error():
        raise SystemExit(run(parse_args()))


if __name__ == "__main__":
    main()

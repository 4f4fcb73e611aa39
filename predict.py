"""Predict new samples with a saved detector: score, decision, anomaly map and overlay for each.

    python predict.py --detector detectors/bagel --rgb part.png --xyz part.tiff
    python predict.py --detector detectors/bagel --rgb images/ --xyz scans/ --output_dir predictions/monday
    python predict.py --detector detectors/bagel --rgb "line/rgb/*.png" --xyz "line/depth/*.png" \\
        --intrinsics camera.json
    python predict.py --detector detectors/bagel --rgb images/ --xyz scans/ --watch --append   # until Ctrl-C or SIGTERM
    python predict.py --detector detectors/bagel --stdin   # {"name": "part", "rgb": "part.png", "xyz": "part.tiff"}

It writes to --output_dir: <name>.tiff (anomaly map, float32, at the resolution of the cloud), <name>_overlay.png, and
a line for each sample in predictions.jsonl and predictions.csv. An interrupted run keeps its lines. If a sample cannot
be predicted, its line has "error" instead of a score, and the run continues with the next one.

Exit code: 0 all samples predicted, or the end of --watch or --stdin; 1 at least one could not be predicted; 2 the run
could not start or stopped early; 3 with --fail_on_anomaly: all predicted, at least one anomalous; 130 interrupted; 141
the reader of stdout closed the pipe.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from runner.predict_settings import PredictSettings, make_parser
from utils.reporting.messages import exit_on_error, show, start_messages
from utils.scans.images import set_max_megapixels

if TYPE_CHECKING:
    from runner.prediction import PredictionWriter, Predictor
    from utils.scans.depth_camera import Camera
    from utils.scans.sample_files import FoundSamples

logger = logging.getLogger("predict")


def predict(settings: PredictSettings, locks: ExitStack) -> int:
    """Predict all samples, write the predictions, and return the exit code. `locks` gets the lock of --output_dir."""
    from runner.prediction import PredictionWriter, output_paths
    from runner.watching import StopSignals, WatchedFiles, answer_requests, recorded_stamps, watch
    from utils.scans.depth_camera import read_camera
    from utils.scans.files import locked, make_folder
    from utils.scans.sample_files import FoundSamples, find_samples

    answers = sys.stdout
    if settings.stdin:
        locks.enter_context(redirect_stdout(sys.stderr))
    begin = time.perf_counter()
    set_max_megapixels(settings.max_megapixels)
    camera = None if settings.intrinsics is None else read_camera(settings.intrinsics)
    look = partial(find_samples, settings.rgb, settings.xyz, depth=camera is not None, required=not settings.watch)
    found = FoundSamples([], []) if settings.stdin else look()
    settings.check_files(found)
    watched = WatchedFiles(look, settings.settle, settings.partner_timeout)
    if settings.watch:
        watched.due(time.monotonic())  # so that the time spent loading counts for --settle
    predictor = load(settings, camera)
    thresholds = settings.thresholds(predictor.detector)
    if thresholds is None:
        logger.warning("%s has no thresholds: there are scores but no decisions", settings.detector)
    folder = make_folder(settings.output_dir, "--output_dir")
    images = (path for each in found.samples if not settings.no_images for path in output_paths(folder, each.path))
    locks.enter_context(locked(folder, "--output_dir", images))
    calibration = predictor.detector.calibration
    typical = 0.0 if calibration is None else calibration.pixels[-1]  # the median
    writer = PredictionWriter(folder, thresholds, not settings.no_images, settings.append, typical)
    tally = Tally()
    if settings.stdin:
        with StopSignals() as stop:
            show("predict.py: ready, reading stdin", sys.stderr)
            answer_requests(sys.stdin.buffer, answers, predictor, writer, settings.check_output, tally.add, stop)
    elif settings.watch:
        watched.done |= recorded_stamps(writer.path)
        with StopSignals() as stop:
            show(f"predict.py: ready, watching {' and '.join(filter(None, (settings.rgb, settings.xyz)))}", sys.stderr)
            watch(watched, predictor, writer, settings.check_output, tally.report, stop)
    else:
        predict_found(found, predictor, writer, tally)
    show(f"{tally.summary(time.perf_counter() - begin, thresholds is not None)}; written to {writer.path}")
    if settings.stdin or settings.watch:
        return 0
    if tally.failed:
        return 1
    return 3 if settings.fail_on_anomaly and tally.anomalous else 0


def load(settings: PredictSettings, camera: "Camera | None") -> "Predictor":
    """Load the detector, and check the flags that depend on it."""
    from feature_extractors.persistence import load_detector
    from runner.prediction import Predictor, SampleReader
    from utils.cleaning.cloud_cleaning import CleaningRule

    weights: dict[str, Any] = {"checkpoint_dir": settings.checkpoint_dir}
    weights |= {"rgb_checkpoint": settings.rgb_checkpoint, "xyz_checkpoint": settings.xyz_checkpoint}
    detector = load_detector(settings.detector, settings.device, **weights)
    settings.check_detector(detector)
    config, flags = detector.config, settings.cleaning_flags(detector)
    rule = None if flags is None else CleaningRule(**flags)
    refused = rule is None and detector.cleaned is not None
    reader = SampleReader([], config.method.modalities, config.img_size, camera, rule, refused)
    batch_size = settings.batch_size or detector.extractor.batch_size
    return Predictor(detector, reader, settings.form(detector), batch_size, settings.num_workers)


def predict_found(found: "FoundSamples", predictor: "Predictor", writer: "PredictionWriter", tally: "Tally") -> None:
    """Predict the files that were found, and print a line for each sample."""
    from utils.reporting.progress import progress_bar

    width = max(len(each.path) for each in found.samples)
    progress = progress_bar(predictor.outcomes(found), total=len(found.files), unit="sample")
    for outcome in progress:
        record = writer.add(outcome)
        with progress.external_write_mode():
            tally.report(record, width)


@dataclass
class Tally:
    """Numbers of predicted, anomalous and failed samples."""

    predicted: int = 0
    anomalous: int = 0
    failed: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count the sample of a line of predictions.jsonl."""
        self.failed += "error" in record
        self.predicted += "error" not in record
        self.anomalous += record.get("anomalous") is True

    def report(self, record: dict[str, Any], width: int = 0) -> None:
        """Count a sample and print its line."""
        self.add(record)
        print_line(record, width)

    def summary(self, seconds: float, decided: bool) -> str:
        """Sentence about the run; `decided` is False without thresholds."""
        text = f"{self.predicted} sample{'s' * (self.predicted != 1)} predicted in {seconds:.1f} s"
        if decided:
            text += f": {self.anomalous} anomalous, {self.predicted - self.anomalous} good"
        return text + (f"; {self.failed} could not be predicted" if self.failed else "")


def print_line(record: dict[str, Any], width: int = 0) -> None:
    """Print a sample on one line of stdout in aligned columns, or its problem on stderr."""
    name = record["name"]
    if "error" in record:
        return show(f"predict.py: {name} could not be predicted: {record['error']}", sys.stderr, logging.ERROR)
    decision = {True: "anomalous", False: "good", None: "no threshold"}[record["anomalous"]]
    severity, remark = record["severity"], ""
    number = f"score {record['score']:.6g}" if severity is None else f"severity {severity:z8.2f}"
    if severity is None and record["threshold"] is not None:
        remark = "  (no severity: the threshold is not above the median score of the good calibration samples)"
    show(f"{name:{width}}  {number:17}  {decision:12}  {record['seconds']:.3f} s{remark}")


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, predict, and exit."""
    args = make_parser(__doc__).parse_args(argv)
    start_messages()
    with ExitStack() as locks:
        raise SystemExit(predict(PredictSettings(**vars(args)), locks))


if __name__ == "__main__":
    main()

"""Judging new parts: from a cold start to the first line, the latency of a part, and memory over many parts in a row.

    python benchmarks/predict.py                              # published networks, over half an hour on two cores
    python benchmarks/predict.py --stages cold latency        # minutes
    python benchmarks/predict.py --networks pip               # EfficientNet-Lite0 and FPFH instead
    python benchmarks/predict.py --networks tiny --parts 100  # to try the script

Random weights and made-up scans, in files: they are written to a temporary folder, together with a detector whose banks
have as many rows as --train good parts leave. What is timed is predict.py itself in a process of its own (cold), or its
loop: reading, networks, scoring, map, overlay and line (latency, memory). Prints figures; writes JSON.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from PIL import Image
from tqdm import tqdm

from benchmarks.measuring import describe_machine, in_fresh_process, memory_slope, write_json
from benchmarks.rows import CORESET_EPS
from benchmarks.workload import PART, SCAN_SIZE, SEED, SIZES, build_networks, detector_config, grown
from dataset import make_sample
from feature_extractors.coreset import select_coreset
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import build_extractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from feature_extractors.persistence import load_detector, save_detector
from feature_extractors.pipeline import calibrate_detectors
from models import RGB_BACKBONES, XYZ_BACKBONES
from runner.prediction import PredictionWriter, SampleReader, predict_samples
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.memory import resident_memory_mb
from utils.metrics import latency_percentiles
from utils.records import SampleFiles
from utils.scans.organized_pc import write_organized_pc
from utils.synthetic_data.scanner import make_scan

STAGES = ("cold", "latency", "memory")
# What differs from the reference configuration.
NETWORKS: dict[str, dict[str, Any]] = {
    "published": {"rgb_backbone_name": "vit_base_patch8_224_dino", "xyz_backbone_name": "Point_MAE"},
    "pip": {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH"},
    "tiny": {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH", "img_size": 64, "xyz_grid": 16},
}
WARM_UP = 5  # parts


class Workplace(NamedTuple):
    """A temporary folder with all that predict.py needs."""

    folder: Path
    device: str

    @property
    def detector(self) -> Path:
        return self.folder / "detector"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def output(self) -> Path:
        return self.folder / "predictions"

    def part(self, number: int) -> SampleFiles:
        return SampleFiles(
            f"{number:04d}", self.folder / f"rgb/{number:04d}.png", self.folder / f"xyz/{number:04d}.tiff"
        )


def prepare(place: Workplace, networks: str, train: int, distinct: int) -> None:
    """Write checkpoints, `distinct` cleaned parts and a detector with the banks of `train` good ones.

    The banks hold a coreset of as many other parts, repeated with noise up to the size of one of `train` parts.
    """
    place.checkpoints.mkdir()
    config = detector_config(SIZES["published"], "fp32", **NETWORKS[networks])
    if networks == "published":
        _write_checkpoints(place.checkpoints)
    samples = []
    for part in map(place.part, range(2 * distinct)):  # the second half is not judged
        assert part.rgb is not None and part.xyz is not None
        scan = make_scan(PART, f"test/good/{part.path}", SCAN_SIZE, SEED)
        xyz, rgb, _ = clean_scan(scan.xyz, scan.rgb, None, CleaningRule())
        write_organized_pc(part.xyz, xyz)
        part.rgb.parent.mkdir(exist_ok=True)
        Image.fromarray(rgb).save(part.rgb)
        samples.append(make_sample(part.path, rgb, xyz, config.img_size))
    extractor = build_extractor(config, place.checkpoints, Path("none"))
    judged, learned = extractor.extract(samples[:distinct]), extractor.extract(samples[distinct:])
    rows = {"xyz": int(config.f_coreset * train * config.xyz_grid**2)}
    rows["rgb"] = int(config.f_coreset * rows["xyz"])  # as the reference protocol has it
    banks = {}
    for name, count in rows.items():
        patches = torch.cat([getattr(each, name) for each in learned])
        picks = select_coreset(patches, BankStatistics(), int(config.f_coreset * len(patches)), CORESET_EPS, SEED)
        banks[name] = MemoryBank(grown(patches[picks], count))
    fusion = DecisionFusion(np.ones(2), np.ones(2), (1.0, 0.1), (1.0, 0.1))
    detector = Detector(config, extractor, banks, fusion)
    calibrate_detectors({"": detector}, judged, 0.01, "validation")
    save_detector(detector, place.detector, class_name=PART)


def _write_checkpoints(folder: Path) -> None:
    """Random weights as the authors of both networks publish theirs."""
    rgb, xyz = build_networks(SIZES["published"])
    rgb_spec, xyz_spec = RGB_BACKBONES["vit_base_patch8_224_dino"], XYZ_BACKBONES["Point_MAE"]
    assert rgb_spec is not None and xyz_spec is not None
    torch.save(rgb.model.state_dict(), folder / rgb_spec.files.names[0])
    state = {f"MAE_encoder.{key}": value for key, value in xyz.state_dict().items()}
    torch.save({"base_model": state}, folder / xyz_spec.files.names[0])


def cold_start(place: Workplace) -> dict[str, float]:
    """Seconds from the start of predict.py to the line of its first part, and to its end."""
    part = place.part(0)
    command = [sys.executable, "predict.py", "--detector", place.detector, "--rgb", part.rgb, "--xyz", part.xyz]
    command += ["--checkpoint_dir", place.checkpoints, "--output_dir", place.output, "--device", place.device]
    begin = time.perf_counter()
    words = list(map(str, command))
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        line = process.stdout.readline()
        first = time.perf_counter() - begin
        process.stdout.read()
    if not line.startswith(part.path) or process.returncode:
        raise RuntimeError(f"predict.py ended with {process.returncode} after {line!r}")
    return {"first_part": first, "end": time.perf_counter() - begin}


class Judged(NamedTuple):
    """What judging some parts in a row took."""

    latency: dict[str, float]  # percentiles of the seconds of a part: networks and scoring
    parts_per_second: float  # with files and pictures
    resident_mb: list[tuple[int, float]]  # after so many parts


def judge_in_a_row(place: Workplace, count: int, distinct: int, batch_size: int | None, workers: int) -> Judged:
    """Judge `count` parts; the first few are not timed."""
    detector = load_detector(place.detector, place.device, checkpoint_dir=place.checkpoints)
    config = detector.config
    files = [place.part(i % distinct)._replace(path=f"{i:04d}") for i in range(WARM_UP + count)]
    reader = SampleReader(files, config.method.modalities, config.img_size)
    place.output.mkdir(exist_ok=True)
    writer = PredictionWriter(place.output, detector.thresholds, images=True)
    seconds, resident, begin = [], [], 0.0
    outcomes = predict_samples(detector, reader, batch_size or detector.extractor.batch_size, workers)
    for i, outcome in enumerate(tqdm(outcomes, total=len(files), desc="samples", leave=False)):
        if outcome.prediction is None:
            raise RuntimeError(f"{outcome.loaded.files.path}: {outcome.problem}")
        writer.add(outcome)
        if i + 1 == WARM_UP:
            begin = time.perf_counter()
        elif i >= WARM_UP:
            seconds.append(outcome.seconds)
            if (i + 1 - WARM_UP) % max(1, count // 20) == 0:
                resident.append((i + 1 - WARM_UP, resident_memory_mb()))
    return Judged(latency_percentiles(seconds), count / (time.perf_counter() - begin), resident)


def run_stages(args: argparse.Namespace, place: Workplace) -> dict[str, Any]:
    """Measure what was asked for, each printed as soon as it is known."""
    found: dict[str, Any] = {}
    if "cold" in args.stages:
        found["cold"] = [cold_start(place) for _ in range(args.repeats)]
        first = sorted(each["first_part"] for each in found["cold"])
        print(f"cold start to the first part: {first[0]:.2f} to {first[-1]:.2f} s in {len(first)} runs")
    for batch_size in (1, args.batch_size) if "latency" in args.stages else ():
        judged = in_fresh_process(judge_in_a_row, place, args.samples, args.distinct, batch_size, args.num_workers)
        found[f"batch {batch_size or 'default'}"] = judged._asdict()
        percentiles = ", ".join(f"{name} {value:.3f} s" for name, value in judged.latency.items())
        print(
            f"batch of {batch_size or 'the default size'}: {percentiles}; {judged.parts_per_second:.2f} parts/s in all"
        )
    if "memory" in args.stages:
        judged = in_fresh_process(judge_in_a_row, place, args.parts, args.distinct, args.batch_size, args.num_workers)
        found["memory"] = judged._asdict() | {"mb_per_1000_parts": memory_slope(judged.resident_mb)}
        (_, first_mb), (count, last_mb) = judged.resident_mb[0], judged.resident_mb[-1]
        print(
            f"{count} parts in a row, {judged.parts_per_second:.2f} parts/s: resident {first_mb:.0f} MB at first, "
            f"{last_mb:.0f} MB at the end, {found['memory']['mb_per_1000_parts']:+.1f} MB per 1000 parts"
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--networks", choices=NETWORKS, default="published", help="tiny: to try the script")
    parser.add_argument("--train", type=int, default=200, help="good parts whose coreset the banks are as large as")
    parser.add_argument("--distinct", type=int, default=8, help="different parts, judged again and again")
    parser.add_argument("--samples", type=int, default=50, help="parts that latency is measured on")
    parser.add_argument("--parts", type=int, default=1000, help="parts in a row that memory is watched over")
    parser.add_argument("--repeats", type=int, default=3, help="cold starts")
    parser.add_argument("--batch_size", type=int, help="beside 1; by default that of predict.py")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that read files ahead")
    parser.add_argument("--device", default="auto", help="as of predict.py")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_predict.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder), args.device)
        in_fresh_process(prepare, place, args.networks, args.train, args.distinct)
        found = run_stages(args, place)
    settings = {name: getattr(args, name) for name in ("networks", "train", "distinct", "num_workers", "device")}
    write_json(args.output, {"schema": 1, "machine": describe_machine(), **settings, **found})


if __name__ == "__main__":
    main()

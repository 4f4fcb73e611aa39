"""Prediction of new samples by predict.py: cold start, latency of a sample, and memory over many samples in a row.

    python benchmarks/predict.py                                # published networks, over half an hour on two cores
    python benchmarks/predict.py --stages cold latency          # minutes
    python benchmarks/predict.py --networks pip                 # EfficientNet-Lite0 and FPFH instead
    python benchmarks/predict.py --networks tiny --many 100     # for a trial

Networks have random weights, and samples are synthetic. Both are written to a temporary folder, with a detector whose
banks are as large as those of --train training samples. The script prints its measurements and writes JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from PIL import Image

from benchmarks.measuring import in_fresh_process, make_parser, memory_slope, write_record
from benchmarks.workload import CLASS_NAME, SCAN_SIZE, SEED, SIZES, build_networks, detector_config, grown
from dataset import make_sample
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.extractor import build_extractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.persistence import save_detector
from feature_extractors.pipeline import calibrate_detectors, collect_features
from models import RGB_BACKBONES, XYZ_BACKBONES
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.metrics import latency_percentiles
from utils.scans.organized_pc import write_organized_pc
from utils.synthetic_data.scanner import make_scan

STAGES = ("cold", "latency", "memory")
NETWORKS: dict[str, dict[str, Any]] = {  # differences from the published configuration
    "published": {},
    "pip": {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH"},
    "tiny": {"rgb_backbone_name": "efficientnet_lite0", "xyz_backbone_name": "FPFH", "img_size": 64, "xyz_grid": 16},
}
WARM_UP = 5  # samples that are not timed
ENDS = ("", "_cpu")  # of the keys of wall-clock and CPU seconds


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write checkpoints, samples, and a detector. Its banks are patches of other samples, repeated with noise."""
    config = detector_config(SIZES["published"], "fp32", **NETWORKS[args.networks])
    write_checkpoints(folder)
    for name in ("rgb", "xyz"):
        Path(folder, name).mkdir()
    samples = []
    for i in range(2 * args.distinct):
        scan = make_scan(CLASS_NAME, f"test/good/{i:04d}", SCAN_SIZE, SEED)
        xyz, rgb, *_ = clean_scan(scan.xyz, scan.rgb, None, CleaningRule())
        samples.append(make_sample(f"{i:04d}", rgb, xyz, config.img_size))
        if i < args.distinct:
            write_organized_pc(folder / f"xyz/{i:04d}.tiff", xyz)
            Image.fromarray(rgb).save(folder / f"rgb/{i:04d}.png")
    extractor = build_extractor(config, folder, None)
    good = collect_features(extractor, samples[: args.distinct], args.distinct)
    others = extractor.extract(samples[args.distinct :])
    rows = int(config.f_coreset * args.train * config.xyz_grid**2)
    banks = {}
    for name, count in {"xyz": rows, "rgb": int(config.f_coreset * rows)}.items():  # sizes of the reference protocol
        patches = torch.cat([getattr(each, name) for each in others])
        banks[name] = MemoryBank(grown(patches[torch.randperm(len(patches))], count))
    fusion = DecisionFusion(np.ones(2), np.ones(2), (1.0, 0.1), (1.0, 0.1))
    detector = Detector(config, extractor, banks, fusion)
    calibrate_detectors({"": detector}, good, 0.01, "validation")
    save_detector(detector, folder / "detector", class_name=CLASS_NAME)


def write_checkpoints(folder: Path) -> None:
    """Write random weights in the file formats that the authors of both networks publish."""
    rgb, xyz = build_networks(SIZES["published"])
    rgb_spec, xyz_spec = RGB_BACKBONES["vit_base_patch8_224_dino"], XYZ_BACKBONES["Point_MAE"]
    torch.save(rgb.model.state_dict(), folder / rgb_spec.files.names[0])
    state = {f"MAE_encoder.{key}": value for key, value in xyz.state_dict().items()}
    torch.save({"base_model": state}, folder / xyz_spec.files.names[0])


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmRSS"))


def run_predict(folder: Path, args: argparse.Namespace, count: int, batch_size: int | None) -> dict[str, Any]:
    """Run predict.py on `count` samples, repeating the distinct ones, and read its lines and its memory."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name, suffix in (("rgb", ".png"), ("xyz", ".tiff")):
            Path(place, name).mkdir()
            for i in range(count):
                target = folder / name / f"{i % args.distinct:04d}{suffix}"
                Path(place, name, f"{i:06d}{suffix}").symlink_to(target)
        command = [sys.executable, "predict.py", "--detector", folder / "detector", "--checkpoint_dir", folder]
        command += ["--rgb", f"{place}/rgb", "--xyz", f"{place}/xyz", "--output_dir", f"{place}/predictions"]
        command += ["--device", args.device, "--num_workers", args.num_workers]
        command += ["--batch_size", batch_size] if batch_size else []
        begin, times, resident = time.perf_counter(), [], []
        with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            assert process.stdout is not None
            for line in process.stdout:
                if line[:6].isdigit():
                    times.append(time.perf_counter() - begin)
                    if len(times) % max(1, count // 20) == 0 and len(times) < count:
                        resident.append((len(times), resident_mb(process.pid)))
        if process.returncode or len(times) != count:
            raise RuntimeError(f"predict.py exited with {process.returncode} after {len(times)} of {count} samples")
        found: dict[str, Any] = {"first_line": times[0], "end": time.perf_counter() - begin, "resident_mb": resident}
        lines = Path(place, "predictions", "predictions.jsonl").read_text().splitlines()
    if count > WARM_UP:
        found["latency"] = latency_percentiles([json.loads(line)["seconds"] for line in lines[WARM_UP:]])
        found["samples_per_second"] = (count - WARM_UP) / (times[-1] - times[WARM_UP - 1])
    return found


def start_up(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Wall-clock and CPU seconds until predict.py is ready, and of importing torch and timm alone."""
    predict = ["predict.py", "--detector", folder / "detector", "--checkpoint_dir", folder, "--device", args.device]
    predict += ["--stdin", "--output_dir", folder / "out"]
    commands: dict[str, list[object]] = {"imports": ["-c", "import torch, timm"], "ready": predict}
    found = {}
    for name, command in commands.items():
        begin, before = time.perf_counter(), os.times()
        arguments = [sys.executable, *map(str, command)]
        subprocess.run(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True)  # noqa: S603
        after = os.times()
        found[name] = time.perf_counter() - begin
        found[f"{name}_cpu"] = sum(after[2:4]) - sum(before[2:4])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "predict")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--networks", choices=NETWORKS, default="published", help="tiny: for a trial")
    parser.add_argument("--train", type=int, default=200, help="training samples that set the size of the banks")
    parser.add_argument("--distinct", type=int, default=8, help="different samples, predicted again and again")
    parser.add_argument("--samples", type=int, default=50, help="samples for the latency")
    parser.add_argument("--many", type=int, default=1000, help="samples in a row for the memory")
    parser.add_argument("--repeats", type=int, default=3, help="cold starts")
    parser.add_argument("--batch_size", type=int, help="batch size beside 1; by default as in predict.py")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that read files ahead")
    parser.add_argument("--device", default="auto", help="as of predict.py")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fresh_process(prepare, folder, args)
        if "cold" in args.stages:
            found["cold"] = [run_predict(folder, args, 1, 1) for _ in range(args.repeats)]
            first = sorted(each["first_line"] for each in found["cold"])
            print(f"cold start to the first line: {first[0]:.2f} to {first[-1]:.2f} s in {len(first)} runs")
            found["ready"] = [start_up(folder, args) for _ in range(args.repeats)]
            beyond = {end: min(each[f"ready{end}"] - each[f"imports{end}"] for each in found["ready"]) for end in ENDS}
            ready = min(each["ready"] for each in found["ready"])
            print(
                f"ready after {ready:.2f} s, {beyond['']:.2f} s (CPU: {beyond['_cpu']:.2f} s) beyond importing torch "
                "and timm"
            )
        for batch_size in (1, args.batch_size) if "latency" in args.stages else ():
            size = batch_size or "default"
            found[f"batch {size}"] = run = run_predict(folder, args, WARM_UP + args.samples, batch_size)
            percentiles = ", ".join(f"{name} {value:.3f} s" for name, value in run["latency"].items())
            print(f"batch size {size}: {percentiles}; {run['samples_per_second']:.2f} samples per second")
        if "memory" in args.stages:
            found["memory"] = run = run_predict(folder, args, args.many, args.batch_size)
            run["mb_per_1000_samples"] = memory_slope(run["resident_mb"])
            first_mb, last_mb = run["resident_mb"][0][1], run["resident_mb"][-1][1]
            print(
                f"{args.many} samples in a row: resident {first_mb:.0f} MB at first, {last_mb:.0f} MB at the end, "
                f"{run['mb_per_1000_samples']:+.1f} MB per 1000 samples"
            )
    write_record(args, found)


if __name__ == "__main__":
    main()

"""Speed of cleaning: one large scan on one core, its clustering beside open3d's, and throughput against workers.

    python benchmarks/preprocessing.py                    # open3d's clustering takes some 20 s
    python benchmarks/preprocessing.py --skip_open3d

Prints a table and writes it as JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import preprocessing
from utils.cloud_cleaning import CleaningRule, clean_scan, cluster_labels, fit_border_plane, remove_plane
from utils.files import atomic_path
from utils.organized_pc import valid_mask
from utils.preprocessing_progress import TEMPORARY
from utils.synthetic import Plan, make_dataset
from utils.synthetic_scanner import make_scan

LARGE_SIZE = 850  # pixels a side: some 184,000 points off the table
REPEATS = 3


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def large_scan(skip_open3d: bool) -> dict[str, float]:
    rule = CleaningRule()
    scan = make_scan("cookie", "train/good/000", LARGE_SIZE, seed=0)
    plane = fit_border_plane(scan.xyz, np.random.default_rng(rule.seed), rule)
    left = remove_plane(scan.xyz, plane, rule.plane_distance)
    points = left[valid_mask(left)].astype(np.float64)
    cluster = (points, rule.cluster_eps, rule.cluster_min_points)
    found = {
        "pixels": scan.xyz[..., 0].size,
        "points_off_the_plane": len(points),
        "clean_seconds": median_seconds(lambda: clean_scan(scan.xyz, scan.rgb, None, rule)),
        "cluster_seconds": median_seconds(lambda: cluster_labels(*cluster)),
    }
    if not skip_open3d:
        import open3d

        cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
        begin = time.perf_counter()
        theirs = np.asarray(cloud.cluster_dbscan(rule.cluster_eps, rule.cluster_min_points))
        found["open3d_cluster_seconds"] = time.perf_counter() - begin
        found["labels_that_differ"] = int((theirs != cluster_labels(*cluster)).sum())
    return found


def throughput(scans: int, workers: int) -> float:
    """Scans a second of the script's own function, files read and written."""
    with tempfile.TemporaryDirectory() as folder:
        raw, clean = Path(folder, "raw"), Path(folder, "clean")
        make_dataset(
            Plan(raw, ("cookie",), train=scans, validation=0, test_good=0, test_defective=0), os.cpu_count() or 1
        )
        job = preprocessing.Job(raw, clean, CleaningRule(), keep_rgb=False, suffix=TEMPORARY)
        begin = time.perf_counter()
        preprocessing.preprocess(job, workers)
        return scans / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scans", type=int, default=48, help="of 400 x 400 pixels, for the throughput")
    parser.add_argument("--skip_open3d", action="store_true", help="leave out open3d's clustering")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_preprocessing.json"))
    args = parser.parse_args()
    record: dict[str, object] = dict(large_scan(args.skip_open3d))
    for name, value in record.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    for workers in range(1, (os.cpu_count() or 1) + 1):
        record[f"scans_per_second_{workers}"] = speed = throughput(args.scans, workers)
        print(f"{workers} workers: {speed:.1f} scans a second")
    with atomic_path(args.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

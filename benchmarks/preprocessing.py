"""Speed of cleaning: one large scan on one core, its clustering beside open3d's, and throughput against workers.

    python benchmarks/preprocessing.py                    # open3d's clustering takes some 20 s
    python benchmarks/preprocessing.py --skip_open3d

Prints a table and writes it as JSON; every figure is the median of three, open3d's of one. `scans_per_second_<workers>`
counts reading, writing and the start of the processes, for 400 x 400 pixels.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import median_seconds_of
from utils import preprocessing
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, cluster_labels, fit_border_plane, remove_plane
from utils.scans.files import atomic_path
from utils.scans.organized_pc import valid_mask
from utils.synthetic import Plan, make_dataset
from utils.synthetic_data.scanner import Scan, make_scan

LARGE_SIZE = 850  # pixels a side: some 184,000 points off the table
REPEATS = 3


def large_scan() -> tuple[Scan, np.ndarray]:
    """A raw scan, and its points (N, 3) float64 off the plane, meters."""
    rule = CleaningRule()
    scan = make_scan("cookie", "train/good/000", LARGE_SIZE, seed=0)
    left = remove_plane(
        scan.xyz, fit_border_plane(scan.xyz, np.random.default_rng(rule.seed), rule), rule.plane_distance
    )
    return scan, left[valid_mask(left)].astype(np.float64)


def cleaning_seconds() -> dict[str, float]:
    """Seconds for the large scan on the cores that this process may use, and how many these are."""
    rule, (scan, points) = CleaningRule(), large_scan()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "pixels": scan.xyz[..., 0].size,
        "points_off_the_plane": len(points),
        "clean_seconds": median_seconds_of(lambda: clean_scan(scan.xyz, scan.rgb, None, rule), REPEATS),
        "cluster_seconds": median_seconds_of(
            lambda: cluster_labels(points, rule.cluster_eps, rule.cluster_min_points), REPEATS
        ),
    }


def on_one_core(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Call `work` in a process of its own that never had more than one core, not for NumPy's threads either."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # inherited by what starts here
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work).result()
    finally:
        os.sched_setaffinity(0, allowed)


def open3d_clustering() -> dict[str, float]:
    """Seconds of open3d's clustering of the large scan on all cores, and how many labels are not ours."""
    import open3d

    rule, (_, points) = CleaningRule(), large_scan()
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    begin = time.perf_counter()
    theirs = np.asarray(cloud.cluster_dbscan(rule.cluster_eps, rule.cluster_min_points))
    seconds = time.perf_counter() - begin
    ours = cluster_labels(points, rule.cluster_eps, rule.cluster_min_points)
    return {"open3d_cluster_seconds": seconds, "labels_that_differ": int((theirs != ours).sum())}


def throughput(raw: Path, scans: int, workers: int) -> float:
    """Scans a second of the script's own function, files read and written, processes started."""

    def clean() -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = preprocessing.Config(raw, Path(folder), workers, keep_rgb=False, dry_run=False, preview=None)
            assert len(preprocessing.preprocess(config).done) == scans

    return scans / median_seconds_of(clean, REPEATS)


def show(record: dict[str, float]) -> dict[str, float]:
    for name, value in record.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scans", type=int, default=96, help="of 400 x 400 pixels, for the throughput")
    parser.add_argument("--skip_open3d", action="store_true", help="leave out open3d's clustering")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_preprocessing.json"))
    args = parser.parse_args()
    record = show(on_one_core(cleaning_seconds))
    if not args.skip_open3d:
        record |= show(open3d_clustering())
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), ("cookie",), train=args.scans, validation=0, test_good=0, test_defective=0)
        make_dataset(plan, cores)
        for workers in range(1, cores + 1):
            record |= show({f"scans_per_second_{workers}": throughput(Path(folder), args.scans, workers)})
    with atomic_path(args.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

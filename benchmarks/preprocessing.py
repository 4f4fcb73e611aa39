"""Speed of cleaning: one large scan on one core, its clustering beside open3d's, and throughput by workers.

    python benchmarks/preprocessing.py                    # open3d's clustering takes some 20 s
    python benchmarks/preprocessing.py --skip_open3d

Times are the median of three runs, open3d's that of one. `scans_per_second_<workers>` includes reading, writing and the
start of the processes, for scans of 400 x 400 pixels. The script prints a table and writes JSON.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring import in_fresh_process, make_parser, median_seconds_of, seconds_of, write_record
from utils import preprocessing
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan, cluster_labels, fit_border_plane, remove_plane
from utils.scans.organized_pc import valid_mask
from utils.synthetic import Plan, make_dataset
from utils.synthetic_data.scanner import Scan, make_scan

LARGE_SIZE = 850  # pixels along a side: some 184,000 points off the table
REPEATS = 3


def large_scan() -> tuple[Scan, np.ndarray]:
    """A raw scan, and its points (N, 3) float64 off the plane, meters."""
    rule = CleaningRule()
    scan = make_scan("cookie", "train/good/000", LARGE_SIZE, seed=0)
    plane, _ = fit_border_plane(scan.xyz, np.random.default_rng(rule.seed), rule)
    left = remove_plane(scan.xyz, plane, rule.plane_distance)
    return scan, left[valid_mask(left)].astype(np.float64)


def cleaning_seconds() -> dict[str, float]:
    """Seconds for cleaning and clustering the large scan, and the number of cores that this process may use."""
    rule, (scan, points) = CleaningRule(), large_scan()
    clean = median_seconds_of(lambda: clean_scan(scan.xyz, scan.rgb, None, rule), REPEATS)
    cluster = median_seconds_of(lambda: cluster_labels(points, rule.cluster_eps, rule.cluster_min_points), REPEATS)
    counts = {"cores": len(os.sched_getaffinity(0)), "points_off_the_plane": len(points)}
    return {**counts, "clean_seconds": clean, "cluster_seconds": cluster}


def on_one_core() -> dict[str, float]:
    """Return `cleaning_seconds` of a process that has only one core, also for NumPy's threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # inherited by new processes
    try:
        return in_fresh_process(cleaning_seconds)
    finally:
        os.sched_setaffinity(0, allowed)


def open3d_clustering() -> dict[str, float]:
    """Seconds of open3d's clustering on all cores, and the number of labels that differ from ours."""
    import open3d

    rule, (_, points) = CleaningRule(), large_scan()
    eps, least = rule.cluster_eps, rule.cluster_min_points
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    labels = []
    seconds = seconds_of(lambda: labels.append(np.asarray(cloud.cluster_dbscan(eps, least))))
    differing = int((labels[0] != cluster_labels(points, eps, least)).sum())
    return {"open3d_cluster_seconds": seconds, "labels_that_differ": differing}


def throughput(raw: Path, scans: int, workers: int) -> float:
    """Scans per second of utils/preprocessing.py."""

    def clean() -> None:
        with tempfile.TemporaryDirectory() as folder:
            flags = [str(raw), "--output_dir", folder, "--workers", str(workers)]
            assert preprocessing.main(flags) == 0

    return scans / median_seconds_of(clean, REPEATS)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "preprocessing")
    parser.add_argument("--scans", type=int, default=96, help="scans of 400 x 400 pixels for the throughput")
    parser.add_argument("--skip_open3d", action="store_true", help="leave out open3d's clustering")
    args = parser.parse_args(argv)
    found = on_one_core() | ({} if args.skip_open3d else open3d_clustering())
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), ("cookie",), train=args.scans, validation=0, test_good=0, test_defective=0)
        make_dataset(plan, cores)
        for workers in range(1, cores + 1):
            found[f"scans_per_second_{workers}"] = throughput(Path(folder), args.scans, workers)
    for name, value in found.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    write_record(args, found)


if __name__ == "__main__":
    main()

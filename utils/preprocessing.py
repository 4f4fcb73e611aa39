"""Clean the scans of a dataset in the layout of MVTec 3D-AD, once, before anything is trained on it.

Every <class>/<split>/<defect>/{rgb,xyz,gt} triple of the same stem loses the plane the part lies on and all but its
largest cluster, and is padded to a square (utils/cleaning/cloud_cleaning.py). Written are .tiff and .png; in place they
take the room of .tif and .jpg files.

    python utils/preprocessing.py datasets/mvtec3d/ --dry_run        # check and count, write nothing
    python utils/preprocessing.py datasets/mvtec3d/ --dry_run --preview before_after.png   # and show what it would do
    python utils/preprocessing.py datasets/mvtec3d/                  # in place, on all cores
    python utils/preprocessing.py datasets/mvtec3d/ --output_dir datasets/mvtec3d_clean/ --workers 4

It may be killed at any moment; the same command continues where it ended, and does nothing once all is done.
`preprocessing.json` in the root of the output records the parameters and, per file, the checksums of source and result.
Exit code: 0 all done, 1 some scans failed (listed at the end, the others are done), 2 bad arguments or folder.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.cleaning.journal import MANIFEST, Record, Scan
from utils.cleaning.preview import FORMATS, Pair, check_format, write_preview
from utils.cleaning.progress import TEMPORARY, Progress
from utils.cleaning.scan_processing import (
    Summary,
    process_scans,
    report,
    require_own_folder,
    split_scans,
    write_results,
)
from utils.errors import InputError, exit_on_input_error
from utils.scans.files import FILE_SUFFIXES, cannot_write, files_by_stem, make_folder, subfolders
from utils.scans.images import defect_mask, open_image, to_rgb
from utils.scans.organized_pc import organized_pc_header, read_organized_pc

VERSION = 1  # of the cleaning: raise it when the same scan and rule give another result


class Job(NamedTuple):
    """Where a run reads and writes, and how it cleans."""

    source: Path
    output: Path
    rule: CleaningRule
    keep_rgb: bool
    suffix: str  # of this run's temporary files: the leftover workers of a killed run write to other names


def find_scans(root: Path) -> tuple[list[Scan], dict[str, str]]:
    """List the scans under `root`, sorted; hidden folders are left out.

    Returns:
        the scans, and the reason for each stem that lacks one of its files, each folder that cannot be read, and each
        folder of defective test scans without any ground truth.

    Raises:
        InputError: `root` is no folder, cannot be read, or holds no scans in the layout of MVTec 3D-AD.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds the classes of the dataset")
    folders, failed = [root], {}
    for _ in ("class", "split", "defect"):
        below = []
        for folder in folders:
            try:
                below += subfolders(folder)
            except InputError as error:
                if folder == root:
                    raise
                failed[folder.relative_to(root).as_posix()] = str(error)
        folders = below
    scans: list[Scan] = []
    for folder in folders:
        try:
            found = {modality: files_by_stem(folder / modality, modality) for modality in FILE_SUFFIXES}
        except InputError as error:
            failed[folder.relative_to(root).as_posix()] = str(error)
            continue
        whole, faults = _complete_scans(folder, root, found)
        scans += whole
        failed |= faults
    if not scans and not failed:
        raise InputError(f"{root} holds no <class>/<split>/<defect>/xyz/*.tiff: give the folder that holds the classes")
    return scans, failed


def _complete_scans(
    folder: Path, root: Path, found: dict[str, dict[str, tuple[Path, ...]]]
) -> tuple[list[Scan], dict[str, str]]:
    """The scans of a folder whose files are all there, and the reasons for the others.

    Ground truth is only needed for defective test scans: a good one, or one for training, may lack it.
    """
    place = folder.relative_to(root)
    defective = place.parts[1] == "test" and place.parts[2] != "good"
    views = sorted({**found["xyz"], **found["rgb"]})
    if defective and views and not found["gt"]:
        return [], {
            place.as_posix(): f"none of its {len(views)} scans has ground truth, expected {folder / 'gt'}/*.png for "
            "defective test scans: add it, or move the folder out of test"
        }
    scans, failed = [], {}
    for stem in sorted({*views, *found["gt"]}):
        sources = {modality: files.get(stem, ()) for modality, files in found.items()}
        if not sources["gt"] and not defective:
            del sources["gt"]
        scan = Scan(f"{place.as_posix()}/{stem}", sources)
        missing = [str(scan.file(root, modality)) for modality in sources if not sources[modality]]
        if missing:
            failed[scan.name] = f"{' and '.join(missing)} missing: restore from the dataset or remove the scan"
        else:
            scans.append(scan)
    return scans, failed


def clean_files(scan: Scan, job: Job) -> Record:
    """Clean one scan and leave the results beside their final places under temporary names, read back and on disk.

    Raises:
        InputError: a file cannot be read or written, or the scan cannot be cleaned (see `clean_scan`).
    """
    pair, padded_gt = _read_and_clean(scan, job)
    arrays = {"xyz": pair.clean_xyz, "rgb": pair.clean_rgb}
    if padded_gt is not None:
        arrays["gt"] = padded_gt
    return write_results(scan, arrays, job.output, job.suffix)


def _source(scan: Scan, modality: str) -> Path:
    """The one file that a modality is made from; InputError where there are several."""
    files = scan.sources[modality]
    if len(files) > 1:
        raise InputError(f"{' and '.join(map(str, files))} are files of one scan: keep one of them")
    return files[0]


def _read_and_clean(scan: Scan, job: Job) -> tuple[Pair, np.ndarray | None]:
    """The scan before and after, and its padded ground truth where it has one; errors as of `clean_files`."""
    xyz = read_organized_pc(_source(scan, "xyz"))
    rgb = _read_photo(_source(scan, "rgb"))
    gt = _read_ground_truth(_source(scan, "gt")) if "gt" in scan.modalities else None
    clean_xyz, clean_rgb, padded_gt = clean_scan(xyz, rgb, gt, job.rule, job.keep_rgb)
    return Pair(rgb, xyz, clean_rgb, clean_xyz), padded_gt


def preview(job: Job, path: Path) -> dict[str, str]:
    """Draw one scan of each class, not cleaned yet, before and after: the first that can be cleaned.

    Returns:
        the reason for each scan that was left out because it cannot be cleaned.

    Raises:
        InputError: the suffix of `path` is no picture format, every scan is done, none can be cleaned, or the picture
            cannot be written.
    """
    check_format(path)
    pairs, left_out = _first_usable(job)
    if not pairs and not left_out:
        raise InputError(f"every scan of {job.source} is cleaned already: --preview shows scans that are not")
    if not pairs:
        name, reason = next(iter(left_out.items()))
        raise InputError(
            f"none of {len(left_out)} scans can be shown by --preview, the first, {name}, because {reason}"
        )
    make_folder(path.parent, "--preview")
    try:
        write_preview(path, pairs)
    except OSError as error:
        raise cannot_write(path, error) from error
    return left_out


def _first_usable(job: Job) -> tuple[dict[str, Pair], dict[str, str]]:
    """The first scan of each class that is not cleaned yet and can be, and the reasons of those before that cannot."""
    scans, _ = find_scans(job.source)
    done = _progress(scans, job).done
    pairs: dict[str, Pair] = {}
    left_out: dict[str, str] = {}
    shown: set[str] = set()
    for scan in scans:
        class_name = scan.name.partition("/")[0]
        if class_name in shown or (job.source == job.output and scan.name in done):
            continue
        try:
            pairs[scan.name], _ = _read_and_clean(scan, job)
            shown.add(class_name)
        except InputError as error:
            left_out[scan.name] = str(error)
    return pairs, left_out


def _progress(scans: list[Scan], job: Job) -> Progress:
    settings = {"version": VERSION, **job.rule.settings(), "keep_rgb": job.keep_rgb}
    return Progress({scan.name: scan for scan in scans}, job.output, settings)


def preprocess(job: Job, workers: int, dry_run: bool = False) -> Summary:
    """Clean every scan under `job.source` that is not done yet.

    Args:
        job: where to read and write, and how to clean.
        workers: processes; 1 works in this one.
        dry_run: check headers and sizes, write nothing; `done` lists what would be cleaned.

    Raises:
        InputError: no dataset, other parameters than before, another run at work on the same folder, or a scan left
            half written that cannot be mended.
    """
    scans, failed = find_scans(job.source)
    if job.output != job.source and (job.source / MANIFEST).is_file():
        raise InputError(
            f"{job.source} holds scans that are preprocessed already ({MANIFEST} is there), and cleaning them twice "
            "ruins them: give the folder of the original scans"
        )
    progress_of = partial(_progress, scans, job)
    if not dry_run:
        return process_scans(scans, progress_of, partial(clean_files, job=job), job.suffix, workers, failed)
    progress = progress_of()
    require_own_folder(scans, progress)
    progress.recover(dry_run=True)
    pending, skipped = split_scans(scans, progress, failed)
    results = _check_all(pending)
    failed |= {scan.name: result for scan, result in results if isinstance(result, str)}
    done = sorted(scan.name for scan, result in results if not isinstance(result, str))
    return Summary(done, skipped, dict(sorted(failed.items())))


def _check_all(scans: list[Scan]) -> list[tuple[Scan, Record | str]]:
    """Check the headers of each scan: an empty record, or the reason why it would fail."""
    results: list[tuple[Scan, Record | str]] = []
    for scan in tqdm(scans, unit="scan", disable=None):
        try:
            height, width = organized_pc_header(_source(scan, "xyz"))
            for modality in scan.modalities[1:]:
                with open_image(path := _source(scan, modality)) as image:
                    if image.size != (width, height):
                        raise InputError(
                            f"{path} is {image.height} x {image.width}, its xyz file {height} x {width} (H x W): "
                            "restore them from the dataset"
                        )
            results.append((scan, {}))
        except InputError as error:
            results.append((scan, str(error)))
    return results


def _read_photo(path: Path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8."""
    with open_image(path) as image:
        return np.asarray(to_rgb(image))


def _read_ground_truth(path: Path) -> np.ndarray:
    """Ground truth as (H, W) uint8: 8-bit ids as stored, any other form as 0 and 255."""
    with open_image(path) as image:
        return np.asarray(image) if image.mode == "L" else defect_mask(image).astype(np.uint8) * 255


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Clean the scans of a dataset in the layout of MVTec 3D-AD: plane removed, largest cluster kept, "
        "padded to a square. May be interrupted and continued at any moment."
    )
    parser.add_argument("dataset", type=Path, help="folder that holds the classes")
    parser.add_argument("--output_dir", type=Path, help="write there instead of in place; the dataset stays as it is")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--keep_rgb", action="store_true", help="only pad the photographs, do not black out background")
    parser.add_argument("--dry_run", action="store_true", help="check pairs, headers and sizes; change nothing")
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="PICTURE",
        help=f"first draw a scan of each class before and after ({', '.join(FORMATS)})",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    args = _parse(argv)
    in_place = args.output_dir is None or args.output_dir.resolve() == args.dataset.resolve()
    output = args.dataset if in_place else args.output_dir
    job = Job(args.dataset, output, CleaningRule(), args.keep_rgb, f".{os.getpid()}{TEMPORARY}")
    if args.preview:
        for name, reason in preview(job, args.preview).items():
            print(f"left out of the preview: {name}: {reason}")
        print(f"before and after: {args.preview}")
    return report(lambda: preprocess(job, args.workers, args.dry_run), "to do" if args.dry_run else "done")


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())

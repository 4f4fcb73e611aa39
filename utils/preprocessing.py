"""Clean the scans of a dataset in the layout of MVTec 3D-AD: remove the table, keep the largest cluster, and pad.

    python utils/preprocessing.py datasets/mvtec3d/ --dry_run --preview before_after.png   # check, show, write nothing
    python utils/preprocessing.py datasets/mvtec3d/                  # in place, on all cores
    python utils/preprocessing.py datasets/mvtec3d/ --output_dir datasets/mvtec3d_clean/ --workers 4

Every scan <class>/<split>/<defect>/{rgb,xyz,gt}/<stem> is cleaned and padded to a square (see
utils/cleaning/cloud_cleaning.py). Results are .tiff and .png files. In place, they replace .tif and .jpg files.

The script may be killed at any moment. Run the same command to continue; once all is done, it changes nothing.
preprocessing.json in the output folder records the parameters and the checksums of every file before and after.
Exit code: 0 all done, 1 some scans failed (listed at the end), 2 bad arguments or folder.
"""

import os
import sys
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from utils.choices import CLEANING_FLAGS
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.cleaning.journal import MANIFEST, Journal, Scan, read_manifest
from utils.cleaning.preview import FORMATS, Pair, write_preview
from utils.cleaning.scan_processing import Result, Summary, process_scans, report, write_results
from utils.command_line import FILE_BOUNDS, MOST_WORKERS, Parser, add_file_flags, from_flags
from utils.errors import InputError
from utils.records import METERS, CloudForm, SampleFiles
from utils.reporting.messages import exit_on_error, show, start_messages, warn_once
from utils.scans.cloud_check import checked_cloud, class_distance
from utils.scans.files import (
    LONGEST_NAME,
    check_folder,
    files_by_modality,
    fix_of_missing,
    is_good,
    make_folder,
    subfolders,
)
from utils.scans.images import defect_mask, defect_share, open_image, read_image, set_max_megapixels
from utils.scans.organized_pc import read_organized_pc

ROWS = 4  # of each class in the preview, at most
Forms = Mapping[str, CloudForm]  # of raw clouds, by class
VERSION = 1  # of the cleaning: raise it when the same scan and rule give another result


@dataclass(frozen=True)
class Config:
    """Flags of the script, and the parameters of the cleaning."""

    dataset: Path
    output_dir: Path | None
    workers: int
    dry_run: bool
    preview: Path | None
    form: CloudForm = METERS
    rule: CleaningRule = field(default_factory=CleaningRule)

    @property
    def output(self) -> Path:
        """Root of the results: the dataset itself when it is cleaned in place."""
        if self.output_dir is None or self.output_dir.resolve() == self.dataset.resolve():
            return self.dataset
        return self.output_dir

    def journal(self) -> Journal:
        """Record of the scans that are done."""
        settings = {"version": VERSION, **self.rule.settings()}
        if self.form.unit != "m":  # older manifests have neither key
            settings["xyz_unit"] = self.form.unit
        if self.form.missing_value:
            settings["missing_value"] = self.form.missing_value
        return Journal(self.output, settings)


def find_scans(root: Path) -> tuple[list[Scan], dict[str, str]]:
    """List the scans under `root`, sorted; hidden folders are left out.

    With them comes the reason for each scan that lacks a file. Raises InputError if a folder cannot be read, or there
    are no scans in the layout of MVTec 3D-AD.
    """
    check_folder(root, "Give the folder that holds the classes of the dataset.")
    scans: list[Scan] = []
    failed: dict[str, str] = {}
    splits = [split for class_folder in subfolders(root) for split in subfolders(class_folder)]
    for folder in (folder for split in splits for folder in subfolders(split)):
        scans += _complete_scans(folder, root, failed)
    if not scans and not failed:
        problem = f"{root} holds no <class>/<split>/<defect>/xyz/*.tiff"
        raise InputError(f"{problem}. Give the folder that holds the classes.")
    return scans, failed


def _complete_scans(folder: Path, root: Path, failed: dict[str, str]) -> list[Scan]:
    """Return the scans of a defect's folder whose files are all there, and put the others into `failed`.

    Only defective test scans need ground truth.
    """
    found = files_by_modality(folder)
    place = folder.relative_to(root)
    defective = place.parts[1] == "test" and not is_good(place.parts[2])
    scans = []
    for stem in sorted({stem for files in found.values() for stem in files}):
        sources = {modality: files.get(stem, ()) for modality, files in found.items()}
        if not sources["gt"] and not defective:
            del sources["gt"]
        stored = next(files[0].stem for files in sources.values() if files)  # `stem` may be in another Unicode form
        scan = Scan(f"{place.as_posix()}/{stored}", sources)
        missing = [modality for modality in sources if not sources[modality]]
        if missing:
            paths = " and ".join(str(scan.file(root, modality)) for modality in missing)
            failed[scan.name] = f"Missing {paths}{fix_of_missing(folder, missing[0], found, ('xyz', 'rgb'))}"
        elif len(os.fsencode(stored)) > LONGEST_NAME:
            failed[scan.name] = f"Its name has more than {LONGEST_NAME} bytes. Rename its files."
        else:
            scans.append(scan)
    return scans


def clean_files(scan: Scan, config: Config, forms: Forms) -> Result:
    """Clean one scan with its `class_forms` and, except in a dry run, write it; errors as in both functions."""
    xyz, rgb, gt = _read(scan)
    clean = clean_scan(_in_meters(scan, xyz, config, forms), rgb, gt, config.rule)
    checked_cloud(_source(scan, "xyz"), clean.xyz)
    if config.dry_run:
        return {}, clean.doubt
    arrays = {modality: getattr(clean, modality) for modality in scan.sources}
    return write_results(scan, arrays, config.output), clean.doubt


def _in_meters(scan: Scan, xyz: np.ndarray, config: Config, forms: Forms) -> np.ndarray:
    return checked_cloud(_source(scan, "xyz"), xyz, forms.get(scan.name.partition("/")[0], config.form))


def class_forms(scans: Sequence[Scan], config: Config) -> Forms:
    """Forms of the raw clouds of unfinished classes, with the distance of their class."""
    done, in_place = config.journal().done, config.output == config.dataset
    classes: dict[str, list[SampleFiles]] = {scan.name.partition("/")[0]: [] for scan in scans if scan.name not in done}
    for scan in scans:
        xyz, form = scan.sources["xyz"][0], config.form
        if in_place and scan.name in done:
            xyz, form = scan.file(config.output, "xyz"), METERS
        if (name := scan.name.partition("/")[0]) in classes:
            classes[name].append(SampleFiles(scan.name, xyz=xyz, form=form))
    return {name: replace(config.form, distance=class_distance(samples)) for name, samples in classes.items()}


def _source(scan: Scan, modality: str) -> Path:
    """Return the file of a modality; InputError if there are several."""
    files = scan.sources[modality]
    if len(files) > 1:
        raise InputError(f"{' and '.join(map(str, files))} are files of one scan. Keep one of them.")
    return files[0]


def _read(scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    xyz = read_organized_pc(_source(scan, "xyz"))
    rgb = read_image(_source(scan, "rgb"))
    if "gt" not in scan.sources:
        return xyz, rgb, None
    path = _source(scan, "gt")
    _, problem = defect_share(path, not is_good(scan.name.split("/")[2]))
    if "alpha channel" in problem:  # the result has none
        raise InputError(problem)
    warn_once("truth", path.parent, problem)
    with open_image(path) as image:  # 8-bit ids as stored, any other form as 0 and 255
        has_ids = image.mode == "L" and image.format == "PNG"
        return xyz, rgb, np.asarray(image) if has_ids else defect_mask(image).astype(np.uint8) * 255


def preview(config: Config, path: Path, flagged: Container[str] = ()) -> None:
    """Draw up to ROWS scans of each class before and after cleaning: the first that can be cleaned, then `flagged`.

    Scans that are cleaned already or cannot be read are not drawn. Refused ones before the first that can be cleaned
    are drawn as well. Raises InputError if there is no scan to draw, or the file cannot be written.
    """
    pairs: dict[str, Pair] = {}
    done = config.journal().done if config.output == config.dataset else {}
    scans, _ = find_scans(config.dataset)
    forms = class_forms(scans, config)
    for scan in sorted(scans, key=lambda scan: scan.name in flagged):
        class_name = scan.name.partition("/")[0]
        drawn = [pair for name, pair in pairs.items() if name.startswith(f"{class_name}/")]
        wanted = scan.name in flagged or all(pair.clean is None for pair in drawn)
        if scan.name in done or not wanted or len(drawn) == ROWS:
            continue
        with suppress(InputError):  # the run itself names the files that cannot be read
            pairs[scan.name] = _pair(scan, config, forms)
    if not pairs:
        problem = f"--preview cannot show any scan of {config.dataset}: all are cleaned already, or cannot be read"
        raise InputError(f"{problem}. Leave it out.")
    make_folder(path.parent, "--preview")
    write_preview(path, dict(sorted(pairs.items())))


def _pair(scan: Scan, config: Config, forms: Forms) -> Pair:
    """Read and clean a scan for the preview; InputError if it cannot be read."""
    xyz, rgb, gt = _read(scan)
    try:
        xyz = _in_meters(scan, xyz, config, forms)
        clean = clean_scan(xyz, rgb, gt, config.rule)
        checked_cloud(_source(scan, "xyz"), clean.xyz)
    except InputError as error:
        return Pair(rgb, xyz, None, str(error))
    return Pair(rgb, xyz, clean, clean.doubt)


def preprocess(config: Config) -> Summary:
    """Clean every scan that is not done yet. A dry run cleans them as well but writes nothing.

    Raises InputError as `find_scans`, `Journal` and `process_scans`, or where a dataset would be cleaned twice.
    """
    scans, failed = find_scans(config.dataset)
    if config.output != config.dataset and read_manifest(config.dataset):
        problem = f"{config.dataset} is preprocessed already ({MANIFEST} is there)"
        raise InputError(f"{problem}. Give the folder of the original scans.")
    process = partial(clean_files, config=config, forms=class_forms(scans, config))
    return process_scans(scans, config.journal(), process, config.workers, failed, config.dry_run)


def parse_args(argv: Sequence[str] | None) -> Config:
    """Read the flags."""
    parser = Parser((__doc__ or "").split("\n\n")[0], {**FILE_BOUNDS, "workers": (1, MOST_WORKERS)})
    parser.add_argument("dataset", type=Path, help="folder that holds the classes")
    parser.add_argument("--output_dir", type=Path, help="write here instead of in place; the dataset stays as it is")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; by default one per core")
    for flag, text in CLEANING_FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument("--strict", action="store_true", help="refuse doubtful scans instead of warning of them")
    parser.add_argument("--dry_run", action="store_true", help="clean without writing, and report what a run would do")
    text = f"draw scans of each class before and after cleaning ({', '.join(FORMATS)}); --dry_run adds doubtful ones"
    parser.add_argument("--preview", type=Path, metavar="IMAGE", help=text)
    add_file_flags(parser.add_argument)
    args = parser.parse_args(argv)
    if args.preview and (args.preview.suffix.lower() not in FORMATS or args.preview.is_dir()):
        raise InputError(f"--preview {args.preview} names no image. End it in one of {', '.join(FORMATS)}.")
    set_max_megapixels(args.max_megapixels)
    form = CloudForm(args.xyz_unit, args.missing_value)
    return from_flags(Config, args, form=form, rule=from_flags(CleaningRule, args))


@exit_on_error("interrupted. Run the same command to continue.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    config = parse_args(argv)
    start_messages("%(message)s")
    summary = preprocess(config) if config.dry_run else None
    if config.preview:
        flagged = summary.failed | summary.doubtful if summary else ()
        preview(config, config.preview, flagged)
        show(f"before and after: {config.preview}")
    return report(summary or preprocess(config), "to do" if config.dry_run else "done")


if __name__ == "__main__":
    sys.exit(main())

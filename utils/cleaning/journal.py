"""Record of preprocessed scans. A run may be killed at any moment and repeated, and no scan is cleaned twice.

A scan has up to three files, which cannot be renamed in one step. A run writes them under temporary names, appends
their checksums to preprocessing.journal, and only then renames them. The next run finishes the renames listed in the
journal and moves its lines into preprocessing.json, the manifest. A scan in neither record is untouched.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from utils.errors import InputError
from utils.scans.files import FILE_SUFFIXES, read_bytes, writing
from utils.scans.json_records import decode_record, encode_record, read_record, write_record

SCHEMA = 1
MANIFEST = "preprocessing.json"
JOURNAL = "preprocessing.journal"
TEMPORARY = ".preprocessing"  # last suffix of the temporary names, so that no reader takes the files for scans
FIX = f"Restore the original dataset and delete {MANIFEST} and {JOURNAL}"
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


@dataclass(frozen=True)
class Scan:
    """One raw view of one object: an xyz and an rgb file, and a gt file where there is ground truth."""

    name: str  # "bagel/test/hole/000": class, split, defect, stem
    sources: Mapping[str, tuple[Path, ...]]  # by modality: the files that the result is made from

    def file(self, root: Path, modality: str) -> Path:
        """Path of a result."""
        folder, _, stem = self.name.rpartition("/")
        return root / folder / modality / (stem + FILE_SUFFIXES[modality][0])

    def temporary(self, root: Path, modality: str) -> Path:
        """Path of a result until it is in the journal."""
        path = self.file(root, modality)
        return path.with_name(path.name + TEMPORARY)

    def is_in(self, root: Path) -> bool:
        """Return True if results under `root` replace the sources."""
        return any(path.parent == self.file(root, name).parent for name in self.sources for path in self.sources[name])


class FileRecord(msgspec.Struct, frozen=True):
    """A file before and after preprocessing."""

    source: str  # see `sha256`
    result: str
    bytes: int  # of the result
    mtime_ns: int  # of the result
    sources: tuple[Stamp, ...]


Record = dict[str, FileRecord]  # by modality


class Manifest(msgspec.Struct):
    """Contents of preprocessing.json, and of the journal beside it."""

    schema: int
    settings: dict[str, Any]
    scans: dict[str, Record]
    in_journal: set[str] = set()


def read_manifest(root: Path) -> Manifest | None:
    """Read manifest and journal of a folder; None if no scan is in them, InputError if one is damaged or too old."""
    if not (root / MANIFEST).exists():
        return None
    manifest = read_record(root / MANIFEST, Manifest, SCHEMA, FIX)
    text = read_bytes(root / JOURNAL, "record") if (root / JOURNAL).exists() else b""
    for each in text.decode("ascii", "replace").split("\n")[:-1]:  # the text after the last line end was cut short
        line = decode_record(each, dict[str, Record], root / JOURNAL, FIX)
        manifest.scans |= line
        manifest.in_journal |= line.keys()
    return manifest if manifest.scans else None


def script_of(settings: Mapping[str, Any]) -> str:
    """Name of the script that has these settings."""
    return "preprocess_eyecandies" if settings.get("converter") == "eyecandies" else "preprocessing"


class Journal:
    """Record, kept in the folder `output`, of its preprocessed scans and the `settings` that they depend on.

    Raises InputError if manifest or journal cannot be read, is damaged, or was written with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, settings
        self.read()

    def read(self) -> None:
        """Read manifest and journal again without writing anything; errors as in the constructor."""
        manifest = read_manifest(self.output) or Manifest(SCHEMA, self.settings, {})
        self._check_settings(manifest.settings)
        self.done, self.renaming = manifest.scans, manifest.in_journal

    def recover(self, scans: Iterable[Scan]) -> None:
        """Finish the renames of a killed run, also of scans not in `scans`; InputError if a file cannot be written."""
        if not (self.output / JOURNAL).is_file():  # no run was killed
            return
        known = {scan.name: scan for scan in scans}
        for name in self.renaming:
            self._put_in_place(known.get(name) or Scan(name, {}))
        self.save()

    def commit(self, scan: Scan, record: Record) -> None:
        """Record a scan in the journal, then rename its temporary files. After an InputError the next run continues."""
        path = self.output / JOURNAL
        with writing(path), path.open("ab") as file:
            file.write(encode_record({scan.name: record}).encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[scan.name] = record
        self._put_in_place(scan)

    def save(self) -> None:
        """Remove temporary files, write the manifest and remove the journal; InputError if it cannot be written.

        Every rename must be finished.
        """
        with suppress(OSError):
            for path in self.output.glob(f"*/*/*/*/*{TEMPORARY}"):
                path.unlink()
        content = {"schema": SCHEMA, "unit": "m", "settings": self.settings, "scans": dict(sorted(self.done.items()))}
        write_record(self.output / MANIFEST, content, indent=1)
        (self.output / JOURNAL).unlink(missing_ok=True)
        self.renaming = set()

    def is_done(self, scan: Scan) -> bool:
        """Return True if the results of a scan exist and its sources, unless replaced by them, are unchanged.

        Only files whose size or time differs from the record are read, such as those of a copied dataset. Raises
        InputError if a scan cleaned in place has neither its results nor its originals, OSError for an unreadable file.
        """
        record = self.done.get(scan.name)
        if record is None or scan.name in self.renaming:
            return record is not None  # `recover` finishes a scan of the journal
        done = record.keys() == scan.sources.keys() and all(
            _unchanged((scan.file(self.output, name),), ((file.bytes, file.mtime_ns),), file.result)
            for name, file in record.items()
        )
        if not scan.is_in(self.output):
            return done and all(
                _unchanged(scan.sources[name], each.sources, each.source) for name, each in record.items()
            )
        if not done and any(sha256(*scan.sources.get(name, ())) != file.source for name, file in record.items()):
            raise InputError("Its files changed after preprocessing. Restore the originals or the results.")
        return done

    def _put_in_place(self, scan: Scan) -> None:
        """Rename the temporary files of a scan, and delete originals of another suffix beside them."""
        for modality, file in self.done[scan.name].items():
            temporary, result = scan.temporary(self.output, modality), scan.file(self.output, modality)
            with writing(result):
                if temporary.is_file():
                    temporary.replace(result)
                for source in scan.sources.get(modality, ()):
                    beside = source.parent == result.parent and source.is_file() and result.is_file()
                    # On a file system that ignores case, both names may denote the same file.
                    if beside and not source.samefile(result) and sha256(source) == file.source:
                        source.unlink()

    def _check_settings(self, found: dict[str, Any]) -> None:
        if (script := script_of(found)) != script_of(self.settings):
            raise InputError(f"{self.output} was written by the other script, utils/{script}.py. Give another folder.")
        keys, both = sorted(self.settings | found), (found, self.settings)
        pairs = {key: [settings.get(key) or "not given" for settings in both] for key in keys}
        changed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in pairs.items() if old != new)
        if changed:
            raise InputError(
                f"{self.output} was preprocessed with {changed}. Use the old settings, give another output folder, or "
                f"restore replaced originals and delete {MANIFEST}."
            )


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of a file, or of the joined digests of several files; OSError if one cannot be read."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def stamp(path: Path) -> Stamp:
    """Return size and time of the last change; OSError if there is no such file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unchanged(files: Sequence[Path], stamps: Sequence[Stamp], checksum: str) -> bool:
    there = all(path.is_file() for path in files)
    return there and (tuple(map(stamp, files)) == stamps or sha256(*files) == checksum)

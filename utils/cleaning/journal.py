"""Record of preprocessed scans: a run may be killed at any moment and repeated, and never cleans a scan twice.

A scan is up to three files, and three files cannot be renamed at once. A run therefore writes the results of a scan
under temporary names, appends their checksums to preprocessing.journal, and only then gives the files their names. The
next run renames what the journal still promises, and moves the journal into preprocessing.json, the manifest. A scan
that is in neither has not been touched.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from utils.errors import InputError
from utils.scans.files import FILE_SUFFIXES, cannot_read, cannot_write
from utils.scans.json_records import decode_record, plain_json, read_record, write_record

SCHEMA = 1
MANIFEST = "preprocessing.json"
JOURNAL = "preprocessing.journal"
TEMPORARY = ".preprocessing"  # last suffix of a result without its final name, so that no reader takes it for a scan
FIX = f"Restore the original dataset and delete {MANIFEST} and {JOURNAL}"
Stamp = tuple[int, int]  # size in bytes and time of the last change in ns


@dataclass(frozen=True)
class Scan:
    """One raw view of one object: an xyz and an rgb file, and a gt file where there is ground truth."""

    name: str  # "bagel/test/hole/000": class, split, defect, stem
    sources: Mapping[str, tuple[Path, ...]]  # by modality: the files that it is made from

    def file(self, root: Path, modality: str) -> Path:
        """Path of the result."""
        folder, _, stem = self.name.rpartition("/")
        return root / folder / modality / (stem + FILE_SUFFIXES[modality][0])

    def temporary(self, root: Path, modality: str) -> Path:
        """Path of the result before it is in the journal."""
        path = self.file(root, modality)
        return path.with_name(path.name + TEMPORARY)

    def folders(self, root: Path) -> set[Path]:
        """Folders of the results."""
        return {self.file(root, modality).parent for modality in self.sources}


class FileRecord(msgspec.Struct, frozen=True):
    """Checksums of a file before and after preprocessing. While sizes and times stay, the files count as unchanged."""

    source: str  # see `sha256`
    result: str
    bytes: int  # of the result
    mtime_ns: int | None = None  # of the result
    sources: tuple[Stamp, ...] = ()


Record = dict[str, FileRecord]  # by modality


class _Line(msgspec.Struct):
    """Line of the journal."""

    scan: str
    files: Record


class Manifest(msgspec.Struct):
    """Contents of preprocessing.json, and what the journal beside it adds."""

    schema: int
    settings: dict[str, Any]
    scans: dict[str, Record]
    in_journal: set[str] = set()


def read_manifest(root: Path) -> Manifest | None:
    """Read manifest and journal of a folder; None without a manifest.

    Raises:
        InputError: one of them cannot be read or is damaged.
    """
    path, journal = root / MANIFEST, root / JOURNAL
    if not path.is_file():
        return None
    manifest = read_record(path, Manifest, SCHEMA, FIX)
    try:
        text = journal.read_text(encoding="ascii", errors="replace") if journal.is_file() else ""
    except OSError as error:
        raise cannot_read(journal, error) from error
    for each in text.split("\n")[:-1]:  # what follows the last line end was cut short
        line = decode_record(each, _Line, journal, FIX)
        manifest.scans[line.scan] = line.files
        manifest.in_journal.add(line.scan)
    return manifest


def script_of(settings: Mapping[str, Any]) -> str:
    """Name of the script that has these settings."""
    return "preprocess_eyecandies" if settings.get("converter") == "eyecandies" else "preprocessing"


def has_results(scan: Scan, record: Record, root: Path) -> bool:
    """Tell by presence and size of its files whether a recorded scan is there. A scan without a record is not."""
    files = {scan.file(root, modality): file.bytes for modality, file in record.items()}
    return bool(files) and all(path.is_file() and path.stat().st_size == size for path, size in files.items())


class Journal:
    """Scans that are done in an output folder, kept on disk.

    Args:
        output: root of the results.
        settings: JSON values that the results depend on. Other settings than the recorded ones are refused.

    Raises:
        InputError: the files on disk cannot be read, are damaged, or were made with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, settings
        self.read()

    def read(self) -> None:
        """Read manifest and journal again, and write nothing; errors as of the constructor."""
        manifest = read_manifest(self.output)
        self.is_new = manifest is None
        manifest = manifest or Manifest(SCHEMA, self.settings, {})
        self._check_settings(manifest.settings)
        self.done = manifest.scans
        self.renaming = manifest.in_journal  # some of their files may still have temporary names

    def recover(self, scans: Iterable[Scan]) -> None:
        """Finish the renaming that a killed run began among `scans` and others, and move the journal to the manifest.

        Raises:
            InputError: a file cannot be renamed, or the manifest cannot be written.
        """
        known = {scan.name: scan for scan in scans}
        for name in self.renaming:
            self._put_in_place(known.get(name) or Scan(name, {}))
        self.save()

    def commit(self, scan: Scan, record: Record) -> None:
        """Record the temporary files of a scan and give them their final names.

        Raises:
            OSError: the journal cannot be written. Nothing has changed.
            InputError: a file cannot be renamed. The next run finishes the scan.
        """
        line = json.dumps({"scan": scan.name, "files": record}, default=plain_json) + "\n"
        _append(self.output / JOURNAL, line.encode())
        self.done[scan.name] = record
        self._put_in_place(scan)

    def save(self) -> None:
        """Write the manifest and remove the journal. Where that fails both stay as they were, with an InputError."""
        content = {"schema": SCHEMA, "settings": self.settings, "scans": dict(sorted(self.done.items()))}
        write_record(self.output / MANIFEST, content, indent=1)
        (self.output / JOURNAL).unlink(missing_ok=True)
        self.renaming = set()

    def is_done(self, scan: Scan) -> bool:
        """Tell whether a scan has its recorded results, and its recorded sources where they lie elsewhere.

        Sizes and times decide. A file is read only where they differ, as after a copy.

        Raises:
            InputError, OSError: a file cannot be read.
        """
        record = self.done.get(scan.name, {})
        if record.keys() != scan.sources.keys():
            return False
        in_place, renaming = self.in_place(scan), scan.name in self.renaming
        for modality, file in record.items():
            result, sources = scan.file(self.output, modality), scan.sources[modality]
            if renaming and scan.temporary(self.output, modality).is_file():
                result = scan.temporary(self.output, modality)
            if not result.is_file() or not _unchanged((result,), ((file.bytes, file.mtime_ns),), file.result):
                return False
            if not in_place and not _unchanged(sources, file.sources, file.source):
                return False
            if in_place and not renaming and not all(each.samefile(result) for each in sources if each.is_file()):
                return False  # an original of another suffix is back
        return True

    def in_place(self, scan: Scan) -> bool:
        """Tell whether results of a scan lie in the folders of its sources."""
        sources = ((source.parent, modality) for modality, each in scan.sources.items() for source in each)
        folders = {(folder, scan.file(self.output, modality).parent) for folder, modality in sources}
        return any(here == there or (there.is_dir() and there.samefile(here)) for here, there in folders)

    def is_original(self, scan: Scan) -> bool:
        """Tell by checksum whether the files of a recorded scan are those that it was made from."""
        record = self.done[scan.name]
        return all(name in scan.sources and sha256(*scan.sources[name]) == record[name].source for name in record)

    def _put_in_place(self, scan: Scan) -> None:
        """Rename the temporary files of a scan, then delete originals beside them that have another suffix."""
        record = self.done[scan.name]
        try:
            for modality in record:
                if (temporary := scan.temporary(self.output, modality)).is_file():
                    temporary.replace(scan.file(self.output, modality))
            for modality, file in record.items():
                result = scan.file(self.output, modality)
                for source in scan.sources.get(modality, ()):
                    other = source.parent == result.parent and source.name != result.name and source.is_file()
                    # A file system that ignores case has one file by both names.
                    if other and not source.samefile(result) and sha256(source) == file.source:
                        sync(source.parent)  # the new name reaches the disk before the old one goes
                        source.unlink()
        except OSError as error:
            raise cannot_write(Path(error.filename2 or error.filename or self.output), error) from error

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        if (script := script_of(found)) != script_of(self.settings):
            raise InputError(f"{self.output} was written by the other script, utils/{script}.py. Give another folder.")
        names = sorted(self.settings.keys() | found.keys())
        changed = [name for name in names if self.settings.get(name) != found.get(name)]
        if changed:
            differences = ", ".join(f"{name} {found.get(name)} (now {self.settings.get(name)})" for name in changed)
            raise InputError(
                f"{self.output} was preprocessed with {differences}. Keep to that, give another output folder, or "
                f"restore the originals where they were replaced and delete {MANIFEST}."
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of `folder`. The lock ends with the process.

    Raises:
        InputError: another process holds the lock, or the folder cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_read(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"Another run is preprocessing {folder}. Wait for it to end.") from None
    finally:
        os.close(descriptor)


def sha256(*paths: Path) -> str:
    """Return the SHA-256 in hexadecimal of a file, or of the lines of hexadecimal digits of several.

    Raises:
        InputError: a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise cannot_read(path, error) from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def stamp(path: Path) -> Stamp:
    """Return size and time of the last change; OSError where there is no such file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unchanged(files: tuple[Path, ...], stamps: tuple[tuple[int, int | None], ...], checksum: str) -> bool:
    return tuple(map(stamp, files)) == stamps or sha256(*files) == checksum


def sync(path: Path) -> None:
    """Flush a written file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append(path: Path, line: bytes) -> None:
    """Append a whole line and flush it to the disk, or leave the file as it was and raise OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise

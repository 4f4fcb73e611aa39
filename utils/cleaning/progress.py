"""What a preprocessing script has done, kept on disk so that a run may be killed at any moment and continued.

A scan is three files, and three files cannot be renamed at once. So the results of a scan are first written under
temporary names, then their checksums go into a journal, then the files get their names. A scan whose journal line is
there can be finished; one without it has not been touched. An original of another suffix than its result goes last.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.cleaning.journal import (
    JOURNAL,
    MANIFEST,
    SCHEMA,
    FileRecord,
    Record,
    Scan,
    has_results,
    read_recorded,
    record_to_json,
    script_of,
    sha256,
    stamp,
)
from utils.errors import InputError
from utils.scans.files import atomic_path, cannot_read, cannot_write

TEMPORARY = ".preprocessing"  # last suffix of a file not yet in place, so that no reader takes it for a scan


class Progress:
    """Which scans of the output folder are done, kept on disk so that a run may be killed at any moment.

    `preprocessing.json` is the manifest. What a running process adds goes line by line into `preprocessing.journal`,
    written before the files of a scan get their names; so only its last line can stand for a scan half renamed, and
    that one is finished at the next start.
    """

    def __init__(self, scans: Mapping[str, Scan], output: Path, settings: dict[str, Any]) -> None:
        """Read what is on disk, write nothing.

        Args:
            scans: by name, also those of earlier runs; their sources may lie where the results go.
            output: root of the results.
            settings: what the results depend on, of JSON types; other settings than the recorded ones are refused.

        Raises:
            InputError: the files on disk cannot be read, are damaged or were made with other settings.
        """
        self._scans, self.output, self.settings = scans, output, settings
        self.manifest, self.journal = output / MANIFEST, output / JOURNAL
        self.refreshed: dict[str, Record] = {}  # done, but with stamps that are not those on disk
        self._foreseen: str | None = None  # the scan that a dry run takes for finished
        recorded = read_recorded(output)
        self.is_new = recorded is None
        self.done: dict[str, Record] = recorded.scans if recorded else {}
        self._last = recorded.last if recorded else None
        if recorded and recorded.settings is not None:
            self._check_settings(recorded.settings)

    def recover(self, dry_run: bool = False) -> None:
        """Finish the scan that a killed run left half renamed, and put the journal into the manifest.

        A dry run writes nothing and lets `is_done` answer as it would afterwards.

        Raises:
            InputError: one of its temporary files is gone and the originals are no longer complete, or the manifest
                cannot be written.
        """
        if self._last is not None:
            name, suffix = self._last["scan"], self._last["suffix"]
            scan = self._scans.get(name, Scan(name, dict.fromkeys(self.done[name], ())))
            if self._can_finish(scan, suffix):
                if dry_run:
                    self._foreseen = name
                else:
                    self._put_in_place(scan, suffix)
            elif self.is_original(scan) or not self.in_place(scan):
                del self.done[name]
            else:
                raise InputError(
                    f"{name} was left half written and its temporary files are gone: restore "
                    f"{', '.join(str(scan.file(self.output, m)) for m in scan.modalities)} from the dataset"
                )
        if not dry_run:
            self._last = None
            self.save()

    def commit(self, scan: Scan, record: Record, suffix: str) -> None:
        """Give the files of `scan`, complete under their names plus `suffix`, their final names.

        Raises:
            OSError: the journal cannot be written; nothing has changed.
            InputError: a file cannot be renamed; what is half renamed the next run finishes.
        """
        line = json.dumps({"scan": scan.name, "suffix": suffix, "files": record_to_json(record)}) + "\n"
        _append(self.journal, line.encode())
        self.done[scan.name] = record
        self._put_in_place(scan, suffix)

    def save(self) -> None:
        """Write the manifest and drop the journal; where that fails both are as before, and InputError says why."""
        scans = {name: record_to_json(self.done[name]) for name in sorted(self.done)}
        content = json.dumps({"schema": SCHEMA, "settings": self.settings, "scans": scans}, indent=1) + "\n"
        try:
            with atomic_path(self.manifest) as temporary:
                temporary.write_text(content)
                sync(temporary)
            self.journal.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.manifest, error) from error

    def is_done(self, scan: Scan) -> bool:
        """Tell whether `scan` is as it was left: its results, and its sources where they lie elsewhere.

        Told by sizes and times alone; a file is read only where its time differs, as after a copy.

        Raises:
            InputError, OSError: a file cannot be read.
        """
        if scan.name == self._foreseen:
            return True
        record = self.done.get(scan.name)
        if record is None or set(record) != set(scan.modalities) or not has_results(scan, record, self.output):
            return False
        fresh, in_place = dict(record), self.in_place(scan)
        for modality, file in record.items():
            target, sources = scan.file(self.output, modality), scan.sources[modality]
            changed = stamp(target)[1]
            if changed != file.mtime_ns and sha256(target) != file.result:
                return False
            stamps = file.sources
            if in_place:
                # An original of another suffix is gone, maybe since `recover`, or somebody has put it back.
                if not all(source.samefile(target) for source in sources if source.is_file()):
                    return False
            elif (stamps := tuple(map(stamp, sources))) != file.sources and sha256(*sources) != file.source:
                return False
            fresh[modality] = file._replace(mtime_ns=changed, sources=stamps)
        if fresh != record:
            self.done[scan.name] = self.refreshed[scan.name] = fresh
        return True

    def take_stamps(self, other: "Progress") -> None:
        """Take over what `other` found by reading files, for scans whose record is the same but for the stamps."""
        for name, fresh in other.refreshed.items():
            if name in self.done and _checksums(self.done[name]) == _checksums(fresh):
                self.done[name] = fresh

    def in_place(self, scan: Scan) -> bool:
        """Tell whether results take the room of sources; of a scan whose sources are not all known they may."""
        for modality in scan.modalities:
            folder = scan.file(self.output, modality).parent
            parents = {path.parent for path in scan.sources[modality]}
            if not parents or any(each == folder or (folder.is_dir() and each.samefile(folder)) for each in parents):
                return True
        return False

    def is_original(self, scan: Scan) -> bool:
        """Tell whether the source files of a recorded scan are, by checksum, those it was made from."""
        return all(
            (files := scan.sources.get(modality))
            and all(path.is_file() for path in files)
            and sha256(*files) == file.source
            for modality, file in self.done[scan.name].items()
        )

    def _can_finish(self, scan: Scan, suffix: str) -> bool:
        """Tell whether the result of every file is there by checksum, under its final or its temporary name."""
        for modality, file in self.done[scan.name].items():
            target = scan.file(self.output, modality)
            places = (temporary_path(target, suffix), target)
            if not any(path.is_file() and sha256(path) == file.result for path in places):
                return False
        return True

    def _put_in_place(self, scan: Scan, suffix: str) -> None:
        """Rename the temporary files that are there, then delete originals beside them that bear another suffix."""
        targets = {modality: scan.file(self.output, modality) for modality in self.done[scan.name]}
        try:
            for target in targets.values():
                if (temporary := temporary_path(target, suffix)).is_file():
                    temporary.replace(target)
            for modality, target in targets.items():
                for source in scan.sources[modality]:
                    if self._is_replaced(source, target, self.done[scan.name][modality]):
                        sync(target.parent)  # the new name reaches the disk before the old one goes
                        source.unlink()
        except OSError as error:
            raise cannot_write(Path(error.filename2 or error.filename or self.output), error) from error

    def _is_replaced(self, source: Path, target: Path, file: FileRecord) -> bool:
        if source.parent != target.parent or source.name == target.name or not source.is_file():
            return False
        # A file system that ignores case has one file by both names.
        return not source.samefile(target) and sha256(source) == file.source

    def _check_settings(self, found: dict[str, Any]) -> None:
        if (script := script_of(found)) != script_of(self.settings):
            raise InputError(f"{self.output} was written by the other script, utils/{script}.py: give another folder")
        changed = sorted(k for k in self.settings.keys() | found.keys() if self.settings.get(k) != found.get(k))
        if changed:
            differences = ", ".join(f"{key} {found.get(key)} (now {self.settings.get(key)})" for key in changed)
            raise InputError(
                f"{self.output} was preprocessed with {differences}: keep to that, give another output folder, "
                f"or delete {self.manifest.name} once the originals are back where they were written over"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of `folder`; the lock goes with the process, however that ends.

    Raises:
        InputError: another process holds the lock, or the folder cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_read(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is preprocessing {folder}: wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


def temporary_path(target: Path, suffix: str) -> Path:
    """Name the file that becomes `target`; `suffix` ends in `TEMPORARY`."""
    return target.with_name(target.name + suffix)


def remove_stale(scans: Iterable[Scan], output: Path) -> None:
    """Delete temporary files of failed scans and killed runs; only while no scan is half renamed."""
    for folder in {scan.file(output, modality).parent for scan in scans for modality in scan.modalities}:
        for path in folder.glob(f"*{TEMPORARY}"):
            path.unlink(missing_ok=True)
    for path in output.glob(".preprocessing.*.tmp.json"):  # of `atomic_path`, when killed while it wrote the manifest
        path.unlink(missing_ok=True)


def _checksums(record: Record) -> dict[str, tuple[str, str]]:
    return {modality: (file.source, file.result) for modality, file in record.items()}


def sync(path: Path) -> None:
    """Flush a written file, or a folder's names, to the disk."""
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

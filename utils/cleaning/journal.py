"""What is written down of preprocessed scans: checksums and stamps of their files, in the manifest and its journal."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import InputError
from utils.scans.files import FILE_SUFFIXES, cannot_read

SCHEMA = 1  # of the manifest and the journal
MANIFEST = "preprocessing.json"
JOURNAL = "preprocessing.journal"
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns: while both stay, a file is taken for unchanged


class Scan(NamedTuple):
    """One view of one part: an xyz and an rgb file, and a gt file where there is ground truth."""

    name: str  # "bagel/test/hole/000": class, split, defect, stem
    sources: Mapping[str, tuple[Path, ...]]  # by modality: the files it is made from

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.sources)

    def file(self, root: Path, modality: str) -> Path:
        """Where the result goes."""
        folder, _, stem = self.name.rpartition("/")
        return root / folder / modality / (stem + FILE_SUFFIXES[modality][0])


class FileRecord(NamedTuple):
    """What tells an original file from its preprocessed form. Manifests of earlier runs have no stamps."""

    source: str  # sha256, of several files that of their listing
    result: str  # sha256
    bytes: int  # of the result
    mtime_ns: int | None = None  # of the result
    sources: tuple[Stamp, ...] = ()


Record = dict[str, FileRecord]  # by modality


class Recorded(NamedTuple):
    """What the manifest and the journal of a folder hold."""

    settings: dict[str, Any] | None  # None: a journal alone
    scans: dict[str, Record]
    last: dict[str, Any] | None  # last line of the journal, the only one that can stand for a scan half renamed

    @property
    def script(self) -> str:
        """The script that wrote them."""
        return script_of(self.settings or {})


def script_of(settings: Mapping[str, Any]) -> str:
    """The name of the script that has such settings."""
    return "preprocess_eyecandies" if settings.get("converter") == "eyecandies" else "preprocessing"


def read_recorded(root: Path) -> Recorded | None:
    """Read manifest and journal of a folder; None where it has neither.

    Raises:
        InputError: they cannot be read, or are damaged.
    """
    manifest, journal = root / MANIFEST, root / JOURNAL
    settings, last = None, None
    scans: dict[str, Record] = {}
    try:
        if manifest.is_file():
            content = json.loads(manifest.read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
            settings = dict(content["settings"])
            scans = {name: record_from_json(files) for name, files in content["scans"].items()}
        elif not journal.is_file():
            return None
        if journal.is_file():
            for line in journal.read_text().split("\n")[:-1]:  # what follows the last newline was cut short
                last = json.loads(line)
                scans[last["scan"]] = record_from_json(last["files"])
    except OSError as error:
        raise cannot_read(Path(error.filename or manifest), error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{manifest} or {journal.name} beside it is damaged ({error!r}): "
            "restore the original dataset and delete both"
        ) from error
    return Recorded(settings, scans, last)


def has_results(scan: Scan, record: Record, root: Path) -> bool:
    """Tell by presence and size of its files whether a recorded scan is there; not where nothing is recorded."""
    files = {scan.file(root, modality): file.bytes for modality, file in record.items()}
    return bool(files) and all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def record_to_json(record: Record) -> dict[str, dict[str, Any]]:
    return {modality: file._asdict() for modality, file in record.items()}


def record_from_json(files: dict[str, dict[str, Any]]) -> Record:
    record = {modality: FileRecord(**file) for modality, file in files.items()}
    return {
        name: file._replace(sources=tuple((size, time) for size, time in file.sources)) for name, file in record.items()
    }


def stamp(path: Path) -> Stamp:
    """Size and time of the last change; OSError where there is no such file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def sha256(*paths: Path) -> str:
    """Return the SHA-256 in hexadecimal of a file, or of the lines that these give for several.

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

"""Files of a dataset by stem, locked folders, atomic writes, and the errors of reading and writing."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize

from utils.errors import InputError, system_problem

# Suffixes of the files of a sample, in upper or lower case; this project writes the first.
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FILE_SUFFIXES = {"xyz": (".tiff", ".tif"), "rgb": _IMAGE_SUFFIXES, "gt": _IMAGE_SUFFIXES}
FOLDERS = {"xyz": ("xyz",), "rgb": ("rgb",), "gt": ("gt", "ground_truth")}  # the first wins; this project writes it
MAX_BYTES = {"image": 1 << 29, "cloud": 1 << 31, "record": 1 << 31, "weights": 1 << 40}  # of a file of that kind
GOOD, _ALSO_GOOD = "good", ("ok", "normal")  # names of folders of good samples, in upper or lower case
FilesByModality = dict[str, dict[str, tuple[Path, ...]]]  # by modality, then by stem
LONGEST_NAME = 220  # bytes of a stem: a file name has 255, and those of temporary files and overlays are longer
TEMPORARY = ".m3dm.tmp"  # in the names of unfinished files and folders
_locks: set[int] = set()  # descriptors of the locked folders


def is_good(folder: str) -> bool:
    """True for the name of a folder of good samples."""
    return folder.casefold() in (GOOD, *_ALSO_GOOD)


def check_folder(folder: Path, fix: str) -> None:
    """Raise InputError, which ends in `fix`, unless `folder` is a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. {fix}")


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones; none if it is absent, InputError if unreadable."""
    return _listing(folder, Path.is_dir)


def files_by_modality(folder: Path) -> FilesByModality:
    """Return the files in a folder such as test/hole by modality, then by stem; none where a folder does not exist.

    Stems are in Unicode form NFC, so that names in different forms match. Ground truth may be in `gt` or
    `ground_truth`, and be called <stem>_mask, unless a sample has that name. The caller refuses several files of one
    stem. Hidden files are left out. Raises InputError if a folder cannot be read.
    """
    found: FilesByModality = {modality: {} for modality in FOLDERS}
    for modality, names in FOLDERS.items():
        for name in names:
            found[modality] = _files_by_stem(folder / name, modality, found) | found[modality]
    return found


def _files_by_stem(folder: Path, modality: str, found: Mapping[str, Container[str]]) -> dict[str, tuple[Path, ...]]:
    files: dict[str, tuple[Path, ...]] = {}
    for path in _listing(folder, lambda path: path.suffix.lower() in FILE_SUFFIXES[modality]):
        stem = normalize("NFC", path.stem)
        if modality == "gt" and stem.lower().endswith("_mask") and not any(stem in each for each in found.values()):
            stem = stem[: -len("_mask")]
        files[stem] = (*files.get(stem, ()), path)
    return files


def fix_of_missing(folder: Path, modality: str, found: FilesByModality, needed: Iterable[str]) -> str:
    """End of an error about missing files of a modality: its files that lack a partner, and the fix.

    `found` is from `files_by_modality`. A sample needs files of the modalities `needed`.
    """
    stems = set.intersection(*(set(found[each]) for each in needed))
    partners = {path for stem in stems for path in found[modality].get(stem, ())}
    places = [folder / name for name in FOLDERS[modality] if (folder / name).is_dir()] or [folder]
    folders = {name for names in FOLDERS.values() for name in names}
    paths = sorted(path for place in places for path in place.iterdir() if path not in partners)
    others = [f"{path.parent.name}/{path.name}" for path in paths if path.name not in folders and path.name[0] != "."]
    if not others:
        return ". Restore them, or remove their samples."
    listing = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    expected = f"{modality}/<stem>{FILE_SUFFIXES[modality][0]}"
    return f" (found: {listing}). Rename or convert those of the samples to {expected}, or remove the samples."


def open_file(path: Path, kind: str) -> BinaryIO:
    """Open a file for reading. All readers of images, clouds, records and weights use this function.

    Raises InputError if `path` is not a regular file (a reader would wait for a pipe), has more than MAX_BYTES of its
    kind, or cannot be opened.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES[kind]:
            size = f"{status.st_size / 1e6:.0f} MB, expected at most {MAX_BYTES[kind] / 1e6:.0f} for this kind of file"
            raise InputError(f"{path} has {size}. Scale it down, or copy it again.")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a pipe or a device, not a file. Move it away and restore the file.")
        return path.open("rb")  # refuses a folder
    except OSError as error:
        raise InputError(system_problem(path, "read", error)) from error


def read_bytes(path: Path, kind: str) -> bytes:
    """Read a file; arguments and errors as in `open_file`."""
    with open_file(path, kind) as file:
        return file.read()


def _listing(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
        return sorted(path for path in paths if not path.name.startswith((".", "lost+found")) and wanted(path))
    except OSError as error:
        raise InputError(system_problem(folder, "read", error)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a system error in the block, which may name a temporary file or none, into an InputError about `path`."""
    try:
        yield
    except OSError as error:
        full = OSError(errno.ENOSPC, str(error))  # NumPy's error of a write cut short has no number
        raise InputError(system_problem(path, "written", error if error.errno else full)) from error


def make_folder(path: Path | str, flag: str) -> Path:
    """Make the folder that `flag` names, before any work starts; InputError if it is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path} cannot be made or written ({error.strerror}). Choose another {flag}.") from None
    return Path(path)


def _unlock_in_worker() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_unlock_in_worker)  # else a worker might keep a lock after its parent has ended


@contextmanager
def locked(folder: Path, flag: str, files: Iterable[Path] = ()) -> Iterator[None]:
    """Lock an existing folder, given by `flag`, while the block runs; the lock ends with the process at the latest.

    `files` are those that the run will write there. Temporary files that killed runs left beside them are removed.
    Raises InputError if another run holds the lock, or a folder is in the place of a file or the reverse.
    """
    planned = set(files)
    places = {folder}.union(place for path in planned for place in path.parents if folder in place.parents)
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another run is writing to {folder}. Wait for it, or choose another {flag}.") from None
        except OSError:
            pass  # some network file systems have no locks
        for path in sorted(planned | places):
            if os.path.lexists(path) and not (path.is_dir() if path in places else path.is_file()):
                kind = "folder" if path in places else "file"
                raise InputError(f"{path} is not a {kind}. Move it away, or choose another {flag}.")
        with suppress(OSError):  # a finished dataset may lie on a read-only disk
            for path in (path for place in places for path in place.glob(f".*{TEMPORARY}*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because libraries choose the format by it. The next run uses the
    same name, so it replaces the file of a killed run. Parent folders are made.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}{TEMPORARY}{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new folder beside `path`, and put it in the place of `path` if the block succeeds.

    The older folder at `path` is first renamed, and deleted at the end. Parent folders are made.
    """
    path = Path(path)
    temporary, older = (path.with_name(f".{path.name}{ending}") for ending in (TEMPORARY, ".old"))
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(older, ignore_errors=True)
            path.rename(older)
        try:
            temporary.rename(path)
        except OSError:
            if older.exists():
                older.rename(path)
            raise
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(path: Path) -> Path | None:
    """Return the older folder, renamed by an `atomic_folder` that was killed before it put the new one at `path`."""
    older = path.with_name(f".{path.name}.old")
    return older if older.exists() and not path.exists() else None

"""Files of a dataset by their stems, and writing files so that a reader never meets half of one."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError

# What a scan's files may be, in any case; the first is what this project writes.
FILE_SUFFIXES = {"xyz": (".tiff", ".tif"), "rgb": (".png", ".jpg", ".jpeg"), "gt": (".png",)}


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, hidden ones left out; none where there is no folder.

    Raises:
        InputError: `folder` cannot be read.
    """
    try:
        return sorted(path for path in _listing(folder) if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise cannot_read(folder, error) from error


def files_by_stem(folder: Path, modality: str) -> dict[str, tuple[Path, ...]]:
    """A folder's files of a modality by stem, all sorted; none where there is no folder. Hidden ones do not count.

    Several files of one stem are for the caller to refuse.

    Raises:
        InputError: `folder` cannot be read.
    """
    found: dict[str, tuple[Path, ...]] = {}
    try:
        listing = sorted(_listing(folder))
    except OSError as error:
        raise cannot_read(folder, error) from error
    for path in listing:
        if not path.name.startswith(".") and path.suffix.lower() in FILE_SUFFIXES[modality]:
            found[path.stem] = (*found.get(path.stem, ()), path)
    return found


def _listing(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def cannot_read(path: Path, error: OSError) -> InputError:
    """Say why the system does not let `path` be read, and the mend."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing: restore it from its source, or remove the scan's other files")
    mend = {
        errno.EACCES: "make it and the folders above it readable",
        errno.EPERM: "make it and the folders above it readable",
        errno.ENAMETOOLONG: "shorten the names in it",
    }.get(error.errno or 0, "check the disk and copy it again from its source")
    return InputError(f"{path} cannot be read ({error.strerror or error}): {mend}")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Say why `path` is not written, and the mend."""
    # NumPy's error of a write cut short has no number.
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    mend = "free disk space" if full else "make it and its folder writable"
    if error.errno == errno.ENAMETOOLONG:
        mend = "shorten the name of the scan's files"
    reason = error.strerror or str(error)
    return InputError(f"{path} cannot be written ({reason}): {mend} and run the same command again")


def make_folder(path: Path | str, flag: str) -> Path:
    """Make the folder that `flag` names before the work that fills it; InputError where it cannot be made or filled."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made ({error.strerror}): choose another {flag}") from None
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{path} takes no files ({error.strerror}): make it writable, or choose another {flag}"
        ) from None
    return Path(path)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if not.

    The temporary name keeps the suffix, because libraries choose the format by it. The parent folder is made
    when it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new folder beside `path`; if the block succeeds it takes the place of `path`, if not it is deleted.

    What was at `path` before is moved aside until the new folder is there, and only then deleted, as is what killed
    processes left. The parent folder is made when it is missing.
    """
    path = Path(path)
    temporary, older = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(older)
        try:
            temporary.rename(path)
        except OSError:
            if older.exists():
                older.rename(path)
            raise
        shutil.rmtree(older, ignore_errors=True)
        for leftover, process in _leftovers(path).items():
            if not _is_running(process):
                shutil.rmtree(leftover, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(path: Path) -> list[Path]:
    """The whole folders that `atomic_folder` moved away from `path`, where it was killed before it put in another."""
    return [] if path.exists() else [leftover for leftover in _leftovers(path) if leftover.suffix == ".old"]


def _leftovers(path: Path) -> dict[Path, int]:
    """The folders that `atomic_folder` has beside `path`, sorted, with the numbers of its processes."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(tmp|old)")
    named = ((each, pattern.fullmatch(each.name)) for each in sorted(path.parent.glob(".*")))
    return {each: int(match[1]) for each, match in named if match}


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True

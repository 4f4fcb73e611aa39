"""Files of a dataset by their stems, and atomic writes."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError

# Suffixes of the files of a sample, in any case; this project writes the first.
FILE_SUFFIXES = {"xyz": (".tiff", ".tif"), "rgb": (".png", ".jpg", ".jpeg"), "gt": (".png",)}


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones; none where there is no folder.

    Raises:
        InputError: `folder` cannot be read.
    """
    try:
        return sorted(path for path in _listing(folder) if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise cannot_read(folder, error) from error


def files_by_stem(folder: Path, modality: str) -> dict[str, tuple[Path, ...]]:
    """Return a folder's files of a modality by stem, sorted, without hidden ones; none where there is no folder.

    The caller refuses several files of one stem.

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
    """Return the InputError of a system error while reading `path`, with the fix."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing. Restore it from its source, or remove the other files of the sample.")
    fix = {
        errno.EACCES: "Make it and the folders above it readable.",
        errno.EPERM: "Make it and the folders above it readable.",
        errno.ENAMETOOLONG: "Shorten the names in it.",
    }.get(error.errno or 0, "Check the disk and copy it again from its source.")
    return InputError(f"{path} cannot be read ({error.strerror or error}). {fix}")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the InputError of a system error while writing `path`, with the fix."""
    # NumPy's error of a write cut short has no number.
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    fix = "Free disk space" if full else "Make it and its folder writable"
    if error.errno == errno.ENAMETOOLONG:
        fix = "Shorten the names of the sample's files"
    return InputError(f"{path} cannot be written ({error.strerror or error}). {fix} and run the same command again.")


def make_folder(path: Path | str, flag: str) -> Path:
    """Make the folder that `flag` names before the work that fills it; InputError where it cannot be made or filled."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made ({error.strerror}). Choose another {flag}.") from None
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path} is not writable ({error.strerror}). Make it so, or choose another {flag}.") from None
    return Path(path)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because libraries choose the format by it. Parent folders are made.
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
    """Yield a new folder beside `path`, and put it in the place of `path` if the block succeeds.

    The folder at `path` is moved aside until the new one is there. Then it is deleted, with the folders that killed
    processes left. Parent folders are made.
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
    """Return the folders that a killed `atomic_folder` had moved aside before it put another one at `path`."""
    return [] if path.exists() else [leftover for leftover in _leftovers(path) if leftover.suffix == ".old"]


def _leftovers(path: Path) -> dict[Path, int]:
    """Return the folders of `atomic_folder` beside `path`, sorted, with the numbers of its processes."""
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

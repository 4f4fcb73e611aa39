"""Command lines of the scripts: help with defaults, --version, short usage errors, and flags as dataclasses."""

import argparse
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils.choices import MAX_MEGAPIXELS, UNITS
from utils.errors import Bounds, range_problem
from utils.reporting.messages import LOG_FILE, QUIET, TRACEBACK, escape_controls, show

Settings = TypeVar("Settings")

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 1024  # threads or processes of a script
FILE_BOUNDS: Bounds = {"missing_value": (-3.4028235e38, 3.4028235e38), "max_megapixels": (1, 4000)}  # float32 and PIL


class Parser(argparse.ArgumentParser):
    """ArgumentParser with defaults in its help, the flags of every script, bounds of numbers, and two-line errors."""

    def __init__(self, description: str | None, bounds: Bounds | None = None) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.bounds = bounds or {}
        silent: dict[str, Any] = {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("--version", action=_Version, help="print the version and exit", **silent)
        self.add_argument("--debug", action=_Debug, help="show the traceback of an error", **silent)
        self.add_argument("--quiet", action=_Quiet, help="print only warnings and errors", **silent)
        text = "also append every message to FILE, with date and time"
        self.add_argument("--log_file", action=_LogFile, metavar="FILE", help=text, **silent | {"nargs": None})

    def error(self, message: str) -> NoReturn:
        """Print one line of usage and the problem, and exit with code 2. Of several processes only the first prints."""
        words = [self.prog, *(str(each.metavar or each.dest) for each in self._get_positional_actions())]
        usage = f"usage: {' '.join(words)} [--flag value ...]  (--help lists all flags)"
        self.exit(2, f"{usage}\n{self.prog}: error: {escape_controls(message)}\n" if is_first_process() else None)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; exits on --help, --version, unknown flags and numbers out of their bounds."""
        args = super().parse_args(argv, namespace)
        for name, (low, high) in self.bounds.items():
            value = getattr(args, name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, float | int) and (problem := range_problem(each, low, high)):
                    self.error(f"--{name} {problem}")
        return args

    def given_flags(self, argv: Sequence[str] | None = None) -> frozenset[str]:
        """Names of the flags on the command line, including those with their default value."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        parsed = vars(self.parse_args(argv, namespace))
        return frozenset(name for name, value in parsed.items() if value is not absent)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Description as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        show(f"{parser.prog} {version()}")
        parser.exit()


class _Debug(argparse.Action):
    def __call__(self, *_: object) -> None:
        TRACEBACK.set(True)


class _Quiet(argparse.Action):
    def __call__(self, *_: object) -> None:
        QUIET.set(True)


class _LogFile(argparse.Action):
    def __call__(self, _parser: object, _namespace: object, value: Any, *_: object) -> None:
        LOG_FILE.set(value)


def version() -> str:
    """Version of CITATION.cff, followed by the commit in a git checkout: "1.0.0 (1a2b3c4)"."""
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    number = next(line.removeprefix("version:").strip() for line in lines if line.startswith("version:"))
    return f"{number} ({found[:7]})" if (found := commit()) else number


def commit() -> str | None:
    """Commit of a git checkout, 40 hexadecimal digits; None elsewhere."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def add_file_flags(add: Callable[..., Any], unit: str | None = "m") -> None:
    """Add the flags about stored clouds and images, which have FILE_BOUNDS; `unit` is the default of --xyz_unit."""
    add("--xyz_unit", default=unit, choices=UNITS, help="unit of the coordinates in point clouds")
    add("--missing_value", type=float, metavar="Z", help="z of pixels without a measurement, besides 0 and NaN")
    add("--max_megapixels", type=int, default=MAX_MEGAPIXELS, help="largest image that is read, megapixels")


def from_flags(kind: type[Settings], args: argparse.Namespace, **others: Any) -> Settings:
    """Build the dataclass `kind`: each field from `others`, else from the flag of its name, else from its default."""
    names = {field.name for field in fields(kind) if hasattr(args, field.name)}  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names} | others)


def is_first_process() -> bool:
    """True in a run of one process, and on rank 0 according to the environment of torchrun or Open MPI."""
    return os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0"

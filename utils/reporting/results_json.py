"""results.json: every metric of a run unrounded, with its arguments and package versions."""

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from utils.command_line import commit
from utils.errors import InputError
from utils.scans.json_records import read_record

if TYPE_CHECKING:
    import torch

SCHEMA = 2
FILE_NAME = "results.json"
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
DISTRIBUTIONS = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "open3d", "pillow")

Share = Annotated[float, msgspec.Meta(ge=0, le=1 + 1e-9)]  # an area may exceed 1 by rounding


class SampleScore(msgspec.Struct, frozen=True):
    """Score of a sample of the test split, or of a good sample in a class without one."""

    path: str
    label: int
    score: float
    severity: float | None


class ImageThreshold(msgspec.Struct, frozen=True):
    image: float


class ClassResults(msgspec.Struct, frozen=True):
    """Metrics of one class; None where undefined."""

    image_rocauc: Share | None = None
    pixel_rocauc: Share | None = None
    au_pro: Share | None = None
    au_pro_exact: dict[str, Share | None] = {}
    f1: Share | None = None
    precision: Share | None = None
    recall: Share | None = None
    false_alarm_rate: Share | None = None
    threshold: ImageThreshold | None = None
    samples: list[SampleScore] = []


class Results(msgspec.Struct, frozen=True):
    """Fields of results.json that a comparison reads."""

    schema: int
    args: dict[str, Any]
    versions: dict[str, Any]
    classes: dict[str, ClassResults]


def results_record(
    command: Sequence[str],
    args: Mapping[str, Any],
    classes: Mapping[str, Mapping[str, Any]],
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Content of results.json; `origin` as in `origin_of_run`."""
    from utils.metrics import mean_over_classes

    return {
        "schema": SCHEMA,
        "command": list(command),
        "args": dict(args),
        "versions": package_versions(),
        **(origin or {}),
        "classes": {name: dict(metrics) for name, metrics in classes.items()},
        "mean": mean_over_classes(classes),
    }


def read_results(path: Path) -> Results:
    """Read a results.json; InputError if it cannot be read, has another schema, or a metric is not from 0 to 1."""
    if path.is_dir():
        raise InputError(f"{path} is a folder. Name the {FILE_NAME} in it.")
    return read_record(path, Results, SCHEMA, f"Name a {FILE_NAME} of main.py")


def origin_of_run(device: "torch.device") -> dict[str, Any]:
    """Commit of this project, name of the CPU or GPU, and number of threads."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"commit": commit(), "machine": {"device": name, "threads": torch.get_num_threads()}}


def _cpu_name() -> str:
    lines = CPU_INFO.read_text("utf-8", "replace").splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect the numbers; None for a missing package."""
    return {"python": platform.python_version()} | {name: _installed_version(name) for name in DISTRIBUTIONS}


@cache
def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

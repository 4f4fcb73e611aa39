"""Layout of the code: imports point down only, importing has no side effects, files are read safely."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The layers from top to bottom. Each imports itself and the layers below; tests and benchmarks import all.
LAYERS = (
    ("main", "fusion_pretrain", "predict"),
    ("runner",),
    ("feature_extractors",),
    ("models", "dataset"),
    ("utils",),
)
SCRIPTS = [
    *("main.py", "fusion_pretrain.py", "predict.py", "runner/reproduce.py"),
    *(f"utils/{name}.py" for name in ("convert", "preprocessing", "preprocess_eyecandies", "synthetic", "report")),
]
HEAVY = {"torch", "timm", "torchvision", "open3d", "matplotlib", "sklearn", "plotly"}
READERS_OF_CHECKPOINTS = {"utils/checkpoint_files.py"}


def part_of(path: str) -> str:
    """Top-level package or module of a path: utils/scans/files.py -> utils, main.py -> main."""
    return Path(path).parts[0].removesuffix(".py")


def find_sources() -> dict[str, str]:
    """Text of every Python file of the project by its path."""
    folders = ("utils", "models", "feature_extractors", "runner", "tests", "benchmarks")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}


SOURCES = find_sources()
LAYERED = [path for path in SOURCES if part_of(path) not in ("tests", "benchmarks")]
MODULES = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in LAYERED]


def imported(path: str, source: str) -> Iterator[str]:
    """Dotted names of all imports of a file, with relative ones resolved."""
    package = Path(path).parent.parts
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*above, *([node.module] if node.module else ())))


def upward_imports(path: str, source: str) -> list[str]:
    """Imports of layers above, of other members of the same layer, and of tests and benchmarks."""
    own = part_of(path)
    depth = layer_of(own)
    found = set()
    for name in imported(path, source):
        part = name.split(".")[0]
        forbidden = part in ("tests", "benchmarks") or (part != own and layer_of(part, default=len(LAYERS)) <= depth)
        if forbidden:
            found.add(name)
    return sorted(found)


def layer_of(part: str, default: int | None = None) -> int:
    """Number of the layer of a package or module; `default` for libraries."""
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    assert default is not None, f"{part} is in no layer"
    return default


@cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


def calls(source: str, function: str) -> list[ast.Call]:
    """Calls of a dotted function such as torch.load, also by aliases."""
    module, name = function.rsplit(".", 1)
    tree = parse(source)
    aliases = {function}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {f"{a.asname}.{name}" for a in node.names if a.name == module and a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            aliases |= {a.asname or a.name for a in node.names if a.name == name}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in aliases]


def has_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


# Project


def test_sources_are_found() -> None:
    assert {"main.py", "dataset.py", "fusion_pretrain.py", "utils/errors.py", "tests/conftest.py"} <= SOURCES.keys()
    assert {"models", "feature_extractors.detector"} <= set(MODULES)


def test_imports_go_down_only() -> None:
    for path in LAYERED:
        assert upward_imports(path, SOURCES[path]) == [], path


def test_folders_stay_small() -> None:
    """At most 4 Python files in the root, and 16 modules in a folder."""
    counts = Counter(Path(path).parent.as_posix() for path in LAYERED if Path(path).name != "__init__.py")
    assert counts.pop(".") <= 4
    assert max(counts.values()) <= 16, counts


def test_no_star_imports() -> None:
    stars = [
        path
        for path, source in SOURCES.items()
        for node in ast.walk(parse(source))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


def test_no_file_has_the_name_of_a_standard_library_module() -> None:
    """Python searches the folder of a script first, so utils/logging.py would replace logging."""
    names = {path for path in LAYERED if Path(path).stem in sys.stdlib_module_names}
    assert names == set()


def test_scripts_in_utils_do_not_search_their_own_folder() -> None:
    """They replace it with the repository root before they import the project."""
    scripts = [path for path in LAYERED if part_of(path) == "utils" and "__main__" in SOURCES[path]]
    assert scripts
    for path in scripts:
        head = SOURCES[path].split("\nfrom utils.")[0]
        assert "sys.path[0] = " in head, path


def test_every_script_starts_its_messages() -> None:
    """Without this call, a script would accept --log_file and write nothing to it."""
    scripts = [path for path in LAYERED if '__name__ == "__main__"' in SOURCES[path]]
    assert set(SCRIPTS) <= set(scripts)
    assert [path for path in scripts if "start_messages(" not in SOURCES[path]] == []


def test_one_function_makes_progress_bars() -> None:
    others = [path for path in LAYERED if "tqdm(" in SOURCES[path] and path != "utils/reporting/progress.py"]
    assert others == []


def test_imports_have_no_side_effects() -> None:
    """Imports parse no argument, print nothing, load no checkpoint, use no GPU and draw no random number."""
    program = f"""
import argparse, sys
import numpy as np, torch

def refuse(*args, **kwargs):
    raise AssertionError("called while importing")

argparse.ArgumentParser.parse_known_args = torch.load = refuse
states = torch.get_rng_state(), np.random.get_state()[1].copy()
threads = torch.get_num_threads()
for module in {MODULES}:
    __import__(module)
    assert torch.equal(torch.get_rng_state(), states[0]), module
    assert (np.random.get_state()[1] == states[1]).all(), module
    assert torch.get_num_threads() == threads, module
    assert not torch.cuda.is_initialized(), module
"""
    command = [sys.executable, "-W", "ignore", "-c", program, "--no-such-flag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_parsing_flags_imports_no_heavy_library(script: str) -> None:
    """--help and wrong flags answer at once; torch alone takes seconds to import."""
    program = f"""
import runpy, sys
heavy = {HEAVY}
for flags, code in ((["--help"], 0), (["--no_such_flag"], 2)):
    sys.argv = [{script!r}, *flags]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == code, stop.code
    found = sorted(heavy & set(sys.modules))
    assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    usage, error = done.stderr.splitlines()
    assert usage.startswith(f"usage: {Path(script).name} ") and "[--flag value ...]" in usage
    assert error.startswith(f"{Path(script).name}: error: ")


def test_torch_load_is_safe_and_only_in_checkpoint_readers() -> None:
    for path, source in SOURCES.items():
        loads = [*calls(source, "torch.load"), *calls(source, "torch.serialization.load")]
        assert all(has_true(call, "weights_only") for call in loads), f"{path}: torch.load without weights_only=True"
        assert not loads or path in READERS_OF_CHECKPOINTS or path not in LAYERED, path
    assert all(calls(SOURCES[path], "torch.load") for path in READERS_OF_CHECKPOINTS)


def test_no_pickle_is_read_or_written() -> None:
    """Files hold tensors and JSON, never pickled objects."""
    for path in LAYERED:
        for function in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "joblib.load", "joblib.dump"):
            assert calls(SOURCES[path], function) == [], (path, function)
        assert not any(has_true(call, "allow_pickle") for call in calls(SOURCES[path], "numpy.load")), path


# Checks of the checks


def test_upward_imports_are_found() -> None:
    for path, source, found in (
        ("utils/a.py", "import models.point_ops", ["models.point_ops"]),
        ("utils/a.py", "def f():\n    from dataset import AnomalyDataset", ["dataset"]),
        ("utils/a.py", "from utils.errors import InputError\nimport torch", []),
        ("models/a.py", "from feature_extractors import config", ["feature_extractors"]),
        ("models/a.py", "from dataset import MVTEC", ["dataset"]),
        ("models/a/b.py", "from ..transformer import Block", []),
        ("models/a.py", "from . import transformer", []),
        ("dataset.py", "from models import build_rgb_backbone", ["models"]),
        ("models/a.py", "from models import b\nimport numpy", []),
        ("dataset.py", "from runner.dataset_check import check_split", ["runner.dataset_check"]),
        ("runner/dataset_check.py", "from main import parse_args", ["main"]),
        ("feature_extractors/a.py", "import main", ["main"]),
        ("fusion_pretrain.py", "from runner.settings import make_parser", []),
        ("runner/settings.py", "from main import run", ["main"]),
        ("main.py", "from tests.conftest import ROOT", ["tests.conftest"]),
        ("main.py", "from dataset import a\nfrom models import b\nfrom utils.c import d", []),
    ):
        assert upward_imports(path, source) == found, (path, source)


def test_calls_are_found() -> None:
    for source, count, safe in (
        ("import torch\ntorch.load(path, weights_only=True)", 1, True),
        ("import torch\ntorch.load(path)", 1, False),
        ("import torch\ntorch.load(path, weights_only=False)", 1, False),
        ("import torch as t\nt.load(path)", 1, False),
        ("from torch import load as read\nread(path)", 1, False),
        ("import torch\nmodel.load(path)\ntorch.save(x, path)", 0, True),
    ):
        found = calls(source, "torch.load")
        assert len(found) == count, source
        assert all(has_true(call, "weights_only") for call in found) == safe, source

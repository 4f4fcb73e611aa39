"""Triton kernels in the interpreter, on a GPU and compiled without one, and the module without Triton."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from triton_cases import CASES

from models import point_ops_triton as kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Error of Triton 3.6 with NumPy 2.4 at every loop, unrelated to the kernels.
INTERPRETER_FAULT = "only 0-dimensional arrays can be converted to Python scalars"

FLOATS, INDICES, COUNT = "*fp32", "*i64", "i32"
SEARCH = {
    "queries": FLOATS,
    "points": FLOATS,
    "squared": FLOATS,
    "indices": INDICES,
    "n_queries": COUNT,
    "n_points": COUNT,
}
# Kernel, argument types, constants and warps of each launch.
LAUNCHES = {
    "sampling": (
        kernels._sample_kernel,
        {"coordinates": FLOATS, "nearest": FLOATS, "picks": INDICES, "n_points": COUNT, "n_picks": COUNT},
        {"BLOCK": kernels.SAMPLING_BLOCK},
        16,
    ),
    "keys": (
        kernels._keys_kernel,
        {
            **{"queries": FLOATS, "coordinates": FLOATS, "keys": INDICES},
            **{"first": COUNT, "n_queries": COUNT, "n_points": COUNT},
        },
        {"BLOCK": kernels.KEYS_BLOCK},
        4,
    ),
    "three": (kernels._three_kernel, SEARCH, {"EXPANDED": False, "BLOCK": kernels.THREE_BLOCK}, 4),
    "three, expanded": (kernels._three_kernel, SEARCH, {"EXPANDED": True, "BLOCK": kernels.THREE_BLOCK}, 4),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Error message of each case, empty if it passed; one process runs them all."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "triton_cases.py"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_cases_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    if "interpreter.py" in interpreted[case] and INTERPRETER_FAULT in interpreted[case]:
        pytest.skip("the interpreter of this Triton is too old for this NumPy")
    assert interpreted[case] == ""


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_cases_on_a_gpu(case: str) -> None:
    CASES[case]("cuda")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", LAUNCHES)
def test_kernels_compile_for_a_gpu_without_one(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX of compute capability 9.0; only the expanded squares use fused multiply-adds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, types, constants, warps = LAUNCHES[kernel]
    source = ASTSource(
        fn=function,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn.f32" not in ptx if kernel != "three, expanded" else ptx.count("fma.rn.f32") == 2


@pytest.mark.slow
def test_import_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from models import point_ops, point_ops_triton
try:
    point_ops_triton.knn(torch.rand(1, 5, 3), torch.rand(1, 5, 3), 5)
except TypeError:
    print("not launched")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "not launched\n", "")

"""benchmarks/precision.py on a made-up class, with backbones that need no checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils import preprocessing
from utils.synthetic import Plan, make_dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_both_precisions_are_compared(tmp_path: Path) -> None:
    raw, parts = tmp_path / "raw", tmp_path / "parts"
    make_dataset(Plan(raw, ("cookie",), train=2, validation=0, test_good=1, test_defective=1, size=224))
    assert preprocessing.main([str(raw), "--output_dir", str(parts), "--workers", "1"]) == 0
    command = [sys.executable, "benchmarks/precision.py", "--dataset_path", parts, "--classes", "cookie"]
    command += ["--rgb_backbone_name", "efficientnet_lite0", "--xyz_backbone_name", "FPFH"]
    command += ["--output", tmp_path / "precision.json"]
    done = subprocess.run([str(each) for each in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "precision.json").read_text())["classes"]["cookie"]
    assert found["cosine"].keys() == {"xyz", "rgb", "fusion"}
    assert found["cosine"]["xyz"]["min"] == pytest.approx(1)  # FPFH does not depend on the precision
    assert 0.9 < found["cosine"]["rgb"]["min"] < found["cosine"]["rgb"]["mean"] < 1 - 1e-7
    assert found["metrics"]["fp32"].keys() == found["metrics"]["bf16"].keys()
    assert "cosine mean" in done.stdout

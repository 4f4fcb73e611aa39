"""The benchmarks run and measure what they say; never how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def run_benchmark(name: str, *flags: object) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_is_measured_beside_the_plain_form(tmp_path: Path) -> None:
    text = run_benchmark("uff_loss", "--rows", 300, "--output", tmp_path / "loss.json")
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found["rows"] == 300
    assert found["ours"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-6)
    assert found["ours"]["gradient_norm"] == pytest.approx(found["plain"]["gradient_norm"], rel=1e-4)
    assert "of the plain form" in text
    alone = run_benchmark("uff_loss", "--rows", 300, "--skip_plain", "--output", tmp_path / "alone.json")
    assert "plain" not in json.loads((tmp_path / "alone.json").read_text())
    assert "of the plain form" not in alone


def test_cleaning_is_measured(tmp_path: Path) -> None:
    run_benchmark("preprocessing", "--scans", 2, "--skip_open3d", "--output", tmp_path / "cleaning.json")
    found = json.loads((tmp_path / "cleaning.json").read_text())
    assert 170_000 < found["points_off_the_plane"] < 200_000
    assert found["cores"] == 1
    assert 0 < found["cluster_seconds"] < found["clean_seconds"]
    speeds = [found[f"scans_per_second_{workers}"] for workers in range(1, (os.cpu_count() or 1) + 1)]
    assert all(speed > 0 for speed in speeds)


@pytest.mark.slow
def test_the_pairings_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few updates: enough for the lines of the figure, not for what they show."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script replaces its first entry
    import uff_pairing

    monkeypatch.setattr(uff_pairing, "PARTS", 10)
    monkeypatch.setitem(uff_pairing.FLAGS, "epochs", 2)
    monkeypatch.setattr(sys, "argv", ["uff_pairing.py", "--figure", str(tmp_path / "figure.png")])
    uff_pairing.main()
    told = capsys.readouterr().out
    assert "aligned: retrieval" in told
    assert "reference: retrieval" in told
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (768, 432)

"""The Python that docs/DATA.md shows does what is said of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from utils.scans.depth_camera import Camera, back_project
from utils.scans.organized_pc import read_organized_pc, valid_mask
from utils.scans.sample_files import CLOUD_SUFFIXES


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs/DATA.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_snippets_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from_scratch, from_png, from_array, convert = blocks("python")
    (camera,) = blocks("json")
    (tmp_path / "camera.json").write_text(camera)

    def run(snippet: str) -> np.ndarray:
        exec(compile(snippet, "docs/DATA.md", "exec"), {})
        return read_organized_pc(tmp_path / "part.tiff")

    assert valid_mask(run(from_scratch)).sum() == 280 * 340
    depth = np.random.default_rng(0).integers(300, 700, (480, 640)).astype(np.uint16)
    Image.fromarray(depth).save("depth.png")
    of_png = run(from_png)
    np.testing.assert_array_equal(of_png, back_project(depth, Camera(**json.loads(camera))))
    np.save("depth.npy", depth * 0.001)
    np.testing.assert_allclose(run(from_array), of_png, rtol=1e-5)
    Path("scans").mkdir()
    header = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 640\nHEIGHT 480\nDATA binary\n"
    Path("scans/007.pcd").write_bytes(header.encode() + (of_png * 1000).tobytes())
    run(convert)
    found = read_organized_pc("parts/bracket/train/good/xyz/007.tiff")
    np.testing.assert_allclose(found, of_png, rtol=1e-5)


def test_every_format_is_described() -> None:
    text = (ROOT / "docs/DATA.md").read_text()
    for suffix in set(CLOUD_SUFFIXES) - {".tif"}:
        assert suffix in text or suffix.removeprefix(".") in text, suffix

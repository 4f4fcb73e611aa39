"""Documentation: links resolve, named code exists, and the snippets of DATA write what they say."""

import ast
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT
from msgspec.structs import replace

from feature_extractors.config import Protocol
from utils.choices import CLEANING_FLAGS
from utils.scans.depth_camera import back_project, read_camera
from utils.scans.organized_pc import read_organized_pc, valid_mask
from utils.scans.sample_files import CLOUD_SUFFIXES

MOST_WORDS = 2000
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).exists()]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to headings: lower case, no punctuation, hyphens for spaces, repetitions numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", CODE.sub("", text), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        plain = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        anchor, repetition = plain, 0
        while anchor in found:
            repetition += 1
            anchor = f"{plain}-{repetition}"
        found.add(anchor)
    return found


def test_anchors_follow_github() -> None:
    text = "# results.json\n## The paper's `--flags`\n## A, b\n## A b\n## [Link](x.md)\n```sh\n# no heading\n```\n"
    assert anchors(text) == {"resultsjson", "the-papers---flags", "a-b", "a-b-1", "link"}


def test_every_link_resolves() -> None:
    dead = []
    for page in pages():
        for target in LINK.findall(CODE.sub("", page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            linked = page.parent / path if path else page
            if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def names_in(path: Path) -> set[str]:
    """Names of the functions and classes of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_the_code_map_names_existing_functions() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Code map\n")[2].partition("\n## ")[0]
    steps = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")][2:]
    files = re.compile(r"\[`[\w/.]+`\]\(([\w/]+\.py)\): `([\w.]+)`")
    named = [("feature_extractors/reference.py", name) for *_, plain in steps for name in re.findall(r"`(\w+)`", plain)]
    missing = [
        f"{file}: {name}" for file, name in [*files.findall(section), *named] if name not in names_in(ROOT / file)
    ]
    assert not missing
    assert len(steps) >= 13
    for step in steps:
        opened = len({file for file, _ in files.findall(step[2])}) + ("`" in step[3])
        assert 1 <= opened <= 2, f"{step[0].strip()}: {opened} files to open"


def test_the_protocol_table_names_every_field() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Protocols\n")[2].partition("\n## ")[0]
    named = re.findall(r"\| `(\w+)`: \[[^|]*\|$", section, flags=re.MULTILINE)
    assert named == [each.name for each in fields(Protocol)]


def test_every_python_file_named_exists() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.splitlines()
    missing = []
    for page in pages():
        for name in set(re.findall(r"(?<![\w/.<>-])((?:[a-z_]+/)*[a-z_]+\.py)\b", page.read_text())):
            if not any(f"/{file}".endswith(f"/{name}") for file in files):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing


def flags_of(*sources: Path) -> set[str]:
    cleaning = {f"--{flag}" for flag in CLEANING_FLAGS if any("CLEANING_FLAGS" in each.read_text() for each in sources)}
    return cleaning | {flag for source in sources for flag in re.findall(r'"(--[a-z][\w-]*)"', source.read_text())}


def test_flags_in_the_text_exist() -> None:
    known = {"--help"} | flags_of(*ROOT.glob("*.py"), *(ROOT / "runner").glob("*.py"), *(ROOT / "utils").glob("*.py"))
    known |= flags_of(*(ROOT / "benchmarks").glob("*.py"))
    unknown = []
    for page in pages():
        for flag in re.findall(r"`(--[a-z][\w-]*)[^`]*`", CODE.sub("", page.read_text())):
            if flag.replace("--no-", "--") not in known:
                unknown.append(f"{page.name}: {flag}")
    assert not unknown


def test_commands_select_tests_that_exist() -> None:
    names = []
    for path in (ROOT / "tests").glob("test_*.py"):
        names += [path.stem, *names_in(path)]
    selections = re.findall(r"-k '?([\w ]+)", (ROOT / "README.md").read_text())
    selected = [word for selection in selections for word in selection.split() if word not in ("and", "or", "not")]
    assert len(selected) >= 8
    assert not [word for word in selected if not any(word in name for name in names)]


def test_the_snippets_of_data_write_their_clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from_array, from_scratch = blocks(ROOT / "docs/DATA.md", "python")

    def run(snippet: str) -> np.ndarray:
        exec(compile(snippet, "docs/DATA.md", "exec"), {})
        return read_organized_pc(tmp_path / "part.tiff")

    assert valid_mask(run(from_scratch)).sum() == 280 * 340
    depth = np.random.default_rng(0).uniform(0.3, 0.7, (480, 640))
    np.save("depth.npy", depth)
    (camera,) = blocks(ROOT / "docs/DATA.md", "json")
    (tmp_path / "camera.json").write_text(camera)
    read = replace(read_camera(tmp_path / "camera.json"), depth_scale=1.0)
    np.testing.assert_array_equal(run(from_array), back_project(depth, read))


def test_every_format_is_described() -> None:
    text = (ROOT / "docs/DATA.md").read_text()
    for suffix in set(CLOUD_SUFFIXES) - {".tif"}:
        assert suffix in text or suffix.removeprefix(".") in text, suffix

"""Every command and Python snippet of the documentation, run on small made-up data.

Each code block runs in its own copy of a folder that holds files of the names that the pages use. The flags in SMALLER
follow those of the page and make runs short. Commands in PARSED are not run, for the reason given there; their flags
are parsed with the script's own parser. So are the commands within sentences, which repeat those of blocks.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from cleaning_runs import call_script, raw_cloud, write_scan
from conftest import ROOT
from main_runs import SMALL, no_download, one_thread, write_cloud, write_image  # noqa: F401 (fixtures)
from test_docs import CODE, blocks, pages
from test_entry_points import SCRIPTS, parser_of
from test_preprocess_eyecandies import write_sample

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
SMALLER: dict[str, list[object]] = {
    "main.py": [*SMALL, "--device", "cpu", "--num_workers", 0, "--report_parts", 2],
    "predict.py": ["--device", "cpu", "--num_workers", 0],
    "fusion_pretrain.py": ["--device", "cpu", "--num_workers", 0, "--batch_size", 2, "--accum_iter", 1, "--epochs", 3],
    "utils/preprocessing.py": ["--workers", 1],
    "utils/preprocess_eyecandies.py": ["--workers", 1],
}
PARSED = {  # word of a command: why the command is not run
    "make": "it runs all tests, or installs everything first; make itself checks that its targets exist",
    "torchrun": "it starts several processes, which test_main_ranks.py and test_uff_ranks.py do",
    "runner.reproduce": "it takes many steps, which test_reproduce.py does",
    "benchmarks/accuracy.py": "it takes over an hour; test_accuracy_benchmark.py runs small trials",
    "--watch": "it waits for files until it is stopped, which test_watching.py does",
    "--stdin": "it waits for lines on stdin, which test_watching.py gives",
}


def shell_blocks(page: Path) -> list[str]:
    return [block for language in ("sh", "bash", "console") for block in blocks(page, language)]


def commands_in(block: str) -> Iterator[list[str]]:
    """Words of each command of a block, without comments and without all that follows a redirection or a pipe."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        end = next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "<", "&", "&&", "||")), len(words))
        if words:
            yield words[:end]


def commands_in_text(page: Path) -> Iterator[list[str]]:
    text = CODE.sub("", page.read_text())
    for command in re.findall(r"`((?:[A-Z_]+=\S+\s)*(?:python|torchrun|make)\s[^`]+)`", text):
        if ".py" in command or command.startswith("make "):
            yield shlex.split(command)


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Path of the Python script that a command starts, perhaps by a launcher, and its flags."""
    modules = {"utils.report": "utils/report.py", "runner.reproduce": "runner/reproduce.py"}  # started with -m
    words = [modules.get(word, word) for word in words]
    script = next((word for word in words if word.endswith(".py")), "")
    assert (ROOT / script).is_file(), f"no script of this project: {shlex.join(words)}"
    return script, words[words.index(script) + 1 :]


def parse(words: list[str], complete: bool = True) -> None:
    """Parse the flags of a command, which may lack required ones if it is not `complete`; exits if they are wrong."""
    if words[0] == "make":
        command = ["make", "--dry-run", *words[1:]]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0, shlex.join(words)
        return
    script, flags = script_of(words)
    module = script.removesuffix(".py").replace("/", ".")
    if module in SCRIPTS:
        parser = parser_of(module)
        for action in parser._actions:
            action.required &= complete
        parser.parse_args(flags)
    for launcher in {"torchrun", "torch.distributed.launch"} & set(words):
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[words.index(launcher) + 1 :])


def run(words: list[str]) -> None:
    """Run a command in this process, or only parse its flags."""
    if any(word in PARSED for word in words):
        return parse(words)
    script, flags = script_of(words)
    main = import_module(script.removesuffix(".py").replace("/", ".")).main
    changes_thresholds = {"--load_detector", "--save_detector"} <= set(flags)  # which is fast and takes no other flags
    done = call_script(main, *flags, *([] if changes_thresholds else SMALLER.get(script, [])))
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"


# Files


def record(cloud: Path, seed: int, unit: float = 1.0, image: Path | None = None) -> None:
    """Write a recording: a cloud in meters / `unit`, or a depth image in millimeters, and its image."""
    xyz = raw_cloud(seed)
    write_image(image or cloud.with_suffix(".png"), np.random.default_rng(seed).integers(1, 256, xyz.shape, np.uint8))
    cloud.parent.mkdir(parents=True, exist_ok=True)
    high, wide, _ = xyz.shape
    body = (xyz / unit).astype("<f4").tobytes()
    if cloud.suffix == ".ply":
        axes = "".join(f"property float {axis}\n" for axis in "xyz")
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex {high * wide}\n{axes}end_header\n"
        cloud.write_bytes(header.encode() + body)
    elif cloud.suffix == ".pcd":
        header = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {wide}\nHEIGHT {high}\nDATA binary\n"
        cloud.write_bytes(header.encode() + body)
    elif cloud.suffix == ".npy":
        np.save(cloud, xyz / unit)
    elif cloud.suffix == ".png":
        write_image(cloud, (xyz[..., 2] * 1000).round().astype(np.uint16))
    else:
        write_cloud(cloud, xyz)


def write_files(folder: Path) -> None:
    """Write the datasets and recordings that the pages name. Stems differ between folders, except images and scans."""
    for root, defect in (("datasets/mvtec3d/bagel", "hole"), ("parts/bracket", "dent")):
        for place, count in (("train/good", 5), ("validation/good", 2), ("test/good", 1), (f"test/{defect}", 1)):
            for seed in range(count):
                write_scan(folder / root / place, f"{seed:03d}", seed, with_gt=False)
        write_image(
            folder / root / f"test/{defect}/gt/000.png", np.pad(np.full((8, 8), 255, np.uint8), ((16, 16), (18, 18)))
        )
    for split in ("train", "test_public"):
        write_sample(folder / "Eyecandies/Confetto" / split / "data", "000")
    record(folder / "part.tiff", 9)
    np.save(folder / "depth.npy", raw_cloud(9)[..., 2])
    camera = {"fx": 500, "fy": 500, "cx": -10, "cy": -10, "depth_scale": 0.001}
    (folder / "camera.json").write_text(json.dumps(camera))
    for number in (1, 2):
        record(folder / f"station/part_00{number}.tiff", number)
    for seed in (10, 11):
        record(folder / f"line/{seed}.pcd", seed, image=folder / f"images/{seed}.png")
        record(folder / f"line/{seed}/image_{seed}.pcd", seed)
        record(folder / f"zivid/{seed}z.ply", seed, 0.001)
        record(folder / f"photoneo/{seed}p.ply", seed, 0.001)
        record(folder / f"ensenso/{seed}e.npy", seed, 0.001)
        for camera_name in ("", "realsense/", "orbbec/"):
            name = f"{seed}{camera_name[:1]}d.png"
            record(folder / f"{camera_name}depth" / name, seed, image=folder / f"{camera_name}color" / name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `write_files` with the detector and the results of a run."""
    folder = tmp_path_factory.mktemp("docs")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["python", "main.py", "--method_name", "DINO+Point_MAE", "--save_detector", "detectors"])
    for name in "ab":
        shutil.copytree(folder / "results", folder / "results_of" / name)
    shutil.rmtree(folder / "results")
    (folder / "results_of").rename(folder / "results")
    return folder


@pytest.fixture
def work_folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fresh copy of the prepared folder, in which the test runs."""
    folder = shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


# Tests

SHELL = [(name, number) for name, page in PAGES.items() for number in range(len(shell_blocks(page)))]
PYTHON = [(name, number) for name, page in PAGES.items() for number in range(len(blocks(page, "python")))]


def test_there_are_commands() -> None:
    assert len(SHELL) >= 12
    assert len(PYTHON) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), SHELL)
def test_commands_run(work_folder: Path, page: str, number: int) -> None:
    block = shell_blocks(PAGES[page])[number]
    for seed in (10, 11):
        record(work_folder / f"scans/{seed}.ply", seed, 0.001 if "--xyz_unit mm" in block else 1.0)
    for words in commands_in(block):
        if not block.startswith("#!"):
            run(words)
        elif "torchrun" in words:
            parse(words[words.index("torchrun") :])


@pytest.mark.parametrize(("page", "number"), SHELL)
def test_flags_of_commands_exist(page: str, number: int) -> None:
    block = shell_blocks(PAGES[page])[number]
    assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""
    for words in commands_in(block):
        if not block.startswith("#!") or "torchrun" in words:
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_commands_within_sentences_exist(page: str) -> None:
    for words in commands_in_text(PAGES[page]):
        parse(words, complete=False)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_python_snippets_run(work_folder: Path, page: str, number: int) -> None:
    snippet = blocks(PAGES[page], "python")[number]
    if not any(f'"{word}"' in snippet for word in PARSED):
        exec(compile(snippet, page, "exec"), {})


def test_wrong_flags_and_unknown_scripts_are_found() -> None:
    with pytest.raises(SystemExit):
        parse(["python", "predict.py", "--detector", "d", "--rbg", "a.png"])
    with pytest.raises(SystemExit):
        parse(["torchrun", "--processes=4", "main.py"])
    with pytest.raises(AssertionError):
        parse(["python", "utils/converter.py"])
    with pytest.raises(AssertionError):
        parse(["make", "no_such_target"])

"""Reproduce the paper's tables, from the unpacked dataset and the published checkpoints to one page.

    python -m runner.reproduce --dataset_path mvtec3d --checkpoint_dir checkpoints
    python -m runner.reproduce --dataset_path Eyecandies --dataset_type eyecandies --seeds 0 1 2
    python -m runner.reproduce --dataset_path mvtec3d -- --classes bagel --device cuda:1    # flags of main.py

It checks dataset and checkpoints, cleans the scans, and runs the three steps of the README with all six methods.
paper.html and paper.md in --output_dir show our figures beside the published ones. Each step is a process that writes
to log.txt. After an interruption, the same command continues with the unfinished step.
"""

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import DATASET_CLASSES, pair_split
from feature_extractors.config import METHODS, DetectorConfig
from models import XYZ_BACKBONES, rgb_spec
from runner.dataset_check import cleaning_of
from runner.finished_classes import FREE_FLAGS
from runner.settings import make_parser
from utils.cleaning.journal import read_manifest
from utils.command_line import ROOT, Parser, from_flags
from utils.errors import InputError
from utils.reporting.html_report.page import write_page
from utils.reporting.messages import exit_on_error, show, start_messages
from utils.reporting.paper_tables import Runs, paper_tables, remarks, tables_markdown, tables_page, tables_text
from utils.reporting.results_json import FILE_NAME, read_results
from utils.reporting.steps import LOG, RECORD, Step, run_steps
from utils.scans.files import locked, make_folder

PAGE, MARKDOWN = "paper.html", "paper.md"
DATA, PATCHES, UFF = "data", "patch_lib", "uff"  # folders of the steps' results in --output_dir
RESULTS = {False: "results_without_uff", True: "results_with_uff"}  # key: the methods have a fusion bank
EPOCHS = 3
UFF_CHECKPOINT = f"checkpoint-{EPOCHS - 1}.pth"
UFF_FLAGS = ("--accum_iter", 16, "--lr", 0.003, "--batch_size", 16, "--epochs", EPOCHS)
BOTH = frozenset({"rgb", "xyz"})
SET_HERE = frozenset({  # flags of main.py that this script sets
    "dataset_type", "dataset_path", "checkpoint_dir", "method_name", "seeds", "output_dir", "resume", "save_feature",
    "save_feature_path", "use_uff", "fusion_module_path", "memory_bank", "save_detector", "load_detector",
    "inspect_dataset", "list_backbones",
})  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Flags of the script."""

    dataset_path: Path
    dataset_type: str
    checkpoint_dir: Path
    seeds: Sequence[int]
    output_dir: Path
    main_flags: Sequence[str]

    @property
    def common_flags(self) -> list[str]:
        """Flags of every run of main.py, except the dataset's folder."""
        seeds = map(str, self.seeds)
        own = ["--dataset_type", self.dataset_type, "--checkpoint_dir", str(self.checkpoint_dir), "--seeds", *seeds]
        return [*self.main_flags, *own]

    @property
    def main_args(self) -> argparse.Namespace:
        """Parsed flags of main.py; exits if they are wrong."""
        return make_parser().parse_args([*self.common_flags, "--dataset_path", str(self.dataset_path)])

    @property
    def classes(self) -> list[str]:
        """Classes that the tables cover."""
        return list(self.main_args.classes or DATASET_CLASSES[self.dataset_type])


def check_input(config: Config) -> None:
    """Print everything that is missing or incomplete; InputError if there is anything."""
    problems = [*_dataset_problems(config), *_checkpoint_problems(config.main_args)]
    for problem in problems:
        show(f"  {problem}", sys.stderr, logging.ERROR)
    if problems:
        count = "problem is" if len(problems) == 1 else f"{len(problems)} problems are"
        raise InputError(
            f"The input is incomplete; the {count} listed above. Complete it and run the same command again."
        )


def _dataset_problems(config: Config) -> list[str]:
    root = config.dataset_path
    if not root.is_dir():
        return [f"{root} is not a folder. Unpack the dataset there, or check the path."]
    problems = []
    if missing := [name for name in config.classes if not (root / name).is_dir()]:
        fix = "Unpack them, or name the others after two hyphens: -- --classes NAME"
        problems.append(f"{root} lacks the classes {', '.join(missing)}. {fix}.")
    for folder in (root / name for name in config.classes if name not in missing):
        if is_published_eyecandies(folder):
            splits = [folder / split / "data" for split in ("train", "test_public")]
            problems += [f"{path} is missing. Unpack it." for path in splits if not path.is_dir()]
        else:
            problems += [problem for split in ("train", "test") for problem in pair_split(folder, split, BOTH)[1]]
    return problems


def is_published_eyecandies(folder: Path) -> bool:
    """True for a class of Eyecandies that is not converted yet."""
    return (folder / "train" / "data").is_dir()


def _checkpoint_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for files, given in (
        (rgb_spec(args.rgb_backbone_name).files, args.rgb_checkpoint),
        (XYZ_BACKBONES[args.xyz_backbone_name].files, args.xyz_checkpoint),
    ):
        if files.names and not (given or files.find(args.checkpoint_dir)):
            problems.append(str(files.missing(args.checkpoint_dir)))
        elif given and not given.is_file():
            problems.append(f"{given} is missing. Check the path.")
    return problems


def make_steps(config: Config) -> list[Step]:
    """List the steps in their order: cleaning, dataset check, and the three steps of the README."""
    cleaning = cleaning_step(config)
    out, data = config.output_dir, cleaning.folder if cleaning else config.dataset_path
    flags = [*config.common_flags, "--dataset_path", str(data)]
    check = Step("dataset check", 2, _script("main.py", *flags, "--inspect_dataset"), out, "", 1)
    save = ["--save_feature", "--save_feature_path", str(out / PATCHES)]
    without_uff = _evaluation(config, flags, "methods without UFF", 45, uff=False, more=save)
    uff = _uff_step(config)
    fuse = ["--use_uff", "--fusion_module_path", str(uff.folder / UFF_CHECKPOINT)]
    with_uff = _evaluation(config, flags, "methods with UFF", 40, uff=True, more=fuse)
    return [*([cleaning] if cleaning else []), check, without_uff, uff, with_uff]


def cleaning_step(config: Config) -> Step | None:
    """Step that cleans or converts the dataset; None if it is cleaned already.

    Results go to --output_dir. Only a cleaning in place that was begun before is finished in place.
    """
    source, data = config.dataset_path, config.output_dir / DATA
    first = source / config.classes[0]
    if config.dataset_type == "eyecandies":
        if not is_published_eyecandies(first):
            return None
        paths = ["--dataset_path", source, "--target_dir", data, "--classes", *config.classes]
        count = sum(len(list((source / name).glob("*/data/*_depth.png"))) for name in config.classes)
        return Step("conversion", 5, _script("utils/preprocess_eyecandies.py", *paths), data, "*/*/*/rgb/*.png", count)
    begun = read_manifest(source) is not None
    if not begun and cleaning_of(source, first.name, pair_split(first, "train", BOTH)[0]) is not None:
        return None
    folder = source if begun else data
    paths = [source] if begun else [source, "--output_dir", data]
    count = len(list(source.glob("*/*/*/rgb/*")))
    return Step("cleaning", 5, _script("utils/preprocessing.py", *paths), folder, "*/*/*/rgb/*.png", count)


def _evaluation(config: Config, flags: Sequence[str], name: str, share: int, uff: bool, more: Sequence[str]) -> Step:
    """Step that fits and tests the methods with or without a fusion bank."""
    methods = [method for method in METHODS if has_fusion(method) == uff]
    folder = config.output_dir / RESULTS[uff]
    own = ["--method_name", *methods, "--output_dir", folder, "--resume", *more]
    count = len(methods) * len(config.classes) * len(config.seeds)
    return Step(name, share, _script("main.py", *flags, *own), folder, "**/classes/*.json", count)


def has_fusion(method: str) -> bool:
    """True for a method with a bank of fused patches."""
    return "fusion" in METHODS[method].banks


def _uff_step(config: Config) -> Step:
    """Step that trains the UFF, or continues an unfinished training."""
    folder = config.output_dir / UFF
    last = folder / "checkpoint-last.pth"
    resume = ["--resume", last] if last.exists() and not (folder / UFF_CHECKPOINT).exists() else []
    paths = ["--data_path", config.output_dir / PATCHES, "--output_dir", folder, "--device", config.main_args.device]
    command = _script("fusion_pretrain.py", *UFF_FLAGS, *paths, *resume)
    return Step("UFF training", 8, command, folder, "checkpoint-[0-9]*.pth", EPOCHS)


def _script(name: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, flags)]


def settings_of(config: Config) -> dict[str, Any]:
    """Flags of main.py that the results depend on."""
    flags = {name: value for name, value in vars(config.main_args).items() if name not in FREE_FLAGS}
    return flags | {"classes": config.classes, "dataset_path": config.dataset_path.resolve()}


def read_runs(config: Config) -> Runs:
    """Results of each method, in the order of METHODS, one for each seed."""
    seeds = [f"seed_{seed}" for seed in config.seeds] if len(config.seeds) > 1 else [""]
    folders = {method: config.output_dir / RESULTS[has_fusion(method)] for method in METHODS}
    return {
        method: [read_results(folder / seed / method / FILE_NAME) for seed in seeds]
        for method, folder in folders.items()
    }


def write_tables(config: Config, command: str) -> None:
    """Print the tables, and write them as a page and as Markdown."""
    runs = read_runs(config)
    tables, notes = paper_tables(runs), remarks(runs, config.seeds)
    for line in [*tables_text(tables).splitlines(), "", *notes]:
        show(line)
    write_page(config.output_dir / PAGE, tables_page(tables, notes, command))
    write_page(config.output_dir / MARKDOWN, tables_markdown(tables, notes, command))
    show(f"written to {config.output_dir / PAGE} and {config.output_dir / MARKDOWN}")


def parse_args(argv: Sequence[str] | None) -> Config:
    """Read the flags; exits or raises InputError if a flag of this script or of main.py is wrong."""
    parser = Parser(__doc__, {"seeds": DetectorConfig.BOUNDS["random_state"]})
    add = parser.add_argument
    add("--dataset_path", type=Path, required=True, help="unpacked dataset, raw or cleaned")
    add("--dataset_type", default="mvtec3d", choices=DATASET_CLASSES, help="type of the dataset")
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of the backbones' checkpoints")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of the coresets; the tables show mean and deviation")
    add("--output_dir", type=Path, default=Path("paper"), help="folder of the results of all steps")
    add("main_flags", nargs="*", metavar="-- FLAG", help="flags of main.py, after two hyphens, such as --classes bagel")
    args = parser.parse_args(argv)
    config = from_flags(Config, args, seeds=list(dict.fromkeys(args.seeds)))
    if given := make_parser().given_flags(config.main_flags) & SET_HERE:
        raise InputError(f"--{min(given)} is set by this script. Remove it from the flags after the two hyphens.")
    return config


@exit_on_error("interrupted. Run the same command to continue.")
def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, run the steps, and write the tables."""
    config = parse_args(argv)
    start_messages("%(message)s")
    check_input(config)
    folder = make_folder(config.output_dir, "--output_dir")
    command = shlex.join(["python", "-m", "runner.reproduce", *(sys.argv[1:] if argv is None else argv)])
    with locked(folder, "--output_dir", [folder / name for name in (RECORD, LOG, PAGE, MARKDOWN)]):
        run_steps(make_steps(config), folder, settings_of(config))
        write_tables(config, command)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT, and so would the steps
        signal.signal(each, signal.default_int_handler)
    main()

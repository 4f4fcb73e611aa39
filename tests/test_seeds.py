"""Several seeds in one run of main.py, and few-shot runs: draws, folders, tables, resuming, and shared features."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from main_runs import (
    METRICS,
    SIDE,
    SMALL,
    TABLES,
    WRITTEN,
    Run,
    call,
    files_below,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    printed,
    read_run,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    run_into,
    surface,
    table_rows,
    write_bagels,
    write_cloud,
    write_image,
)

from feature_extractors.extractor import Inputs, PatchExtractor
from runner.class_files import draw_samples
from utils.errors import InputError
from utils.records import Sample

METHODS = ("DINO", "DINO+Point_MAE")
TRAIN = [f"train/good/{i:03d}" for i in range(6)]
TEST = ["test/good/000", "test/hole/000"]
FILES = ("results.json", "report.html", "classes/bagel.json")  # of each method and seed
# Few rows of wide patches, so that the random projection, and with it the seed, matters
FLAGS: list[object] = [*SMALL, "--report_parts", 1, "--num_workers", 0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of every run; the class has six training samples."""
    root = write_bagels(tmp_path_factory.mktemp("data"))
    for i in range(2, len(TRAIN)):
        noise = np.random.default_rng(90 + i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        write_cloud(root / f"bagel/train/good/xyz/{i:03d}.tiff", surface(90 + i))
        write_image(root / f"bagel/train/good/rgb/{i:03d}.png", noise)
    return [*FLAGS, "--dataset_path", root]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Paths of the samples whose features are extracted in the block."""
    seen: list[str] = []
    prepare = PatchExtractor.prepare

    def count(extractor: PatchExtractor, samples: Sequence[Sample]) -> Inputs:
        seen.extend(sample.path for sample in samples)
        return prepare(extractor, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchExtractor, "prepare", count)
        yield seen


@pytest.fixture
def extracted() -> Iterator[list[str]]:
    with counted() as seen:
        yield seen


def figures(run: Run) -> dict[str, object]:
    """Results of a run without its time and memory."""
    return {key: value for key, value in run.entry.items() if key not in ("seconds", "latency", "peak_memory_mb")}


# Draws


def test_draws_depend_on_seed_and_class_only() -> None:
    names = [f"train/good/{i:03d}" for i in range(100)]
    drawn = draw_samples("bagel", names, 10, 0)
    assert drawn == draw_samples("bagel", names, 10, 0) == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != draw_samples("bagel", names, 10, 1)
    assert drawn != draw_samples("rope", names, 10, 0)


def test_a_larger_draw_includes_the_smaller_one() -> None:
    names = [f"{i:03d}" for i in range(100)]
    assert set(draw_samples("bagel", names, 5, 3)) < set(draw_samples("bagel", names, 50, 3))
    assert draw_samples("bagel", names, 100, 3) == names


def test_too_large_a_draw_is_refused() -> None:
    with pytest.raises(InputError, match=r"bagel has 2 training samples to draw from, fewer than --few_shot 3\."):
        draw_samples("bagel", ["a", "b"], 3, 0)


# Several seeds


class Seeded(NamedTuple):
    """Run of two methods and seeds."""

    folder: Path
    runs: dict[str, Run]  # by folder
    extracted: list[str]


@pytest.fixture(scope="module")
def seeded(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    folder = tmp_path_factory.mktemp("seeded")
    with counted() as seen:
        stdout = printed("--method_name", *METHODS, *base, "--seeds", 0, 7, "--output_dir", folder)
    names = [f"seed_{seed}/{method}" for seed in (0, 7) for method in METHODS]
    return Seeded(folder, {name: read_run(folder / name, stdout) for name in names}, seen)


def test_each_seed_equals_its_own_run(base: list[object], seeded: Seeded, tmp_path: Path) -> None:
    alone = printed("--method_name", *METHODS, *base, "--seeds", 7, "--output_dir", tmp_path)
    for method in METHODS:
        single, together = read_run(tmp_path / method, alone), seeded.runs[f"seed_7/{method}"]
        assert figures(single) == figures(together)
        assert single.results["args"]["random_state"] == together.results["args"]["random_state"] == 7
    assert figures(seeded.runs["seed_0/DINO"]) != figures(seeded.runs["seed_7/DINO"])


def test_each_seed_has_a_folder_and_the_tables_are_above(seeded: Seeded) -> None:
    folder, runs, _ = seeded
    assert files_below(folder) == sorted([*WRITTEN, *(f"{name}/{file}" for name in runs for file in FILES)])


def test_tables_hold_mean_and_deviation_of_the_seeds(seeded: Seeded) -> None:
    folder, runs, _ = seeded
    for name, key in zip(TABLES[:2], METRICS[:2], strict=True):
        rows = []
        for method in METHODS:
            values = [runs[f"seed_{seed}/{method}"].entry[key] for seed in (0, 7)]
            rows.append([method, *[f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"] * 2])
        assert table_rows(folder, name) == [["Method", "bagel", "Mean"], *rows]
        assert "over the seeds 0, 7." in (folder / name).read_text()
    with (folder / "results.csv").open(newline="") as file:
        csv_rows = list(csv.DictReader(file))
    expected = [(method, seed) for method in METHODS for seed in ("0", "7", "mean", "std")]
    assert [(row["method"], row["seed"]) for row in csv_rows] == expected
    assert (folder / "tables.tex").read_text().count(r"\pm") > 3


def test_each_report_names_its_seed(seeded: Seeded) -> None:
    for name, run in seeded.runs.items():
        assert f" Protocol: reference. Seed {name[5]}." in (run.folder / "report.html").read_text(), name


def test_each_result_is_printed_with_method_and_seed(seeded: Seeded) -> None:
    lines = seeded.runs["seed_0/DINO"].stdout.splitlines()
    fits = [f"{method}, seed {seed}" for seed in (0, 7) for method in METHODS]
    assert [line.partition(": I-AUROC")[0] for line in lines[:4]] == [f"bagel, {fit}" for fit in fits]


def test_features_are_extracted_once_for_all_seeds_and_methods(seeded: Seeded) -> None:
    assert seeded.extracted == [*TRAIN, *TEST]


def test_one_method_has_its_files_in_the_folder_of_the_seed(base: list[object], tmp_path: Path) -> None:
    call("--method_name", "DINO", *base, "--seeds", 0, 1, "--output_dir", tmp_path)
    assert files_below(tmp_path) == sorted([*WRITTEN, *(f"seed_{seed}/{file}" for seed in (0, 1) for file in FILES)])


def test_a_seed_named_twice_counts_once(base: list[object], tmp_path: Path) -> None:
    run = run_into(tmp_path, "--method_name", "DINO", *base, "--seeds", 3, 3)
    assert files_below(tmp_path) == sorted([*WRITTEN, *FILES])
    assert run.results["args"]["random_state"] == 3


def test_resume_computes_a_class_unless_all_seeds_have_it(
    base: list[object], tmp_path: Path, extracted: list[str]
) -> None:
    flags = ["--method_name", "DINO", *base, "--output_dir", tmp_path]
    call(*flags, "--seeds", 0, 1)
    before = table_rows(tmp_path, TABLES[0])
    extracted.clear()
    call(*flags, "--seeds", 0, 1, "--resume")
    assert not extracted
    (tmp_path / "seed_1/classes/bagel.json").unlink()
    call(*flags, "--seeds", 0, 1, "--resume")
    assert extracted == [*TRAIN, *TEST]
    assert table_rows(tmp_path, TABLES[0]) == before
    call(*flags, "--seeds", 0, 1, 2, "--resume")  # one seed more
    assert len(table_rows(tmp_path, TABLES[0])) == 4


# Few-shot


def test_few_shot_records_and_uses_its_draw(base: list[object], tmp_path: Path, extracted: list[str]) -> None:
    drawn = draw_samples("bagel", TRAIN, 2, 5)
    stdout = printed("--method_name", *METHODS, *base, "--few_shot", 2, "--seeds", 5, "--output_dir", tmp_path)
    assert extracted == [*drawn, *TEST]
    for method in METHODS:
        run = read_run(tmp_path / method, stdout)
        assert run.entry["train_samples"] == drawn
        assert run.entry["threshold"]["parts"] == 2
        assert run.results["args"].items() >= {"few_shot": 2, "random_state": 5}.items()
    assert "Fitted on 2 of the training samples of each class, drawn at random." in (tmp_path / TABLES[0]).read_text()


def test_each_seed_of_few_shot_uses_its_own_draw(base: list[object], tmp_path: Path, extracted: list[str]) -> None:
    flags = ["--method_name", *METHODS, *base, "--few_shot", 3]
    call(*flags, "--seeds", 0, 1, "--output_dir", tmp_path / "both")
    draws = {seed: draw_samples("bagel", TRAIN, 3, seed) for seed in (0, 1)}
    assert draws[0] != draws[1]
    assert extracted == [*sorted({*draws[0], *draws[1]}), *TEST]
    for seed, drawn in draws.items():
        call(*flags, "--seeds", seed, "--output_dir", tmp_path / "alone")
        for method in METHODS:
            together = read_run(tmp_path / f"both/seed_{seed}" / method, "")
            alone = read_run(tmp_path / "alone" / method, "")
            assert together.entry["train_samples"] == alone.entry["train_samples"] == drawn
            assert together.scores == pytest.approx(alone.scores, rel=1e-3)  # in other batches


def test_few_shot_of_all_samples_equals_a_usual_run(base: list[object], tmp_path: Path) -> None:
    flags = ["--method_name", "DINO", *base, "--seeds", 0]
    usual = run_into(tmp_path / "usual", *flags)
    few = run_into(tmp_path / "few", *flags, "--few_shot", len(TRAIN))
    assert figures(few) == figures(usual) | {"train_samples": TRAIN}


def test_few_shot_draws_from_the_first_max_sample(base: list[object], tmp_path: Path) -> None:
    flags = ["--method_name", "DINO", *base, "--seeds", 0, "--max_sample", 3, "--few_shot", 2]
    assert run_into(tmp_path, *flags).entry["train_samples"] == draw_samples("bagel", TRAIN[:3], 2, 0)


def test_few_shot_without_a_seed_draws_and_records_one(base: list[object], tmp_path: Path) -> None:
    flags = ["--method_name", "DINO", *base, "--few_shot", 2]
    first = run_into(tmp_path / "first", *flags)
    seed = first.results["args"]["random_state"]
    assert files_below(tmp_path / "first") == sorted([*WRITTEN, *FILES])
    assert figures(run_into(tmp_path / "again", *flags, "--seeds", seed)) == figures(first)


REFUSALS = {
    "--save_detector x --seeds 0 1": "--save_detector saves the detectors of one seed, but --seeds has several. Give",
    "--few_shot 2 --resume": "--resume needs the seed of the --few_shot draw. Give it as --seeds;",
    "--few_shot 2 --seeds 0 1 --save_feature": "--save_feature would mix the samples that --few_shot draws for each",
    "--few_shot 7": "bagel has 6 training samples to draw from, fewer than --few_shot 7. Give a smaller number",
    "--few_shot 3 --max_sample 2": "bagel has 2 training samples to draw from, fewer than --few_shot 3. Give a smaller",
    "--seeds 0 -1": "--seeds is -1. Give a number from 0 to 4294967295.",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_impossible_combinations_are_refused(
    capsys: pytest.CaptureFixture[str], base: list[object], tmp_path: Path, flags: str
) -> None:
    message = refusal(
        capsys, *base, "--method_name", "DINO+Point_MAE", "--output_dir", tmp_path / "out", *flags.split()
    )
    assert message.startswith(REFUSALS[flags])
    assert not files_below(tmp_path)

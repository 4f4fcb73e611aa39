"""Several methods in one run of main.py: each one's results equal those of a separate run."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from main_runs import (
    METRICS,
    RGB_DIM,
    SIDE,
    SMALL,
    TABLES,
    WRITTEN,
    XYZ_DIM,
    Run,
    files_below,
    no_download,  # noqa: F401 (a fixture)
    one_thread,  # noqa: F401 (a fixture)
    printed,
    read_run,
    refusal,
    run_in_tmp_path,  # noqa: F401 (a fixture)
    table_rows,
    write_bagels,
    write_cloud,
)

from feature_extractors.config import METHODS
from feature_extractors.extractor import Inputs, PatchExtractor
from models.feature_fusion import FeatureFusion
from runner.settings import detector_configs, extraction_config, make_parser
from utils.feature_store import PatchFileDataset
from utils.records import Sample

ALL = tuple(METHODS)
METHOD_FILES = ("results.json", "report.html", "classes/bagel.json")  # in each method's folder
TEST_SAMPLES = ("test/good/000", "test/hole/000")
CURVES = ["0.3, 100 thresholds", *(f"{limit}, exact curve" for limit in ("0.3", "0.1", "0.05", "0.01"))]
# Flags that apply to some methods only, with these methods.
PARTIAL: dict[tuple[object, ...], set[str]] = {
    ("--use_uff",): {"Fusion", "DINO+Point_MAE+Fusion"},
    ("--rm_zero_for_project",): {"Point_MAE"},
    ("--asy_memory_bank", 1): set(ALL) - {"DINO", "Point_MAE", "Fusion"},
    ("--memory_bank", "multiple"): set(ALL) - {"DINO", "Point_MAE", "Fusion"},
}
Comparer = Callable[..., dict[str, Run]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of every run: the smallest dataset, with background at the top, and an untrained UFF."""
    folder = tmp_path_factory.mktemp("compared")
    data = write_bagels(folder / "data")
    for path in data.rglob("*.tiff"):
        xyz = tifffile.imread(path)
        xyz[: SIDE // 4] = 0
        write_cloud(path, xyz)
    torch.manual_seed(0)
    torch.save({"model": FeatureFusion(XYZ_DIM, RGB_DIM).state_dict()}, folder / "uff.pth")
    return [*SMALL, "--dataset_path", data, "--seeds", 0, "--fusion_module_path", folder / "uff.pth"]


def compare_into(folder: Path, base: list[object], methods: tuple[str, ...], *flags: object) -> dict[str, Run]:
    """Run several methods together; each has its own folder below this one."""
    stdout = printed("--method_name", *methods, *base, *flags, "--output_dir", folder)
    return {method: read_run(folder / method, stdout) for method in methods}


@pytest.fixture(scope="module")
def compare(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Comparer:
    """Cached runs of all methods together, by their flags."""
    return cache(lambda *flags: compare_into(tmp_path_factory.mktemp("run"), base, ALL, *flags))


@pytest.fixture(scope="module")
def alone(base: list[object], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Cached runs of a single method, by its name and flags."""

    @cache
    def run(method: str, *flags: object) -> Run:
        folder = tmp_path_factory.mktemp("alone")
        return read_run(folder, printed("--method_name", method, *base, *flags, "--output_dir", folder))

    return run


def figures(run: Run) -> dict[str, object]:
    """Results of a run without its time and memory."""
    return {key: value for key, value in run.entry.items() if key not in ("seconds", "latency", "peak_memory_mb")}


@pytest.mark.parametrize("method", ALL)
def test_each_method_equals_its_separate_run(compare: Comparer, alone: Callable[..., Run], method: str) -> None:
    together = compare()[method]
    assert figures(together) == figures(alone(method))
    assert [sample["path"] for sample in together.entry["samples"]] == list(TEST_SAMPLES)
    assert together.results["mean"] == alone(method).results["mean"]
    assert together.results["args"]["method_name"] == alone(method).results["args"]["method_name"] == method
    assert together.results["command"][1 : 2 + len(ALL)] == ["--method_name", *ALL]


def test_methods_differ(compare: Comparer) -> None:
    assert len({tuple(run.scores) for run in compare().values()}) == len(ALL)


@pytest.mark.parametrize("method", ALL)
def test_a_flag_for_some_methods_does_not_change_the_others(
    compare: Comparer, alone: Callable[..., Run], method: str
) -> None:
    """With all partial flags in one run, each method equals its separate run with the flags that apply to it."""
    together = compare(*(word for flag in PARTIAL for word in flag))[method]
    own = [word for flag, methods in PARTIAL.items() if method in methods for word in flag]
    assert figures(together) == figures(alone(method, *own))
    recorded, expected = together.results["args"], alone(method, *own).results["args"]
    for flag in PARTIAL:
        name = str(flag[0]).removeprefix("--")
        assert recorded[name] == expected[name]
    own = [word for word in own if word not in ("--memory_bank", "multiple")]  # it only confirms the method's default
    assert (together.scores != compare()[method].scores) == bool(own)


@pytest.mark.parametrize("flag", PARTIAL)
def test_a_flag_changes_only_the_methods_that_it_applies_to(flag: tuple[object, ...]) -> None:
    name = str(flag[0]).removeprefix("--")
    args = make_parser().parse_args(["--method_name", *ALL, *map(str, flag)])
    configs = detector_configs(args)
    assert list(configs) == list(ALL)
    without = detector_configs(make_parser().parse_args(["--method_name", *ALL]))
    changed = {method for method in ALL if getattr(configs[method], name) != getattr(without[method], name)}
    assert changed == PARTIAL[flag]
    assert all(getattr(configs[method], name) == getattr(args, name) for method in changed)
    assert all(configs[method] == without[method] for method in set(ALL) - changed)


def test_every_sample_is_extracted_once(base: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, prepare = [], PatchExtractor.prepare

    def count(extractor: PatchExtractor, samples: Sequence[Sample]) -> Inputs:
        seen.extend(sample.path for sample in samples)
        return prepare(extractor, samples)

    monkeypatch.setattr(PatchExtractor, "prepare", count)
    runs = compare_into(tmp_path, base, ("DINO", "Point_MAE", "DINO+Point_MAE+add"))
    assert seen == ["train/good/000", "train/good/001", *TEST_SAMPLES]
    seconds = [run.entry["seconds"] for run in runs.values()]
    assert [each["extract"] for each in seconds] == pytest.approx([seconds[0]["extract"]] * 3, rel=0.05)  # shared
    assert all(each[stage] > 0 for each in seconds for stage in ("extract", "coreset", "score", "metrics"))


def test_only_features_of_needed_banks_are_extracted() -> None:
    for methods, banks in {
        ("DINO",): ("rgb",),
        ("Point_MAE", "DINO"): ("xyz", "rgb"),
        ("DINO+Point_MAE", "DINO+Point_MAE+add"): ("xyz", "rgb"),
        ("Fusion",): ("fusion",),
        ("Fusion", "DINO"): ("xyz", "rgb", "fusion"),
    }.items():
        configs = detector_configs(make_parser().parse_args(["--method_name", *methods]))
        assert extraction_config(configs).method.banks == banks, methods


def test_each_method_has_a_folder_and_the_tables_are_above(compare: Comparer) -> None:
    runs = compare()
    folder = runs["DINO"].folder.parent
    assert files_below(folder) == sorted([*WRITTEN, *(f"{method}/{name}" for method in ALL for name in METHOD_FILES)])


def test_tables_have_a_row_for_each_method(compare: Comparer) -> None:
    runs = compare()
    folder = runs["DINO"].folder.parent
    for name, key in zip(TABLES[:2], METRICS[:2], strict=True):
        rows = [[method, *[f"{run.entry[key]:.3f}"] * 2] for method, run in runs.items()]
        assert table_rows(folder, name) == [["Method", "bagel", "Mean"], *rows]
    header, *rows = table_rows(folder, TABLES[2])
    assert header == ["Method", "bagel", "Mean"]
    areas = {
        method: [run.entry["au_pro"], *run.entry["au_pro_exact"].values()] for method, run in runs.items()
    }  # in the order of CURVES
    assert rows == [
        [f"{method}, limit {curve}", *[f"{areas[method][k]:.3f}"] * 2]
        for k, curve in enumerate(CURVES)
        for method in ALL
    ]


def test_each_result_is_printed_with_its_method(compare: Comparer) -> None:
    runs = compare()
    lines = runs["DINO"].stdout.splitlines()
    for line, (method, run) in zip(lines, runs.items(), strict=False):
        assert line.startswith(f"bagel, {method}: I-AUROC {run.entry['image_rocauc']:.3f}, P-AUROC ")
    assert sum(line.startswith("bagel") for line in lines) == len(ALL)
    assert lines[-1] == f"written to {runs['DINO'].folder.parent}/"


def test_a_method_named_twice_counts_once(
    base: list[object], alone: Callable[..., Run], compare: Comparer, tmp_path: Path
) -> None:
    single = tmp_path / "single"
    run = read_run(single, printed("--method_name", "DINO", "DINO", *base, "--output_dir", single))
    assert figures(run) == figures(alone("DINO"))
    assert files_below(single) == sorted([*WRITTEN, *METHOD_FILES])  # no folder DINO, as for one method

    stdout = printed("--method_name", "Point_MAE", "DINO", "Point_MAE", *base, "--output_dir", tmp_path / "two")
    assert [row[0] for row in table_rows(tmp_path / "two", TABLES[0])] == ["Method", "Point_MAE", "DINO"]
    assert stdout.count("bagel, Point_MAE:") == stdout.count("bagel, DINO:") == 1
    for method in ("DINO", "Point_MAE"):
        assert figures(read_run(tmp_path / "two" / method, stdout)) == figures(compare()[method])


def prediction_files() -> list[str]:
    names = [path.removeprefix("test/") for path in TEST_SAMPLES]
    return [f"anomaly_maps/bagel/test/{name}.tiff" for name in names] + [
        f"pred_maps/bagel/{name}.png" for name in names
    ]


@pytest.mark.parametrize(
    ("named", "saved"), [(["Point_MAE"], ["Point_MAE"]), ([], ["DINO", "Point_MAE"]), (["DINO"], ["DINO"])]
)
def test_predictions_of_the_named_methods_are_saved(
    base: list[object], tmp_path: Path, named: list[str], saved: list[str]
) -> None:
    runs = compare_into(tmp_path, base, ("DINO", "Point_MAE"), "--save_preds", *named)
    for method, run in runs.items():
        expected = prediction_files() if method in saved else []
        assert files_below(run.folder) == sorted([*METHOD_FILES, *expected])
    assert {path for path in files_below(tmp_path) if "/" not in path} == set(WRITTEN)
    maps = [tifffile.imread(tmp_path / method / prediction_files()[1]) for method in saved]
    assert all(plane.shape == (SIDE, SIDE) and np.ptp(plane) > 0 for plane in maps)
    assert len({plane.tobytes() for plane in maps}) == len(maps)  # each method's own


def test_predictions_of_a_method_that_does_not_run_are_refused(
    base: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "--method_name", "DINO", *base, "--output_dir", tmp_path, "--save_preds", "Fusion")
    assert message == "--save_preds Fusion is not a method of this run. Add it to --method_name."
    assert not files_below(tmp_path)


def test_methods_that_together_need_both_branches_save_features(base: list[object], tmp_path: Path) -> None:
    """DINO and Point_MAE each refuse --save_feature alone, but together save the features of DINO+Point_MAE."""
    saved = []
    for methods in (("DINO", "Point_MAE"), ("DINO+Point_MAE",)):
        lib, out = tmp_path / methods[0] / "lib", tmp_path / methods[0] / "out"
        printed("--method_name", *methods, *base, "--save_feature", "--save_feature_path", lib, "--output_dir", out)
        assert files_below(lib) == ["bagel/000.safetensors", "bagel/001.safetensors"]
        saved.append(PatchFileDataset(lib))
    for i in range(2):
        for ours, expected in zip(saved[0][i], saved[1][i], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)

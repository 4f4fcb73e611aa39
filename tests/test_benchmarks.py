"""The benchmarks run and their measurements are consistent. No test depends on speed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import one_thread  # noqa: F401 (a fixture)

from benchmarks.class_run import ClassRun, count_operations, run_class, stopped_coreset
from benchmarks.curve import memory_law, seconds_law
from benchmarks.measuring import count_flops, median_seconds, memory_slope, timed_calls
from benchmarks.rows import Row, through_blocks
from benchmarks.scaling_model import Machine, Pass, coreset_seconds, grown_passes, pass_seconds
from benchmarks.workload import (
    SIZES,
    build_networks,
    detector_config,
    grown,
    made_up_samples,
    plain_features,
    plain_networks,
)
from feature_extractors import reference
from feature_extractors.extractor import PatchExtractor
from utils.records import Sample

ROOT = Path(__file__).resolve().parent.parent
TINY = SIZES["tiny"]


def run_benchmark(name: str, *flags: object) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # tensors this small are slower on several threads
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Workload


@pytest.fixture(scope="module")
def sample() -> Sample:
    return made_up_samples(1, "train", TINY.img_size)[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return plain_networks(TINY)


def test_plain_networks_extract_the_same_features(sample: Sample, plain: dict[str, Any]) -> None:
    config = detector_config(TINY, "fp32")
    ours, expected = PatchExtractor(config, *build_networks(TINY))(sample), plain_features(config, plain, sample)
    torch.testing.assert_close(expected["xyz"], ours.xyz, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(expected["rgb"], ours.rgb, rtol=1e-4, atol=1e-4)


def test_operations_of_a_class_are_the_sum_of_its_stages() -> None:
    networks, config = build_networks(TINY), detector_config(TINY, "fp32")
    dim = 192  # width of three blocks' tokens, which is not projected for so few rows
    selected = 2.0 * 2560 * dim * 256 + 2.0 * 160 * 64 * 25
    searched = 14 * 2.0 * (256 * 256 * dim + 16 * 25 * 64)
    assert count_operations(config, networks, 7.0, 10, 4) == pytest.approx(14 * 7 + selected + searched)


def test_operations_of_attention_are_counted(plain: dict[str, Any]) -> None:
    """Each block counts 24 T w^2 in linear layers and 4 T^2 w in attention, both in plain form and in timm."""
    tokens, fast = torch.zeros(TINY.num_group, TINY.width), build_networks(TINY).xyz
    expected = 3 * (24 * TINY.num_group * TINY.width**2 + 4 * TINY.num_group**2 * TINY.width)
    assert count_flops(lambda: through_blocks(plain["xyz"], tokens, tokens)) == expected
    assert count_flops(lambda: through_blocks(fast, tokens[None], tokens[None])) == expected


def test_grown_rows_are_repetitions_with_noise() -> None:
    patches = torch.randn(50, 6, generator=torch.Generator().manual_seed(4))
    patches[::3] = 0.0
    rows = grown(patches, 120)
    assert rows.shape == (120, 6)
    assert torch.equal(rows[:50], patches)
    assert torch.equal(rows[50:100][::3], torch.zeros(17, 6))
    noise = rows[50:100][1::3] - patches[1::3]
    assert 0.05 < noise.std() < 0.2
    assert (noise != 0).all()


def test_made_up_samples_are_like_real_ones() -> None:
    samples = made_up_samples(4, "test", 64)
    assert [sample.label for sample in samples] == [0, 1, 0, 1]
    for sample in samples:
        assert sample.xyz is not None
        assert sample.mask is not None
        assert 0.2 < (sample.xyz != 0).all(dim=0).float().mean() < 0.3
        assert bool(sample.mask.any()) == (sample.label == 1)
    good = made_up_samples(1, "train", 64)[0]
    assert (good.label, good.mask) == (None, None)


# Measuring


def test_functions_are_timed_in_turn() -> None:
    done: list[str] = []
    seconds = median_seconds({name: partial(done.append, name) for name in "ab"}, repeats=2)
    assert "".join(done) == "ababab"
    assert seconds.keys() == {"a", "b"}
    assert all(value > 0 for value in seconds.values())


def test_calls_are_timed_and_the_function_is_restored() -> None:
    original = reference.knn
    with timed_calls(reference, "knn") as seconds:
        for count in (5, 7):
            distance, _ = reference.knn(torch.rand(2, 3), torch.rand(count, 3), 4)
            assert distance.shape == (2, 4)
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert reference.knn is original


def test_a_stopped_coreset_is_filled_up() -> None:
    rows = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    picks = reference.greedy_coreset(rows, 60)
    with stopped_coreset(20) as picking:
        stopped = reference.greedy_coreset(rows, 60)
    assert torch.equal(stopped[:20], picks[:20])
    assert len(stopped.unique()) == 60
    ((seconds, factor),) = picking
    assert seconds > 0
    assert factor == 59 / 19


def test_ratio_and_share_of_a_row() -> None:
    row = Row("step", {"plain": 8.0, "fp32": 2.0, "bf16": 1.0}, {"fp32": 6e9, "bf16": 6e9}, {"fp32": 4e9, "bf16": 3e10})
    assert (row.ratio("fp32"), row.ratio("bf16")) == (4.0, 8.0)
    assert (row.share("fp32"), row.share("bf16")) == (0.75, 0.2)


def test_time_and_memory_curves_pass_through_the_measurements() -> None:
    stages = {"fit": 30.0, "pick": 16.0, "score": 4.0}
    runs = [ClassRun(train, 2, stages, 100.0, 1024.0 * gb, 0.5, {}) for train, gb in ((10, 2.0), (20, 3.0))]
    assert seconds_law(runs)(np.array([20, 40])).tolist() == [30.0, 20.0 + 80.0]
    assert memory_law(runs)(np.array([10, 20, 40])).tolist() == [2.0, 3.0, 5.0]


def test_the_memory_slope_is_computed_from_the_second_half() -> None:
    samples = [(100, 900.0), (200, 990.0), (300, 1000.0), (400, 1001.0), (500, 1002.0), (600, 1003.0)]
    assert memory_slope(samples) == pytest.approx(10)


def test_the_cost_of_a_pass_is_the_sum_of_its_steps() -> None:
    """The cost equals hand-computed numbers, with machine rates that tell the steps apart."""
    machine = Machine(touched=1e3, pair=1.0, scanned=1e-3, mutual=1e-6, choice=1e-5, byte=1e-9, latency=1e-12)
    one = Pass(rows=100, candidates=10, picks=4, touched=50)
    assert pass_seconds(one, 3, 1, machine) == pytest.approx(
        {"update": 50 * 1004, "scan": 0.1, "select": 1e-4 + 4e-4, "send": 0}
    )
    shared = pass_seconds(one, 3, 2, machine)
    assert shared["update"] == pytest.approx(25 * 1004)
    assert shared["scan"] == pytest.approx(0.05)
    assert shared["send"] == pytest.approx(1e-9 * (10 * 3 * 8 / 2 + 16 * 11) + 5e-12)
    assert coreset_seconds([one, one], 3, 2, machine) == pytest.approx(2 * sum(shared.values()))
    assert grown_passes([one], 3) == [one._replace(rows=300, touched=150)] * 3


# Scripts


def test_the_figure_of_uff_pairings_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few updates give retrieval rates and a figure; they are too few for meaningful values."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # restored after the script replaces its first entry
    from benchmarks import uff_pairing

    monkeypatch.setattr(uff_pairing, "SAMPLES", 10)
    monkeypatch.setitem(uff_pairing.FLAGS, "epochs", 2)
    uff_pairing.main(["--figure", str(tmp_path / "figure.png")])
    text = capsys.readouterr().out
    assert "aligned: retrieval" in text
    assert "reference: retrieval" in text
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (768, 432)


@pytest.mark.slow
def test_the_uff_loss_is_measured_with_and_without_the_plain_form(tmp_path: Path) -> None:
    text = run_benchmark("uff_loss", "--rows", 300, "--output", tmp_path / "loss.json")
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found["fast"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-6)
    assert found["fast"]["gradient_norm"] == pytest.approx(found["plain"]["gradient_norm"], rel=1e-4)
    assert "of the plain form" in text
    alone = run_benchmark("uff_loss", "--rows", 300, "--skip_plain", "--output", tmp_path / "alone.json")
    assert "plain" not in json.loads((tmp_path / "alone.json").read_text())
    assert "of the plain form" not in alone


@pytest.mark.slow
def test_cleaning_is_measured(tmp_path: Path) -> None:
    run_benchmark("preprocessing", "--scans", 2, "--skip_open3d", "--output", tmp_path / "cleaning.json")
    found = json.loads((tmp_path / "cleaning.json").read_text())
    assert 170_000 < found["points_off_the_plane"] < 200_000
    assert found["cores"] == 1
    assert 0 < found["cluster_seconds"] < 5 * found["clean_seconds"]  # a part of the cleaning, timed on its own
    speeds = [found[f"scans_per_second_{workers}"] for workers in range(1, (os.cpu_count() or 1) + 1)]
    assert all(speed > 0 for speed in speeds)


@pytest.mark.slow
def test_a_class_in_plain_form_has_the_same_metrics() -> None:
    ours, plain = (run_class(form, "tiny", 3, 4, None, 1.0) for form in ("fp32", "plain"))
    for name in ("image_rocauc", "pixel_rocauc", "au_pro"):
        assert plain.metrics[name] == pytest.approx(ours.metrics[name], abs=0.01)
    assert ours.peak_mb > 0.9 * ours.start_mb > 0  # the kernel updates the two counters with separate delays
    assert ours.share_of_product > 0
    assert plain.seconds["total"] == pytest.approx(plain.seconds["fit"] + plain.seconds["evaluate"])
    assert 0 < plain.seconds["pick"] + plain.seconds["score"] < plain.seconds["fit"]


@pytest.mark.slow
def test_the_largest_class_is_fitted_with_features_on_disk(tmp_path: Path) -> None:
    flags = ("--networks", "tiny", "--train", 6, "--distinct", 2, "--memory_budget", 0.001)
    text = run_benchmark("largest_class", *flags, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["on_disk"]
    assert "features on disk" in text
    patches = TINY.xyz_grid**2
    assert found["rows"]["rgb"] == found["rows"]["fusion"] == int(0.1 * int(0.1 * 6 * patches))
    assert 0 < found["start_mb"] < found["peak_mb"]
    assert found["seconds"]["coreset"] > 0
    assert found["seconds"]["fuse"] > 0


@pytest.mark.slow
def test_all_stages_are_measured(tmp_path: Path) -> None:
    text = run_benchmark(
        "stages", "--networks", "tiny", "--repeats", 1, "--batch", 2, "--distinct", 2, "--rows", 600, "--picks", 20,
        "--train", 3, "--test", 2, "--precisions", "fp32", "--curve", "--curve_fast",
        "--output", tmp_path / "found.json", "--figure", tmp_path / "figure.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["cpu"] in text
    stages = [
        "ViT of 2 images",
        "group encoder",
        "point transformer",
        "point search",
        "alignment",
        "features of a sample",
        "features of 2 samples",
        "coreset 600 x 192 to 60",
        "scoring 256 x 60 x 192",
    ]
    assert list(found["stages"]) == stages
    for stage in found["stages"].values():
        assert all(value > 0 for numbers in stage.values() for value in numbers.values())
    assert found["stages"]["ViT of 2 images"]["share_of_product"].keys() == {"plain", "fp32"}
    assert found["class_ratios"]["fp32"].keys() == {"time", "memory"}
    runs = {form: [run["train"] for run in of_form] for form, of_form in found["classes"].items()}
    assert runs == {"plain": [3], "fp32": [3]}
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (1152, 480)


@pytest.mark.slow
def test_prediction_is_measured(tmp_path: Path) -> None:
    text = run_benchmark(
        "predict", "--networks", "tiny", "--train", 4, "--distinct", 2, "--samples", 4, "--many", 20, "--repeats", 1,
        "--batch_size", 2, "--output", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    (cold,) = found["cold"]
    assert 0 < cold["first_line"] <= cold["end"]
    for stage in ("batch 1", "batch 2", "memory"):
        latency = found[stage]["latency"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert found[stage]["samples_per_second"] > 0
    assert [count for count, _ in found["memory"]["resident_mb"]] == list(range(1, 20))
    assert "20 samples in a row" in text
    assert "MB per 1000 samples" in text


@pytest.mark.slow
def test_the_cost_of_processes_is_measured(tmp_path: Path) -> None:
    """Coreset and class are measured with one and two processes, and the model uses this machine's rates."""
    sizes = ["--samples", 1, 2, "--processes", 1, 2, "--networks", "tiny", "--train", 8, "--test", 4]
    text = run_benchmark("ranks", *sizes, "--output", tmp_path / "ranks.json", "--figure", tmp_path / "scaling.png")
    found = json.loads((tmp_path / "ranks.json").read_text())
    costs = {(cost["stage"], cost["rows"], cost["processes"]): cost for cost in found["costs"]}
    assert set(costs) == {
        *(("coreset", rows, count) for rows in (3136, 6272) for count in (1, 2)),
        ("class", 12, 1),
        ("class", 12, 2),
    }
    for (stage, rows, count), cost in costs.items():
        assert (cost["received_mb"] > 0) == (count > 1)
        assert cost["passes"] == costs[stage, rows, 1]["passes"]
    assert sum(picks for _, _, picks, _ in found["passes"]["6272"]) == 626  # a tenth, except for the first one
    assert set(found["model"]) == {f"{rows} {count}" for rows in (3136, 6272) for count in (1, 2)}
    # Rates are differences of times, which other work on the machine can make negative.
    assert np.isfinite([*found["rates"].values(), found["alone"]]).all()
    assert "of measured" in text
    with Image.open(tmp_path / "scaling.png") as figure:
        assert figure.size[0] > figure.size[1]

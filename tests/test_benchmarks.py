"""The benchmarks run and measure what they say; never how fast."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import one_thread  # noqa: F401 (a fixture)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from benchmarks.class_run import ClassRun, count_operations, run_class
from benchmarks.curve import memory_law, seconds_law
from benchmarks.measuring import median_seconds, memory_slope
from benchmarks.rows import CORESET_EPS, Row
from benchmarks.scaling_model import Machine, Pass, coreset_seconds, grown_passes, pass_seconds
from benchmarks.workload import (
    SEED,
    SIZES,
    Networks,
    build_networks,
    detector_config,
    group_encoder_flops,
    grown,
    made_up_samples,
    point_transformer_flops,
    vit_flops,
)
from feature_extractors.alignment import align_to_patches
from feature_extractors.coreset import select_coreset
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from utils.metrics import evaluate as compute_metrics
from utils.records import PatchFeatures, Sample

ROOT = Path(__file__).resolve().parent.parent
TINY = SIZES["tiny"]


def run_benchmark(name: str, *flags: object) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # tensors this small only lose by being shared out
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_cleaning_is_measured(tmp_path: Path) -> None:
    run_benchmark("preprocessing", "--scans", 2, "--skip_open3d", "--output", tmp_path / "cleaning.json")
    found = json.loads((tmp_path / "cleaning.json").read_text())
    assert 170_000 < found["points_off_the_plane"] < 200_000
    assert found["cores"] == 1
    assert 0 < found["cluster_seconds"] < found["clean_seconds"]
    speeds = [found[f"scans_per_second_{workers}"] for workers in range(1, (os.cpu_count() or 1) + 1)]
    assert all(speed > 0 for speed in speeds)


def test_the_pairings_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few updates: enough for the lines of the figure, not for what they show."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script replaces its first entry
    from benchmarks import uff_pairing

    monkeypatch.setattr(uff_pairing, "PARTS", 10)
    monkeypatch.setitem(uff_pairing.FLAGS, "epochs", 2)
    monkeypatch.setattr(sys, "argv", ["uff_pairing.py", "--figure", str(tmp_path / "figure.png")])
    uff_pairing.main()
    told = capsys.readouterr().out
    assert "aligned: retrieval" in told
    assert "reference: retrieval" in told
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (768, 432)


def sample_points(sample: Sample) -> Tensor:
    assert sample.xyz is not None
    return sample.xyz[:, (sample.xyz != 0).all(dim=0)].T.contiguous()


@pytest.fixture(scope="module")
def sample() -> Sample:
    return made_up_samples(1, "train", TINY.img_size)[0]


@pytest.fixture(scope="module")
def slow() -> Networks:
    return plain.make_plain(build_networks(TINY))


def test_the_plain_features_are_ours(sample: Sample, slow: Networks) -> None:
    ours = PatchExtractor(detector_config(TINY, "fp32"), *build_networks(TINY))(sample)
    twin = plain.extract(slow, sample, TINY.xyz_grid)
    torch.testing.assert_close(twin["xyz"], ours.xyz, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twin["rgb"], ours.rgb, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_plain_parts_are_ours(sample: Sample, slow: Networks) -> None:
    ours, points = build_networks(TINY).xyz, sample_points(sample)
    groups, centers = plain.group(points, TINY.num_group, TINY.group_size)
    for twin, fast in zip((groups, centers), ours.group([points])[0], strict=True):
        assert torch.equal(twin, fast)
    encoded = plain.encode_groups(slow.xyz.encoder, groups)
    torch.testing.assert_close(encoded, ours.encoder(groups), rtol=1e-3, atol=1e-4)
    tokens, _ = plain.point_tokens(slow.xyz, points)
    (found,) = ours([points])
    torch.testing.assert_close(tokens, found.features, rtol=1e-4, atol=1e-4)
    plane = plain.pooled_plane(found.features, centers, sample.xyz, TINY.xyz_grid)
    torch.testing.assert_close(plane, align_to_patches(found, sample.xyz, TINY.xyz_grid), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [200, 24])  # 24: fewer columns than the projection would have
def test_the_plain_coreset_picks_the_same(width: int) -> None:
    rows = torch.randn(400, width, generator=torch.Generator().manual_seed(1)) + 2
    statistics = BankStatistics(float(rows.mean()), float(rows.std()))
    projected = plain.project(statistics.normalize(rows), CORESET_EPS, SEED)
    picks = plain.greedy_coreset(projected, 60)
    assert torch.equal(picks, select_coreset(rows, statistics, 60, CORESET_EPS, SEED))
    stopped = plain.greedy_coreset(projected, 60, stop=20)
    assert torch.equal(stopped[:20], picks[:20])
    assert len(stopped.unique()) == 60


def test_the_plain_coreset_repeats_no_row() -> None:
    rows = torch.tensor([[0.0], [0.0], [5.0], [5.0], [9.0]])
    assert plain.greedy_coreset(rows, 5).tolist() == [0, 4, 2, 1, 3]


@pytest.mark.parametrize("method", ["Point_MAE", "DINO+Point_MAE"])
def test_the_plain_scoring_is_ours(method: str) -> None:
    generator = torch.Generator().manual_seed(2)
    bank, queries = torch.randn(150, 40, generator=generator), torch.randn(64, 40, generator=generator)
    config = detector_config(TINY, "fp32", method_name=method)
    detector = Detector(config, PatchExtractor(config, None, None), {"xyz": MemoryBank(bank)})
    scores, maps = detector.bank_results(PatchFeatures(xyz=queries))
    row = config.method
    score, plane = plain.score_bank(queries, bank, TINY.img_size, row.score_divisor, row.weight_epsilon)
    assert score == pytest.approx(scores["xyz"], rel=1e-4)
    torch.testing.assert_close(plane, maps["xyz"], rtol=0, atol=1.5 / 255 * float(plane.max()))  # one gray level


def test_the_plain_metrics_are_ours() -> None:
    rng = np.random.default_rng(3)
    masks = np.zeros((4, 24, 24), np.uint8)
    masks[1, 3:8, 4:9] = masks[1, 15:20, 15:18] = masks[3, 10:14, 2:20] = 1
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)
    labels, scores = [0, 1, 0, 1], [0.1, 0.4, 0.5, 0.9]
    ours, twin = compute_metrics(labels, scores, masks, maps), plain.measure_maps(labels, scores, masks, maps)
    assert twin.pop("au_pro_exact") == pytest.approx(ours.pop("au_pro_exact"))
    assert twin == pytest.approx(ours)


@pytest.mark.slow
def test_a_plain_class_has_our_figures() -> None:
    ours, twin = (run_class(form, "tiny", 3, 4, None, 1.0) for form in ("fp32", "plain"))
    for name in ("image_rocauc", "pixel_rocauc", "au_pro"):
        assert twin.metrics[name] == pytest.approx(ours.metrics[name], abs=0.01)
    assert ours.peak_mb > 0.9 * ours.start_mb > 0  # the kernel updates the two counters separately, each with a delay
    assert ours.share_of_product > 0
    assert twin.seconds["total"] == pytest.approx(twin.seconds["fit"] + twin.seconds["evaluate"])


@torch.inference_mode()
def test_operations_are_those_that_pytorch_counts(sample: Sample, slow: Networks) -> None:
    ours = build_networks(TINY).xyz
    ((groups, _),) = slow.xyz.group([sample_points(sample)])
    tokens = torch.zeros(1, TINY.num_group, TINY.point_numbers["width"])
    assert sample.rgb is not None
    counted: list[tuple[float, Callable[[], object]]] = [
        (vit_flops(slow.rgb), partial(plain.rgb_patches, slow.rgb, sample.rgb)),
        (group_encoder_flops(slow.xyz, plain=True), partial(plain.encode_groups, slow.xyz.encoder, groups)),
        (group_encoder_flops(ours), partial(ours.encoder, groups)),
        (point_transformer_flops(slow.xyz), partial(slow.xyz.blocks, tokens, tokens, slow.xyz.taken)),
    ]
    for flops, work in counted:
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == flops


def test_operations_of_a_class_are_those_of_its_parts() -> None:
    networks, config = build_networks(TINY), detector_config(TINY, "fp32")
    rgb, xyz = networks
    fast, twice = (count_operations(config, networks, 10, 4, each) for each in (False, True))
    dim = 192  # of three blocks' tokens; so few rows would be projected to more columns, so they are not
    selected = 2.0 * 2560 * dim * 256 + 2.0 * 160 * 64 * 25
    searched = 14 * 2.0 * (256 * 256 * dim + 16 * 25 * 64)
    of_sample = vit_flops(rgb) + point_transformer_flops(xyz)
    assert fast == pytest.approx(14 * (of_sample + group_encoder_flops(xyz)) + selected + searched)
    assert twice == pytest.approx(24 * (of_sample + group_encoder_flops(xyz, plain=True)) + selected + searched)


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


def test_made_up_samples_are_like_scans() -> None:
    samples = made_up_samples(4, "test", 64)
    assert [sample.label for sample in samples] == [0, 1, 0, 1]
    for sample in samples:
        assert sample.xyz is not None
        assert sample.mask is not None
        assert 0.2 < (sample.xyz != 0).all(dim=0).float().mean() < 0.3
        assert bool(sample.mask.any()) == (sample.label == 1)
    good = made_up_samples(1, "train", 64)[0]
    assert (good.label, good.mask) == (None, None)


def test_work_is_timed_in_turns() -> None:
    done: list[str] = []
    seconds = median_seconds({name: partial(done.append, name) for name in "ab"}, repeats=2)
    assert "".join(done) == "ababab"
    assert seconds.keys() == {"a", "b"}
    assert all(value > 0 for value in seconds.values())


def test_a_row_tells_ratio_and_share() -> None:
    row = Row("step", {"plain": 8.0, "fp32": 2.0, "bf16": 1.0}, {"fp32": 6e9, "bf16": 6e9}, {"fp32": 4e9, "bf16": 3e10})
    assert (row.ratio("fp32"), row.ratio("bf16")) == (4.0, 8.0)
    assert (row.share("fp32"), row.share("bf16")) == (0.75, 0.2)


def test_the_laws_go_through_what_was_measured() -> None:
    stages = {"fit": 30.0, "extract": 8.0, "project": 2.0, "pick xyz": 15.0, "pick rgb": 1.0, "score": 4.0}
    runs = [ClassRun(train, 2, stages, 100.0, 1024.0 * gb, 0.5, {}) for train, gb in ((10, 2.0), (20, 3.0))]
    assert seconds_law(runs)(np.array([20, 40])).tolist() == [30.0, 20.0 + 80.0]
    assert memory_law(runs)(np.array([10, 20, 40])).tolist() == [2.0, 3.0, 5.0]


@pytest.mark.slow
def test_the_largest_class_is_fitted_with_features_on_disk(tmp_path: Path) -> None:
    flags = ("--networks", "tiny", "--train", 6, "--distinct", 2, "--memory_budget", 0.001)
    told = run_benchmark("largest_class", *flags, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["on_disk"]
    assert "features on disk" in told
    patches = TINY.xyz_grid**2
    assert found["rows"]["rgb"] == found["rows"]["fusion"] == int(0.1 * int(0.1 * 6 * patches))
    assert 0 < found["start_mb"] < found["peak_mb"]
    assert found["seconds"]["coreset"] > 0
    assert found["seconds"]["fuse"] > 0


@pytest.mark.slow
def test_all_stages_are_measured(tmp_path: Path) -> None:
    told = run_benchmark(
        "stages", "--networks", "tiny", "--repeats", 1, "--batch", 2, "--distinct", 2, "--rows", 600, "--picks", 20,
        "--maps", 4, "--train", 3, "--test", 2, "--precisions", "fp32", "--curve", "--curve_fast",
        "--output", tmp_path / "found.json", "--figure", tmp_path / "figure.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["cpu"] in told
    stages = [
        "ViT of 2 pictures",
        "group encoder",
        "point transformer",
        "point search",
        "alignment",
        "features of a sample",
        "features of 2 samples",
        "coreset 600 x 192 to 60",
        "scoring 256 x 60 x 192",
        "metrics of 4 maps 64 x 64",
    ]
    assert list(found["stages"]) == stages
    for stage in found["stages"].values():
        assert all(value > 0 for numbers in stage.values() for value in numbers.values())
    assert found["stages"]["ViT of 2 pictures"]["share_of_product"].keys() == {"plain", "fp32"}
    assert found["class_ratios"]["fp32"].keys() == {"time", "memory"}
    assert {form: [run["train"] for run in runs] for form, runs in found["classes"].items()} == {
        "plain": [3],
        "fp32": [3],
    }
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (1152, 480)


def test_the_slope_of_memory_is_that_of_the_second_half() -> None:
    samples = [(100, 900.0), (200, 990.0), (300, 1000.0), (400, 1001.0), (500, 1002.0), (600, 1003.0)]
    assert memory_slope(samples) == pytest.approx(10)


@pytest.mark.slow
def test_judging_is_measured(tmp_path: Path) -> None:
    told = run_benchmark(
        "predict", "--networks", "tiny", "--train", 4, "--distinct", 2, "--samples", 4, "--parts", 20, "--repeats", 1,
        "--batch_size", 2, "--output", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    (cold,) = found["cold"]
    assert 0 < cold["first_part"] <= cold["end"]
    for stage in ("batch 1", "batch 2", "memory"):
        latency = found[stage]["latency"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert found[stage]["parts_per_second"] > 0
    assert [count for count, _ in found["memory"]["resident_mb"]] == list(range(1, 21))
    assert "20 parts in a row" in told and "MB per 1000 parts" in told


@pytest.mark.slow
def test_what_processes_share_is_measured(tmp_path: Path) -> None:
    """Coreset and class of two processes beside one; the model from what this machine takes for its parts."""
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
    picks = [[each[2] for each in found["details"][f"coreset 6272 {count}"]["recorded"]] for count in (1, 2)]
    assert picks[0] == picks[1]
    assert sum(picks[0]) == 626  # a tenth, but for the first one
    assert set(found["model"]) == {f"{rows} {count}" for rows in (3136, 6272) for count in (1, 2)}
    # Differences of times, which other work on the machine can make negative.
    assert np.isfinite([*found["rates"].values(), found["alone"]]).all()
    assert "of measured" in text
    with Image.open(tmp_path / "scaling.png") as figure:
        assert figure.size[0] > figure.size[1]


def test_a_pass_costs_what_its_parts_cost() -> None:
    """By hand, with numbers that keep the parts apart."""
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


@pytest.mark.slow
def test_a_gpu_is_measured_without_one(tmp_path: Path) -> None:
    """The same steps on the CPU, small."""
    flags = ["--device", "cpu", "--networks", "tiny", "--train", 4, "--batch", 2, "--repeats", 1]
    text = run_benchmark("gpu", *flags, "--output", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    steps = found["steps"]
    assert all(step.get("seconds", 1) > 0 for step in steps.values())
    for precision in ("fp32", "bf16"):
        assert steps[f"parts per second, {precision}"]["rate"] == pytest.approx(
            1 / steps[f"a part from scan to map, {precision}"]["seconds"]
        )
        assert {f"UFF, a batch of 2 parts, {precision}", f"score and map, {precision}"} <= set(steps)
    assert f"coreset {4 * TINY.xyz_grid**2} x 192 to 102" in steps
    assert found["peak_mb"] > 0
    assert "parts per second, bf16" in text

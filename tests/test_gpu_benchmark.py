"""GPU benchmark on a CPU: its stages give the predictions, and its counts are right."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import TRIPLE, fit, made_up_samples, one_thread, settings  # noqa: F401 (a fixture)
from torch.autograd import DeviceType

from benchmarks import gpu
from benchmarks.gpu_stages import Rates, Stage, search_cost, stages_of, tensor_bytes
from benchmarks.gpu_waits import RANGE, Operations, calls_in_range, count_waits
from benchmarks.workload import distance_flops
from feature_extractors import detector as detector_module
from feature_extractors.detector import Detector
from feature_extractors.memory_bank import MemoryBank


@pytest.fixture(scope="module")
def detector() -> Detector:
    return fit(settings(TRIPLE, use_uff=True))[0]


@pytest.mark.parametrize("together", [1, 4])
def test_stages_give_the_predictions(detector: Detector, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_module, "SCORED_TOGETHER_ON_CPU", together)
    samples = made_up_samples("test")
    found = stages_of(detector, samples)
    assert found.complete
    assert len(found.results) == len(samples) / together
    scores = torch.cat([scores[-1] for scores, _ in found.results])
    maps = torch.cat([maps[-1] for _, maps in found.results])
    for score, plane, prediction in zip(scores, maps, detector.predict_batch(samples), strict=True):
        assert float(score) == prediction.score
        torch.testing.assert_close(plane, prediction.anomaly_map, rtol=0, atol=0)


def test_operations_and_bytes_of_stages(detector: Detector) -> None:
    """Search of the rgb bank and UFF against formulas. The 16 rgb patches of a sample are all different."""
    samples = made_up_samples("test")
    stages = {stage.name: stage for stage in stages_of(detector, samples).stages}
    search, rows = stages["search of the rgb bank"], detector.banks["rgb"].rows
    queries = 16 * len(samples)
    assert search.flops == distance_flops(queries, len(rows), rows.shape[1])
    results = queries * (4 + 8) + len(samples)  # distance, row, and a bool for each sample
    assert search.moved == 4 * (queries + len(rows)) * rows.shape[1] + results
    uff, fusion = detector.extractor.feature_fusion, stages["UFF"]
    linear = sum(each.weight.numel() for mlp in (uff.xyz_mlp, uff.rgb_mlp) for each in (mlp.fc1, mlp.fc2))
    assert fusion.flops == 2 * 64 * len(samples) * linear


def test_bank_of_halves_takes_three_products() -> None:
    bank = MemoryBank(torch.ones(5, 7))
    assert search_cost(bank, 2) == (2 * 2 * 5 * 7, "fp32")
    bank._search.halved = True  # on a GPU
    assert search_cost(bank, 2) == (3 * 2 * 2 * 5 * 7, "bf16")


def test_limit_is_the_longer_of_two_times() -> None:
    rates = Rates({"fp32": 100.0, "bf16": 400.0}, {"memory": 10.0, "host": 2.0})
    for flops, moved, precision, path, seconds in (
        (800, 10, "fp32", "memory", 8),
        (800, 10, "bf16", "memory", 2),
        (800, 40, "bf16", "memory", 4),
        (0, 40, "fp32", "host", 20),
    ):
        stage = Stage("", lambda: None, flops, moved, precision, path)
        assert stage.limit(rates) == seconds, (flops, moved, precision, path)


def test_bytes_of_nested_tensors() -> None:
    assert tensor_bytes([torch.zeros(3), {"a": (torch.zeros(2, dtype=torch.int64), None, 7)}]) == 12 + 16


def test_waiting_operations_are_counted() -> None:
    values, mask, first = torch.arange(4.0), torch.tensor([True, False, True, False]), torch.tensor([0])
    for work, waiting in (
        (lambda: values + 1, {}),
        (lambda: values[first], {}),
        (lambda: values[mask], {"index": 1}),
        (lambda: values.clone().index_put_((mask,), values.new_zeros(())), {"index_put_": 1}),
        (lambda: values.sum().item(), {"_local_scalar_dense": 1}),
        (lambda: torch.where(mask), {"nonzero": 1}),
        (lambda: torch.unique(values), {"_unique2": 1}),
    ):
        with Operations() as operations, torch.inference_mode():
            work()
        assert dict(operations.waiting) == waiting
    with Operations("cuda") as elsewhere:
        values.sum().item()
    assert not elsewhere.counts


def test_composite_operations_are_counted_by_their_parts() -> None:
    rows, weight = torch.ones(2, 3), torch.ones(4, 3)
    with Operations() as operations, torch.inference_mode():
        torch.nn.functional.linear(rows, weight)
    assert operations.counts == {"t": 1, "mm": 1}


def test_operations_of_both_backbones_are_counted(detector: Detector) -> None:
    """The rgb backbone runs in another thread, whose operations a context alone does not count."""
    sample = made_up_samples("test")[0]
    with Operations() as counted:
        detector.predict_batch([sample])
    found = count_waits(detector, [sample])
    images = detector.extractor.prepare([sample]).images
    with Operations() as of_rgb:
        detector.extractor._rgb_patches(images)
    assert found["operations"] == counted.counts.total() + of_rgb.counts.total()
    assert found["waiting_calls"] is None


def test_calls_outside_of_the_range_do_not_count() -> None:
    events = [
        event("cudaDeviceSynchronize", 1),
        event(RANGE, 2, 9),
        event(RANGE, 4, 5, DeviceType.CUDA),
        event("cudaMemcpyAsync", 3),
        event("cudaStreamSynchronize", 6),
        event("cudaMemcpy_v3020", 8),
        event("cudaDeviceSynchronize", 10),
    ]
    assert calls_in_range(events) == {"cudaStreamSynchronize": 1, "cudaMemcpy": 1}


def event(name: str, start: float, end: float | None = None, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end or start), device_type=device)


@pytest.mark.slow
def test_the_script_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--networks", "tiny", "--repeats", "1", "--train", "4", "--distinct", "2"]
    gpu.main([*flags, "--batch_sizes", "1", "3", "--output", str(tmp_path / "gpu.json")])
    found, text = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert "coreset 1024 x 192 to 102" in found["steps"]
    assert set(found["fit_seconds"]) == {"features, fp32", "features, bf16", "coresets", "decision fusion"}
    for precision in ("fp32", "bf16"):
        assert f"UFF update, 2 samples of 256 patches, {precision}" in found["steps"]
        assert set(found["samples_per_second"][precision]) == {"1", "3"}
        stages = found["stages"][precision]["stages"]
        assert stages["ViT"]["flops"] > 0
        assert all(stage["seconds"] > 0 for stage in stages.values())
        assert f"stages of a batch of 4, {precision}" in text
    assert [row["samples"] for row in found["waits"]] == [1, 4]
    one, four = found["batched_scoring"]
    assert one["waiting"] == four["waiting"] == 0
    assert 0 < one["operations"] <= four["operations"] < 1.5 * one["operations"]
    assert found["peak_mb"] > 0

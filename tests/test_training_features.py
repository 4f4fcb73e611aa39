"""Training features in memory and in mapped files: equal rows and resident memory."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_pipeline import assert_same_detector
from tiny_networks import TRAIN, TRIPLE, build, made_up_samples, one_thread, run, settings  # noqa: F401 (a fixture)
from torch import Tensor

from feature_extractors.config import PROTOCOLS
from feature_extractors.patch_rows import PatchRows
from feature_extractors.pipeline import collect_features, fit_detector
from feature_extractors.training_features import FEATURES_SHARE, TrainingFeatures
from utils.errors import InputError
from utils.records import PatchFeatures

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 5
BYTES = SAMPLES * (4 * 6 + 2 * 3) * 4
BUDGETS = {"memory": BYTES / FEATURES_SHARE / 1e9, "disk": 0.99 * BYTES / FEATURES_SHARE / 1e9}


def made_up() -> list[PatchFeatures]:
    generator = torch.Generator().manual_seed(0)
    samples = [
        PatchFeatures(xyz=torch.randn(4, 6, generator=generator), rgb=torch.randn(2, 3, generator=generator))
        for _ in range(SAMPLES)
    ]
    for sample in samples:
        assert sample.xyz is not None
        sample.xyz[1] = 0.0  # background
    return samples


@pytest.fixture(params=BUDGETS)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def features(place: str) -> TrainingFeatures:
    collected = TrainingFeatures(SAMPLES, BUDGETS[place])
    for sample in made_up():
        collected.append(sample)
    assert collected.on_disk == (place == "disk")
    return collected


def together(name: str, samples: int = SAMPLES) -> Tensor:
    return torch.cat([getattr(sample, name) for sample in made_up()[:samples]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_subset_has_the_samples_of_some_paths(place: str, dtype: torch.dtype) -> None:
    collected = TrainingFeatures(SAMPLES, BUDGETS[place], dtype)
    for number, sample in enumerate(made_up()):
        collected.append(sample, f"{number}")
    subset = collected.subset(["4", "1", "of another rank"])
    assert len(subset) == subset.capacity == 2
    for name in ("xyz", "rgb"):
        expected = torch.cat([getattr(collected.sample(number), name) for number in (1, 4)])
        assert torch.equal(torch.cat(list(subset.rows(name).shard.split(3))), expected)
    assert len(collected.subset([])) == 0


def test_samples_and_rows_equal_the_appended_ones(features: TrainingFeatures) -> None:
    for i, sample in enumerate(made_up()):
        kept = features.sample(i)
        assert torch.equal(kept.xyz, sample.xyz)
        assert torch.equal(kept.rgb, sample.rgb)
        assert kept.fusion is None
    for name in ("xyz", "rgb"):
        for samples in (None, 1, 3):
            rows, expected = features.rows(name, samples).shard, together(name, samples or SAMPLES)
            assert (len(rows), rows.shape) == (len(expected), expected.shape)
            for step in (1, 3, 100):
                blocks = [block.clone() for block in rows.split(step)]
                assert [len(block) for block in blocks[:-1]] == [step] * (len(blocks) - 1)
                assert torch.equal(torch.cat(blocks), expected)
            index = torch.arange(-1, 3000) % len(expected)
            assert torch.equal(rows[index], expected[index])


def test_rows_can_be_filtered_twice(features: TrainingFeatures) -> None:
    expected = together("xyz")
    expected = expected[(expected != 0).any(dim=1)]
    kept = features.rows("xyz").shard.where(lambda rows: (rows != 0).any(dim=1), step=3)
    assert torch.equal(torch.cat([block.clone() for block in kept.split(4)]), expected)
    positive = kept.where(lambda rows: rows[:, 0] > 0, step=2)
    expected = expected[expected[:, 0] > 0]
    assert 0 < len(expected) < len(kept)
    assert torch.equal(positive[torch.arange(len(positive))], expected)
    assert len(kept.where(lambda rows: torch.zeros(len(rows), dtype=torch.bool))) == 0


def test_half_precision_keeps_the_zeros(place: str) -> None:
    collected = TrainingFeatures(1, BUDGETS[place] / SAMPLES / 2, torch.float16)
    assert collected.dtype.itemsize == 2
    xyz = torch.tensor([[1.0001, 1e-9, 0.0]])
    collected.append(PatchFeatures(xyz=xyz))
    kept = collected.sample(0).xyz
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, xyz, rtol=1e-3, atol=1e-7)
    assert torch.equal(kept == 0, xyz == 0)


def test_rows_of_a_tensor() -> None:
    rows = PatchRows(torch.arange(6.0).view(3, 2))
    assert rows[torch.tensor([2])].tolist() == [[4.0, 5.0]]
    assert [block.tolist() for block in rows.split(2)] == [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_in_memory_and_on_disk_give_the_same_detector(protocol: str) -> None:
    config = settings(TRIPLE, protocol=PROTOCOLS[protocol])
    extractor = build(config)
    on_disk = collect_features(extractor, made_up_samples("train"), TRAIN, memory_budget=1e-6)
    assert on_disk.on_disk
    assert_same_detector(fit_detector(config, extractor, on_disk), run(config).detector)


def test_half_precision_changes_the_detector_slightly() -> None:
    config = settings(TRIPLE, f_coreset=1.0)
    extractor = build(config)
    halved = collect_features(extractor, made_up_samples("train"), TRAIN, dtype=torch.float16)
    detector, whole = fit_detector(config, extractor, halved), run(config).detector
    for name, bank in detector.banks.items():
        difference = (bank.rows - whole.banks[name].rows).abs().max()
        assert 0 < difference < 1e-2 * whole.banks[name].rows.abs().max(), name


def test_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=rf"take 0.0 GB, which do not fit in {tmp_path} \(No space left.*TMPDIR"):
        TrainingFeatures(SAMPLES, 1e-9).append(made_up()[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "dtype", "fix"),
    [
        (torch.nan, torch.float32, "Check its files"),
        (torch.inf, torch.float16, "Check its files"),
        (7e4, torch.float16, "Use --train_feature_dtype fp32"),
    ],
)
def test_features_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, fix: str) -> None:
    first, second = made_up()[:2]
    second.rgb[1, 2] = value
    features = TrainingFeatures(SAMPLES, dtype=dtype)
    features.append(first)
    with pytest.raises(InputError, match=f"rgb features of good sample 1 hold NaN or infinity as float.*{fix}"):
        features.append(second)


def test_place_of_features_on_disk_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level("INFO"):
        TrainingFeatures(SAMPLES, 1e-9).append(made_up()[0])
    assert f"the training features go to files in {tmp_path}. If it is in memory" in caplog.text


RESIDENT = """
import json, sys
from pathlib import Path
import torch
from feature_extractors.memory_bank import mean_and_std
from feature_extractors.training_features import TrainingFeatures
from utils.records import PatchFeatures

def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])

torch.manual_seed(0)
features, before = TrainingFeatures(50, float(sys.argv[1])), peak()
for _ in range(50):
    features.append(PatchFeatures(xyz=torch.rand(2500, 800)))  # 8 MB
rows = features.rows("xyz")
mean_and_std(rows, 2500)
rows.take(torch.arange(0, len(rows), 40))
for i in range(50):
    features.sample(i).xyz.sum()
print(json.dumps({"mb": (peak() - before) / 1024, "left": [str(path) for path in Path(sys.argv[2]).iterdir()]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "least", "most"), [(10.0, 390, 600), (0.1, 0, 200)])
def test_resident_memory(budget: float, least: float, most: float, tmp_path: Path) -> None:
    """All of 400 MB, or only a few samples, are resident; no file has a name."""
    command = [sys.executable, "-c", RESIDENT, str(budget), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert least <= found["mb"] <= most
    assert found["left"] == []

"""Shared fixtures: recorded numbers, stand-in weights, and the order of test files in parallel runs."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Set before huggingface_hub is imported, so that no test uses the network or waits for it.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, so more threads would only compete
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from golden_weights import write_golden_weights

from dataset import AnomalyDataset, index_split
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import PatchExtractor, build_extractor
from utils.records import PatchFeatures, Sample

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).parent / "goldens"
REAL_DATA = ROOT.parent / "shared"
GoldenFeatures = Callable[..., PatchFeatures]
GOLDEN_METHOD = "DINO+Point_MAE+Fusion"  # its features hold those of every other method


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each file's tests on one worker, and all tests that need the stand-in weights on one worker, first.

    Fixtures are then set up once, and the longest group does not start last.
    """
    needs_weights = {id(item) for item in items if "golden_weights" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "golden weights" if id(item) in needs_weights else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: id(item) not in needs_weights)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images and clouds, which are not in the repository because of their licenses."""
    for folder in ("mvtec3d_tire_rgb", "scans"):
        if not (REAL_DATA / folder).is_dir():
            pytest.skip(
                f"{REAL_DATA / folder} not found. Real images are not in the repository because of their licenses"
            )
    return REAL_DATA


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the numbers recorded from the original computation; its README describes each file."""
    return GOLDENS


@pytest.fixture(scope="session")
def golden_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stand-in checkpoints that the goldens were recorded with (570 MB)."""
    folder = tmp_path_factory.mktemp("weights")
    write_golden_weights(folder)
    return folder


@pytest.fixture(scope="session")
def golden_samples() -> dict[str, Sample]:
    """The six training and ten test samples of the recorded class by path."""
    modalities = DetectorConfig(GOLDEN_METHOD).method.modalities
    splits = (index_split(GOLDENS / "data" / "bagel", split, modalities) for split in ("train", "test"))
    return {sample.path: sample for files in splits for sample in AnomalyDataset(files, modalities, 224)}


@pytest.fixture(scope="session")
def golden_features(golden_weights: Path, golden_samples: dict[str, Sample]) -> GoldenFeatures:
    """Patch features of a golden sample by (path, --point_norm), extracted on first use and then cached."""

    @cache
    def extractor(point_norm: str) -> PatchExtractor:
        config = DetectorConfig(GOLDEN_METHOD, use_uff=True, point_norm=point_norm)
        return build_extractor(config, golden_weights, golden_weights / "uff.pth")

    @cache
    def features(path: str, point_norm: str) -> PatchFeatures:
        return extractor(point_norm)(golden_samples[path])

    return lambda path, point_norm="cloud": features(path, point_norm)

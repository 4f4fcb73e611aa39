"""Shared fixtures: where the recorded numbers and the real data lie, and the stand-in weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

# huggingface_hub reads it when it is first imported: no test may reach the network, or wait for one that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from dataset import AnomalyDataset, index_split
from feature_extractors.config import DetectorConfig
from feature_extractors.extractor import build_extractor
from utils.records import PatchFeatures

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded numbers and real data beside the checkout; a test that needs it skips without it.

    Where M3DM_REQUIRE_SHARED is set (continuous integration), its absence is a failure instead.
    """
    if not SHARED.is_dir():
        reason = f"{SHARED} is absent: recorded numbers and real data are not part of the repository"
        if os.environ.get("M3DM_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    return shared / "goldens"


@pytest.fixture(scope="session")
def golden_weights(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the reproducible random checkpoints that the goldens were recorded with (570 MB)."""
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, goldens / "make_weights.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def golden_features(goldens: Path, golden_weights: Path) -> Callable[[str], dict[str, PatchFeatures]]:
    """Patch features of all golden training and test samples by path, for a --point_norm; each computed once."""

    @cache
    def extract(point_norm: str) -> dict[str, PatchFeatures]:
        config = DetectorConfig(use_uff=True, point_norm=point_norm)
        extractor = build_extractor(config, golden_weights, golden_weights / "uff.pth")
        features = {}
        for split in ("train", "test"):
            files = index_split(goldens / "data" / "bagel", split, config.method.modalities)
            for sample in AnomalyDataset(files, config.method.modalities, config.img_size):
                features[sample.path] = extractor(sample)
        return features

    return extract


@pytest.fixture(scope="session")
def golden_double_features(golden_features: Callable[[str], dict[str, PatchFeatures]]) -> list[PatchFeatures]:
    """Features of the six golden training samples under the reference protocol."""
    return [features for path, features in golden_features("cloud").items() if path.startswith("train/")]

"""Networks, samples and runs that are small enough to test every setting of the detector."""

import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from feature_extractors import extractor as extractor_module
from feature_extractors.config import DetectorConfig
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.pipeline import collect_features, fit_detector
from feature_extractors.training_features import TrainingFeatures
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointTransformer
from utils.records import Prediction, Sample

SIZE, GRID, RGB_GRID = 32, 8, 4  # img_size; patches along a side of the xyz and of the rgb bank
XYZ_DIM, RGB_DIM = 192, 160  # wide enough for the coreset to be projected
TRAIN, TEST = 4, 4
SINGLE, DOUBLE, TRIPLE = "Point_MAE", "DINO+Point_MAE", "DINO+Point_MAE+Fusion"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StubRgb(nn.Module):
    """Stand-in of RgbBackbone: patches of 8 x 8 pixels, each through a convolution and a Linear."""

    embed_dim = RGB_DIM

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.grid_size = img_size // 8
        self.patches = nn.Conv2d(3, self.embed_dim, 8, stride=8)
        self.mix = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, rgb: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.patches(rgb)).flatten(2).transpose(1, 2))


def seeded(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Module whose random weights depend only on its name."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        return make().eval()


def stub_rgb(
    name: str, checkpoint_dir: Path, img_size: int, checkpoint: Path | None, layers: tuple[int, ...] | None = None
) -> nn.Module:
    return seeded(f"{name}{layers or ''}", lambda: StubRgb(img_size))


def stub_xyz(name: str, checkpoint_dir: Path, checkpoint: Path | None, **numbers: object) -> nn.Module:
    """The real point transformer, but narrow and shallow."""
    return seeded(name, lambda: PointTransformer(width=XYZ_DIM // 3, depth=3, num_heads=2, encoder_dim=64, **numbers))


def stub_fusion(path: Path, *, xyz_dim: int, rgb_dim: int) -> nn.Module:
    return seeded(path.name, lambda: FeatureFusion(xyz_dim, rgb_dim, mlp_ratio=0.5, head_dim=8))


def build(config: DetectorConfig) -> PatchExtractor:
    """Call build_extractor with stubs in place of the published networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor_module, "build_rgb_backbone", stub_rgb)
        patch.setattr(extractor_module, "build_xyz_backbone", stub_xyz)
        patch.setattr(extractor_module, "build_feature_fusion", stub_fusion)
        return build_extractor(config, Path("weights"), Path("uff.pth"))


def settings(method_name: str = DOUBLE, **changed: object) -> DetectorConfig:
    base = {"img_size": SIZE, "xyz_grid": GRID, "num_group": 24, "group_size": 12}
    base |= {"f_coreset": 0.3, "random_state": 0}
    return DetectorConfig(method_name=method_name, **(base | changed))


@cache
def made_up_samples(split: str, size: int = SIZE) -> list[Sample]:
    """Samples of a bumpy surface half a meter away, 2 mm between pixels, with background at the top and right.

    Half of the test samples have a defect: a bright dent.
    """
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    background = (row < size // 4) | (column >= size - size // 5)
    samples = []
    for i in range(TRAIN if split == "train" else TEST):
        generator = torch.Generator().manual_seed(i if split == "train" else 100 + i)
        defect = torch.zeros(size, size, dtype=torch.bool)
        if split == "test" and i % 2:
            defect[size // 2 : size // 2 + 6, 6 + i : 14 + i] = True
        depth = 0.5 + 0.01 * torch.sin((row + i) / 4) + 0.001 * torch.rand(size, size, generator=generator)
        xyz = torch.stack([0.002 * column - 0.03, 0.002 * row + 0.01, depth + 0.04 * defect])
        rgb = torch.sin(torch.stack([row, column, row + column]) / 3.0) + 2.0 * defect
        rgb += 0.2 * torch.rand(3, size, size, generator=generator)
        rest = (defect[None].byte(), int(defect.any())) if split == "test" else (None, None)
        samples.append(Sample(f"{split}/{'hole' if defect.any() else 'good'}/{i:03d}", rgb, xyz * ~background, *rest))
    return samples


def fit(config: DetectorConfig, extractor: PatchExtractor | None = None) -> tuple[Detector, TrainingFeatures]:
    extractor = extractor or build(config)
    features = collect_features(extractor, made_up_samples("train", config.img_size), TRAIN)
    return fit_detector(config, extractor, features), features


def rows_of(features: TrainingFeatures, name: str, samples: int | None = None) -> Tensor:
    rows = features.rows(name, samples)
    return rows.take(torch.arange(len(rows)))


class Outcome(NamedTuple):
    """Detector of a configuration and its predictions for the test samples."""

    scores: Tensor  # (TEST,)
    maps: Tensor  # (TEST, S, S)
    detector: Detector
    features: TrainingFeatures
    predictions: list[Prediction]


def run_anew(config: DetectorConfig) -> Outcome:
    detector, features = fit(config)
    predictions = [detector.predict(sample) for sample in made_up_samples("test", config.img_size)]
    scores = torch.tensor([each.score for each in predictions], dtype=torch.float64)
    return Outcome(scores, torch.stack([each.anomaly_map for each in predictions]), detector, features, predictions)


run = cache(run_anew)


def changes(before: Outcome, after: Outcome) -> set[str]:
    """Names of the results (score, map) that differ; a difference by rounding only is an error."""
    found = set()
    for name, one, other in (("score", before.scores, after.scores), ("map", before.maps, after.maps)):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-6, atol=0):
            found.add(name)
        else:
            assert torch.equal(one, other), f"{name} changes by rounding only"
    return found

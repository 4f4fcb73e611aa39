"""Samples of the accuracy benchmark, and their features, kept on disk for all protocols."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset import AnomalyDataset, index_split, load_samples
from feature_extractors.config import DetectorConfig, Protocol
from feature_extractors.extractor import build_extractor
from utils import preprocessing
from utils.feature_store import grid_side, resize_patches
from utils.records import PatchFeatures
from utils.scans.files import atomic_path
from utils.synthetic import Plan, make_dataset

FULL, RGB = "DINO+Point_MAE+Fusion", "DINO"
EXTRACTION_FIELDS = ("exact_distances", "masked_pooling")  # fields of Protocol that change the features
SCAN_SIZE, DEFECT_STRENGTH = 300, 0.7
COUNTS = {"train": 16, "validation": 4, "test_good": 12, "test_defective": 2}  # test_defective: of each type of defect
SPLITS = ("train", "validation", "test")
STORED = tuple(name for name in PatchFeatures._fields if name != "fusion")

Features = dict[str, list[PatchFeatures]]  # of the samples of each split


@dataclass(frozen=True)
class Trial:
    """Samples of one class that detectors are fitted to and tested on."""

    class_name: str
    img_size: int
    seed: int | None = None  # of synthetic samples
    images: Path | None = None  # dataset folder of real images

    @property
    def name(self) -> str:
        """Name of its files, and key of its results."""
        return f"{self.class_name}-{'images' if self.seed is None else self.seed}-{self.img_size}"

    @property
    def full_method(self) -> str:
        """Method with all banks that the samples allow."""
        return FULL if self.images is None else RGB

    @property
    def set_name(self) -> str:
        """Column of the tables that the trial belongs to."""
        return f"{self.class_name} {self.img_size}" if self.seed is None else ("choosing", "confirming")[self.seed % 2]


def detector_config(trial: Trial, method: str, protocol: Protocol) -> DetectorConfig:
    return DetectorConfig(
        method_name=method,
        rgb_backbone_name="efficientnet_lite0",
        xyz_backbone_name="FPFH",
        protocol=protocol,
        img_size=trial.img_size,
        xyz_grid=trial.img_size // 4,
        random_state=0,
    )


def extract(trial: Trial, protocols: Sequence[Protocol], work_dir: Path) -> None:
    """Write the features of a trial for each of the protocols, unless they exist."""
    wanted = {features_path(trial, each, work_dir): each for each in protocols}
    missing = {path: protocol for path, protocol in wanted.items() if not path.exists()}
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = trial.images or make_samples(trial, Path(folder))
        for path, protocol in missing.items():
            with atomic_path(path) as temporary:
                save_file(extract_class(trial, protocol, root / trial.class_name), temporary)


def features_path(trial: Trial, protocol: Protocol, work_dir: Path) -> Path:
    changed = "".join(f"-{name}" for name in EXTRACTION_FIELDS if getattr(protocol, name))
    return work_dir / "features" / f"{trial.name}{changed}.safetensors"


def make_samples(trial: Trial, folder: Path) -> Path:
    """Dataset folder of cleaned synthetic samples of a trial."""
    assert trial.seed is not None
    raw, clean = folder / "raw", folder / "clean"
    sizes = {**COUNTS, "size": SCAN_SIZE, "seed": trial.seed}
    make_dataset(Plan(raw, (trial.class_name,), defect_strength=DEFECT_STRENGTH, **sizes), num_workers=2)
    preprocessing.preprocess(preprocessing.parse_args([str(raw), "--output_dir", str(clean), "--workers", "1"]))
    return clean


def extract_class(trial: Trial, protocol: Protocol, class_folder: Path) -> dict[str, Tensor]:
    """Features (N, P, C) of each split, "train/xyz" etc., and "masks" (N, S, S) and "labels" (N,) of the test split.

    Fusion patches are left out; `read_features` makes them from the others.
    """
    config = detector_config(trial, trial.full_method, protocol)
    extractor = build_extractor(config, Path(), None)
    arrays: dict[str, Tensor] = {}
    for split in SPLITS:
        files = index_split(class_folder, split, config.method.modalities)
        samples = [*load_samples(AnomalyDataset(files, config.method.modalities, trial.img_size), num_workers=0)]
        extracted = [extractor(sample) for sample in samples]
        for name in STORED:
            if getattr(extracted[0], name) is not None:
                arrays[f"{split}/{name}"] = torch.stack([getattr(each, name) for each in extracted])
    arrays["masks"] = torch.cat([sample.mask for sample in samples if sample.mask is not None])  # of the last split
    arrays["labels"] = torch.tensor([sample.label for sample in samples])
    return arrays


def read_features(trial: Trial, protocol: Protocol, work_dir: Path) -> tuple[Features, Tensor, Tensor]:
    """Features of each split, and the masks (N, S, S) and labels (N,) of the test split."""
    arrays = load_file(features_path(trial, protocol, work_dir))
    features: Features = {}
    for split in SPLITS:
        stacked = {name: arrays[key] for name in STORED if (key := f"{split}/{name}") in arrays}
        samples = zip(*stacked.values(), strict=True)
        features[split] = [with_fusion(dict(zip(stacked, patches, strict=True))) for patches in samples]
    return features, arrays["masks"], arrays["labels"]


def with_fusion(patches: Mapping[str, Tensor]) -> PatchFeatures:
    """Features of one sample with its fusion patches, which are plain concatenations without a UFF."""
    if "xyz" not in patches:
        return PatchFeatures(**patches)
    fusion = torch.cat([patches["xyz"], resize_patches(patches["rgb"], grid_side(patches["xyz"]))], dim=1)
    return PatchFeatures(**patches, fusion=fusion)

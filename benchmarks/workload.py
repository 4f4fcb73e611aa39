"""Work to be timed: networks with random weights, synthetic samples in memory, and the operations of each step."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from feature_extractors import reference
from feature_extractors.config import BANKS, DetectorConfig
from models.point_transformer import PointTransformer
from models.rgb_backbone import RgbBackbone
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.records import PatchFeatures, Sample
from utils.scans.organized_pc import resize_nearest
from utils.synthetic_data.defects import DEFECTS
from utils.synthetic_data.scanner import make_scan

METHOD, TRIPLE = "DINO+Point_MAE", "DINO+Point_MAE+Fusion"
SEED = 0
CLASS_NAME, SCAN_SIZE = "cookie", 400  # after cleaning, a quarter of the pixels hold a point
NOISE = 0.1  # times the standard deviation of a column, see `varied`


class Size(NamedTuple):
    """Sizes of both networks and of their grids."""

    timm_name: str
    img_size: int
    xyz_grid: int
    num_group: int
    group_size: int
    width: int = 384  # of the point transformer
    depth: int = 12
    heads: int = 6


SIZES = {
    "published": Size("vit_base_patch8_224.dino", 224, 56, 1024, 128),
    "tiny": Size("test_vit", 64, 16, 48, 16, width=64, depth=3, heads=2),
}


class Networks(NamedTuple):
    """Both backbones, in evaluation mode, on the CPU."""

    rgb: RgbBackbone
    xyz: PointTransformer


def build_networks(size: Size) -> Networks:
    """Both backbones with the same random weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        rgb = RgbBackbone(size.timm_name, size.img_size)
        xyz = PointTransformer(size.num_group, size.group_size, size.width, size.depth, size.heads, size.width)
    return Networks(rgb.eval(), xyz.eval())


def plain_networks(size: Size) -> dict[str, Any]:
    """The same networks in plain form, as feature_extractors.reference.extract takes them."""
    rgb, xyz = build_networks(size)
    for module in rgb.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # timm then computes softmax(q k^T / sqrt(d)) v step by step
    plain = reference.PointTransformer(size.num_group, size.group_size, size.width, size.depth, size.heads)
    plain.load_state_dict(xyz.state_dict())
    return {"rgb": rgb.model, "xyz": plain}


def plain_features(config: DetectorConfig, networks: dict[str, Any], sample: Sample) -> reference.Patches:
    assert sample.rgb is not None
    assert sample.xyz is not None
    return reference.extract(config, networks, sample.rgb, sample.xyz)


def detector_config(size: Size, precision: str, **changed: Any) -> DetectorConfig:
    """The reference protocol of the double method at this size."""
    sizes: dict[str, Any] = {name: getattr(size, name) for name in ("img_size", "xyz_grid", "num_group", "group_size")}
    config = {"method_name": METHOD, "precision": precision, "random_state": SEED, **sizes}
    return DetectorConfig(**config | changed)


def made_up_samples(count: int, split: str, size: int) -> list[Sample]:
    """Cleaned samples of one class, as the dataset returns them; every second one of the test split is defective."""
    samples = []
    for i in range(count):
        defect = list(DEFECTS)[i // 2 % len(DEFECTS)] if split == "test" and i % 2 else "good"
        path = f"{split}/{defect}/{i:03d}"
        scan = make_scan(CLASS_NAME, path, SCAN_SIZE, SEED)
        xyz, rgb, gt, _ = clean_scan(scan.xyz, scan.rgb, scan.gt, CleaningRule())
        image = Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
        sample = Sample(path, torch.from_numpy(pixels).float().permute(2, 0, 1).contiguous(), resize_nearest(xyz, size))
        if split == "test":
            assert gt is not None
            mask = np.asarray(Image.fromarray(gt).resize((size, size), Image.Resampling.NEAREST)) > 0
            sample = sample._replace(mask=torch.from_numpy(mask).byte()[None], label=int(mask.any()))
        samples.append(sample)
    return samples


def valid_points(sample: Sample) -> Tensor:
    """(N, 3) points of a sample."""
    assert sample.xyz is not None
    return sample.xyz[:, (sample.xyz != 0).all(dim=0)].T.contiguous()


def grown(patches: Tensor, rows: int) -> Tensor:
    """(rows, C): the patches (N, C), then repetitions of them with noise, in place of those of more samples."""
    generator = torch.Generator(patches.device).manual_seed(SEED)
    repetitions = [varied(patches, generator) for _ in range(math.ceil(rows / len(patches)) - 1)]
    return torch.cat([patches, *repetitions])[:rows]


def varied(patches: Tensor, generator: torch.Generator, noise: float = NOISE) -> Tensor:
    """Patches (N, C) with noise of `noise` times the standard deviation of each column; background stays exactly 0."""
    occupied = (patches != 0).any(dim=1)
    drawn = torch.randn(patches.shape, generator=generator, device=patches.device)
    return patches + drawn * (noise * patches[occupied].std(dim=0)) * occupied[:, None]


def varied_features(features: PatchFeatures, generator: torch.Generator, noise: float = NOISE) -> PatchFeatures:
    """Features as of another sample: those of a given one with noise, see `varied`."""
    patches = {name: each for name in BANKS if (each := getattr(features, name)) is not None}
    return features._replace(**{name: varied(each, generator, noise) for name, each in patches.items()})


def distance_flops(queries: int, rows: int, width: int) -> float:
    """Operations of the distances of all queries to all rows."""
    return 2.0 * queries * rows * width

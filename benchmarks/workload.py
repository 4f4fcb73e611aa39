"""What is benchmarked: networks with random weights, made-up parts in memory, and the operations of each step."""

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from feature_extractors.config import DetectorConfig
from models.point_transformer import PointTransformer
from models.rgb_backbone import VisionTransformerBackbone
from utils.cleaning.cloud_cleaning import CleaningRule, clean_scan
from utils.records import Sample
from utils.scans.organized_pc import resize_nearest
from utils.synthetic_data.parts import DEFECTS
from utils.synthetic_data.scanner import make_scan

METHOD = "DINO+Point_MAE"
SEED = 0
PART, SCAN_SIZE = "cookie", 400  # cleaned, a quarter of its pixels hold a point
NOISE = 0.1  # of the spread of a column, see `grown`


class Size(NamedTuple):
    """The numbers of both networks and of their grids."""

    timm_name: str
    img_size: int
    xyz_grid: int
    num_group: int
    group_size: int
    point_numbers: dict[str, Any]  # of PointTransformer


SIZES = {
    "published": Size("vit_base_patch8_224.dino", 224, 56, 1024, 128, {}),
    "tiny": Size("test_vit", 64, 16, 48, 16, {"width": 64, "depth": 3, "num_heads": 2, "encoder_dim": 64}),
}


class Networks(NamedTuple):
    """Both backbones, in evaluation mode, on the CPU."""

    rgb: VisionTransformerBackbone
    xyz: PointTransformer


def build_networks(size: Size) -> Networks:
    """The same random weights each time; how fast they are does not hang on what they learned."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        rgb = VisionTransformerBackbone(size.timm_name, size.img_size)
        xyz = PointTransformer(size.num_group, size.group_size, **size.point_numbers)
    return Networks(rgb.eval(), xyz.eval())


def detector_config(size: Size, precision: str, **changed: Any) -> DetectorConfig:
    """The reference protocol of the double method at this size."""
    return DetectorConfig(
        **{
            "method_name": METHOD,
            "precision": precision,
            "img_size": size.img_size,
            "xyz_grid": size.xyz_grid,
            "num_group": size.num_group,
            "group_size": size.group_size,
            "random_state": SEED,
            **changed,
        }
    )


def made_up_samples(count: int, split: str, size: int) -> list[Sample]:
    """Cleaned scans of one class, as the dataset would give them; every second one of the test split is defective."""
    samples = []
    for i in range(count):
        defect = list(DEFECTS)[i // 2 % len(DEFECTS)] if split == "test" and i % 2 else "good"
        path = f"{split}/{defect}/{i:03d}"
        scan = make_scan(PART, path, SCAN_SIZE, SEED)
        xyz, rgb, gt = clean_scan(scan.xyz, scan.rgb, scan.gt, CleaningRule())
        photo = Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(photo, np.float32) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
        sample = Sample(path, torch.from_numpy(pixels).float().permute(2, 0, 1).contiguous(), resize_nearest(xyz, size))
        if split == "test":
            assert gt is not None
            mask = np.asarray(Image.fromarray(gt).resize((size, size), Image.Resampling.NEAREST)) > 0
            sample = sample._replace(mask=torch.from_numpy(mask).byte()[None], label=int(mask.any()))
        samples.append(sample)
    return samples


def grown(patches: Tensor, rows: int) -> Tensor:
    """As many rows (rows, C) as more samples would give, of patches (N, C) of a few.

    The patches are repeated, and every repetition but the first gets Gaussian noise of NOISE times the standard
    deviation of each column over the patches with a point; patches without one stay exactly zero, as in real scans.
    """
    generator = torch.Generator(patches.device).manual_seed(SEED)
    repetitions = [varied(patches, generator) for _ in range(math.ceil(rows / len(patches)) - 1)]
    return torch.cat([patches, *repetitions])[:rows]


def varied(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Patches (N, C) with noise, see `grown`."""
    occupied = (patches != 0).any(dim=1)
    noise = torch.randn(patches.shape, generator=generator, device=patches.device).mul_(
        NOISE * patches[occupied].std(dim=0)
    )
    return noise.mul_(occupied[:, None]).add_(patches)


# Operations: a multiplication and an addition are two. What is not a product of matrices is not counted.


def transformer_flops(tokens: int, width: int, blocks: Any) -> float:
    """Each block: 24 T w^2 (qkv 6, projection 2, MLP of ratio r = 4 with 4 r) and 4 T^2 w of attention."""
    ratio = blocks[0].mlp.fc1.out_features / width
    return len(blocks) * ((8 + 4 * ratio) * tokens * width**2 + 4 * tokens**2 * width)


def vit_flops(backbone: VisionTransformerBackbone) -> float:
    """The blocks over all tokens, and the patch embedding of 3 p^2 inputs a patch."""
    model, patches = backbone.model, backbone.grid_size**2
    embedding = 2 * patches * 3 * model.patch_embed.patch_size[0] ** 2 * backbone.embed_dim
    return embedding + transformer_flops(patches + backbone.prefix_tokens, backbone.embed_dim, model.blocks)


def point_transformer_flops(network: PointTransformer) -> float:
    width = network.embed_dim // len(network.taken)
    return transformer_flops(network.num_group, width, network.blocks.blocks)


def group_encoder_flops(network: PointTransformer, plain: bool = False) -> float:
    """Convolutions 3-128-256 and 512-512-C at every point; ours has 128-512 for the second and less at every group.

    Ours adds the second moments of the 128 hidden values, of the 3 coordinates, and some products of weights.
    """
    groups, points = network.num_group, network.num_group * network.group_size
    out_dim = cast(nn.Conv1d, network.encoder.second_conv[3]).out_channels
    shared = 2 * points * (3 * 128 + 128 * 256 + 512 * out_dim)
    if plain:
        return shared + 2 * 512 * 512 * points
    at_points = 512 * 128 + 128 * 128 + 3 * 3
    at_groups = 512 * 256 + 512 * 128
    of_weights = 128 * 3 * 3 + 512 * (256 * 128 + 128 * 128)
    return shared + 2 * (at_points * points + at_groups * groups + of_weights)


def coreset_flops(rows: int, width: int, picks: int) -> float:
    """The distances of all (projected) rows to all picks as products: 2 N K n. The projection is sparse."""
    return 2.0 * rows * width * picks


def search_flops(queries: int, rows: int, width: int) -> float:
    """The distances of all queries to all rows as a product: 2 M N D."""
    return 2.0 * queries * rows * width

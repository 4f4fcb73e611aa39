"""Extraction of patch features from samples: both backbones, alignment and fusion. Fast form of `reference.extract`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from feature_extractors.alignment import align_to_patches, valid_pixels
from feature_extractors.config import DetectorConfig
from models import build_feature_fusion, build_rgb_backbone, build_xyz_backbone
from models.checkpoints import weights_checksum
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointBackbone, PointFeatures, PointTransformer
from models.rgb_backbone import RgbBackbone
from utils.errors import InputError
from utils.feature_store import resize_patches
from utils.precision import autocast, choose_precision, round_weights, without_tf32
from utils.records import PatchFeatures, Sample

BATCH_ON_CPU, BATCH_ON_GPU = 4, 16  # samples that pass through the networks together


class PatchExtractor:
    """Extractor of patch features on `device`, from networks with loaded weights.

    The method decides which backbones are needed. Without a UFF, fusion patches are plain concatenations. In bf16, the
    weights of the given networks are rounded in place.
    """

    def __init__(
        self,
        config: DetectorConfig,
        rgb_backbone: RgbBackbone | None,
        xyz_backbone: PointBackbone | None,
        feature_fusion: FeatureFusion | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.precision = choose_precision(config.precision, self.device)
        self.batch_size = BATCH_ON_CPU if self.device.type == "cpu" else BATCH_ON_GPU
        # Saved detectors and finished classes refer to the weights before rounding.
        networks = {"rgb": rgb_backbone, "xyz": xyz_backbone, "fusion": feature_fusion}
        self.checksums = {name: weights_checksum(network) for name, network in networks.items() if network is not None}
        self.rgb_backbone = rgb_backbone.to(self.device).eval() if rgb_backbone else None
        self.xyz_backbone = xyz_backbone.to(self.device).eval() if xyz_backbone else None
        self.feature_fusion = feature_fusion.to(self.device).eval() if feature_fusion else None
        # Only the blocks of the point transformer are rounded.
        point_blocks = xyz_backbone.blocks if isinstance(xyz_backbone, PointTransformer) else None
        for network in (self.rgb_backbone, point_blocks, self.feature_fusion):
            if network is not None:
                round_weights(network, self.precision)

    def with_fusion(self, feature_fusion: FeatureFusion) -> "PatchExtractor":
        """An extractor with the same backbones and another UFF."""
        other = copy(self)
        other.checksums = self.checksums | {"fusion": weights_checksum(feature_fusion)}
        other.feature_fusion = feature_fusion.to(self.device).eval()
        round_weights(other.feature_fusion, self.precision)
        return other

    @property
    def no_patches(self) -> PatchFeatures:
        """Features of a sample without patches: (0, C) for each bank."""
        networks = {"xyz": self.xyz_backbone, "rgb": self.rgb_backbone}
        widths = {name: network.embed_dim for name, network in networks.items() if network is not None}
        if "fusion" in self.config.method.banks:
            widths["fusion"] = sum(widths.values())
        return PatchFeatures(**{name: torch.empty(0, width, device=self.device) for name, width in widths.items()})

    def __call__(self, sample: Sample) -> PatchFeatures:
        """Extract the features of one sample; see `extract`."""
        return self.extract([sample])[0]

    @torch.inference_mode()
    def extract(self, samples: Sequence[Sample]) -> list[PatchFeatures]:
        """Extract the features of some samples, ideally `batch_size` of them.

        On a CPU both backbones run at the same time: each leaves cores idle between its matrix products. Raises
        InputError if a modality is missing, or a cloud has fewer valid points than the 3D backbone needs.
        """
        with ThreadPoolExecutor(1) as thread:
            pending = thread.submit(self._rgb_patches, samples)
            if self.device.type != "cpu":
                wait([pending])  # until its kernels are queued; a GPU runs them one after the other anyway
            xyz = self._xyz_patches(samples)  # (3136, C_xyz) each
            rgb = pending.result()  # (784, C_rgb) each
        fused = "fusion" in self.config.method.banks
        fusion = map(self._fuse, xyz, rgb) if fused else [None] * len(samples)  # (3136, C_xyz + C_rgb) each
        return [PatchFeatures(*each) for each in zip(rgb, xyz, fusion, strict=True)]

    @torch.inference_mode()  # needed in each thread
    def _rgb_patches(self, samples: Sequence[Sample]) -> Sequence[Tensor | None]:
        if self.rgb_backbone is None:
            return [None] * len(samples)
        images = torch.stack([self._given(sample, "rgb") for sample in samples])  # (B, 3, S, S)
        with autocast(self.device, self.precision), without_tf32():
            return list(self.rgb_backbone(images).float())

    def _xyz_patches(self, samples: Sequence[Sample]) -> Sequence[Tensor | None]:
        if self.xyz_backbone is None:
            return [None] * len(samples)
        planes = [self._given(sample, "xyz") for sample in samples]  # (3, S, S) each
        clouds = [xyz[:, valid_pixels(xyz)].T.contiguous() for xyz in planes]  # (N, 3) each
        least = self.xyz_backbone.min_points
        for sample, points in zip(samples, clouds, strict=True):
            if len(points) < least:
                grouped = isinstance(self.xyz_backbone, PointTransformer)
                lower = ", or fit with lower --num_group and --group_size" if grouped else ""
                size, name = self.config.img_size, self.config.xyz_backbone_name
                problem = f"{sample.path} has {len(points)} valid points at {size}x{size}, but {name} needs at least"
                raise InputError(f"{problem} {least}. Repair the point cloud{lower}.")
        # One at a time on a CPU, where batches gain nothing, so results do not depend on batch composition.
        batches = [[points] for points in clouds] if self.device.type == "cpu" else [clouds]
        with autocast(self.device, self.precision):
            found = [of_cloud for batch in batches for of_cloud in self.xyz_backbone(batch)]
        grid, protocol, point_ops = self.config.xyz_grid, self.config.protocol, self.config.point_ops
        switches = {"exact_distances": protocol.exact_distances, "masked": protocol.masked_pooling}
        return [
            align_to_patches(PointFeatures(features.float(), centers), xyz, grid, point_ops=point_ops, **switches)
            for (features, centers), xyz in zip(found, planes, strict=True)
        ]

    def _fuse(self, xyz: Tensor | None, rgb: Tensor | None) -> Tensor:
        assert xyz is not None and rgb is not None
        rgb = resize_patches(rgb, self.config.xyz_grid)  # (784, C_rgb) -> (3136, C_rgb)
        if self.feature_fusion is None:
            return torch.cat([xyz, rgb], dim=1)
        with autocast(self.device, self.precision):
            return self.feature_fusion.fuse(xyz, rgb).float()

    def _given(self, sample: Sample, modality: str) -> Tensor:
        """The (3, S, S) plane of a modality, on the device."""
        plane: Tensor | None = getattr(sample, modality)
        if plane is None:
            raise InputError(f"{sample.path} has no {modality} file, but {self.config.method_name} needs it. Add it.")
        return plane.to(self.device)


def build_extractor(
    config: DetectorConfig,
    checkpoint_dir: Path,
    fusion_module_path: Path | None,
    device: torch.device | str = "cpu",
    *,
    rgb_checkpoint: Path | None = None,
    xyz_checkpoint: Path | None = None,
) -> PatchExtractor:
    """Build the networks that the method needs, and only those; InputError if a checkpoint is missing or does not fit.

    The published files are in `checkpoint_dir`, unless `rgb_checkpoint` or `xyz_checkpoint` names one. Without
    `fusion_module_path`, PatchExtractor.with_fusion adds the UFF later.
    """
    needed = config.method.modalities
    rgb = xyz = fusion = None
    if "xyz" in needed:  # first, because it is quick to build, so a missing file is found at once
        settings = {name: getattr(config, name) for name in ("num_group", "group_size", "point_norm", "point_ops")}
        xyz = build_xyz_backbone(config.xyz_backbone_name, checkpoint_dir, checkpoint=xyz_checkpoint, **settings)
    if "rgb" in needed:
        name, layers = config.rgb_backbone_name, config.rgb_layers
        rgb = build_rgb_backbone(name, checkpoint_dir, config.img_size, rgb_checkpoint, layers)
    if config.use_uff and fusion_module_path is not None and xyz is not None and rgb is not None:
        fusion = build_feature_fusion(fusion_module_path, xyz_dim=xyz.embed_dim, rgb_dim=rgb.embed_dim)
    return PatchExtractor(config, rgb, xyz, fusion, device)

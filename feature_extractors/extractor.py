"""Extraction of patch features from samples: both backbones, alignment and fusion. Fast form of `reference.extract`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import copy
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.alignment import Clouds, align_to_patches, occupied_patches, pack_clouds
from feature_extractors.config import DetectorConfig
from models import build_feature_fusion, build_rgb_backbone, build_xyz_backbone
from models.checkpoints import weights_checksum
from models.feature_fusion import FeatureFusion
from models.point_transformer import PointBackbone, PointFeatures, PointTransformer
from models.rgb_backbone import RgbBackbone
from utils.errors import InputError
from utils.feature_store import resize_patches
from utils.memory import on_stream, upload
from utils.precision import autocast, choose_precision, round_weights, without_tf32
from utils.records import PatchFeatures, Sample

BATCH_ON_CPU, BATCH_ON_GPU = 4, 16  # samples that pass through the networks together


class Inputs(NamedTuple):
    """Batch of B samples on the device. Fields that the method does not need are None or empty."""

    images: Tensor | None  # (B, 3, S, S)
    clouds: list[Clouds]  # one for each batch of the 3D backbone
    occupied: list[Tensor]  # as in PatchFeatures
    copied: torch.cuda.Event | None  # recorded after the copies to a GPU


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
        on_gpu = self.device.type == "cuda"
        self.batch_size = BATCH_ON_GPU if on_gpu else BATCH_ON_CPU
        # Streams for the copies and for the RGB backbone. All other work is on the current stream.
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None
        self._beside = torch.cuda.Stream(self.device) if on_gpu else None
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
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))

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

    def extract(self, samples: Sequence[Sample]) -> list[PatchFeatures]:
        """Extract the features of some samples, ideally `batch_size` of them; raises InputError as `prepare` does."""
        return self.extract_prepared(self.prepare(samples))

    def prepare(self, samples: Sequence[Sample]) -> Inputs:
        """Copy samples to the device. On a GPU, the copies come from pinned memory and overlap with other work.

        Raises InputError if a modality is missing, or a cloud has fewer valid points than the 3D backbone needs.
        """
        images, clouds, occupied = None, [], []
        with on_stream(self._copies):
            if self.rgb_backbone is not None:
                images = upload(torch.stack([self._given(sample, "rgb") for sample in samples]), self.device)
            if self.xyz_backbone is not None:
                planes = [self._given(sample, "xyz") for sample in samples]  # (3, S, S) each
                # One at a time on a CPU, where batches gain nothing, so results do not depend on batch composition.
                step = 1 if self.device.type == "cpu" else len(planes)
                clouds = [pack_clouds(planes[i : i + step], self.device) for i in range(0, len(planes), step)]
                self._check_counts(samples, [count for batch in clouds for count in batch.counts])
                grid, masked = self.config.xyz_grid, self.config.protocol.masked_pooling
                occupied = [occupied_patches(xyz, grid, masked) for xyz in planes]
        return Inputs(images, clouds, occupied, None if self._copies is None else self._copies.record_event())

    @torch.inference_mode()
    def extract_prepared(self, inputs: Inputs) -> list[PatchFeatures]:
        """Extract the features of the samples that `prepare` has copied.

        Both backbones run at the same time. On a CPU, each leaves cores idle between its matrix products. On a GPU,
        farthest point sampling leaves most of the device idle.
        """
        with ThreadPoolExecutor(1) as thread:
            self._wait_for_copies(inputs)
            pending = thread.submit(self._rgb_patches, inputs.images)
            if self._beside is not None:
                wait([pending])  # until the kernels of the RGB backbone are queued
            xyz = [self._xyz_patches(clouds) for clouds in inputs.clouds]  # (b, 3136, C_xyz) each
            rgb = pending.result()  # (B, 784, C_rgb)
        if self._beside is not None and rgb is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)
            rgb.record_stream(torch.cuda.current_stream(self.device))
        fusion: list[Tensor] = []
        if "fusion" in self.config.method.banks and rgb is not None:
            pairs = zip(xyz, rgb.split([len(batch) for batch in xyz]), strict=True)
            fusion = [self._fuse(*pair) for pair in pairs]  # (b, 3136, C_xyz + C_rgb) each
        columns = [() if rgb is None else rgb, chain(*xyz), chain(*fusion), inputs.occupied]
        return [PatchFeatures(*each) for each in zip_longest(*columns)]

    def _wait_for_copies(self, inputs: Inputs) -> None:
        """Make both streams wait for the copies to a GPU, and keep the copied tensors until both have used them."""
        if self._beside is None or inputs.copied is None:
            return
        packed = [tensor for clouds in inputs.clouds for tensor in (clouds.points, clouds.pixels)]
        for stream in (torch.cuda.current_stream(self.device), self._beside):
            stream.wait_event(inputs.copied)
            for tensor in packed if inputs.images is None else [inputs.images, *packed]:
                tensor.record_stream(stream)

    @torch.inference_mode()  # needed in each thread
    def _rgb_patches(self, images: Tensor | None) -> Tensor | None:
        if self.rgb_backbone is None or images is None:
            return None
        with on_stream(self._beside), autocast(self.device, self.precision), without_tf32():
            return self.rgb_backbone(images).float()

    def _xyz_patches(self, clouds: Clouds) -> Tensor:
        assert self.xyz_backbone is not None
        with autocast(self.device, self.precision):
            found = self.xyz_backbone(clouds.each())
        grid, protocol, point_ops = self.config.xyz_grid, self.config.protocol, self.config.point_ops
        switches = {"exact_distances": protocol.exact_distances, "masked": protocol.masked_pooling}
        features = [PointFeatures(each.features.float(), each.centers) for each in found]
        return align_to_patches(features, clouds, grid, point_ops=point_ops, **switches)

    def _fuse(self, xyz: Tensor, rgb: Tensor) -> Tensor:
        rgb = resize_patches(rgb, self.config.xyz_grid)  # (b, 784, C_rgb) -> (b, 3136, C_rgb)
        if self.feature_fusion is None:
            return torch.cat([xyz, rgb], dim=2)
        with autocast(self.device, self.precision):
            return self.feature_fusion.fuse(xyz, rgb).float()

    def _check_counts(self, samples: Sequence[Sample], counts: Sequence[int]) -> None:
        """Raise InputError if a sample has fewer valid points than the 3D backbone needs."""
        assert self.xyz_backbone is not None
        least = self.xyz_backbone.min_points
        for sample, count in zip(samples, counts, strict=True):
            if count < least:
                grouped = isinstance(self.xyz_backbone, PointTransformer)
                lower = ", or fit with lower --num_group and --group_size" if grouped else ""
                size, name = self.config.img_size, self.config.xyz_backbone_name
                problem = f"{sample.path} has {count} valid points at {size}x{size}, but {name} needs at least"
                raise InputError(f"{problem} {least}. Repair the point cloud{lower}.")

    def _given(self, sample: Sample, modality: str) -> Tensor:
        """Plane (3, S, S) of a modality; InputError if the sample has none."""
        plane: Tensor | None = getattr(sample, modality)
        if plane is None:
            raise InputError(f"{sample.path} has no {modality} file, but {self.config.method_name} needs it. Add it.")
        return plane


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

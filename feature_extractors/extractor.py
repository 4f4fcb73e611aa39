"""From a sample to its patch features: both backbones, the alignment, the fusion."""

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
from utils.precision import autocast, choose_precision, round_weights, whole_factors
from utils.records import PatchFeatures, Sample

# Pictures that go through the RGB backbone together.
PICTURES_ON_CPU, PICTURES_ON_GPU = 4, 16


class PatchExtractor:
    """Turns samples into patch features with finished networks, which become its own: in bf16 it rounds their weights.

    Args:
        config: decides which banks are needed and how points become patches.
        rgb_backbone: None where the method needs none.
        xyz_backbone: None where the method needs none.
        feature_fusion: the trained UFF; None where the fusion bank is a plain concatenation.
        device: where the networks run and the features come to lie.
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
        self.batch_size = PICTURES_ON_CPU if self.device.type == "cpu" else PICTURES_ON_GPU
        # What a saved detector, or a class that is kept, is tied to. Now, since rounding loses the weights as they were
        # read: hashing ViT-B/8 and Point-MAE, 430 MB, takes 0.3 s.
        networks = {"rgb": rgb_backbone, "xyz": xyz_backbone, "fusion": feature_fusion}
        self.checksums = {name: weights_checksum(network) for name, network in networks.items() if network is not None}
        self.rgb_backbone = rgb_backbone.to(self.device).eval() if rgb_backbone else None
        self.xyz_backbone = xyz_backbone.to(self.device).eval() if xyz_backbone else None
        self.feature_fusion = feature_fusion.to(self.device).eval() if feature_fusion else None
        # What the point transformer does before its blocks, it does in fp32 or with its weights in other forms.
        point_blocks = xyz_backbone.blocks if isinstance(xyz_backbone, PointTransformer) else None
        for network in (self.rgb_backbone, point_blocks, self.feature_fusion):
            if network is not None:
                round_weights(network, self.precision)

    def with_fusion(self, feature_fusion: FeatureFusion) -> "PatchExtractor":
        """An extractor of the same backbones with another UFF, which becomes its own."""
        other = copy(self)
        other.checksums = self.checksums | {"fusion": weights_checksum(feature_fusion)}
        other.feature_fusion = feature_fusion.to(self.device).eval()
        round_weights(other.feature_fusion, self.precision)
        return other

    @property
    def no_patches(self) -> PatchFeatures:
        """The features of a sample without patches: (0, C) of each bank."""
        networks = {"xyz": self.xyz_backbone, "rgb": self.rgb_backbone}
        widths = {name: network.embed_dim for name, network in networks.items() if network is not None}
        if "fusion" in self.config.method.banks:
            widths["fusion"] = sum(widths.values())
        return PatchFeatures(**{name: torch.empty(0, width, device=self.device) for name, width in widths.items()})

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> PatchFeatures:
        """Extract the features of one sample; errors as of `extract`."""
        return self.extract([sample])[0]

    @torch.inference_mode()
    def extract(self, samples: Sequence[Sample]) -> list[PatchFeatures]:
        """Extract the features of some samples, best `batch_size` of them, whose pictures go through together.

        On the CPU both backbones run at the same time: each leaves cores idle where it is not multiplying.

        Raises:
            InputError: a scan has no valid point, or fewer than the 3D backbone groups.
        """
        with ThreadPoolExecutor(1) as thread:
            rgb_done = thread.submit(self._extract_rgb, samples)
            if self.device.type != "cpu":
                wait([rgb_done])  # for its kernels to be queued: they would run one after the other all the same
            of_xyz = self._extract_xyz(samples)
            of_rgb = rgb_done.result()
        fused = "fusion" in self.config.method.banks
        return [
            PatchFeatures(rgb=rgb, xyz=xyz, fusion=self._fuse(xyz, rgb) if fused else None)
            for rgb, xyz in zip(of_rgb, of_xyz, strict=True)
        ]

    @torch.inference_mode()  # of the thread that runs it
    def _extract_rgb(self, samples: Sequence[Sample]) -> Sequence[Tensor | None]:
        if self.rgb_backbone is None:
            return [None] * len(samples)
        pictures = []
        for sample in samples:
            if sample.rgb is None:
                raise InputError(f"{sample.path} has no rgb picture, which {self.config.method_name} needs")
            pictures.append(sample.rgb)
        with autocast(self.device, self.precision), whole_factors():
            return list(self.rgb_backbone(torch.stack(pictures).to(self.device)).float())

    def _extract_xyz(self, samples: Sequence[Sample]) -> Sequence[Tensor | None]:
        if self.xyz_backbone is None:
            return [None] * len(samples)
        scans = [self._scan(sample) for sample in samples]
        clouds = [xyz[:, valid_pixels(xyz)].T.contiguous() for xyz in scans]  # (N, 3) each
        for sample, points in zip(samples, clouds, strict=True):
            self._check_points(sample, len(points), self.xyz_backbone)
        # On a CPU, where they would gain nothing together, one after the other: it does not matter then what a cloud
        # comes with.
        step = 1 if self.device.type == "cpu" else len(clouds)
        found: list[PointFeatures] = []
        with autocast(self.device, self.precision):
            for begin in range(0, len(clouds), step):
                found += self.xyz_backbone(clouds[begin : begin + step])
        return [
            align_to_patches(
                of_points._replace(features=of_points.features.float()),
                xyz,
                self.config.xyz_grid,
                exact_distances=self.config.protocol.exact_distances,
                masked=self.config.protocol.masked_pooling,
                point_ops=self.config.point_ops,
            )
            for of_points, xyz in zip(found, scans, strict=True)
        ]

    def _scan(self, sample: Sample) -> Tensor:
        """(3, S, S), on the device."""
        if sample.xyz is None:
            raise InputError(f"{sample.path} has no xyz scan, which {self.config.method_name} needs")
        return sample.xyz.to(self.device)

    def _check_points(self, sample: Sample, count: int, backbone: PointBackbone) -> None:
        if count >= backbone.min_points:
            return
        mend = "mend the scan"
        if isinstance(backbone, PointTransformer):
            mend += ", or fit with lower --num_group and --group_size"
        raise InputError(
            f"{sample.path} has {count} valid points at {self.config.img_size}x{self.config.img_size}, but "
            f"{self.config.xyz_backbone_name} needs at least {backbone.min_points}: {mend}"
        )

    def _fuse(self, xyz: Tensor | None, rgb: Tensor | None) -> Tensor:
        assert xyz is not None
        assert rgb is not None
        rgb = resize_patches(rgb, self.config.xyz_grid)  # (3136, C_rgb)
        if self.feature_fusion is None:
            return torch.cat([xyz, rgb], dim=1)
        with autocast(self.device, self.precision):
            return self.feature_fusion.fuse(xyz, rgb).float()


def build_extractor(
    config: DetectorConfig,
    checkpoint_dir: Path,
    fusion_module_path: Path | None,
    device: torch.device | str = "cpu",
    *,
    rgb_checkpoint: Path | None = None,
    xyz_checkpoint: Path | None = None,
) -> PatchExtractor:
    """Build the networks that the method needs, and only those, with their weights.

    Args:
        config: names the networks.
        checkpoint_dir: where their published files are looked for.
        fusion_module_path: checkpoint of the UFF; None leaves it to PatchExtractor.with_fusion.
        device: where they run.
        rgb_checkpoint: the file of the RGB backbone itself, instead of the search.
        xyz_checkpoint: the file of the 3D backbone itself.

    Raises:
        InputError: a checkpoint is missing or does not fit.
    """
    needed = config.method.modalities
    rgb = xyz = fusion = None
    if "rgb" in needed:
        rgb = build_rgb_backbone(config.rgb_backbone_name, checkpoint_dir, config.img_size, rgb_checkpoint)
    if "xyz" in needed:
        xyz = build_xyz_backbone(
            config.xyz_backbone_name,
            checkpoint_dir,
            num_group=config.num_group,
            group_size=config.group_size,
            point_norm=config.point_norm,
            point_ops=config.point_ops,
            checkpoint=xyz_checkpoint,
        )
    if config.use_uff and fusion_module_path is not None and xyz is not None and rgb is not None:
        fusion = build_feature_fusion(fusion_module_path, xyz_dim=xyz.embed_dim, rgb_dim=rgb.embed_dim)
    return PatchExtractor(config, rgb, xyz, fusion, device)

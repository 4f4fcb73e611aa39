"""Table of the published backbones, and the functions that build networks with their weights."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import InputError

if TYPE_CHECKING:
    from models.feature_fusion import FeatureFusion
    from models.point_transformer import PointBackbone
    from models.rgb_backbone import RgbBackbone

logger = logging.getLogger(__name__)


class CheckpointFiles(NamedTuple):
    """File names of a checkpoint, and the address where its authors publish it."""

    names: tuple[str, ...]
    source: str

    def find(self, folder: Path) -> Path | None:
        """Path of the first of these files that exists in `folder`, or None."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def missing(self, folder: Path, tried: str = "") -> InputError:
        """Error for a missing file; `tried` describes a failed attempt to download it."""
        return InputError(
            f"No checkpoint {' or '.join(self.names)} in {folder}{tried}. "
            f"Download it from {self.source} and put it there."
        )

    def __str__(self) -> str:
        return f"{' or '.join(self.names)}, from {self.source}"


class RgbSpec(NamedTuple):
    """A vision transformer: its name in timm 1.0 and its weights."""

    timm_name: str
    files: CheckpointFiles
    own_normalization: bool = False  # False: that of ImageNet, as in the original for every network


class XyzSpec(NamedTuple):
    """A point transformer: its settings, the keys of its weights, and its files."""

    numbers: dict[str, Any]  # arguments of models.point_transformer.PointTransformer
    prefix: str  # its keys in the file start with this; the others belong to other networks
    left_out: tuple[str, ...]  # keys that start with one of these, after the prefix, are ignored
    files: CheckpointFiles


class BackboneRow(NamedTuple):
    """A row of --list_backbones."""

    name: str
    modality: str
    width: int
    grid: str  # rgb: patches along both sides; xyz: location of the features
    weights: str  # the path found, "absent", or the reason that no file is needed
    published: str  # file names and source; empty where no file is needed


def _dino(stem: str) -> CheckpointFiles:
    return CheckpointFiles((f"{stem}.pth",), f"https://dl.fbaipublicfiles.com/dino/{stem}/{stem}.pth")


def _augreg(stem: str) -> CheckpointFiles:
    return CheckpointFiles((f"{stem}.npz",), f"https://storage.googleapis.com/vit_models/augreg/{stem}.npz")


_B8_IN21K = "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_B8_IN1K = f"{_B8_IN21K}--imagenet2012-steps_20k-lr_0.01-res_224"

# The keys are timm's names of 2022, the flag values of the original code. None: the weights come with pip.
RGB_BACKBONES: dict[str, RgbSpec | None] = {
    "vit_base_patch8_224_dino": RgbSpec("vit_base_patch8_224.dino", _dino("dino_vitbase8_pretrain")),
    "vit_base_patch8_224": RgbSpec("vit_base_patch8_224.augreg_in21k_ft_in1k", _augreg(_B8_IN1K)),
    "vit_base_patch8_224_in21k": RgbSpec("vit_base_patch8_224.augreg_in21k", _augreg(_B8_IN21K)),
    "vit_small_patch8_224_dino": RgbSpec("vit_small_patch8_224.dino", _dino("dino_deitsmall8_pretrain")),
    "efficientnet_lite0": None,
}

# None: needs no weights.
XYZ_BACKBONES: dict[str, XyzSpec | None] = {
    "Point_MAE": XyzSpec(
        {"encoder_dim": 384},
        prefix="MAE_encoder.",
        left_out=(),
        files=CheckpointFiles(
            ("pointmae_pretrain.pth", "pretrain.pth"), "https://github.com/Pang-Yatian/Point-MAE (pre-trained model)"
        ),
    ),
    "Point_Bert": XyzSpec(
        {"encoder_dim": 256, "class_token": True},
        prefix="transformer_q.",
        left_out=("cls_head.",),
        files=CheckpointFiles(("Point-BERT.pth",), "https://github.com/lulutang0608/Point-BERT (pre-trained model)"),
    ),
    "FPFH": None,
}


def rgb_spec(name: str) -> RgbSpec | None:
    """Row of RGB_BACKBONES, or a new one for another timm vision transformer; InputError for an unknown name."""
    if name in RGB_BACKBONES:
        return RGB_BACKBONES[name]
    from models.rgb_backbone import pretrained_source

    published = pretrained_source(name)
    if published is None:
        raise InputError(
            f"rgb_backbone_name {name!r} is unknown. Choose one of {', '.join(RGB_BACKBONES)}, or the timm name "
            "of another vision transformer, such as vit_small_patch14_dinov2.lvd142m."
        )
    names = tuple(f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".npz"))
    return RgbSpec(name, CheckpointFiles(names, published), own_normalization=True)


def build_rgb_backbone(name: str, checkpoint_dir: Path, img_size: int, checkpoint: Path | None = None) -> "RgbBackbone":
    """Build the RGB backbone `name` (see `rgb_spec`) with its weights, in evaluation mode, on the CPU.

    Args:
        name: a key of RGB_BACKBONES, or the name of a vision transformer in timm.
        checkpoint_dir: folder of the published file; if that is missing, timm downloads the weights.
        img_size: side of the square input, pixels.
        checkpoint: file to load instead.

    Raises:
        InputError: unknown name, img_size that is not a multiple of the patch size, missing or wrong checkpoint.
    """
    from models import rgb_backbone

    spec = rgb_spec(name)
    if spec is None:
        if checkpoint is not None:
            raise InputError(f"{checkpoint} is not used, because the weights of {name} come with pip. Leave it out.")
        return rgb_backbone.EfficientNetLiteBackbone(img_size).eval()
    backbone = rgb_backbone.VisionTransformerBackbone(spec.timm_name, img_size, spec.own_normalization)
    path = checkpoint or spec.files.find(checkpoint_dir)
    if path is None:
        logger.info("%s is not in %s. Downloading it with timm.", " or ".join(spec.files.names), checkpoint_dir)
        try:
            path = rgb_backbone.download_weights(spec.timm_name)
        except OSError as error:
            raise spec.files.missing(checkpoint_dir, f", and timm's download failed ({error})") from None
    return rgb_backbone.load_vision_transformer(backbone, path).eval()


def build_xyz_backbone(
    name: str,
    checkpoint_dir: Path,
    *,
    num_group: int,
    group_size: int,
    point_norm: str,
    point_ops: str,
    checkpoint: Path | None = None,
) -> "PointBackbone":
    """Build the 3D backbone `name` in evaluation mode, on the CPU, from `checkpoint` or a file in `checkpoint_dir`.

    Raises:
        InputError: unknown name, missing or wrong checkpoint.
    """
    if name not in XYZ_BACKBONES:
        raise InputError(f"xyz_backbone_name {name!r} is unknown. Choose one of {', '.join(XYZ_BACKBONES)}.")
    spec = XYZ_BACKBONES[name]
    if spec is None:
        if checkpoint is not None:
            raise InputError(f"{checkpoint} is not used, because {name} needs no weights. Leave it out.")
        from models.fpfh import FpfhBackbone

        return FpfhBackbone().eval()
    from models.checkpoints import load_strict, point_transformer_state
    from models.point_transformer import PointTransformer
    from utils.checkpoint_files import read_checkpoint

    path = checkpoint or spec.files.find(checkpoint_dir)
    if path is None:
        raise spec.files.missing(checkpoint_dir)
    module = PointTransformer(num_group, group_size, point_norm=point_norm, point_ops=point_ops, **spec.numbers)
    load_strict(module, point_transformer_state(read_checkpoint(path), path, spec.prefix, spec.left_out), path)
    return module.eval()


def list_backbones(checkpoint_dir: Path, img_size: int) -> list[BackboneRow]:
    """Rows of --list_backbones, one for each named backbone. Reads no weights and downloads nothing."""
    import torch

    from models.fpfh import FpfhBackbone
    from models.point_transformer import PointTransformer
    from models.rgb_backbone import EfficientNetLiteBackbone, VisionTransformerBackbone, cached_weights

    rows = []
    for name, rgb in RGB_BACKBONES.items():
        if rgb is None:
            network: RgbBackbone = EfficientNetLiteBackbone(img_size)
            weights, published = "with pip", ""
        else:
            with torch.device("meta"):  # shapes without memory
                network = VisionTransformerBackbone(rgb.timm_name, img_size)
            path = rgb.files.find(checkpoint_dir) or cached_weights(rgb.timm_name)
            weights, published = str(path or "absent"), str(rgb.files)
        grid = f"{network.grid_size} x {network.grid_size}"
        rows.append(BackboneRow(name, "rgb", network.embed_dim, grid, weights, published))
    for name, xyz in XYZ_BACKBONES.items():
        if xyz is None:
            rows.append(BackboneRow(name, "xyz", FpfhBackbone.embed_dim, "every point", "needs none", ""))
            continue
        with torch.device("meta"):
            width = PointTransformer(**xyz.numbers).embed_dim
        weights = str(xyz.files.find(checkpoint_dir) or "absent")
        rows.append(BackboneRow(name, "xyz", width, "every group", weights, str(xyz.files)))
    return rows


def print_backbones(checkpoint_dir: Path, img_size: int) -> None:
    """Print the table of --list_backbones, and the sources of the weights."""
    from utils.reporting.tables import print_columns

    rows = list_backbones(checkpoint_dir, img_size)
    print_columns([("name", "branch", "width", "grid", "weights"), *[tuple(map(str, row[:5])) for row in rows]])
    published = [f"  {row.name}: {row.published}" for row in rows if row.published]
    print("\nPublished as:", *published, sep="\n")
    print("\nAny other timm vision transformer works by its timm name, such as vit_small_patch14_dinov2.lvd142m.")


def build_feature_fusion(path: Path, *, xyz_dim: int, rgb_dim: int) -> "FeatureFusion":
    """Build the UFF of a checkpoint written by fusion_pretrain.py, in evaluation mode, on the CPU.

    Raises:
        InputError: missing or wrong checkpoint, or one trained on features of other widths.
    """
    from models.checkpoints import feature_fusion_state
    from models.feature_fusion import FeatureFusion
    from utils.checkpoint_files import read_checkpoint

    module = FeatureFusion.from_state_dict(feature_fusion_state(read_checkpoint(path), path), path)
    if (module.xyz_dim, module.rgb_dim) != (xyz_dim, rgb_dim):
        raise InputError(
            f"{path} was trained on features {module.xyz_dim} (xyz) and {module.rgb_dim} (rgb) wide, but the "
            f"backbones give {xyz_dim} and {rgb_dim}. Train it on features of the same backbones."
        )
    return module.eval()

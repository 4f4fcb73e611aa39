"""The networks, and the one factory that knows their numbers and where their weights come from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from models.checkpoints import (
    State,
    feature_fusion_state,
    find_checkpoint,
    load_from,
    point_bert_state,
    point_mae_state,
    read_checkpoint,
)
from models.feature_fusion import FeatureFusion
from models.fpfh import FpfhBackbone
from models.point_transformer import PointBackbone, PointTransformer
from models.rgb_backbone import (
    EfficientNetLiteBackbone,
    RgbBackbone,
    VisionTransformerBackbone,
    load_vision_transformer,
)
from utils.errors import InputError

Entry = TypeVar("Entry")


class CheckpointFiles(NamedTuple):
    """The names a file goes by in the checkpoint folder, and where its authors publish it."""

    names: tuple[str, ...]
    source: str


class RgbSpec(NamedTuple):
    """A vision transformer: its name in timm 1.0 and its weights."""

    timm_name: str
    files: CheckpointFiles


class XyzSpec(NamedTuple):
    """A point transformer: the numbers that differ between them, and its weights."""

    numbers: dict[str, Any]
    state_of: Callable[[Any, Path], State]
    files: CheckpointFiles


_DINO = "https://dl.fbaipublicfiles.com/dino"
_AUGREG = "https://storage.googleapis.com/vit_models/augreg"
_B8_IN21K = "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_B8_IN1K = f"{_B8_IN21K}--imagenet2012-steps_20k-lr_0.01-res_224"

# The keys are timm's names of 2022, which the original's flags use. None: the weights come with a pip package.
RGB_BACKBONES: dict[str, RgbSpec | None] = {
    "vit_base_patch8_224_dino": RgbSpec(
        "vit_base_patch8_224.dino",
        CheckpointFiles(("dino_vitbase8_pretrain.pth",), f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    ),
    "vit_base_patch8_224": RgbSpec(
        "vit_base_patch8_224.augreg_in21k_ft_in1k",
        CheckpointFiles((f"{_B8_IN1K}.npz",), f"{_AUGREG}/{_B8_IN1K}.npz"),
    ),
    "vit_base_patch8_224_in21k": RgbSpec(
        "vit_base_patch8_224.augreg_in21k",
        CheckpointFiles((f"{_B8_IN21K}.npz",), f"{_AUGREG}/{_B8_IN21K}.npz"),
    ),
    "vit_small_patch8_224_dino": RgbSpec(
        "vit_small_patch8_224.dino",
        CheckpointFiles(
            ("dino_deitsmall8_pretrain.pth",), f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
        ),
    ),
    "efficientnet_lite0": None,
}

# None: needs no weights.
XYZ_BACKBONES: dict[str, XyzSpec | None] = {
    "Point_MAE": XyzSpec(
        {"encoder_dim": 384},
        point_mae_state,
        CheckpointFiles(
            ("pointmae_pretrain.pth", "pretrain.pth"), "https://github.com/Pang-Yatian/Point-MAE (pre-trained model)"
        ),
    ),
    "Point_Bert": XyzSpec(
        {"encoder_dim": 256, "class_token": True},
        point_bert_state,
        CheckpointFiles(("Point-BERT.pth",), "https://github.com/lulutang0608/Point-BERT (pre-trained model)"),
    ),
    "FPFH": None,
}


def build_rgb_backbone(name: str, checkpoint_dir: Path, img_size: int) -> RgbBackbone:
    """Build the RGB backbone `name` with its published weights, in evaluation mode, on the CPU.

    Raises:
        InputError: unknown name, img_size that the patches do not divide, missing or wrong checkpoint.
    """
    spec = _chosen(RGB_BACKBONES, name, "rgb_backbone_name")
    if spec is None:
        return EfficientNetLiteBackbone(img_size).eval()
    path = find_checkpoint(checkpoint_dir, spec.files.names, spec.files.source)
    return load_vision_transformer(VisionTransformerBackbone(spec.timm_name, img_size), path).eval()


def build_xyz_backbone(
    name: str, checkpoint_dir: Path, *, num_group: int, group_size: int, point_norm: str, point_ops: str
) -> PointBackbone:
    """Build the 3D backbone `name` with its published weights, in evaluation mode, on the CPU.

    Raises:
        InputError: unknown name, missing or wrong checkpoint.
    """
    spec = _chosen(XYZ_BACKBONES, name, "xyz_backbone_name")
    if spec is None:
        return FpfhBackbone().eval()
    path = find_checkpoint(checkpoint_dir, spec.files.names, spec.files.source)
    module = PointTransformer(num_group, group_size, point_norm=point_norm, point_ops=point_ops, **spec.numbers)
    load_from(path, module, spec.state_of)
    return module.eval()


def build_feature_fusion(path: Path, *, xyz_dim: int, rgb_dim: int) -> FeatureFusion:
    """Build the UFF of a checkpoint written by fusion_pretrain.py, in evaluation mode, on the CPU.

    Raises:
        InputError: missing or wrong checkpoint, or one trained on features of other widths.
    """
    module = FeatureFusion.from_state_dict(feature_fusion_state(read_checkpoint(path), path), path)
    if (module.xyz_dim, module.rgb_dim) != (xyz_dim, rgb_dim):
        raise InputError(
            f"{path} was trained on features {module.xyz_dim} (xyz) and {module.rgb_dim} (rgb) wide, but the "
            f"backbones give {xyz_dim} and {rgb_dim}: train it on features of the same backbones"
        )
    return module.eval()


def _chosen(table: Mapping[str, Entry], name: str, flag: str) -> Entry:
    if name not in table:
        raise InputError(f"{flag} {name!r} is unknown: choose one of {', '.join(table)}")
    return table[name]

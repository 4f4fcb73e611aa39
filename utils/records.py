"""Records passed between the stages: named tuples of tensors, with their shapes and units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CloudForm:
    """Form of the clouds in files, for `utils.scans.cloud_check.checked_cloud`."""

    unit: Literal["m", "mm", "cm"] = "m"
    missing_value: float | None = None  # z of a pixel without a measurement, besides 0, NaN and infinity
    camera_frame: bool = True  # x right, y down, z away from the camera; False for converted Eyecandies
    distance: float | None = None  # median distance of the class from the camera, meters; None: not checked


METERS = CloudForm()


class SampleFiles(NamedTuple):
    """Files of one sample; None where there is none."""

    path: str  # "test/hole/000" in a dataset: split, defect, stem; elsewhere the stem of its files
    rgb: Path | None = None
    xyz: Path | None = None
    mask: Path | None = None
    label: int | None = None  # 1 = defective, 0 = good; test split only
    form: CloudForm = METERS  # of `xyz`


class Sample(NamedTuple):
    """One view of one object, on the CPU, S = img_size. A modality that the method does not need is None."""

    path: str  # as in SampleFiles
    rgb: Tensor | None = None  # (3, S, S) float32, ImageNet-normalized
    xyz: Tensor | None = None  # (3, S, S) float32, meters, camera frame; an invalid pixel is exactly 0
    mask: Tensor | None = None  # (1, S, S) uint8, 1 = defect; test split only
    label: int | None = None  # 1 = defective, 0 = good; test split only


class PatchFeatures(NamedTuple):
    """Patch features of one sample, row-major over their grid. A bank that the method lacks is None."""

    rgb: Tensor | None = None  # (rgb_grid**2, C_rgb) float32
    xyz: Tensor | None = None  # (xyz_grid**2, C_xyz) float32; a patch without a valid point is exactly 0
    fusion: Tensor | None = None  # (xyz_grid**2, C_fusion) float32
    occupied: Tensor | None = None  # (xyz_grid**2,) bool, on the CPU: True for an xyz patch with a valid point


class Prediction(NamedTuple):
    """Prediction of a detector for one sample; larger means more anomalous."""

    score: float  # of the whole sample
    anomaly_map: Tensor  # (S, S) float32, per pixel
    bank_scores: dict[str, float]  # before decision fusion, by bank name
    bank_maps: dict[str, Tensor]  # (S, S) float32 each, before decision fusion


class SampleResult(NamedTuple):
    """Prediction for a test sample, with its ground truth."""

    path: str  # as in Sample
    label: int
    mask: Tensor  # (S, S) uint8
    prediction: Prediction
    # Time to extract (with all networks of the run) and score its batch, divided by the number of samples in the batch.
    # Reading files and copying samples to the device do not count.
    seconds: float

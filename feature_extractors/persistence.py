"""Saving and loading fitted detectors: a folder with config.json and state.safetensors.

The folder holds banks, statistics, one-class SVMs, thresholds and the UFF. The published backbones are not
saved: config.json keeps checksums of their weights, and loading builds them again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.detector_record import (
    FIX,
    STATE_FILE,
    DetectorRecord,
    SavedDetector,
    check_target,
    now,
    read_saved,
    read_state,
    write_detector,
)
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from models.checkpoints import State, weights_checksum
from models.feature_fusion import FeatureFusion
from models.point_ops import check_backend
from utils.distributed import choose_device
from utils.errors import InputError
from utils.feature_store import STORAGE_DTYPES
from utils.reporting.results_json import package_versions

COEFS = ("score_coef", "map_coef")


def round_banks(detector: Detector, dtype: torch.dtype) -> None:
    """Round the rows of the banks to `dtype`, so that thresholds calibrated afterwards fit the saved detector.

    Raises InputError if a bank exceeds the range of the dtype.
    """
    for name, bank in detector.banks.items():
        rows = _rows_in(dtype, name, bank).to(bank.rows.dtype)
        detector.banks[name] = MemoryBank(rows, bank.statistics, spacing=bank.spacing)


def save_detector(
    detector: Detector, folder: Path | str, *, class_name: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a fitted detector as a folder; an older detector is replaced once the new one is complete.

    `class_name` is by default the folder's name, `dtype` that of the banks' rows: float32, or float16, which changes
    the scores slightly; see `round_banks`. Raises InputError if the folder holds anything but a detector or cannot be
    written, a value is not finite, or a bank exceeds the range of the dtype.
    """
    storage = next((name for name, each in STORAGE_DTYPES.items() if each == dtype), None)
    if storage is None:
        raise InputError(f"dtype is {dtype}. Use {' or '.join(map(str, STORAGE_DTYPES.values()))}.")
    folder = Path(folder).resolve()
    check_target(folder)
    extractor, config = detector.extractor, replace(detector.config, precision=detector.extractor.precision)
    state = save(_checked_state(detector, dtype))
    record = DetectorRecord(
        class_name=class_name or folder.name,
        written=now(),
        versions=package_versions(),
        config=config,
        backbone_sha256={modality: extractor.checksums[modality] for modality in config.backbone_names},
        thresholds=detector.thresholds,
        calibration=detector.calibration,
        dtype=storage,  # type: ignore[arg-type]
        state_sha256=hashlib.sha256(state).hexdigest(),
        clouds=detector.clouds,
        cleaned=detector.cleaned,
    )
    write_detector(folder, record, state)


def load_detector(
    folder: Path | str,
    device: str = "auto",
    *,
    checkpoint_dir: Path = Path("checkpoints"),
    rgb_checkpoint: Path | None = None,
    xyz_checkpoint: Path | None = None,
    point_ops: str = "auto",
    precision: str | None = None,
) -> Detector:
    """Load a detector that `save_detector` wrote, on any device.

    For `device` see `choose_device`, for the checkpoints `build_extractor`, for `point_ops` models.point_ops. Without a
    `precision` the networks run in that of the fit.

    Raises:
        InputError: the folder is not a detector, is damaged or of another version, a backbone is missing or has other
            weights than at the fit, or the device does not exist.
    """
    chosen = choose_device(device)
    check_backend(point_ops, chosen)
    saved = read_saved(folder, point_ops=point_ops, precision=precision)
    config = saved.record.config
    extractor = build_extractor(
        config, checkpoint_dir, None, chosen, rgb_checkpoint=rgb_checkpoint, xyz_checkpoint=xyz_checkpoint
    )
    return restore_detectors({config.method_name: saved}, extractor)[config.method_name]


def restore_detectors(saved: Mapping[str, SavedDetector], extractor: PatchExtractor) -> dict[str, Detector]:
    """Restore the detectors of one class, by method. They share one extractor, which is built without a UFF.

    Raises:
        InputError: a folder is damaged, a backbone has other weights than at the fit, or two detectors hold different
            UFFs.
    """
    detectors: dict[str, Detector] = {}
    fusions: dict[str, str] = {}  # checksum of the UFF, empty without one, by folder
    for name, each in saved.items():
        _check_backbones(each, extractor)
        detectors[name], fusion = _restore(each, extractor)
        if "fusion" in each.record.config.method.banks:
            fusions[str(each.folder)] = weights_checksum(fusion) if fusion else ""
            if len(set(fusions.values())) > 1:
                raise InputError(f"{' and '.join(fusions)} hold different UFFs. Evaluate them in separate runs.")
            extractor = extractor.with_fusion(fusion) if fusion else extractor
    for detector in detectors.values():
        detector.extractor = extractor
    return detectors


def _checked_state(detector: Detector, dtype: torch.dtype) -> State:
    """Tensors of state.safetensors, on the CPU; InputError for one that would make every score NaN."""
    state: State = {}
    for name, bank in detector.banks.items():
        state[f"banks.{name}.rows"] = _rows_in(dtype, name, bank).cpu().contiguous()
        state[f"banks.{name}.statistics"] = torch.tensor(list(bank.statistics), dtype=torch.float64)
        if bank.spacing is not None:
            state[f"banks.{name}.spacing"] = bank.spacing.cpu()
    if detector.decision_fusion is not None:
        for key in COEFS:
            state[f"decision_fusion.{key}"] = torch.tensor(getattr(detector.decision_fusion, key), dtype=torch.float64)
    if detector.config.use_uff and detector.extractor.feature_fusion is not None:
        weights = detector.extractor.feature_fusion.state_dict()
        state |= {f"feature_fusion.{key}": value.to("cpu", torch.float32) for key, value in weights.items()}
    for key, value in state.items():
        if not value.isfinite().all() or (key.endswith(".statistics") and value[1] <= 0):
            raise InputError(
                f"{key} of the detector holds NaN, infinity or a standard deviation of 0, so every score would be NaN. "
                "Check its training samples."
            )
    return state


def _rows_in(dtype: torch.dtype, name: str, bank: MemoryBank) -> Tensor:
    rows = bank.rows.to(dtype)
    if bank.rows.isfinite().all() and not rows.isfinite().all():
        raise InputError(f"The {name} bank exceeds the range of {dtype}. Save it in torch.float32 (fp32).")
    return rows


def _check_backbones(saved: SavedDetector, extractor: PatchExtractor) -> None:
    """Refuse an extractor whose weights are not those of the fit."""
    for modality, name in saved.record.config.backbone_names.items():
        expected, found = saved.record.backbone_sha256.get(modality, ""), extractor.checksums[modality]
        if found != expected:
            raise InputError(
                f"{saved.folder} was fitted with other weights of {name} (SHA-256 {expected[:12]!r}, found "
                f"{found[:12]!r}). Give its file as --{modality}_checkpoint, or fit the detector again."
            )


def _restore(saved: SavedDetector, extractor: PatchExtractor) -> tuple[Detector, FeatureFusion | None]:
    """Return a detector, and its UFF or None. The caller puts the UFF into the extractor."""
    record, path = saved.record, saved.folder / STATE_FILE
    config, content = record.config, read_state(saved)
    try:
        state = load(content)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error}). {FIX}.") from None
    try:
        banks = {name: _restore_bank(name, state, config, extractor.device) for name in config.method.banks}
        decision = None
        if config.decision_fusion in ("svm", "noise"):
            score_coef, map_coef = (state[f"decision_fusion.{key}"].numpy() for key in COEFS)
            largest = config.decision_fusion == "noise"
            decision = DecisionFusion(score_coef, map_coef, *config.lambdas_of_banks, largest)
    except KeyError as error:
        raise InputError(f"{path} lacks {error}. {FIX}.") from None
    prefix = "feature_fusion."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    fusion = FeatureFusion.from_state_dict(weights, path) if config.use_uff else None
    kept = record.thresholds, record.calibration, record.clouds, record.cleaned
    return Detector(config, extractor, banks, decision, *kept), fusion


def _restore_bank(name: str, state: State, config: DetectorConfig, device: torch.device) -> MemoryBank:
    """Bank from the tensors of state.safetensors; KeyError if one is missing."""
    rows, statistics = state[f"banks.{name}.rows"], BankStatistics(*state[f"banks.{name}.statistics"].tolist())
    spacing = state[f"banks.{name}.spacing"].to(device) if config.protocol.local_spacing else None
    return MemoryBank(rows.to(device).float(), statistics, spacing=spacing)

"""Keeping a fitted detector: a folder with config.json, which a person can read, and state.safetensors.

    save_detector(detector, "detectors/bagel", class_name="bagel")
    detector = load_detector("detectors/bagel")

Banks, statistics, one-class SVMs, thresholds and the UFF are in the folder. The published backbones are not:
config.json names them with a checksum of their weights, and they are built anew.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.detector import Detector
from feature_extractors.detector_record import (
    CONFIG_FILE,
    MEND,
    SCHEMA,
    DetectorRecord,
    SavedBackbone,
    SavedDetector,
    damaged,
    read_saved,
    write_record,
)
from feature_extractors.extractor import PatchExtractor, build_extractor
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from models.checkpoints import State, weights_checksum
from models.feature_fusion import FeatureFusion
from models.point_ops import check_backend
from utils.distributed import choose_device
from utils.errors import InputError
from utils.feature_store import STORAGE_DTYPES
from utils.files import atomic_folder
from utils.report import package_versions

STATE_FILE = "state.safetensors"


def check_target(folder: Path | str) -> None:
    """Before the work whose result is saved there: a folder may be absent, empty, or hold a detector and nothing else.

    Raises:
        InputError: something else is there, which saving would delete.
    """
    folder = Path(folder)
    try:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise InputError(f"{folder} is no folder that can be read ({error.strerror}): save to another one") from None
    others = [name for name in found if name not in (CONFIG_FILE, STATE_FILE)]
    if others or (found and CONFIG_FILE not in found):
        raise InputError(
            f"{folder} is no detector but holds {', '.join((others or found)[:5])}: move these away or save to another "
            "folder, since a detector takes the place of the whole folder"
        )


def save_detector(
    detector: Detector, folder: Path | str, *, class_name: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write a fitted detector as a folder; a detector that is there is replaced once the new one is whole.

    Args:
        detector: fitted, its thresholds calibrated or not.
        folder: absent, empty, or a detector.
        class_name: what kind of part it judges.
        dtype: of the banks' rows, float32 or float16. Half precision halves the file and changes the scores slightly.

    Raises:
        InputError: the folder holds something else or cannot be written, or a bank does not fit in the dtype.
    """
    folder = Path(folder).resolve()
    check_target(folder)
    state, extractor = _state_of(detector, dtype), detector.extractor
    names = {"rgb": detector.config.rgb_backbone_name, "xyz": detector.config.xyz_backbone_name}
    try:
        with atomic_folder(folder) as temporary:
            save_file(state, temporary / STATE_FILE)
            record = DetectorRecord(
                SCHEMA,
                class_name,
                detector.config.method_name,
                datetime.now().astimezone().isoformat(timespec="seconds"),
                package_versions(),
                replace(detector.config, precision=extractor.precision),
                {
                    each: SavedBackbone(names[each], extractor.checksums[each])
                    for each in sorted(detector.config.method.modalities)
                },
                detector.thresholds,
                next(name for name, each in STORAGE_DTYPES.items() if each == dtype),
                _file_checksum(temporary / STATE_FILE),
            )
            write_record(temporary, record)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be written ({reason}): free space there or save to another folder") from None


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
    """Re-create a detector that `save_detector` wrote, on whichever device.

    Args:
        folder: what was written.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", …
        checkpoint_dir: where the backbones' published files are looked for.
        rgb_checkpoint: the file of the RGB backbone itself, instead of the search.
        xyz_checkpoint: the file of the 3D backbone itself.
        point_ops: back-end of the point searches. Not the saved one, which the device may not have.
        precision: of the networks; None: the one that the detector was fitted with.

    Raises:
        InputError: the folder is no detector, damaged or of another version, a backbone is missing or has other weights
            than the detector was fitted with, or the device is not there.
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
    """The detectors of one class over one extractor, to share its features.

    Args:
        saved: by a name of the caller's.
        extractor: built without a UFF, for a method that covers theirs.

    Raises:
        InputError: a folder is damaged, the backbones are not those that it was fitted with, or two detectors hold
            different UFFs.
    """
    detectors: dict[str, Detector] = {}
    fusions: dict[str, str] = {}  # checksum of a UFF, or none, by the folder that holds it
    for name, each in saved.items():
        _check_backbones(each, extractor)
        detectors[name], fusion = _restore(each, extractor)
        if "fusion" in each.record.config.method.banks:
            fusions[str(each.folder)] = weights_checksum(fusion) if fusion else ""
            if len(set(fusions.values())) > 1:
                raise InputError(f"{' and '.join(fusions)} hold different UFFs: evaluate them in runs of their own")
            extractor = extractor.with_fusion(fusion) if fusion else extractor
    for detector in detectors.values():
        detector.extractor = extractor
    return detectors


def _state_of(detector: Detector, dtype: torch.dtype) -> State:
    """The tensors of state.safetensors, on the CPU."""
    state: State = {}
    for name, bank in detector.banks.items():
        rows = bank.rows.to("cpu", dtype).contiguous()
        if not torch.isfinite(rows).all():
            raise InputError(f"the {name} bank holds values that are not finite in {dtype}: save it as float32")
        state[f"banks.{name}.rows"] = rows
        state[f"banks.{name}.statistics"] = torch.tensor(list(bank.statistics), dtype=torch.float64)
    if detector.decision_fusion is not None:
        for key, values in detector.decision_fusion._asdict().items():
            state[f"decision_fusion.{key}"] = torch.tensor(values, dtype=torch.float64)
    if detector.config.use_uff and detector.extractor.feature_fusion is not None:
        weights = detector.extractor.feature_fusion.state_dict()
        state |= {f"feature_fusion.{key}": value.to("cpu", torch.float32) for key, value in weights.items()}
    return state


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_backbones(saved: SavedDetector, extractor: PatchExtractor) -> None:
    for modality, backbone in saved.record.backbones.items():
        found = extractor.checksums[modality]
        if found != backbone.sha256:
            raise InputError(
                f"{saved.folder} was fitted with other weights of {backbone.name} (SHA-256 {backbone.sha256[:12]}…) "
                f"than are there now ({found[:12]}…): give the file it was fitted with as --{modality}_checkpoint or "
                "in --checkpoint_dir, or save the detector anew with main.py --save_detector"
            )


def _restore(saved: SavedDetector, extractor: PatchExtractor) -> tuple[Detector, FeatureFusion | None]:
    """A detector, and its UFF where it has one, which its extractor still lacks."""
    record, path = saved.record, saved.folder / STATE_FILE
    config, device = record.config, extractor.device
    state = _read_state(path, record.state_sha256)
    uff = {}
    if config.use_uff:
        uff = {key: state.pop(key) for key in sorted(state) if key.startswith("feature_fusion.")}
    widths = _bank_widths(extractor)
    _check_state(path, state, _expected_state(record, widths))
    banks = {}
    for name in config.method.banks:
        statistics = BankStatistics(*state[f"banks.{name}.statistics"].tolist())
        banks[name] = MemoryBank(state[f"banks.{name}.rows"].to(device).float(), statistics)
    decision = None
    if config.method.fusion == "svm":
        score_coef, map_coef, *lambdas = (state[f"decision_fusion.{key}"] for key in DecisionFusion._fields)
        score_lambdas, map_lambdas = (tuple(each.tolist()) for each in lambdas)
        decision = DecisionFusion(score_coef.numpy(), map_coef.numpy(), score_lambdas, map_lambdas)
    fusion = _restore_fusion(path, uff, widths) if config.use_uff else None
    return Detector(config, extractor, banks, decision, record.thresholds), fusion


def _read_state(path: Path, sha256: str) -> State:
    try:
        if _file_checksum(path) != sha256:
            raise damaged(
                path, f"is truncated, damaged or of another detector: its checksum is not that of {CONFIG_FILE}"
            )
        return load_file(path)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise damaged(path, reason) from None
    except SafetensorError as error:
        raise damaged(path, f"is no safetensors file ({error})") from None


def _bank_widths(extractor: PatchExtractor) -> dict[str, int]:
    """Width of a row of each bank."""
    networks = {"rgb": extractor.rgb_backbone, "xyz": extractor.xyz_backbone}
    widths = {name: network.embed_dim for name, network in networks.items() if network is not None}
    return widths | {"fusion": sum(widths.values())}


def _expected_state(
    record: DetectorRecord, widths: Mapping[str, int]
) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
    """Shape (None: any length) and dtype of each tensor but those of the UFF."""
    method = record.config.method
    expected: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {}
    for name in method.banks:
        expected[f"banks.{name}.rows"] = (None, widths[name]), STORAGE_DTYPES[record.dtype]
        expected[f"banks.{name}.statistics"] = (2,), torch.float64
    if method.fusion == "svm":
        for key in DecisionFusion._fields:
            expected[f"decision_fusion.{key}"] = (len(method.banks),), torch.float64
    return expected


def _check_state(path: Path, state: State, expected: Mapping[str, tuple[tuple[int | None, ...], torch.dtype]]) -> None:
    for what, keys in (("lacks", expected.keys() - state.keys()), ("has an unknown", state.keys() - expected.keys())):
        if keys:
            raise damaged(path, f"{what} {', '.join(sorted(keys)[:5])}")
    for key, (shape, dtype) in expected.items():
        found = state[key]
        fits = len(found.shape) == len(shape) and all(
            has == wanted if wanted is not None else has > 0 for has, wanted in zip(found.shape, shape, strict=True)
        )
        if not fits or found.dtype != dtype:
            wanted = " x ".join("any" if each is None else str(each) for each in shape)
            raise damaged(path, f"has {key} of {_described(found)}, expected {wanted} {dtype}")


def _described(tensor: Tensor) -> str:
    return f"{' x '.join(map(str, tensor.shape)) or 'no dimension'} {tensor.dtype}"


def _restore_fusion(path: Path, uff: State, widths: Mapping[str, int]) -> FeatureFusion:
    weights = {key.removeprefix("feature_fusion."): value for key, value in uff.items()}
    wrong = [key for key, value in uff.items() if value.dtype != torch.float32]
    if wrong:
        raise damaged(path, f"has {wrong[0]} of {_described(uff[wrong[0]])}, expected torch.float32")
    try:
        module = FeatureFusion.from_state_dict(weights, path)
    except InputError as error:
        raise InputError(f"{error}; {MEND}") from None
    if (module.xyz_dim, module.rgb_dim) != (widths["xyz"], widths["rgb"]):
        raise damaged(
            path,
            f"has a UFF for features {module.xyz_dim} (xyz) and {module.rgb_dim} (rgb) wide, but the backbones give "
            f"{widths['xyz']} and {widths['rgb']}",
        )
    return module

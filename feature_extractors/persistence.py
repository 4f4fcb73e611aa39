"""Keeping a fitted detector: a folder with config.json, which a person can read, and state.safetensors.

    save_detector(detector, "detectors/bagel", class_name="bagel")
    detector = load_detector("detectors/bagel")

Banks, statistics, one-class SVMs, thresholds and the UFF are in the folder. The published backbones are not:
config.json names them with a checksum of their weights, and they are built anew.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from reprlib import repr as shortened

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
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
    config_checksum,
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
from utils.report import package_versions
from utils.scans.files import atomic_folder, cannot_read, cannot_write

STATE_FILE = "state.safetensors"


def check_target(folder: Path | str) -> None:
    """Before the work whose result is saved there: a folder may be absent, empty, or hold a detector and nothing else.

    Raises:
        InputError: something else is there, which saving would delete.
    """
    folder = Path(folder)
    try:
        found = {path.name: path.is_file() for path in sorted(folder.iterdir())} if folder.exists() else {}
    except OSError as error:
        raise InputError(f"{folder} is no folder that can be read ({error.strerror}): save to another one") from None
    others = [name for name, is_file in found.items() if not is_file or name not in (CONFIG_FILE, STATE_FILE)]
    if others or (found and not _is_detector(folder)):
        raise InputError(
            f"{folder} is no detector but holds {', '.join((others or list(found))[:5])}: move these away or save to "
            "another folder, since a detector takes the place of the whole folder"
        )


def _is_detector(folder: Path) -> bool:
    """By its config.json; where that is damaged, by the file beside it."""
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return (folder / STATE_FILE).is_file()
    return isinstance(raw, dict) and "state_sha256" in raw


def round_banks(detector: Detector, dtype: torch.dtype) -> None:
    """Give a detector the banks that it will have once it is saved in `dtype`, so that its thresholds are theirs.

    Raises:
        InputError: a bank does not fit in the dtype.
    """
    for name, bank in detector.banks.items():
        rows = _rows_in(dtype, name, bank).to(bank.rows.dtype)
        detector.banks[name] = MemoryBank(rows, bank.statistics)


def save_detector(
    detector: Detector, folder: Path | str, *, class_name: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a fitted detector as a folder; a detector that is there is replaced once the new one is whole.

    Args:
        detector: fitted, its thresholds calibrated or not.
        folder: absent, empty, or a detector.
        class_name: what kind of part it judges; None: the folder's name.
        dtype: of the banks' rows, float32 or float16. Half precision halves the file and changes the scores slightly;
            see `round_banks`.

    Raises:
        InputError: the folder holds something else or cannot be written, a number is not finite, or a bank does not
            fit in the dtype.
    """
    storage = next((name for name, each in STORAGE_DTYPES.items() if each == dtype), None)
    if storage is None:
        raise InputError(f"dtype is {dtype}, expected one of {', '.join(map(str, STORAGE_DTYPES.values()))}")
    folder = Path(folder).resolve()
    check_target(folder)
    state, extractor = _state_of(detector, dtype), detector.extractor
    fault = _fault_of_values(state)
    if fault:
        raise InputError(f"the detector has {fault}, and would find every part good: check its training samples")
    content, config = save(state), replace(detector.config, precision=extractor.precision)
    try:
        with atomic_folder(folder) as temporary:
            # By way of bytes: save_file makes files that nobody but their owner may read.
            (temporary / STATE_FILE).write_bytes(content)
            record = DetectorRecord(
                SCHEMA,
                class_name or folder.name,
                detector.config.method_name,
                datetime.now().astimezone().isoformat(timespec="seconds"),
                package_versions(),
                config,
                config_checksum(config),
                {each: SavedBackbone(name, extractor.checksums[each]) for each, name in config.backbone_names.items()},
                detector.thresholds,
                storage,
                hashlib.sha256(content).hexdigest(),
            )
            write_record(temporary, record)
    except OSError as error:
        raise cannot_write(folder, error) from None


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
        state[f"banks.{name}.rows"] = _rows_in(dtype, name, bank).cpu().contiguous()
        state[f"banks.{name}.statistics"] = torch.tensor(list(bank.statistics), dtype=torch.float64)
    if detector.decision_fusion is not None:
        for key, values in detector.decision_fusion._asdict().items():
            state[f"decision_fusion.{key}"] = torch.tensor(values, dtype=torch.float64)
    if detector.config.use_uff and detector.extractor.feature_fusion is not None:
        weights = detector.extractor.feature_fusion.state_dict()
        state |= {f"feature_fusion.{key}": value.to("cpu", torch.float32) for key, value in weights.items()}
    return state


def _rows_in(dtype: torch.dtype, name: str, bank: MemoryBank) -> Tensor:
    rows = bank.rows.to(dtype)
    if bank.rows.isfinite().all() and not rows.isfinite().all():
        raise InputError(f"the {name} bank holds values that {dtype} cannot: save it in torch.float32 (fp32)")
    return rows


def _fault_of_values(state: State) -> str | None:
    """What makes every score NaN, of which none is above a threshold."""
    for key, value in state.items():
        if not value.isfinite().all():
            return f"{key} that is not finite"
        if key.endswith(".statistics") and not value[1] > 0:
            return f"{key} with a standard deviation of {value[1]}"
    return None


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
    widths = {name: patches.shape[1] for name, patches in extractor.no_patches._asdict().items() if patches is not None}
    _check_state(path, state, _expected_state(record, widths))
    fault = _fault_of_values(state | uff)
    if fault:
        raise damaged(path, f"has {fault}")
    banks = {}
    for name in config.method.banks:
        statistics = BankStatistics(*state[f"banks.{name}.statistics"].tolist())
        banks[name] = MemoryBank(state[f"banks.{name}.rows"].to(device).float(), statistics)
    decision = None
    if config.method.fusion == "svm":
        score_coef, map_coef, *lambdas = (state[f"decision_fusion.{key}"] for key in DecisionFusion._fields)
        score_lambdas, map_lambdas = (tuple(each.tolist()) for each in lambdas)
        if (score_lambdas, map_lambdas) != config.lambdas_of_banks:
            raise damaged(path, f"has other factors of decision fusion than {CONFIG_FILE}")
        decision = DecisionFusion(score_coef.numpy(), map_coef.numpy(), score_lambdas, map_lambdas)
    fusion = _restore_fusion(path, uff, widths) if config.use_uff else None
    return Detector(config, extractor, banks, decision, record.thresholds), fusion


def _read_state(path: Path, sha256: str) -> State:
    try:
        content = path.read_bytes()  # once: what is checked is what is used, whatever happens to the file
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, f"is truncated, damaged or of another detector: its checksum is not that of {CONFIG_FILE}")
    try:
        return load(content)
    except SafetensorError as error:
        raise damaged(path, f"is no safetensors file ({error})") from None


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
    unknown = [shortened(key) for key in state.keys() - expected.keys()]
    for what, keys in (("lacks", expected.keys() - state.keys()), ("has an unknown", unknown)):
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
        raise damaged(path, f"has {shortened(wrong[0])} of {_described(uff[wrong[0]])}, expected torch.float32")
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

"""Saving and loading detectors: round trips, clear errors for damaged files, and safe replacement."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest
import torch
from detector_files import seal
from safetensors.torch import load_file, save_file
from tiny_networks import (
    DOUBLE,
    RGB_DIM,
    SINGLE,
    TRIPLE,
    build,
    fit,
    made_up_samples,
    one_thread,  # noqa: F401 (a fixture)
    run,
    seeded,
    settings,
    stub_fusion,
    stub_rgb,
    stub_xyz,
)

from feature_extractors import extractor as extractor_module
from feature_extractors.config import METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.detector import Detector
from feature_extractors.detector_record import check_target, read_saved
from feature_extractors.memory_bank import BankStatistics, MemoryBank
from feature_extractors.persistence import load_detector, restore_detectors, round_banks, save_detector
from feature_extractors.thresholds import Thresholds
from models.checkpoints import weights_checksum
from models.fpfh import FpfhBackbone
from utils.errors import InputError
from utils.scans.files import atomic_folder, make_folder

THRESHOLDS = Thresholds(0.1 + 0.2, 1 / 3, 0.01, "validation", 22, 1e-7)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def stub_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks under the names of the published ones."""
    monkeypatch.setattr(extractor_module, "build_rgb_backbone", stub_rgb)
    monkeypatch.setattr(extractor_module, "build_xyz_backbone", stub_xyz)
    monkeypatch.setattr(extractor_module, "build_feature_fusion", lambda *_, **__: pytest.fail("the UFF is saved"))


def fitted(config: DetectorConfig) -> Detector:
    """Copy of a fitted detector, whose attributes a test may change."""
    found = run(config).detector
    return Detector(config, found.extractor, dict(found.banks), found.decision_fusion, THRESHOLDS)


def full() -> Detector:
    return fitted(settings(TRIPLE, use_uff=True))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved detector with every optional part."""
    folder = tmp_path_factory.mktemp("pristine") / "bagel"
    save_detector(full(), folder, class_name="bagel")
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bagel"))


def assert_same_predictions(one: Detector, other: Detector) -> None:
    for sample in made_up_samples("test", one.config.img_size):
        mine, theirs = one.predict(sample), other.predict(sample)
        assert mine.score == pytest.approx(theirs.score, rel=1e-6)
        torch.testing.assert_close(mine.anomaly_map, theirs.anomaly_map, rtol=1e-6, atol=0)
        assert mine.bank_scores == pytest.approx(theirs.bank_scores, rel=1e-6)


# Round trips


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method_name", METHODS)
def test_loaded_detector_predicts_the_same(method_name: str, protocol: str, tmp_path: Path) -> None:
    detector = fitted(settings(method_name, protocol=PROTOCOLS[protocol], use_uff="Fusion" in method_name))
    save_detector(detector, tmp_path / "saved", class_name="bagel")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "state.safetensors"]
    loaded = load_detector(tmp_path / "saved", "cpu")
    assert loaded.config == detector.config
    assert loaded.thresholds == THRESHOLDS
    assert list(loaded.banks) == list(detector.banks)
    for name, bank in detector.banks.items():
        assert torch.equal(loaded.banks[name].rows, bank.rows)
        assert loaded.banks[name].statistics == bank.statistics
    assert_same_predictions(loaded, detector)


def test_loaded_detector_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    save_detector(load_detector(saved, "cpu"), tmp_path / "again", class_name="bagel")
    assert (tmp_path / "again/state.safetensors").read_bytes() == (saved / "state.safetensors").read_bytes()
    mine, theirs = (read_saved(folder).record for folder in (tmp_path / "again", saved))
    written = {"written": theirs.written, "config_sha256": theirs.config_sha256}  # the checksum depends on the date
    assert msgspec.structs.replace(mine, **written) == theirs


def test_content_of_a_saved_detector(saved: Path) -> None:
    text = json.loads((saved / "config.json").read_text())
    assert (text["schema"], text["class_name"], text["dtype"]) == (4, "bagel", "fp32")
    assert text["config"]["method_name"] == TRIPLE
    assert text["versions"]["torch"]
    assert text["written"][:2] == "20"
    assert text["config"]["protocol"] == dict.fromkeys(text["config"]["protocol"], False)
    assert text["config"]["score_lambdas"] == [1.0, 0.1, 1.0]
    assert text["thresholds"] == asdict(THRESHOLDS)
    rgb = stub_rgb("vit_base_patch8_224_dino", saved, 32, None)
    assert text["backbone_sha256"]["rgb"] == weights_checksum(rgb)
    assert list(text["backbone_sha256"]) == ["rgb", "xyz"]
    state = load_file(saved / "state.safetensors")
    assert {value.dtype for key, value in state.items() if "statistics" in key or "decision" in key} == {torch.float64}
    assert any(key.startswith("feature_fusion.") for key in state)


def test_single_modality_saves_one_backbone(tmp_path: Path) -> None:
    save_detector(fitted(settings(SINGLE)), tmp_path / "saved", class_name="bagel")
    assert list(read_saved(tmp_path / "saved").record.backbone_sha256) == ["xyz"]
    assert load_detector(tmp_path / "saved", "cpu").extractor.rgb_backbone is None


def test_detector_without_thresholds(tmp_path: Path) -> None:
    detector = full()
    detector.thresholds = None
    save_detector(detector, tmp_path / "saved", class_name="bagel")
    assert load_detector(tmp_path / "saved", "cpu").thresholds is None


def test_half_precision_is_close_at_half_the_size(saved: Path, tmp_path: Path) -> None:
    detector = fitted(settings(DOUBLE))
    for name, dtype in (("whole", torch.float32), ("half", torch.float16)):
        save_detector(detector, tmp_path / name, class_name="bagel", dtype=dtype)
    sizes = {name: (tmp_path / name / "state.safetensors").stat().st_size for name in ("whole", "half")}
    assert sizes["half"] < 0.55 * sizes["whole"]
    loaded = load_detector(tmp_path / "half", "cpu")
    for name, bank in detector.banks.items():
        assert loaded.banks[name].rows.dtype == torch.float32
        assert torch.equal(loaded.banks[name].rows, bank.rows.half().float())
    for sample in made_up_samples("test"):
        mine, theirs = loaded.predict(sample), detector.predict(sample)
        assert mine.score != theirs.score
        assert mine.score == pytest.approx(theirs.score, rel=1e-3)


def test_overflow_in_half_precision_is_refused(tmp_path: Path) -> None:
    detector = fitted(settings(SINGLE))
    bank = detector.banks["xyz"]
    detector.banks["xyz"] = type(bank)(bank.rows * 1e6, bank.statistics)
    with pytest.raises(InputError, match=r"The xyz bank exceeds the range of torch.float16. Save it in torch.float32"):
        save_detector(detector, tmp_path / "saved", class_name="bagel", dtype=torch.float16)
    with pytest.raises(InputError, match=r"The xyz bank exceeds the range of torch.float16"):
        round_banks(detector, torch.float16)
    assert not list(tmp_path.iterdir())


def test_rounded_banks_equal_the_saved_ones(tmp_path: Path) -> None:
    detector = fitted(settings(DOUBLE))
    round_banks(detector, torch.float16)
    save_detector(detector, tmp_path / "saved", class_name="bagel", dtype=torch.float16)
    assert_same_predictions(load_detector(tmp_path / "saved", "cpu"), detector)
    assert detector.banks["xyz"].rows.dtype == torch.float32


def test_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dtype is torch.bfloat16. Use torch.float16 or torch.float32"):
        save_detector(fitted(settings(SINGLE)), tmp_path / "saved", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["rows", "mean", "std", "coef"])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, place: str, dtype: torch.dtype) -> None:
    """Such a detector would score NaN and call every sample good."""
    detector = fitted(settings(DOUBLE))
    rows, (mean, std) = detector.banks["xyz"].rows.clone(), detector.banks["xyz"].statistics
    if place == "rows":
        rows[0, 0] = torch.nan
    if place == "coef":
        fusion = detector.decision_fusion
        detector.decision_fusion = fusion._replace(score_coef=fusion.score_coef * torch.nan)
    statistics = BankStatistics(torch.inf if place == "mean" else mean, 0.0 if place == "std" else std)
    detector.banks["xyz"] = MemoryBank(rows, statistics)
    with pytest.raises(InputError, match=r"\S+ of the detector holds NaN, infinity or a standard deviation of 0"):
        save_detector(detector, tmp_path / "saved", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["image", "pixel", "typical"])
def test_thresholds_that_are_not_finite_are_not_saved(tmp_path: Path, field: str) -> None:
    detector = fitted(settings(SINGLE))
    detector.thresholds = replace(THRESHOLDS, **{field: float("nan")})
    with pytest.raises(ValueError, match=r"not JSON compliant|> 0\.0"):
        save_detector(detector, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_class_name_defaults_to_the_folder(tmp_path: Path) -> None:
    save_detector(fitted(settings(SINGLE)), tmp_path / "cookie")
    assert read_saved(tmp_path / "cookie").record.class_name == "cookie"


def test_saved_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    save_detector(fitted(settings(SINGLE)), tmp_path / "saved")
    (tmp_path / "new").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "new", *(tmp_path / "saved").iterdir())}
    assert len(modes) == 1


def test_loaded_detector_does_not_depend_on_its_file(saved: Path) -> None:
    loaded, path = load_detector(saved, "cpu"), saved / "state.safetensors"
    with path.open("r+b") as file:
        file.seek(len(path.read_bytes()) // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert_same_predictions(loaded, full())


def test_round_trip_in_low_precision(tmp_path: Path) -> None:
    """The UFF is saved after rounding; the backbones' checksums are of the weights before rounding."""
    config = settings(TRIPLE, use_uff=True, precision="bf16")
    detector = fitted(config)
    save_detector(detector, tmp_path / "saved", class_name="bagel")
    assert_same_predictions(load_detector(tmp_path / "saved", "cpu"), detector)
    assert read_saved(tmp_path / "saved").record.backbone_sha256["rgb"] == full().extractor.checksums["rgb"]
    exact = load_detector(tmp_path / "saved", "cpu", precision="fp32")
    sample = made_up_samples("test")[1]
    assert exact.predict(sample).score != detector.predict(sample).score


def test_automatic_precision_is_saved_by_name(tmp_path: Path) -> None:
    detector, _ = fit(settings(SINGLE, precision="auto"))
    save_detector(detector, tmp_path / "saved", class_name="bagel")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["config"]["precision"] == detector.extractor.precision


def test_point_ops_of_a_gpu_are_not_restored(saved: Path) -> None:
    edit(saved, lambda record: record["config"].update(point_ops="triton"))
    loaded = load_detector(saved, "cpu")
    assert loaded.config.point_ops == "auto"
    assert_same_predictions(loaded, full())
    with pytest.raises(InputError, match="--point_ops extension needs a GPU"):
        load_detector(saved, "cpu", point_ops="extension")


def test_unknown_device_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="--device 'gpu' is unknown"):
        load_detector(saved, "gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: detectors moved between CPU and GPU")
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_detectors_move_between_cpu_and_gpu(here: str, there: str, tmp_path: Path) -> None:
    config = settings(TRIPLE, use_uff=True)
    on_cpu = fitted(config)
    save_detector(on_cpu, tmp_path / "first", class_name="bagel")
    first = load_detector(tmp_path / "first", here)
    save_detector(first, tmp_path / "second", class_name="bagel")
    second = load_detector(tmp_path / "second", there)
    assert {bank.rows.device.type for bank in second.banks.values()} == {there}
    for sample in made_up_samples("test"):
        mine, theirs = second.predict(sample), on_cpu.predict(sample)
        assert mine.score == pytest.approx(theirs.score, rel=1e-3)
        torch.testing.assert_close(mine.anomaly_map, theirs.anomaly_map, rtol=0.02, atol=0.02)


# Checksums of networks


def test_checksum_depends_on_the_weights_only() -> None:
    def network() -> torch.nn.Module:
        return seeded("a", lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))

    expected = weights_checksum(network())
    assert weights_checksum(network()) == expected
    assert len(expected) == 64
    for change in (
        lambda module: module[0].weight.data[1, 2].add_(1e-6),
        lambda module: module[1].running_mean.add_(1),
        lambda module: module.half(),
        lambda module: setattr(module[0], "weight", torch.nn.Parameter(module[0].weight.reshape(3, 4))),
        lambda module: module.append(torch.nn.Linear(1, 1)),
    ):
        module = network()
        change(module)
        assert weights_checksum(module) != expected
    assert weights_checksum(FpfhBackbone()) == hashlib.sha256().hexdigest()  # it has no weights


def test_checksums_are_taken_before_rounding() -> None:
    exact, low = (build(settings(DOUBLE, precision=precision)) for precision in ("fp32", "bf16"))
    assert low.checksums == exact.checksums
    assert weights_checksum(low.rgb_backbone) != low.checksums["rgb"]


@pytest.mark.parametrize("modality", ["rgb", "xyz"])
def test_changed_weights_of_a_backbone_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch, modality: str) -> None:
    stub = {"rgb": stub_rgb, "xyz": stub_xyz}[modality]

    def changed(name: str, *rest: object, **numbers: object) -> torch.nn.Module:
        return stub(f"another {name}", *rest, **numbers)

    monkeypatch.setattr(extractor_module, f"build_{modality}_backbone", changed)
    with pytest.raises(InputError) as refusal:
        load_detector(saved, "cpu")
    message = str(refusal.value)
    assert message.startswith(f"{saved} was fitted with other weights of ")
    assert f"Give its file as --{modality}_checkpoint, or fit the detector again." in message


def test_uff_checkpoint_is_not_needed(saved: Path) -> None:
    """The fixture fails on any attempt to build a UFF from a file."""
    uff = load_detector(saved, "cpu").extractor.feature_fusion
    theirs = stub_fusion(Path("uff.pth"), xyz_dim=uff.xyz_dim, rgb_dim=RGB_DIM)
    assert weights_checksum(uff) == weights_checksum(theirs)


# Damaged files


def edit(folder: Path, change: Change) -> None:
    """Change the record, and update its checksum."""
    path = folder / "config.json"
    record = json.loads(path.read_text())
    change(record)
    seal(record)
    path.write_text(json.dumps(record))


def edit_state(folder: Path, change: Change) -> None:
    """Change the tensors, and update their checksum."""
    path = folder / "state.safetensors"
    state = load_file(path)
    state = {key: value.clone() for key, value in state.items()}
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    update_checksum(folder)


def update_checksum(folder: Path) -> None:
    digest = hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda record: record.update(state_sha256=digest))


def refused(folder: Path) -> str:
    """Error message of loading the detector, with its fix."""
    with pytest.raises(InputError) as refusal:
        load_detector(folder, "cpu")
    message = str(refusal.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400
    remedies = (
        "fit the detector again",
        "Update this",
        "Save one",
        "Name one",
        "Rename",
        "Give the one",
        "Move this",
        "Restore it",
    )
    assert any(remedy in message for remedy in remedies)
    return message.removeprefix(str(folder))


DAMAGED_CONFIGS: list[tuple[Change, str]] = [
    (lambda record: record.update(schema=5), "is from a newer version (schema 5, expected 4). Update this program."),
    (lambda record: record.update(schema=3), "is from an older version (schema 3, expected 4). Restore the folder"),
    (lambda record: record.pop("schema"), "no schema number"),
    (lambda record: record.pop("thresholds"), "missing required field `thresholds`"),
    (lambda record: record.update(note=""), "unknown field `note`"),
    (lambda record: record.update(config=[]), "Expected `object`, got `array` at `config`"),
    (lambda record: record["config"].update(img_size="32"), "Expected `int`, got `str` at `config.img_size`"),
    (lambda record: record["config"].update(use_uff=1), "Expected `bool`, got `int` at `config.use_uff`"),
    (lambda record: record["config"].update(score_lambdas=[1, 1]), "of length 3, got 2 at `config.score_lambdas`"),
    (lambda record: record["config"].update(f_coreset=2), "is damaged (--f_coreset is 2.0 at `config`)."),
    (lambda record: record["config"].update(method_name="M3DM"), "is damaged (--method_name is 'M3DM' at `config`)."),
    (lambda record: record["config"].update(method_name="\x1b" * 9999), "method_name is "),
    (lambda record: record["config"]["protocol"].update(float_blur=1), "got `int` at `config.protocol.float_blur`"),
    (lambda record: record["backbone_sha256"].update(rgb=1), "Expected `str`, got `int` at `backbone_sha256[...]`"),
    (lambda record: record["backbone_sha256"].pop("xyz"), "was fitted with other weights of Point_MAE (SHA-256 ''"),
    (lambda record: record["thresholds"].update(image=float("nan")), "NaN is not a finite number"),
    (lambda record: record["thresholds"].update(image=0), "> 0.0 at `thresholds.image`"),
    (lambda record: record["thresholds"].update(pixel=-1e-9), "> 0.0 at `thresholds.pixel`"),
    (lambda record: record["thresholds"].update(target_fpr=1.5), "< 1.0 at `thresholds.target_fpr`"),
    (lambda record: record["thresholds"].update(parts=0), ">= 1 at `thresholds.parts`"),
    (lambda record: record["thresholds"].update(source="test"), "Invalid enum value 'test' at `thresholds.source`"),
    (lambda record: record["thresholds"].pop("typical"), "missing required field `typical` at `thresholds`"),
]  # fmt: skip


def test_damaged_config_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    intact = path.read_text()
    for change, message in DAMAGED_CONFIGS:
        path.write_text(intact)
        edit(saved, change)
        assert message in refused(saved), message


def test_edited_config_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    intact = json.loads(path.read_text())
    edits: list[Change] = [
        lambda record: record["config"].update(ocsvm_nu=0.4),
        lambda record: record["thresholds"].update(image=1000.0),
        lambda record: record["thresholds"].update(target_fpr=0.2),
        lambda record: record.update(thresholds=None),
        lambda record: record.update(dtype="fp16"),
        lambda record: record.update(class_name="rope"),
        lambda record: record.update(config_sha256=""),
        lambda record: record.pop("config_sha256"),
    ]
    for number, change in enumerate(edits):
        record = json.loads(json.dumps(intact))
        change(record)
        assert record != intact, number
        path.write_text(json.dumps(record))
        assert "config.json was changed: it does not match its config_sha256" in refused(saved), number


def test_integer_for_a_float_setting_is_accepted(tmp_path: Path) -> None:
    save_detector(fitted(settings(SINGLE, f_coreset=1)), tmp_path / "saved", class_name="bagel")
    assert read_saved(tmp_path / "saved").record.config.f_coreset == 1


def test_unknown_precision_does_not_blame_the_detector(saved: Path) -> None:
    with pytest.raises(InputError, match=r"^--precision is 'fp8'. Give one of"):
        load_detector(saved, "cpu", precision="fp8")


def test_truncated_config_is_refused(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    for length in range(0, len(text) - 2, 97):
        (saved / "config.json").write_text(text[:length])
        assert "is damaged (not JSON" in refused(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("banks.rgb.rows"), "lacks 'banks.rgb.rows'"),
        (lambda state: state.pop("decision_fusion.map_coef"), "lacks 'decision_fusion.map_coef'"),
    ],
)  # fmt: skip
def test_missing_tensors_are_refused(saved: Path, change: Change, message: str) -> None:
    edit_state(saved, change)
    assert message in refused(saved)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_damaged_state_file_is_refused(saved: Path, damage: str) -> None:
    path = saved / "state.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes({"truncated": content[:-1], "flipped": content, "emptied": b""}[damage])
    assert "is damaged or of another detector: it does not match config.json" in refused(saved)


def test_state_file_of_another_format_is_refused(saved: Path) -> None:
    (saved / "state.safetensors").write_bytes(b"no tensors")
    update_checksum(saved)
    assert "is not a safetensors file" in refused(saved)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "state.safetensors").unlink()
    assert "/state.safetensors is missing" in refused(saved)
    (saved / "config.json").unlink()
    assert "is not a detector, because it has no config.json. Save one with main.py --save_detector." in refused(saved)
    shutil.rmtree(saved)
    assert "is not a detector" in refused(saved)


def test_file_of_a_detector_is_refused_with_its_folder(saved: Path) -> None:
    assert f"is a file, but a detector is a folder. Give the one around it, {saved}." in refused(saved / "config.json")


def test_folder_at_the_path_of_the_config_is_refused(saved: Path) -> None:
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    assert "/config.json cannot be read (Is a directory). Move this folder away and run" in refused(saved)


def test_parent_folder_is_refused_with_its_detectors(saved: Path) -> None:
    (saved.parent / ".cookie.m3dm.tmp").mkdir()  # left by a killed process
    (saved.parent / ".cookie.m3dm.tmp/config.json").write_text("{}")
    assert "because it has no config.json. Name one of the detectors in it (bagel)." in refused(saved.parent)


# Several detectors over one extractor


def test_detectors_of_one_class_share_the_features(tmp_path: Path) -> None:
    configs = {name: settings(name, use_uff="Fusion" in name) for name in ("DINO", DOUBLE, TRIPLE)}
    for name, config in configs.items():
        save_detector(fitted(config), tmp_path / name, class_name="bagel")
    covering = extractor_module.build_extractor(configs[TRIPLE], tmp_path, None)
    loaded = restore_detectors({name: read_saved(tmp_path / name) for name in configs}, covering)
    assert len({id(detector.extractor) for detector in loaded.values()}) == 1
    assert covering.feature_fusion is None  # the next class may have another
    for name, config in configs.items():
        assert_same_predictions(loaded[name], fitted(config))


def test_different_uffs_cannot_share_features(tmp_path: Path) -> None:
    for name, use_uff in (("Fusion", True), (TRIPLE, False)):
        save_detector(fitted(settings(name, use_uff=use_uff)), tmp_path / name, class_name="bagel")
    extractor = extractor_module.build_extractor(settings(TRIPLE), tmp_path, None)
    with pytest.raises(InputError, match=r"hold different UFFs\. Evaluate them in separate runs"):
        restore_detectors({name: read_saved(tmp_path / name) for name in ("Fusion", TRIPLE)}, extractor)


# Target folders


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_older_detector_is_replaced(saved: Path) -> None:
    save_detector(fitted(settings(SINGLE)), saved, class_name="cookie")
    assert read_saved(saved).record.class_name == "cookie"
    assert list(content(saved)) == ["config.json", "state.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["bagel"]  # no temporary folder is left


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("place", "stage"), [(Path, "write_bytes"), (Path, "write_text")])
def test_failed_write_keeps_the_older_detector(
    saved: Path, monkeypatch: pytest.MonkeyPatch, place: object, stage: str, error: BaseException
) -> None:
    before, whole = content(saved.parent), getattr(place, stage)

    def fails(*args: object, **options: object) -> None:
        whole(*args, **options)
        raise error

    monkeypatch.setattr(place, stage, fails)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as refusal:
        save_detector(fitted(settings(SINGLE)), saved, class_name="bagel")
    if expected is InputError:
        assert str(refusal.value).startswith(
            f"{saved} cannot be written (No space left on device). Free disk space and"
        )
    assert content(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["bagel"]


def test_failed_rename_restores_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fails(self: Path, other: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert content(tmp_path) == {"saved/old": b"old"}


@pytest.mark.parametrize(
    "files", [["notes.txt"], ["config.json", "state.safetensors", "notes.txt"], ["state.safetensors"]]
)
def test_folder_without_a_detector_is_not_replaced(tmp_path: Path, files: list[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"mine is not a detector and holds .*\. Save to another folder"):
        check_target(folder)
    with pytest.raises(InputError, match="is not a detector and holds"):
        save_detector(full(), folder, class_name="bagel")
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", ['{"architectures": []}', "[]", "{", None])
def test_other_config_files_do_not_make_a_detector(tmp_path: Path, text: str | None) -> None:
    """A folder named config.json does not either."""
    config = tmp_path / "model/config.json"
    config.parent.mkdir()
    if text is None:
        config.mkdir()
    else:
        config.write_text(text)
    with pytest.raises(InputError, match=r"model is not a detector and holds config.json"):
        check_target(tmp_path / "model")


@pytest.mark.parametrize("text", ["", '{"state_sha256": '])
def test_detector_with_a_damaged_config_may_be_replaced(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    check_target(saved)
    (saved / "state.safetensors").unlink()
    with pytest.raises(InputError, match=r"is not a detector and holds config.json"):
        check_target(saved)
    (saved / "state.safetensors").mkdir()
    with pytest.raises(InputError, match=r"is not a detector and holds config.json, state.safetensors"):
        check_target(saved)


def test_interrupted_save_can_be_renamed_back(saved: Path) -> None:
    """The process was killed between its two renames; the next save deletes its leftovers."""
    older = saved.rename(saved.parent / ".bagel.old")
    other = saved.parent / ".cookie.m3dm.tmp"
    for folder in (saved.parent / ".bagel.m3dm.tmp", other):
        folder.mkdir()
    assert f"Saving it was interrupted. Rename {older} to bagel" in refused(saved)
    save_detector(fitted(settings(SINGLE)), saved)
    assert sorted(saved.parent.iterdir()) == sorted([saved, other])


def test_unreadable_state_is_not_called_damaged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def fails(path: Path, *mode: str) -> IO[Any]:
        if path.name == "state.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(InputError, match=r"state.safetensors cannot be read \(Permission denied\)"):
        load_detector(saved, "cpu")


def test_read_only_folder_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    assert make_folder(tmp_path / "a/b", "--output_dir") == tmp_path / "a/b"
    assert not list((tmp_path / "a/b").iterdir())
    monkeypatch.setattr("tempfile.TemporaryFile", fails)
    with pytest.raises(InputError, match=r"b cannot be made or written \(Read-only file system\)\. Choose"):
        make_folder(tmp_path / "a/b", "--output_dir")


def test_file_at_the_target_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"Not a directory.*file"):
        save_detector(full(), tmp_path / "file", class_name="bagel")
    assert content(tmp_path) == {"file": b"mine"}


def test_empty_and_missing_folders_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/missing/folder"):
        save_detector(fitted(settings(SINGLE)), tmp_path / name, class_name="bagel")
        assert load_detector(tmp_path / name, "cpu").config.method_name == SINGLE


def test_link_to_a_detector_is_kept(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    save_detector(fitted(settings(SINGLE)), tmp_path / "link", class_name="cookie")
    assert (tmp_path / "link").is_symlink()
    assert read_saved(saved).record.class_name == "cookie"

"""Plain form of the method against the numbers recorded from the original and against the fast routines."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden_weights import INVENTORY, seeded_tensor
from numpy.typing import ArrayLike, NDArray
from tiny_networks import SIZE, TRIPLE, fit, made_up_samples, settings
from torch import Tensor, nn

from feature_extractors import reference
from feature_extractors.config import BANKS, METHODS, PROTOCOLS, DetectorConfig
from feature_extractors.reference import FeatureFusion, Patches, PointTransformer
from utils.feature_store import pair_rgb
from utils.records import PatchFeatures, Sample

TOLERANCE = 1e-3


def assert_close(ours: ArrayLike, theirs: NDArray, tolerance: float = TOLERANCE) -> None:
    """Every entry is within `tolerance` of the largest entry."""
    ours = np.asarray(ours, dtype=np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def recorded_state(file: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the recorded network whose name starts with `prefix`, by the rest of their name."""
    entries = json.loads(INVENTORY.read_text())[file]
    names = [entry for entry in entries if entry["key"].startswith(prefix)]
    return {entry["key"].removeprefix(prefix): seeded_tensor(file, **entry) for entry in names}


# Stages of one sample


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, NDArray]:
    return dict(np.load(goldens / "stages_bagel_test_hole_000.npz"))


@pytest.fixture(scope="module")
def valid(recorded: dict[str, NDArray]) -> Tensor:
    """Valid pixels (224, 224) bool."""
    pixels = torch.zeros(224 * 224, dtype=torch.bool)
    pixels[torch.from_numpy(recorded["nonzero_indices"]).long()] = True
    return pixels.view(224, 224)


@pytest.fixture(scope="module")
def points(recorded: dict[str, NDArray], valid: Tensor) -> Tensor:
    return torch.from_numpy(recorded["resized_pc"])[:, valid].T


@pytest.fixture(scope="module")
def point_transformer() -> PointTransformer:
    network = PointTransformer()
    network.load_state_dict(recorded_state("pointmae_pretrain.pth", "module.MAE_encoder."))
    return network


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    network = timm.create_model("vit_base_patch8_224.dino", num_classes=0)
    network.load_state_dict(recorded_state("dino_vitbase8_pretrain.pth"))
    return network.eval()


@pytest.fixture(scope="module")
def feature_fusion() -> FeatureFusion:
    network = FeatureFusion()
    network.load_state_dict(recorded_state("uff.pth"))
    return network


@pytest.fixture(scope="module")
def stages(recorded: dict[str, NDArray], points: Tensor, valid: Tensor, vit: nn.Module) -> dict[str, Tensor]:
    """Stages of the sample with running statistics of batch norm, as in the recorded patches."""
    network = PointTransformer()
    network.load_state_dict(recorded_state("pointmae_pretrain.pth", "module.MAE_encoder."))
    found: dict[str, Tensor] = {}
    taps = {"tokens": network.encoder, "pos": network.pos_embed}
    taps |= {f"block{i}": block for i, block in enumerate(network.blocks["blocks"].children())}
    for name, module in taps.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output}))
    with torch.inference_mode():
        found["features"], found["centers"] = network.eval()(points)
        at_points = reference.three_nn_interpolate(points, found["centers"], found["features"])
        found["interpolated"] = at_points
        found["xyz"] = reference.project_and_pool(at_points, valid, 56)
        found["rgb"] = reference.rgb_patches(vit, torch.from_numpy(recorded["img"]))
        found["rgb_resized"] = reference.resize_patches(found["rgb"], 56)
    return found


@pytest.mark.golden
def test_point_groups(recorded: dict[str, NDArray], points: Tensor) -> None:
    picks = reference.farthest_point_sample(points, 1024)
    np.testing.assert_array_equal(picks, recorded["fps_idx"])
    distance, index = reference.knn(points[picks], points, 128)
    np.testing.assert_array_equal(np.sort(index[::4], axis=1), np.sort(recorded["knn_idx"], axis=1))
    np.testing.assert_allclose(distance[:16], recorded["knn_dist_rows0_16"], rtol=1e-6, atol=1e-8)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("stage", "stride"),
    [("tokens", 16), ("pos", 64), ("block0", 128), ("block3", 128), ("block7", 128), ("block11", 128)],
)
def test_point_transformer_stages(
    recorded: dict[str, NDArray], stages: dict[str, Tensor], stage: str, stride: int
) -> None:
    assert_close(stages[stage][::stride], recorded[f"Point_MAE_eval_{stage}_s"])


@pytest.mark.golden
def test_point_features(
    recorded: dict[str, NDArray], stages: dict[str, Tensor], points: Tensor, point_transformer: PointTransformer
) -> None:
    with torch.inference_mode():
        cloud_features, _ = point_transformer(points)
    for kind, features in {"eval": stages["features"], "bntrain": cloud_features}.items():
        assert_close(features.T[:, ::64], recorded[f"Point_MAE_{kind}_feat_s"])
        assert_close(features.norm(dim=1), recorded[f"Point_MAE_{kind}_feat_norms"])


@pytest.mark.golden
def test_interpolation(recorded: dict[str, NDArray], stages: dict[str, Tensor], points: Tensor) -> None:
    columns = torch.from_numpy(recorded["interp_cols"]).long()
    assert_close(stages["interpolated"][columns].T[::16], recorded["Point_MAE_eval_interp_s"])
    assert_close(stages["interpolated"].norm(dim=1), recorded["Point_MAE_eval_interp_norms"])
    exact = reference.three_nn_interpolate(points[columns], stages["centers"], stages["features"], exact_distances=True)
    assert_close(exact.T[::16], recorded["Point_MAE_eval_interp_exact64_s"])


@pytest.mark.golden
def test_patches(recorded: dict[str, NDArray], stages: dict[str, Tensor], feature_fusion: FeatureFusion) -> None:
    assert_close(stages["xyz"][::25], recorded["xyz_patch_s"])
    assert_close(stages["xyz"].norm(dim=1), recorded["xyz_patch_norms"])
    assert_close(stages["rgb"][::12], recorded["vit_s"])
    assert_close(stages["rgb_resized"][::49], recorded["rgb_patch2_s"])
    with torch.inference_mode():
        fused = feature_fusion.fuse(stages["xyz"], stages["rgb_resized"])
    assert_close(fused[::49], recorded["uff_patch_s"])
    assert_close(fused.norm(dim=1), recorded["uff_patch_norms"])


@pytest.mark.golden
def test_contrastive_loss(goldens: Path, stages: dict[str, Tensor], feature_fusion: FeatureFusion) -> None:
    expected = json.loads((goldens / "stages_meta.json").read_text())["bagel_test_hole_000"]
    for pairing, name in (("aligned", "aligned"), ("reference", "saved")):
        with torch.inference_mode():
            heads = feature_fusion(stages["xyz"], pair_rgb(stages["rgb"], 56**2, pairing))
        loss = float(reference.contrastive_loss(*heads))
        assert loss == pytest.approx(expected[f"uff_contrastive_loss_on_{name}_patch"], rel=1e-6)


@pytest.mark.golden
def test_initial_feature_fusion(goldens: Path) -> None:
    expected = json.loads((goldens / "uff_train.json").read_text())["bagel"]["init"]["norms"]
    torch.manual_seed(0)
    norms = {name: float(value.detach().double().norm()) for name, value in FeatureFusion().named_parameters()}
    assert norms == pytest.approx(expected, rel=1e-6)


# Unit cases


@pytest.fixture(scope="module")
def unit(goldens: Path) -> dict[str, NDArray]:
    return dict(np.load(goldens / "unit.npz"))


@pytest.mark.golden
def test_sampling_skips_padding(unit: dict[str, NDArray]) -> None:
    picks = reference.farthest_point_sample(torch.from_numpy(unit["fps_skip_pts"]), 64)
    np.testing.assert_array_equal(picks, unit["fps_skip_idx"])


@pytest.mark.golden
def test_coreset(unit: dict[str, NDArray]) -> None:
    generator = np.random.RandomState(0)
    rows = generator.randn(3000, 1152).astype("f4")
    rows += np.repeat(generator.randn(30, 1152).astype("f4") * 2, 100, axis=0)
    projected = reference.random_projection(torch.from_numpy(rows), 0.9, 0)
    np.testing.assert_allclose(projected[:8], unit["coreset_Z_rows0_8"], rtol=1e-5, atol=1e-4)
    picks = reference.greedy_coreset(projected, 300)
    np.testing.assert_array_equal(picks, unit["coreset_idx_nohalf_float64"])


@pytest.mark.golden
def test_image_score(goldens: Path, unit: dict[str, NDArray]) -> None:
    expected = json.loads((goldens / "unit_meta.json").read_text())["score_s"]
    patches, rows = torch.from_numpy(unit["score_patch"]), torch.from_numpy(unit["score_bank"])
    distances, index = reference.nearest_rows(patches, rows)
    np.testing.assert_array_equal(index, unit["score_minidx"])
    for name, divisor in {"Double(/1000)": 1000.0, "add": 1.0}.items():
        score = reference.image_score(patches, distances, index, rows, divisor, 0.0)
        assert score == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.golden
def test_blur(unit: dict[str, NDArray]) -> None:
    for plane, levels, scale in zip(unit["blur_in"], unit["blur_out_q"], unit["blur_scale"], strict=True):
        blurred = reference.anomaly_map(torch.from_numpy(plane).flatten(), len(plane)).numpy() / scale * 255
        assert np.abs(blurred - levels.astype(np.float64)).max() <= 1.001


# Complete runs


@pytest.fixture(scope="module")
def golden_patches(
    golden_samples: dict[str, Sample],
    vit: nn.Module,
    point_transformer: PointTransformer,
    feature_fusion: FeatureFusion,
) -> dict[str, Patches]:
    """Patches of the recorded samples by path; takes ten seconds per sample."""
    networks = {"rgb": vit, "xyz": point_transformer, "fusion": feature_fusion}
    config = DetectorConfig(TRIPLE)
    return {path: reference.extract(config, networks, each.rgb, each.xyz) for path, each in golden_samples.items()}


def keep_results(patch: pytest.MonkeyPatch, function: str) -> list[Any]:
    """List that collects the results of a function of the reference module."""
    results: list[Any] = []
    original = getattr(reference, function)

    def spy(*arguments: Any) -> Any:
        results.append(original(*arguments))
        return results[-1]

    patch.setattr(reference, function, spy)
    return results


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_recorded_run(
    name: str, goldens: Path, golden_patches: dict[str, Patches], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coresets, scores and maps of the banks, image scores and anomaly maps match."""
    run = dict(np.load(goldens / f"run_bn_{name}.npz"))
    paths = json.loads((goldens / "runs_meta.json").read_text())[f"bn_{name}"]["test_paths"]
    stems = [path.removeprefix("bagel/").removesuffix(".png").replace("/rgb/", "/") for path in paths]
    good = [each for path, each in golden_patches.items() if path.startswith("train/")]
    config = DetectorConfig(name, random_state=0)
    coresets, of_banks = keep_results(monkeypatch, "greedy_coreset"), keep_results(monkeypatch, "score_banks")
    scores, maps = reference.fit_and_score(config, good, [golden_patches[stem] for stem in stems])

    for k, picks in enumerate(coresets):
        expected = run[f"coreset_idx_{k}"]
        assert len(picks) == len(expected)
        assert len(np.intersect1d(picks, expected)) >= 0.999 * len(expected)
    # The original's distances of training samples to their own bank lose precision, depending on the processor.
    for phase, levels, tolerance, results in (("late", 5, 5e-3, of_banks[:6]), ("test", 1, 1e-3, of_banks[6:])):
        for k, bank in enumerate(config.method.banks):
            if f"s_{phase}_{bank}" in run:
                found = [bank_scores[k] for bank_scores, _ in results]
                np.testing.assert_allclose(found, run[f"s_{phase}_{bank}"], rtol=tolerance)
            if f"blurq_{phase}_{bank}" in run:
                assert_levels([planes[..., k] for _, planes in results], run, f"{phase}_{bank}", levels)
    tolerance = 5e-3 if config.method.fusion == "svm" else 1e-3
    np.testing.assert_allclose(scores, run["image_preds"], rtol=tolerance)
    assert_close(maps[:, ::8, ::8], run["pred_sub8"], 0.01)
    np.testing.assert_allclose(np.linalg.norm(maps, axis=(1, 2)), run["pred_norm"], rtol=1e-3)


def assert_levels(planes: Iterable[NDArray], run: dict[str, NDArray], name: str, levels: int) -> None:
    """Maps are within `levels` of the recorded 8-bit images."""
    for plane, expected, scale in zip(planes, run[f"blurq_{name}"], run[f"blurscale_{name}"], strict=True):
        stride = len(plane) // len(expected)
        difference = np.abs(plane[::stride, ::stride] / scale * 255 - expected)
        assert difference.max() <= levels + 0.1, name


# Fast routines


def test_fast_routines_name_plain_forms_that_exist() -> None:
    folder = Path(reference.__file__).parent
    sources = [*folder.glob("*.py"), *(folder.parent / "models").glob("*.py")]
    named = {name for source in sources for name in re.findall(r"`reference\.(\w+)", source.read_text())}
    assert {"build_banks", "greedy_coreset", "image_score"} <= named
    assert [name for name in named if not hasattr(reference, name)] == []


@pytest.mark.parametrize("protocol", ["reference", "corrected"])
@pytest.mark.parametrize("name", METHODS)
def test_detector_equals_the_plain_form(name: str, protocol: str) -> None:
    config = settings(name, protocol=PROTOCOLS[protocol], use_uff="fusion" in METHODS[name].banks)
    detector, features = fit(config)
    good = [by_bank(features.sample(i)) for i in range(len(features))]
    tested = detector.extractor.extract(made_up_samples("test", SIZE))
    scores, maps = reference.fit_and_score(config, good, [by_bank(each) for each in tested])
    predictions = detector.predict_features(tested)
    np.testing.assert_allclose([each.score for each in predictions], scores, rtol=1e-3)
    np.testing.assert_allclose(np.stack([each.anomaly_map for each in predictions]), maps, atol=0.01 * maps.max())


def by_bank(features: PatchFeatures) -> Patches:
    return {name: patches for name in BANKS if (patches := getattr(features, name)) is not None}

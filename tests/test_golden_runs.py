"""Every method, from features to metrics, against the recorded runs of the original computation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import GoldenFeatures
from numpy.typing import NDArray
from torch import Tensor

from feature_extractors import banks
from feature_extractors import detector as detector_module
from feature_extractors.config import DetectorConfig
from feature_extractors.coreset import select_coreset
from feature_extractors.detector import Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.pipeline import fit_detector
from feature_extractors.scoring import image_scores
from feature_extractors.training_features import TrainingFeatures
from utils.metrics import evaluate
from utils.records import Prediction, Sample

RUNS = {
    "bn_DINO": {"method_name": "DINO"},
    "bn_Point_MAE": {"method_name": "Point_MAE"},
    "bn_Point_MAE_rmzero": {"method_name": "Point_MAE", "rm_zero_for_project": True},
    "bn_Fusion": {"method_name": "Fusion", "use_uff": True},
    "bn_DINO+Point_MAE": {"method_name": "DINO+Point_MAE"},
    "bn_DINO+Point_MAE+add": {"method_name": "DINO+Point_MAE+add"},
    "bn_DINO+Point_MAE+Fusion": {"method_name": "DINO+Point_MAE+Fusion", "use_uff": True},
    "bn_Triple_asy3": {"method_name": "DINO+Point_MAE+Fusion", "use_uff": True, "asy_memory_bank": 3},
    "eval_DINO+Point_MAE+Fusion": {
        "method_name": "DINO+Point_MAE+Fusion",
        "use_uff": True,
        "point_norm": "running",
    },
}


class BankResult(NamedTuple):
    """Result of scoring one sample against one bank."""

    distances: Tensor  # (N,) distance of each patch to its nearest row of the bank
    score: float
    anomaly_map: Tensor  # (224, 224)


class Run(NamedTuple):
    """Our run and the recorded run of one method."""

    recorded: dict[str, NDArray]
    meta: dict
    detector: Detector
    selections: list[NDArray]  # indices of each coreset, in the order of the banks
    results: dict[str, list[dict[str, BankResult]]]  # [phase][sample][bank]; phase: "late" (training samples), "test"
    predictions: list[Prediction]  # of the test samples
    masks: NDArray

    def bank(self, phase: str) -> list[str]:
        """Banks with recorded arrays in this phase."""
        return [name for name in self.detector.banks if f"minval_{phase}_{name}" in self.recorded]


def relative(ours: object, theirs: object) -> float:
    """Largest difference over the largest recorded magnitude."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# Extracting all features with running statistics takes a minute more. test_golden_stages covers one sample.
PARAMS = [pytest.param(name, marks=pytest.mark.slow if name.startswith("eval") else ()) for name in RUNS]


@pytest.fixture(scope="module", params=PARAMS)
def run(
    request: pytest.FixtureRequest,
    goldens: Path,
    golden_samples: dict[str, Sample],
    golden_features: GoldenFeatures,
) -> Run:
    """Fit on the golden training samples, predict the test samples, and record each coreset and all distances."""
    meta = json.loads((goldens / "runs_meta.json").read_text())[request.param]
    recorded = dict(np.load(goldens / f"run_{request.param}.npz"))
    config = DetectorConfig(random_state=0, **RUNS[request.param])
    training = [golden_features(path, config.point_norm) for path in golden_samples if path.startswith("train/")]
    stems = [path.removeprefix("bagel/").removesuffix(".png").replace("/rgb/", "/") for path in meta["test_paths"]]
    collected = TrainingFeatures(len(training))
    for each in training:
        collected.append(each)

    selections: list[NDArray] = []
    distances: list[Tensor] = []

    def select(*args: object) -> Tensor:
        selections.append(select_coreset(*args).numpy())
        return torch.from_numpy(selections[-1])

    def score(patches: Tensor, nearest: Tensor, *rest: object) -> Tensor:
        distances.append(nearest[0])
        return image_scores(patches, nearest, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banks, "select_coreset", select)
        patch.setattr(detector_module, "image_scores", score)
        detector = fit_detector(config, PatchExtractor(config, None, None), collected)
        results: dict[str, list[dict[str, BankResult]]] = {"late": [], "test": []}
        for each in training if config.method.fusion != "none" else []:
            distances.clear()
            ((scores, maps),) = detector.bank_results([each])
            results["late"].append(by_bank(detector, distances, scores, maps))
        predictions = []
        for stem in stems:
            distances.clear()
            (prediction,) = detector.predict_features([golden_features(stem, config.point_norm)])
            predictions.append(prediction)
            bank_scores, bank_maps = prediction.bank_scores.values(), prediction.bank_maps.values()
            results["test"].append(by_bank(detector, distances, bank_scores, bank_maps))
    masks = np.stack([golden_samples[stem].mask[0].numpy() for stem in stems])
    return Run(recorded, meta, detector, selections, results, predictions, masks)


def by_bank(
    detector: Detector, distances: list[Tensor], scores: Iterable[float], maps: Iterable[Tensor]
) -> dict[str, BankResult]:
    return {name: BankResult(*each) for name, *each in zip(detector.banks, distances, scores, maps, strict=True)}


pytestmark = pytest.mark.golden


def test_ground_truth_equals_the_recording(run: Run, goldens: Path) -> None:
    packed = np.unpackbits(np.load(goldens / "run_bn_DINO.npz")["gts_packed"])[: run.masks.size].reshape(
        run.masks.shape
    )
    np.testing.assert_array_equal(run.masks, packed)


def test_every_bank_was_recorded(run: Run) -> None:
    banks = set(run.detector.banks)
    assert set(run.bank("test")) == banks
    assert set(run.bank("late")) == (set() if run.detector.config.method.fusion == "none" else banks)


def test_input_of_the_image_svm(run: Run) -> None:
    """Training scores times lambdas equal the recorded input within the error by cancellation."""
    if run.detector.decision_fusion is None:
        assert run.detector.config.method.fusion != "svm"
        return
    ours = [[result.score for result in sample.values()] for sample in run.results["late"]]
    scaled = np.array(ours) * run.detector.decision_fusion.score_lambdas
    np.testing.assert_allclose(scaled, run.recorded["s_lib"], rtol=5e-3)


def test_statistics(run: Run) -> None:
    stats = run.meta["stats"]
    for name, bank in run.detector.banks.items():
        mean, std = (stats.get(f"{name}_{which}", 0.0) for which in ("mean", "std"))
        if run.detector.config.method_name == "DINO":
            mean, std = stats["mean"], stats["std"]
        if std == 0.0:  # this bank is not normalized
            mean, std = 0.0, 1.0
        assert bank.statistics == pytest.approx((mean, std), rel=1e-3)


def test_coresets(run: Run) -> None:
    """Coresets equal the recorded sets; their order may differ by rounding after 50 picks."""
    assert run.selections
    for k, ours in enumerate(run.selections):
        theirs = run.recorded[f"coreset_idx_{k}"]
        np.testing.assert_array_equal(ours[:50], theirs[:50])
        assert len(ours) == len(theirs)
        assert len(np.intersect1d(ours, theirs)) >= 0.999 * len(theirs), f"coreset {k}"


def test_bank_sizes(run: Run) -> None:
    shapes = [list(bank.rows.shape) for bank in run.detector.banks.values()]
    assert shapes == list(run.meta["bank_shapes"].values())


# Training samples against their own bank differ more, because the original's distances cancel there.
DISTANCE_TOLERANCES = {"test": 5e-3, "late": 0.03}
# Where squared distances cancel, their last digits come from the squared norms and depend on the rounding of the
# processor's matrix product. Two processors differed by 12 ulps.
CANCELED_ULPS = 16
# An SVM's number of epochs depends on these digits. Coefficients and scores differed by 0.3 % between two processors.
SVM_TOLERANCE = 5e-3


def squared_norm_ulp(bank: MemoryBank) -> float:
    """Ulp in fp32 of the bank's largest squared norm."""
    return float(np.spacing(bank.rows.square().sum(dim=1).max().numpy()))


@pytest.mark.parametrize(("phase", "tolerance"), DISTANCE_TOLERANCES.items())
def test_nearest_distances(run: Run, phase: str, tolerance: float) -> None:
    for name in run.bank(phase):
        theirs = run.recorded[f"minval_{phase}_{name}"].astype(np.float64)
        ours = torch.stack([result[name].distances for result in run.results[phase]])
        found = ours.view(theirs.shape).double().numpy()
        lost = np.abs(found**2 - theirs**2) <= CANCELED_ULPS * squared_norm_ulp(run.detector.banks[name])
        np.testing.assert_allclose(np.where(lost, theirs, found), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("phase", "levels"), [("test", 1), ("late", 5)])
def test_bank_maps_and_scores(run: Run, phase: str, levels: int) -> None:
    """Maps are within a level of the recorded 8-bit maps (training samples: five), scores within 1e-3 (5e-3).

    A training sample is so close to its own bank that the original's distances lose digits, and their rounding depends
    on the processor. So its maps may also differ by the tolerance of distances, and its scores by four ulps of the
    squared norms.
    """
    divisor = run.detector.config.method.score_divisor
    for name in run.bank(phase):
        ulp = squared_norm_ulp(run.detector.banks[name])
        for i, result in enumerate(run.results[phase]):
            _, score, plane = result[name]
            scale = float(run.recorded[f"blurscale_{phase}_{name}"][i])
            theirs = run.recorded[f"blurq_{phase}_{name}"][i].astype(np.float64)
            stride = plane.shape[-1] // theirs.shape[-1]  # most runs record every 4th pixel
            ours = plane.numpy().astype(np.float64)[::stride, ::stride] / scale * 255
            allowed = max(levels, DISTANCE_TOLERANCES["late"] / scale * 255) if phase == "late" else levels
            assert np.abs(ours - theirs).max() <= allowed + 0.1, f"{name} map of sample {i}"
            if f"s_{phase}_{name}" in run.recorded:
                recorded = run.recorded[f"s_{phase}_{name}"][i]
                rounding = 4 * ulp / (2 * scale) / divisor if phase == "late" else 0.0  # dd = d(d^2) / 2d
                near = 5e-3 if phase == "late" else 1e-3
                assert score == pytest.approx(recorded, rel=near, abs=rounding)


def test_image_scores(run: Run) -> None:
    ours = [prediction.score for prediction in run.predictions]
    tolerance = SVM_TOLERANCE if run.detector.decision_fusion else 1e-3
    np.testing.assert_allclose(ours, run.recorded["image_preds"], rtol=tolerance)


def test_fused_maps(run: Run) -> None:
    """Fused maps differ by no more than a level of each 8-bit map causes."""
    maps = np.stack([prediction.anomaly_map.numpy() for prediction in run.predictions])
    assert relative(maps[:, ::8, ::8], run.recorded["pred_sub8"]) < 0.01
    np.testing.assert_allclose(np.linalg.norm(maps, axis=(1, 2)), run.recorded["pred_norm"], rtol=1e-3)


def test_metrics(run: Run) -> None:
    maps = np.stack([prediction.anomaly_map.numpy() for prediction in run.predictions])
    metrics, _ = evaluate(
        run.recorded["image_labels"], [prediction.score for prediction in run.predictions], run.masks, maps
    )
    for key in ("image_rocauc", "pixel_rocauc", "au_pro"):
        assert metrics[key] == pytest.approx(run.meta["metrics"][key], abs=1e-3), key


def test_support_vector_machines(run: Run) -> None:
    if run.detector.decision_fusion is None:
        assert run.detector.config.method.fusion != "svm"
        return
    fusion = run.detector.decision_fusion
    np.testing.assert_allclose(fusion.score_coef, run.meta["svm"]["detect_fuser"]["coef"], rtol=SVM_TOLERANCE)
    np.testing.assert_allclose(fusion.map_coef, run.meta["svm"]["seg_fuser"]["coef"], rtol=1e-2)

"""Decision fusion against its plain form on the same rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_extractors import reference
from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion, fit_decision_fusion, fit_noise_units

SCORE_LAMBDAS, MAP_LAMBDAS = (1.0, 0.1, 2.0), (0.5, 0.2, 1.0)
NU, MAX_ITER = 0.5, 1000


def training_results(samples: int, banks: int, seed: int = 0) -> tuple[list[list[float]], list[list[Tensor]]]:
    """Scores and maps (6, 5) of training samples; each bank has another scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 4.0, 0.3])[:banks]
    scores = (1 + torch.rand(samples, banks, generator=generator)) * scale
    maps = torch.rand(samples, banks, 6, 5, generator=generator) * scale[:, None, None]
    return scores.tolist(), [list(planes) for planes in maps]


def fit(samples: int = 8, banks: int = 3, **changed: object) -> DecisionFusion:
    scores, maps = training_results(samples, banks)
    settings = {
        "score_lambdas": SCORE_LAMBDAS[:banks],
        "map_lambdas": MAP_LAMBDAS[:banks],
        "nu": NU,
        "max_iter": MAX_ITER,
    }
    return fit_decision_fusion(scores, maps, **(settings | changed))


def fuse(fusion: DecisionFusion, scores: list[float], maps: list[Tensor]) -> tuple[float, Tensor]:
    """Fuse scores as float64 tensors, like the detector does; return the score as a number."""
    score, plane = fusion.fuse([torch.tensor(each, dtype=torch.float64) for each in scores], maps)
    assert (score.shape, score.dtype) == ((), torch.float64)
    return float(score), plane


@pytest.mark.parametrize(("samples", "banks"), [(1, 2), (8, 2), (8, 3)])
def test_fuse_equals_score_samples_of_the_svms(samples: int, banks: int) -> None:
    scores, maps = training_results(samples, banks)
    score_rows = np.array(scores) * SCORE_LAMBDAS[:banks]
    pixel_rows = torch.stack([torch.stack(planes, dim=-1) for planes in maps]).double().numpy() * MAP_LAMBDAS[:banks]
    config = DetectorConfig(ocsvm_nu=NU, ocsvm_maxiter=MAX_ITER)
    score_svm = reference.one_class_svm(config, score_rows)
    map_svm = reference.one_class_svm(config, pixel_rows.reshape(-1, banks))

    fusion = fit(samples, banks)
    for test_scores, test_maps in zip(*training_results(4, banks, seed=1), strict=True):
        score, plane = fuse(fusion, test_scores, test_maps)
        row = np.array([test_scores]) * SCORE_LAMBDAS[:banks]
        assert score == pytest.approx(score_svm.score_samples(row)[0], rel=1e-12)
        pixels = torch.stack(test_maps, dim=-1).double().numpy() * MAP_LAMBDAS[:banks]
        expected = map_svm.score_samples(pixels.reshape(-1, banks)).reshape(6, 5)
        np.testing.assert_allclose(plane.numpy(), expected, rtol=1e-6)
        assert plane.dtype == torch.float32


def test_fuse_by_hand() -> None:
    fusion = DecisionFusion(np.array([2.0, 3.0]), np.array([1.0, -1.0]), (1.0, 0.1), (0.5, 10.0))
    score, plane = fuse(fusion, [5.0, 20.0], [torch.tensor([[2.0, 4.0, 0.0]]), torch.tensor([[0.1, 0.0, 1.0]])])
    assert score == pytest.approx(2 * 5 + 3 * 0.1 * 20)
    torch.testing.assert_close(plane, torch.tensor([[1.0 - 1.0, 2.0, -10.0]]))


def test_units_of_noise_by_hand() -> None:
    """The first bank's noise is 2 in scores and 10 in maps, the second's 4 and 1; a pixel of 0 is background."""
    loud, quiet = torch.full((2, 50), 10.0), torch.full((2, 50), 1.0)
    quiet[:, :25] = 0.0
    outlier = torch.cat([loud[:, :49], torch.tensor([[10.0], [1000.0]])], dim=1)
    maps = [[loud, quiet], [loud, quiet], [outlier, quiet]]
    fusion = fit_noise_units([[1.0, 4.0], [2.0, 5.0], [9.0, 3.0]], maps)
    score, plane = fuse(fusion, [6.0, 8.0], [torch.tensor([[5.0, 20.0, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]])])
    assert score == pytest.approx(6 / 2)  # not 8 / 4
    torch.testing.assert_close(plane, torch.tensor([[2.0, 2.0, 0.0]]))


def test_banks_without_noise_have_finite_weights() -> None:
    fusion = fit_noise_units([[0.0, 0.0]], [[torch.zeros(2, 2)] * 2])
    assert np.isfinite(fusion.score_coef).all()
    assert np.isfinite(fusion.map_coef).all()


def test_no_value_is_read_back_from_the_device() -> None:
    """Fusion works on the meta device, where reading a value fails."""
    scores = [torch.empty((), dtype=torch.float64, device="meta")] * 3
    score, plane = fit().fuse(scores, [torch.empty(6, 5, device="meta")] * 3)
    assert score.is_meta
    assert plane.is_meta


def test_larger_is_more_anomalous() -> None:
    fusion = fit()
    scores, maps = training_results(8, 3)
    score, plane = fuse(fusion, scores[0], maps[0])
    worse, worse_plane = fuse(fusion, [3 * each for each in scores[0]], [3 * each for each in maps[0]])
    assert worse > score > 0
    assert (worse_plane >= plane).all()


@pytest.mark.parametrize("bank", range(3))
@pytest.mark.parametrize("which", ["score_lambdas", "map_lambdas"])
def test_each_lambda_matters_to_its_own_svm(which: str, bank: int) -> None:
    values = list(SCORE_LAMBDAS if which == "score_lambdas" else MAP_LAMBDAS)
    values[bank] *= 3
    before, after = fit(), fit(**{which: tuple(values)})
    scores, maps = training_results(1, 3, seed=1)
    score, plane = fuse(before, scores[0], maps[0])
    other_score, other_plane = fuse(after, scores[0], maps[0])
    assert (score != pytest.approx(other_score, rel=1e-6)) == (which == "score_lambdas")
    assert torch.equal(plane, other_plane) == (which == "score_lambdas")


def test_the_order_of_banks_matters() -> None:
    fusion = fit()
    scores, maps = training_results(1, 3, seed=1)
    score, plane = fuse(fusion, scores[0], maps[0])
    swapped_score, swapped_plane = fuse(fusion, scores[0][::-1], maps[0][::-1])
    assert score != pytest.approx(swapped_score, rel=1e-3)
    assert not torch.allclose(plane, swapped_plane, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Maximum number of iteration reached")
@pytest.mark.parametrize("changed", [{"nu": 0.1}, {"max_iter": 1}])
def test_settings_of_the_svm_matter(changed: dict[str, float]) -> None:
    before, after = fit(), fit(**changed)
    assert not np.allclose(before.score_coef, after.score_coef, rtol=1e-3)
    assert not np.allclose(before.map_coef, after.map_coef, rtol=1e-3)


def test_the_svms_do_not_depend_on_the_global_seed() -> None:
    coefficients = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002 (tests that the global state does not matter)
        coefficients.append(fit())
    np.testing.assert_array_equal(coefficients[0].score_coef, coefficients[1].score_coef)
    np.testing.assert_array_equal(coefficients[0].map_coef, coefficients[1].map_coef)


def test_a_missing_bank_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        fuse(fit(), [1.0, 2.0], [torch.ones(2, 2)] * 2)

"""Decision layer fusion (DLF): one score and one map from those of the banks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SVM_RANDOM_STATE = 42  # seeds the order of stochastic gradient descent; --seeds does not apply to it


class DecisionFusion(NamedTuple):
    """Linear one-class SVMs: D_a for scores, D_s for pixels. Plain form: `reference.one_class_svm`.

    The anomaly score of a vector x is score_samples(x) = coef . x, larger = more anomalous, without the SVM's offset.
    """

    score_coef: np.ndarray  # (K,) float64, on the K banks' scores
    map_coef: np.ndarray  # (K,) float64, on the K banks' maps, pixel by pixel
    score_lambdas: tuple[float, ...]  # factors of the banks' scores
    map_lambdas: tuple[float, ...]

    def fuse(self, scores: Sequence[Tensor | float], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Score () float64 and map (H, W) float32 from the K scores and maps (H, W) of one sample, on their device."""
        score = _weighted_sum(scores, self.score_lambdas, self.score_coef)
        return score, _weighted_sum(maps, self.map_lambdas, self.map_coef).float()


def fit_decision_fusion(
    scores: Sequence[Sequence[float]],
    maps: Sequence[Sequence[Tensor]],
    score_lambdas: tuple[float, ...],
    map_lambdas: tuple[float, ...],
    nu: float,
    max_iter: int,
) -> DecisionFusion:
    """Fit both SVMs on N training samples with K scores and K maps (H, W) each, in float64.

    The lambdas are factors of the banks, `nu` is the allowed share of training errors, and `max_iter` the maximum
    number of epochs. Peak memory: the pixels in float64, 8 * N * H * W * K bytes, twice.
    """
    score_rows = np.stack([_weighted(row, score_lambdas) for row in scores])
    pixels = np.concatenate([_weighted([m.numpy() for m in row], map_lambdas).reshape(-1, len(row)) for row in maps])
    score_coef, map_coef = _fit_one_class(score_rows, nu, max_iter), _fit_one_class(pixels, nu, max_iter)
    return DecisionFusion(score_coef, map_coef, score_lambdas, map_lambdas)


def _weighted(values: Sequence[float] | Sequence[np.ndarray], lambdas: tuple[float, ...]) -> np.ndarray:
    """K scalars or (H, W) planes times their factors, stacked to (..., K) float64."""
    planes = [np.asarray(value, dtype=np.float64) * factor for value, factor in zip(values, lambdas, strict=True)]
    return np.stack(planes, axis=-1)


def _weighted_sum(values: Sequence[Tensor | float], lambdas: tuple[float, ...], coef: np.ndarray) -> Tensor:
    factors = zip(values, lambdas, coef.tolist(), strict=True)  # Python numbers reach a GPU without a transfer
    terms = [torch.as_tensor(value, dtype=torch.float64) * factor * c for value, factor, c in factors]
    return torch.stack(terms).sum(dim=0)


def _fit_one_class(rows: np.ndarray, nu: float, max_iter: int) -> np.ndarray:
    from sklearn.linear_model import SGDOneClassSVM

    return SGDOneClassSVM(random_state=SVM_RANDOM_STATE, nu=nu, max_iter=max_iter).fit(rows).coef_

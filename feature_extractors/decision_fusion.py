"""Decision layer fusion (DLF): one score and one map from those of the banks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NOISE_TAIL = 0.01  # share of the pixels above the noise of a map
LEAST_NOISE = 1e-12  # replaces 0, the noise of identical samples
SVM_RANDOM_STATE = 42  # seeds the order of stochastic gradient descent; --seeds does not change it


class DecisionFusion(NamedTuple):
    """Linear one-class SVMs: D_a for scores, D_s for pixels. Plain form: `reference.one_class_svm`.

    The anomaly score of a vector x is score_samples(x) = coef . x, larger = more anomalous, without the SVM's offset.
    With `largest`, it is the largest of the products instead of their sum; coef is then from `fit_noise_units`.
    """

    score_coef: np.ndarray  # (K,) float64, on the K banks' scores
    map_coef: np.ndarray  # (K,) float64, on the K banks' maps, pixel by pixel
    score_lambdas: tuple[float, ...]  # factors of the banks' scores
    map_lambdas: tuple[float, ...]
    largest: bool = False

    def fuse(self, scores: Sequence[Tensor], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Fused scores (B,) float64 and maps (B, H, W) float32 from those of K banks, on their device."""
        score = self._combine(scores, self.score_lambdas, self.score_coef)
        return score, self._combine(maps, self.map_lambdas, self.map_coef).float()

    def _combine(self, values: Sequence[Tensor], lambdas: tuple[float, ...], coef: np.ndarray) -> Tensor:
        factors = zip(values, lambdas, coef.tolist(), strict=True)  # Python numbers reach a GPU without a transfer
        terms = torch.stack([value.double() * factor * c for value, factor, c in factors])
        return terms.amax(dim=0) if self.largest else terms.sum(dim=0)


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


def fit_noise_units(scores: Sequence[Sequence[float]], maps: Sequence[Sequence[Tensor]]) -> DecisionFusion:
    """Fusion that divides each bank's scores and maps by their noise and takes the largest.

    `scores` and `maps` hold K scores and K maps (H, W) of each of N good samples, from banks without the sample's own
    patches. The noise of scores is their median. The noise of maps is the value that NOISE_TAIL of their pixels exceed;
    pixels that are 0 are background and do not count.
    """
    of_scores = [float(np.median(of_bank)) for of_bank in zip(*scores, strict=True)]
    of_maps = [_noise_of_map(torch.stack(of_bank).numpy()) for of_bank in zip(*maps, strict=True)]
    score_coef, map_coef = (1 / np.maximum(noise, LEAST_NOISE) for noise in (of_scores, of_maps))
    ones = (1.0,) * len(of_scores)
    return DecisionFusion(score_coef, map_coef, ones, ones, largest=True)


def _noise_of_map(pixels: np.ndarray) -> float:
    foreground = pixels[pixels > 0]
    return float(np.quantile(foreground, 1 - NOISE_TAIL)) if foreground.size else 0.0


def _weighted(values: Sequence[float] | Sequence[np.ndarray], lambdas: tuple[float, ...]) -> np.ndarray:
    """K scalars or (H, W) planes times their factors, stacked to (..., K) float64."""
    planes = [np.asarray(value, dtype=np.float64) * factor for value, factor in zip(values, lambdas, strict=True)]
    return np.stack(planes, axis=-1)


def _fit_one_class(rows: np.ndarray, nu: float, max_iter: int) -> np.ndarray:
    from sklearn.linear_model import SGDOneClassSVM

    return SGDOneClassSVM(random_state=SVM_RANDOM_STATE, nu=nu, max_iter=max_iter).fit(rows).coef_

"""The obvious twin of a whole class: every training sample is extracted twice, and each bank grows by torch.cat."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import SGDOneClassSVM
from torch import Tensor

from benchmarks.plain import extract, greedy_coreset, project, score_bank
from benchmarks.workload import Networks
from feature_extractors.config import DetectorConfig
from feature_extractors.pipeline import Stopwatch
from utils.metrics import evaluate as compute_metrics
from utils.records import Sample

STAGES = ("extract", "project", "pick xyz", "pick rgb", "score", "fuse", "metrics")


class Fitted(NamedTuple):
    """Two banks, the statistics they were normalized with, two one-class SVMs."""

    banks: dict[str, Tensor]
    mean: Tensor
    std: Tensor
    score_svm: SGDOneClassSVM
    map_svm: SGDOneClassSVM


def fit(
    config: DetectorConfig, networks: Networks, samples: Sequence[Sample], stages: Stopwatch, stop: int | None = None
) -> Fitted:
    """Fit the double method: every sample is extracted for the banks, and again for decision fusion."""
    libraries = {"xyz": torch.empty(0), "rgb": torch.empty(0)}
    for sample in samples:
        with stages.measure("extract"):
            patches = extract(networks, sample, config.xyz_grid)
            libraries = {name: torch.cat([rows, patches[name]]) for name, rows in libraries.items()}
    with stages.measure("project"):
        mean, std = libraries["xyz"].mean(), libraries["rgb"].std()
    banks: dict[str, Tensor] = {}
    for name, rows in libraries.items():
        n = max(int(config.f_coreset * len(banks.get("xyz", rows))), 1)
        with stages.measure("project"):
            rows = (rows - mean) / std
            projected = project(rows, config.coreset_eps, config.random_state)
        with stages.measure(f"pick {name}"):
            banks[name] = rows[greedy_coreset(projected, n, stop)]
    all_scores, all_maps = [], []
    for sample in samples:
        scores, maps = judge_banks(config, networks, (banks, mean, std), sample, stages)
        all_scores.append(scores)
        all_maps.append(maps.reshape(-1, maps.shape[-1]))
    with stages.measure("fuse"):
        svms = [
            SGDOneClassSVM(random_state=42, nu=config.ocsvm_nu, max_iter=config.ocsvm_maxiter).fit(rows)
            for rows in (np.stack(all_scores), np.concatenate(all_maps))
        ]
    return Fitted(banks, mean, std, *svms)


def judge_banks(
    config: DetectorConfig,
    networks: Networks,
    fitted: tuple[dict[str, Tensor], Tensor, Tensor],
    sample: Sample,
    stages: Stopwatch,
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted scores (2,) and maps (S, S, 2) of one sample, float64, by banks, mean and standard deviation."""
    banks, mean, std = fitted
    with stages.measure("extract"):
        patches = extract(networks, sample, config.xyz_grid)
    with stages.measure("score"):
        judged = [
            score_bank((patches[name] - mean) / std, bank, config.img_size, config.method.score_divisor)
            for name, bank in banks.items()
        ]
    scores = np.array([score for score, _ in judged]) * config.score_lambdas[:2]
    return scores, np.stack([plane.double().numpy() for _, plane in judged], axis=-1) * config.map_lambdas[:2]


def evaluate(
    config: DetectorConfig, networks: Networks, fitted: Fitted, samples: Sequence[Sample], stages: Stopwatch
) -> dict[str, Any]:
    """The metrics of the test samples."""
    judged = [judge_banks(config, networks, fitted[:3], sample, stages) for sample in samples]
    with stages.measure("fuse"):
        scores = [fitted.score_svm.score_samples(scores[None])[0] for scores, _ in judged]
        maps = [fitted.map_svm.score_samples(m.reshape(-1, m.shape[-1])).reshape(m.shape[:2]) for _, m in judged]
    with stages.measure("metrics"):
        masks = [sample.mask[0].numpy() for sample in samples if sample.mask is not None]
        return compute_metrics([int(sample.label or 0) for sample in samples], scores, masks, maps)

"""The fitted detector: memory banks and decision fusion over an extractor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_extractors.alignment import near_points
from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.scoring import anomaly_maps, image_score, top_scores
from feature_extractors.thresholds import Calibration, Thresholds
from utils.records import METERS, CloudForm, PatchFeatures, Prediction, Sample


@dataclass(eq=False)
class Detector:
    """A fitted detector of one class. Fast form of the scoring in `reference.fit_and_score`."""

    config: DetectorConfig
    extractor: PatchExtractor
    banks: dict[str, MemoryBank]  # in the order of the method's banks
    decision_fusion: DecisionFusion | None = None  # only of methods with SVMs; set once these are fitted
    thresholds: Thresholds | None = None  # set once they are calibrated
    calibration: Calibration | None = None  # set at the same time, for thresholds of another false-alarm rate
    clouds: CloudForm = METERS  # form of raw clouds, the default of predict.py
    cleaned: dict[str, bool] | None = None  # flags of the cleaning of the training samples; None: not cleaned

    def predict(self, sample: Sample) -> Prediction:
        """Score, larger = more anomalous, and anomaly map (img_size, img_size) of one sample."""
        return self.predict_features(self.extractor(sample))

    @torch.inference_mode()
    def predict_features(self, features: PatchFeatures) -> Prediction:
        """`predict` from the patch features of a sample."""
        # 1. phi and psi: score and map of each bank
        scores, maps = self._score_banks(features, "cancelling")
        # 2. D_a and D_s: one score and one map
        if self.decision_fusion is not None:
            score, fused = self.decision_fusion.fuse(list(scores), list(maps))
        else:  # "sum", or a single bank
            score, fused = scores.sum(), maps.sum(dim=0)
        *bank_scores, score = torch.cat([scores, score[None]]).tolist()  # one transfer from the device
        # Cloned, because a view would keep all maps in memory, and be pickled with all of them.
        *bank_maps, fused = (plane.clone() for plane in torch.cat([maps, fused[None]]).cpu())
        return Prediction(
            score, fused, dict(zip(self.banks, bank_scores, strict=True)), dict(zip(self.banks, bank_maps, strict=True))
        )

    @torch.inference_mode()
    def bank_results(
        self, features: PatchFeatures, left_out: int | None = None
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Image score and anomaly map (img_size, img_size) of each bank, on the CPU, for fitting decision fusion.

        The banks are used without the patches of the training sample `left_out`. Peak memory: a copy of one bank.
        """
        scores, maps = self._score_banks(features, "everywhere", left_out)
        planes = [plane.clone() for plane in maps.cpu()]
        return dict(zip(self.banks, scores.tolist(), strict=True)), dict(zip(self.banks, planes, strict=True))

    def _score_banks(
        self, features: PatchFeatures, expanded: str, left_out: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores (K,) float64 and maps (K, img_size, img_size) float32; `expanded` as in MemoryBank.nearest."""
        size, protocol = self.config.img_size, self.config.protocol
        results = [self._score_bank(name, features, expanded, left_out) for name in self.banks]
        scores, distances = zip(*results, strict=True)
        maps = anomaly_maps(distances, size, protocol.float_blur)
        if self.config.has_foreground:
            maps = maps * self._foreground(features, size**2).view(size, size)
        return top_scores(maps) if protocol.top_score else torch.stack(scores), maps

    def _score_bank(
        self, name: str, features: PatchFeatures, expanded: str, left_out: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """Image score () float64 of a bank, None if it comes from the map, and distances (P,) of the patches."""
        config, protocol = self.config, self.config.protocol
        bank = self.banks[name] if left_out is None else self.banks[name].without(left_out)
        patches = bank.statistics.normalize(getattr(features, name))
        near: Tensor | int = self._foreground(features, len(patches)) if config.has_foreground else 1
        relative = None if bank.spacing is None else bank.relative_distances(patches) * near
        if relative is not None and protocol.top_score:
            return None, relative
        nearest, index = bank.nearest(patches, "nowhere" if protocol.exact_distances else expanded)
        nearest = nearest * near
        divisor = 1.0 if protocol.unscaled_scores else config.method.score_divisor
        score = image_score(patches, nearest, index, bank, divisor, config.method.weight_epsilon)
        return score, nearest if relative is None else relative

    def _foreground(self, features: PatchFeatures, patches: int) -> Tensor:
        """(patches,) bool, row-major over a square grid: True near a point of the cloud."""
        assert features.xyz is not None
        return near_points(features.xyz, math.isqrt(patches))

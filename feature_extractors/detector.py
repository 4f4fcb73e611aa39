"""The fitted detector: memory banks and decision fusion over an extractor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from feature_extractors.alignment import near_points
from feature_extractors.config import DetectorConfig
from feature_extractors.decision_fusion import DecisionFusion
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.scoring import anomaly_maps, image_scores, top_scores
from feature_extractors.thresholds import Calibration, Thresholds
from utils.memory import read_back, upload
from utils.records import METERS, CloudForm, PatchFeatures, Prediction, Sample

# Samples scored together on a CPU, so that their products stay in the cache. A GPU scores all given samples together.
SCORED_TOGETHER_ON_CPU = 1


class Batch(NamedTuple):
    """B samples that are scored together."""

    features: Sequence[PatchFeatures]
    expanded: str  # as in MemoryBank.search
    left_out: Tensor | None  # (B,) int64, as in MemoryBank.search
    bounded: bool  # as in MemoryBank.search; True also avoids other steps that make the host wait


class BankResult(NamedTuple):
    """Results of one bank for B samples."""

    scores: Tensor | None  # (B,) float64
    distances: Tensor  # (B, P) float32
    complete: Tensor  # () bool, as in MemoryBank.search


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
        return self.predict_batch([sample])[0]

    def predict_batch(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Predict several samples, ideally `extractor.batch_size`. Results match single predictions up to rounding.

        Raises InputError as PatchExtractor.prepare does.
        """
        size, predictions = self.extractor.batch_size, []
        for begin in range(0, len(samples), size):
            predictions += self.predict_features(self.extractor.extract(samples[begin : begin + size]))
        return predictions

    def predict_features(self, features: Sequence[PatchFeatures]) -> list[Prediction]:
        """`predict_batch` from the patch features of the samples."""
        return [
            Prediction(
                scores[-1],
                maps[-1],
                dict(zip(self.banks, scores[:-1], strict=True)),
                dict(zip(self.banks, maps[:-1], strict=True)),
            )
            for scores, maps in self._results(features, "cancelling", fused=True)
        ]

    def bank_results(
        self, features: Sequence[PatchFeatures], left_out: Sequence[int] | None = None
    ) -> list[tuple[list[float], list[Tensor]]]:
        """Image scores and anomaly maps (img_size, img_size) of the banks, on the CPU, for fitting decision fusion.

        The banks are used without the patches of the training samples `left_out`, one for each sample.
        """
        return self._results(features, "everywhere", left_out)

    @torch.inference_mode()
    def _results(
        self,
        features: Sequence[PatchFeatures],
        expanded: str,
        left_out: Sequence[int] | None = None,
        fused: bool = False,
    ) -> list[tuple[list[float], list[Tensor]]]:
        """Scores and maps of the banks for each sample, on the CPU. If `fused`, the fused ones come last."""
        device, results = self.extractor.device, []
        on_cpu = device.type == "cpu"
        step = SCORED_TOGETHER_ON_CPU if on_cpu else max(1, len(features))
        for begin in range(0, len(features), step):
            part = slice(begin, begin + step)
            excluded = None if left_out is None else upload(torch.tensor(left_out[part]), device)
            batch = Batch(features[part], expanded, excluded, bounded=not on_cpu)
            scores, maps, complete = read_back(*self._score(batch, fused))  # the host waits for a GPU once
            if not complete:  # rare
                scores, maps, _ = read_back(*self._score(batch._replace(bounded=False), fused))
            for of_sample, planes in zip(scores.T.tolist(), maps.unbind(1), strict=True):
                # Cloned, because a view would keep all maps in memory, and be pickled with all of them.
                results.append((of_sample, [plane.clone() for plane in planes]))
        return results

    def _score(self, batch: Batch, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (K, B) float64, maps (K, B, img_size, img_size) float32, and () bool, True if no search is incomplete.

        K is the number of banks. If `fused`, it is one more, and the fused scores and maps come last.
        """
        # 1. phi and psi: scores and maps of each bank
        size, protocol = self.config.img_size, self.config.protocol
        results = [self._score_bank(name, batch) for name in self.banks]
        distances, complete = [each.distances for each in results], torch.stack([each.complete for each in results])
        maps = anomaly_maps(distances, size, protocol.float_blur)
        if self.config.has_foreground:
            maps = maps * self._foreground(batch, size**2).view(-1, size, size)
        of_banks = [each.scores for each in results if each.scores is not None]
        scores = top_scores(maps) if protocol.top_score else torch.stack(of_banks)
        if not fused:
            return scores, maps, complete.all()
        # 2. D_a and D_s: one score and one map
        if self.decision_fusion is not None:
            score, plane = self.decision_fusion.fuse(list(scores), list(maps))
        else:  # "sum", or a single bank
            score, plane = scores.sum(dim=0), maps.sum(dim=0)
        return torch.cat([scores, score[None]]), torch.cat([maps, plane[None]]), complete.all()

    def _score_bank(self, name: str, batch: Batch) -> BankResult:
        """Distances of the patches to a bank, and image scores unless the protocol takes them from the maps."""
        config, protocol, bank = self.config, self.config.protocol, self.banks[name]
        patches = bank.statistics.normalize(torch.stack([getattr(each, name) for each in batch.features]))  # (B, P, D)
        queries, sample, place = distinct_patches(name, batch, patches)
        left_out = None if batch.left_out is None else batch.left_out[sample]
        near: Tensor | int = self._foreground(batch, patches.shape[1]) if config.has_foreground else 1
        relative = None
        if bank.spacing is not None:
            relative = bank.relative_distances(queries, left_out)[place] * near
            if protocol.top_score:
                return BankResult(None, relative, torch.ones((), dtype=torch.bool, device=queries.device))
        expanded = "nowhere" if protocol.exact_distances else batch.expanded
        found = bank.search(queries, expanded, left_out, batch.bounded)
        nearest, index = found.distance[place] * near, found.row[place]
        divisor = 1.0 if protocol.unscaled_scores else config.method.score_divisor
        scores = image_scores(patches, nearest, index, bank, divisor, config.method.weight_epsilon, batch.left_out)
        return BankResult(scores, nearest if relative is None else relative, found.complete)

    def _foreground(self, batch: Batch, patches: int) -> Tensor:
        """Mask (B, patches) bool, row-major over a square grid, True near a point of the cloud."""
        near = [near_points(each.occupied, math.isqrt(patches)) for each in batch.features if each.occupied is not None]
        return upload(torch.stack(near), self.extractor.device)


def distinct_patches(name: str, batch: Batch, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct patches (M, D) of each sample, the sample (M,) of each, and the index (B, P) of each patch among them.

    Background patches are often equal, and equal patches are searched once. On a GPU and for a `bounded` search, only
    the xyz patches without a point count as equal. Comparing values would make the host wait for the number of distinct
    ones.
    """
    by_value = patches.device.type == "cpu" and not batch.bounded
    return _by_value(patches) if by_value else _by_occupancy(name, batch, patches)


def _by_value(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = [torch.unique(each, dim=0, return_inverse=True) for each in patches]
    counts = torch.tensor([len(rows) for rows, _ in found], device=patches.device)
    samples = torch.arange(len(found), device=patches.device).repeat_interleave(counts)
    place = torch.stack([inverse for _, inverse in found]) + (counts.cumsum(dim=0) - counts)[:, None]
    return torch.cat([rows for rows, _ in found]), samples, place


def _by_occupancy(name: str, batch: Batch, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    occupied = torch.ones(patches.shape[:2], dtype=torch.bool)
    if name == "xyz":
        occupied = torch.stack([each.occupied for each in batch.features if each.occupied is not None])
    empty = occupied.int().argmin(dim=1, keepdim=True)  # the first patch without a point, if there is one
    kept = occupied.scatter(1, empty, True)
    number = (kept.flatten().cumsum(dim=0) - 1).view_as(kept)
    place, index = torch.where(occupied, number, number.gather(1, empty)), kept.flatten().nonzero()[:, 0]
    place, index = (upload(each, patches.device) for each in (place, index))
    return patches.flatten(0, 1)[index], index // patches.shape[1], place

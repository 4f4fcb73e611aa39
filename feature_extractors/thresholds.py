"""Decision thresholds for image scores and pixels, calibrated on good samples."""

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike

Source = Literal["validation", "training"]
Rate = Annotated[float, Meta(gt=0, lt=1)]
LEAST_THRESHOLD = 1e-30  # replaces 0, the result if good samples score 0, as with a coreset of all patches
ROUNDING = 1e-14  # relative rounding error of rate * count: 0.29 * 100 is 28.999…996
TAILS = np.geomspace(1e-6, 0.5, 257).tolist()  # shares of good pixels above the kept pixel values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thresholds:
    """Decision thresholds and their calibration."""

    image: Annotated[float, Meta(gt=0)]  # a sample with a score above is anomalous
    pixel: Annotated[float, Meta(gt=0)]  # a pixel with a value above in the anomaly map is anomalous
    target_fpr: Rate  # requested false-alarm rate
    source: Source  # split that the good samples are from
    parts: Annotated[int, Meta(ge=1)]  # number of the good samples
    typical: float  # median score of the good samples

    def severity(self, score: float) -> float | None:
        """(score - median) / (threshold - median), with the median score of the good samples.

        0 is a typical good sample, 1 the threshold, 2 twice as far away; it does not saturate. None if the threshold is
        not above the median, as with few or equal good samples.
        """
        spread = self.image - self.typical
        return None if spread <= max(LEAST_THRESHOLD, 1e-12 * self.image) else (score - self.typical) / spread


@dataclass(frozen=True)
class Calibration:
    """Condensed scores and maps of the good samples, to change the false-alarm rate later."""

    scores: Annotated[tuple[float, ...], Meta(min_length=1)]  # of the samples, ascending
    tails: Annotated[tuple[Rate, ...], Meta(min_length=1)]  # shares of all pixels of their maps, ascending
    pixels: Annotated[tuple[float, ...], Meta(min_length=1)]  # smallest values that at most these shares exceed
    source: Source

    def thresholds(self, target_fpr: float) -> Thresholds:
        """Both thresholds for a false-alarm rate.

        Image: the score of rank ceil((1 - target_fpr)(n + 1)), in ascending order. A new good sample of the same
        distribution exceeds it with a probability of at most target_fpr (split conformal prediction). If the rank is
        above n, it is the largest score, see `needed_samples`. Pixel: the value that the largest of the `tails` up to
        target_fpr exceed, or the largest value.
        """
        count = len(self.scores)
        exceeding = _share_of(target_fpr, count + 1)  # n + 1 minus the rank: 0 if n is too small
        image = self.scores[count - min(max(exceeding, 1), count)]
        pixel = self.pixels[max(bisect_right(self.tails, target_fpr) - 1, 0)]
        median = float(np.median(self.scores))
        image, pixel = max(image, LEAST_THRESHOLD), max(pixel, LEAST_THRESHOLD)
        return Thresholds(image, pixel, target_fpr, self.source, count, typical=median)


def needed_samples(target_fpr: float) -> int:
    """Smallest number of good samples for a false-alarm rate; with fewer, the largest score is the threshold."""
    return math.ceil(1 / target_fpr * (1 - ROUNDING)) - 1


def warn_of_few_samples(counts: Mapping[str, int], target_fpr: float) -> None:
    """Warn of classes with too few good samples for a false-alarm rate; `counts` has their number by class."""
    needed = needed_samples(target_fpr)
    if few := {name: count for name, count in counts.items() if count < needed}:
        logger.warning(
            "a false-alarm rate of %g needs %d good samples, but there are %s, which allow %.2g. The image threshold "
            "is their largest score",
            *(target_fpr, needed, ", ".join(f"{count} of {name}" for name, count in few.items())),
            1 / (min(few.values()) + 1),
        )


def calibrate(scores: Sequence[float], maps: Sequence[ArrayLike], target_fpr: float, source: Source) -> Calibration:
    """Condense the scores and maps of good samples.

    The n scores and n maps (H, W) float32 are those of good samples of the split `source`; pixels are copied once. The
    pixel values include the exact one for `target_fpr`.

    Raises:
        ValueError: there is no sample, or a score or map is not finite.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    count = len(ordered)
    if count == 0 or len(maps) != count:
        raise ValueError(f"{count} scores and {len(maps)} maps, expected one of each per good sample, at least one")
    pixels = np.concatenate([np.ravel(each) for each in maps])
    if not (np.isfinite(ordered).all() and np.isfinite(pixels).all()):
        raise ValueError("a score or an anomaly map of a good sample holds NaN or infinity")
    tails = sorted({*TAILS, target_fpr})
    ranks = [max(len(pixels) - _share_of(tail, len(pixels)), 1) - 1 for tail in tails]
    pixels.partition(sorted(set(ranks)))
    return Calibration(tuple(ordered.tolist()), tuple(tails), tuple(pixels[ranks].tolist()), source)


def _share_of(rate: float, count: int) -> int:  # rounded down
    return math.floor(rate * count * (1 + ROUNDING))

"""Decision thresholds for image scores and pixels, calibrated on good samples."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike

Source = Literal["validation", "training"]
TYPICAL_VALUE = 0.05  # normalized score of the median good sample; that of the threshold is 0.5
LEAST_THRESHOLD = 1e-30  # replaces 0, the result if good samples score 0, as with a coreset of all patches
ROUNDING = 1e-14  # relative rounding error of rate * count: 0.29 * 100 is 28.999…996

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thresholds:
    """Decision thresholds and their calibration."""

    image: Annotated[float, Meta(gt=0)]  # a sample with a score above is anomalous
    pixel: Annotated[float, Meta(gt=0)]  # a pixel with a value above in the anomaly map is anomalous
    target_fpr: Annotated[float, Meta(gt=0, lt=1)]  # requested false-alarm rate
    source: Source  # split that the good samples are from
    parts: Annotated[int, Meta(ge=1)]  # number of the good samples
    typical: float  # median score of the good samples

    def normalize(self, score: float) -> float:
        """Score on a scale from 0 to 1 that is comparable between detectors.

        An increasing logistic curve with 0.5 at the threshold and 0.05 at the median good sample (0.95 if the threshold
        lies below it). If both coincide, the value is 0 below, 0.5 at and 1 above the threshold.
        """
        spread, above = abs(self.image - self.typical), score - self.image
        if spread == 0:
            return 0.5 + 0.5 * ((above > 0) - (above < 0))
        slope = math.log(1 / TYPICAL_VALUE - 1)
        return 0.5 + 0.5 * math.tanh(slope * (above / spread) / 2)


def calibrate(scores: Sequence[float], maps: Sequence[ArrayLike], target_fpr: float, source: Source) -> Thresholds:
    """Choose both thresholds for a false-alarm rate.

    Image: the score of rank ceil((1 - target_fpr)(n + 1)), in ascending order. A new good sample of the same
    distribution exceeds it with a probability of at most target_fpr (split conformal prediction). If the rank is above
    n, it is the largest score, with a warning. Pixel: the smallest value that at most target_fpr of all pixels exceed.

    The n scores and n maps (H, W) float32 are those of good samples of the split `source`; pixels are copied once.

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
    exceeding = _share_of(target_fpr, count + 1)  # n + 1 minus the rank: 0 if n is too small
    if exceeding == 0:
        needed = math.ceil(1 / target_fpr * (1 - ROUNDING)) - 1
        logger.warning(
            "a false-alarm rate of %g needs %d good samples, but there are %d, which allow %.2g. The image threshold "
            "is their largest score.",
            *(target_fpr, needed, count, 1 / (count + 1)),
        )
    rank = max(len(pixels) - _share_of(target_fpr, len(pixels)), 1)
    pixels.partition(rank - 1)
    image, pixel = float(ordered[count - min(max(exceeding, 1), count)]), float(pixels[rank - 1])
    image, pixel = max(image, LEAST_THRESHOLD), max(pixel, LEAST_THRESHOLD)
    return Thresholds(image, pixel, target_fpr, source, count, typical=float(np.median(ordered)))


def _share_of(rate: float, count: int) -> int:  # rounded down
    return math.floor(rate * count * (1 + ROUNDING))

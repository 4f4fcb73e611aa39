"""From the scores and maps of good parts to a decision: what is above the threshold is anomalous."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike

from utils.errors import InputError

Source = Literal["validation", "training"]
# Where `normalize` puts the median good part; the threshold lies at 0.5.
TYPICAL_VALUE = 0.05
# Below it no number of parts or pixels that could be had tells one rate from another.
LEAST_FPR = 1e-6
# Relative, of a share of a count: 0.29 * 100 is 28.999…996 in floating point.
ROUNDING = 1e-14

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thresholds:
    """Where good ends, and what that was calibrated on."""

    image: float  # a part whose score is above is anomalous
    pixel: float  # a pixel whose value in the anomaly map is above is anomalous
    target_fpr: Annotated[float, Meta(gt=0, lt=1)]  # the false-alarm rate asked for
    source: Source  # split of the good samples it was calibrated on
    parts: Annotated[int, Meta(ge=1)]  # number of these samples
    typical: float  # the median score of these parts

    def normalize(self, score: float) -> float:
        """The score on a scale from 0 to 1 that means the same for every detector.

        A logistic curve, 0.5 at the threshold and 0.05 at the median good part; it never falls as the score rises.
        Where the threshold is the median itself, for want of any spread, it is 0 below, 0.5 at and 1 above it. A
        target_fpr above one half puts the threshold below the median: the curve is then as steep the other way round.
        """
        spread, above = abs(self.image - self.typical), score - self.image
        if spread == 0:
            return 0.5 + 0.5 * ((above > 0) - (above < 0))
        slope = math.log(1 / TYPICAL_VALUE - 1)
        return 0.5 + 0.5 * math.tanh(slope * (above / spread) / 2)


def check_target_fpr(target_fpr: float) -> None:
    """Raises InputError for what is no false-alarm rate that a threshold could have."""
    if not LEAST_FPR <= target_fpr < 1:
        raise InputError(
            f"target_fpr is {target_fpr}, expected a rate between 0 and 1, such as 0.01, and no less than {LEAST_FPR}"
        )


def calibrate(scores: Sequence[float], maps: Sequence[ArrayLike], target_fpr: float, source: Source) -> Thresholds:
    """Choose both thresholds for a false-alarm rate.

    Image: of n good scores the one of rank ceil((1 - target_fpr)(n + 1)), which a new good part exceeds with
    probability target_fpr at most if it is made as these were (split conformal prediction). Where n is too small for
    that rank, the largest score, and a warning says which rate n parts allow. Pixel: the smallest value that at most
    target_fpr of all pixels of the good maps exceed.

    Args:
        scores: n of good parts, larger = more anomalous.
        maps: their n anomaly maps (H, W), float32.
        target_fpr: from LEAST_FPR to below 1.
        source: split of the samples.

    Peak memory: all pixels once more, 4 * n * H * W bytes: 72 MB for 361 maps of 224 x 224.

    Raises:
        InputError: target_fpr is out of its range.
        ValueError: no part, or a score or map that is not finite.
    """
    check_target_fpr(target_fpr)
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    parts = len(ordered)
    if parts == 0 or len(maps) != parts:
        raise ValueError(f"{parts} scores and {len(maps)} maps, expected one of each per good part, and at least one")
    pixels = np.concatenate([np.ravel(each) for each in maps])
    if not (np.isfinite(ordered).all() and np.isfinite(pixels).all()):
        raise ValueError("a score or an anomaly map of a good part holds NaN or infinity")
    exceeding = _share_of(target_fpr, parts + 1)  # n + 1 minus the rank
    if exceeding == 0:
        logger.warning(
            "a false-alarm rate of %g needs %d good parts, but there are %d, which allow %.2g: the image threshold is "
            "their largest score",
            target_fpr,
            math.ceil(1 / target_fpr * (1 - ROUNDING)) - 1,
            parts,
            1 / (parts + 1),
        )
    rank = max(len(pixels) - _share_of(target_fpr, len(pixels)), 1)
    pixels.partition(rank - 1)
    return Thresholds(
        image=float(ordered[parts - min(max(exceeding, 1), parts)]),
        pixel=float(pixels[rank - 1]),
        target_fpr=target_fpr,
        source=source,
        parts=parts,
        typical=float(np.median(ordered)),
    )


def _share_of(rate: float, count: int) -> int:
    """How many of `count` are at most this share of them."""
    return math.floor(rate * count * (1 + ROUNDING))

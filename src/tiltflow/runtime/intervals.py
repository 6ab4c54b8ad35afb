"""A mean with its interval, and the interval of a rate: what training, evaluation and tests of chance all need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Z_95: Final = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval; `low` and `high` are NaN where there is none, as for a plain count.

    Example: `Estimate(value=0.52, low=0.45, high=0.58, count=240)`.
    """

    value: float
    low: float
    high: float
    count: int  # images, or pairs, behind the value

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.3f}{interval}" if interval or not float(self.value).is_integer() else f"{self.value:.0f}"


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Return the ends of the 95% Wilson score interval of a rate (Wilson 1927), NaN for a count of 0.

    Args:
        rate: Share of hits. A mean of any values in [0, 1] may stand here: none varies more than a rate of that mean,
            so that the interval is rather too long than too short.
        count: Independent trials behind it.
    """
    if count == 0:
        return math.nan, math.nan
    scale = 1 + Z_95**2 / count
    center = (rate + Z_95**2 / (2 * count)) / scale
    half = Z_95 / scale * math.sqrt(rate * (1 - rate) / count + Z_95**2 / (4 * count**2))
    return (center - half if rate > 0 else 0.0), (center + half if rate < 1 else 1.0)  # exact where rounding is not


def mean_of_independent(scores: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Return the mean of scores from 0 to 1 with its 95% Wilson interval, which takes each for independent.

    Args:
        scores: One per case, N; whether 0 or 1 or between. None at all: the mean is NaN.
    """
    array = np.asarray(scores, dtype=np.float64)
    value = float(array.mean()) if len(array) else math.nan
    return Estimate(value, *wilson(value, len(array)), len(array))

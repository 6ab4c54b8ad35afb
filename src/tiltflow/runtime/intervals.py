"""The interval of a rate: what training, evaluation and tests of chance all need."""

import math
from typing import Final

Z_95: Final = 1.959963984540054


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

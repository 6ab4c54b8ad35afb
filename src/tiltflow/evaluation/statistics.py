"""Means with 95% intervals, above all for images that come several to a prompt.

The images of one prompt resemble each other, so whole prompts are resampled (the cluster bootstrap; Davison and Hinkley
1997, chapter 3), not images: an interval over images would be too short.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tiltflow.runtime.intervals import Estimate, wilson

RESAMPLES: Final = 2000
_SEED: Final = 20_240_607
_AT_ONCE: Final = 100  # resamplings

Floats = NDArray[np.float64]


def estimate(values: Sequence[float] | Floats, clusters: Sequence[int] | NDArray[Any]) -> Estimate:
    """Return the mean with a 95% percentile interval from 2,000 resamplings of whole clusters (prompts).

    A rate (only zeros and ones) that shows no variation, or that has one cluster only, gets the Wilson interval on its
    images instead (Wilson 1927): resampling zeros would promise certainty. Other values of one cluster are resampled
    image by image, which says nothing about other prompts.

    Args:
        values: One per image, N; NaN is left out.
        clusters: The prompt that each image belongs to, N.
    """
    return estimate_stratified(values, clusters, np.zeros(len(values), dtype=np.int64))


def weighted_mean(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted mean of rates of different cases, with the interval made of the parts' own.

    With shares s that add up to 1 and rates r in [l, u], the ends are sum s r - sqrt(sum (s (r - l))^2) and
    sum s r + sqrt(sum (s (u - r))^2). Unlike those of the normal interval they stay within [0, 1], and rates of 0 or 1
    promise no certainty.

    Args:
        parts: The rates; none is NaN.
        weights: What each counts, at least one above 0.

    Source: Zou, Huang and Zhang 2009 (Computational Statistics & Data Analysis 53), with Wilson's intervals.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    value, low, high = np.array([(part.value, part.low, part.high) for part in parts]).T
    mean = float(shares @ value)
    below, above = (float(np.sqrt(((shares * distance) ** 2).sum())) for distance in (value - low, high - value))
    return Estimate(mean, max(0.0, mean - below), min(1.0, mean + above), sum(part.count for part in parts))


def estimate_stratified(
    values: Sequence[float] | Floats, clusters: Sequence[int] | NDArray[Any], strata: Sequence[Any] | NDArray[Any]
) -> Estimate:
    """Return the unweighted mean of the strata's means, prompts resampled within each stratum (GenEval's tag).

    A rate's stratum that shows no variation, or has one prompt only, is drawn from its Jeffreys posterior over images,
    Beta(k + 1/2, n - k + 1/2) (Brown, Cai and DasGupta 2001): resampling it would promise certainty. Other values of a
    single prompt are resampled image by image, which says nothing about other prompts.

    Args:
        values: One per image, N; NaN is left out.
        clusters: The prompt that each image belongs to, N.
        strata: The stratum that each image belongs to, N.
    """
    array = np.asarray(values, dtype=np.float64)
    known = array[np.isfinite(array)]
    return estimate_known(array, np.asarray(clusters), np.asarray(strata), rate=bool(np.isin(known, (0.0, 1.0)).all()))


def estimate_known(values: Floats, clusters: NDArray[Any], strata: NDArray[Any], *, rate: bool) -> Estimate:
    """Do the work of `estimate_stratified` where the caller knows whether the values are a rate."""
    known = np.isfinite(values)
    values, clusters, strata = values[known], clusters[known], strata[known]
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    parts = [strata == stratum for stratum in np.unique(strata)]
    value = float(np.mean([values[part].mean() for part in parts]))
    if rate and (values.min() == values.max() or len(np.unique(clusters)) < 2):
        return Estimate(value, *wilson(value, count), count)
    if count == 1:
        return Estimate(value, math.nan, math.nan, count)
    generator = np.random.default_rng(_SEED)
    draws = np.mean([_drawn_means(values[part], clusters[part], generator, rate=rate) for part in parts], axis=0)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, float(low), float(high), count)


def paired_score(changes: Sequence[float] | Floats, clusters: Sequence[int] | NDArray[Any]) -> tuple[float, float]:
    """Return the mean change and how far it is from zero, in standard deviations of chance.

    The score is the t statistic over the prompts' mean changes, carried over to the standard normal distribution
    (Wallace 1959: z = (8n + 1) / (8n + 3) sqrt(n log(1 + t^2 / n)), n = prompts - 1), so that few prompts do not pass
    for many. Unlike a bootstrap of 2,000 draws it reaches probabilities of one in a million.

    Args:
        changes: One per image, N; NaN is left out.
        clusters: The prompt that each image belongs to, N.

    Returns:
        Both NaN for no change at all; the score NaN for a single prompt, infinite where all prompts change alike.
    """
    array, places = np.asarray(changes, dtype=np.float64), np.asarray(clusters)
    known = np.isfinite(array)
    array, places = array[known], places[known]
    if len(array) == 0:
        return math.nan, math.nan
    means = np.array([array[places == place].mean() for place in np.unique(places)])
    mean, free = float(means.mean()), len(means) - 1
    if free == 0:
        return mean, math.nan
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    if error == 0:
        return mean, math.copysign(math.inf, mean) if mean else 0.0
    t = mean / error
    return mean, math.copysign((8 * free + 1) / (8 * free + 3) * math.sqrt(free * math.log1p(t * t / free)), t)


def _drawn_means(values: Floats, clusters: NDArray[Any], generator: np.random.Generator, *, rate: bool) -> Floats:
    """Return plausible means of one stratum, `[RESAMPLES]`."""
    if rate and (values.min() == values.max() or len(np.unique(clusters)) < 2):
        right = values.sum()
        return generator.beta(right + 0.5, len(values) - right + 0.5, size=RESAMPLES)
    return _resampled_means(values, clusters, generator)


def _resampled_means(values: Floats, clusters: NDArray[Any], generator: np.random.Generator) -> Floats:
    """Return the mean of each resampling, `[RESAMPLES]`; a single cluster is resampled image by image."""
    _, index = np.unique(clusters, return_inverse=True)
    if index.max() == 0:
        index = np.arange(len(values))
    sums, sizes = np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
    number = len(sizes)
    chances, parts = np.full(number, 1 / number), list[Floats]()
    for start in range(0, RESAMPLES, _AT_ONCE):  # of many clusters a whole matrix of draws would fill the memory
        times_drawn = generator.multinomial(number, chances, size=min(_AT_ONCE, RESAMPLES - start)).astype(np.float64)
        parts.append((times_drawn @ sums) / (times_drawn @ sizes))
    return np.concatenate(parts)

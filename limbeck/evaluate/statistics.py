"""Token-weighted means over prompts, with intervals that know that the tokens of one prompt belong together.

Tokens of one answer resemble each other, so the prompt is the unit that is drawn again: a cluster bootstrap
of the ratio estimator sum(x) / sum(n) over prompts (Cochran, Sampling Techniques, chapter 6; Efron and
Tibshirani, chapter 8). Percentiles of it are too narrow with few prompts: with 10 of them a nominal 95 %
interval covers about 90 %. The percentiles are therefore taken further out by the factor t_{n-1} / z *
sqrt(n / (n - 1)), the "expanded percentile interval" of Hesterberg (2015), arXiv 1411.5279, section 4.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 4_000_000
"""Prompt draws held at a time."""
_NORMAL = 10_000
"""Degrees of freedom from which t is the normal distribution to four digits."""


class Interval(NamedTuple):
    """A figure and its interval; `low` and `high` are None with fewer than two prompts."""

    value: float
    low: float | None
    high: float | None


def ratio_interval(
    sums_P: NDArray[np.float64],
    counts_P: NDArray[np.float64],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The mean over tokens, `sum(sums_P) / sum(counts_P)`, with an interval over the P prompts.

    `sums_P` holds the sum of a figure over the tokens of each prompt, `counts_P` how many tokens those are
    (each at least 1). The same seed draws the same prompts for every figure. The interval always holds the
    value: where percentiles would not, as can happen with few and very unequal prompts, it is widened to do
    so.

    Raises `ValueError` for no prompts, prompts without tokens, and different lengths.
    """
    prompts = len(sums_P)
    if prompts == 0 or len(counts_P) != prompts or not bool((np.asarray(counts_P) > 0).all()):
        raise ValueError(f"ratio_interval needs the tokens of one prompt or more: {prompts} sums, counts {counts_P!r}")
    value = float(np.sum(sums_P) / np.sum(counts_P))
    if prompts < 2:
        return Interval(value, None, None)
    rng, ratios = np.random.default_rng(seed), np.empty(resamples)
    step = max(1, _CELLS // prompts)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, prompts, size=(min(step, resamples - start), prompts))
        ratios[start : start + len(drawn)] = sums_P[drawn].sum(axis=1) / counts_P[drawn].sum(axis=1)
    tail = expanded_tail(prompts, level)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value))


@cache
def expanded_tail(n: int, level: float = LEVEL) -> float:
    """The share of bootstrap replicates to leave out at each end so that n clusters cover `level`.

    Goes to (1 - level) / 2 as n grows.
    """
    reach = math.sqrt(n / (n - 1)) * student_t((1 + level) / 2, n - 1)
    return NormalDist().cdf(-reach)


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t at `probability` in (0.5, 1), by bisection on its distribution function.

    The distribution function is the finite trigonometric sum of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if degrees > _NORMAL:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _t_central(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_central(t: float, degrees: int) -> float:
    """P(-t < T < t) for Student's T with so many degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    term, total = (1.0, 0.0) if degrees % 2 == 0 else (math.cos(angle), 0.0)
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine2 * k / (k + 1)
    if degrees % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)

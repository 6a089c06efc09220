"""Whether paired differences are more than chance: a randomisation test, corrected over a family of comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SAMPLES, _SAMPLES_OF_EACH = 9_999, 200
"""At least so many random signs are drawn in all, and for each comparison of a family: .05 / m is ten times the least
p value."""
_AT_ONCE = 500
_CLOSE = 1e-9


def adjusted_p_values(series: Sequence[Sequence[float]], *, seed: int) -> tuple[list[float], list[float]]:
    """The p value of each series of paired differences, and those adjusted for their number (``holm``).

    Series of one length are over the same prompts.
    """
    p_values = p_values_of(series, seed=seed, comparisons=len(series))
    return p_values, holm(p_values)


def p_values_of(series: Sequence[Sequence[float]], *, seed: int, comparisons: int) -> list[float]:
    """The p value of each series of paired differences, from enough random signs for so many ``comparisons``."""
    p_values = [1.0] * len(series)
    for length in dict.fromkeys(map(len, series)):
        same = [index for index, differences in enumerate(series) if len(differences) == length]
        tested = sign_flip_p_values([series[index] for index in same], seed=seed, comparisons=comparisons)
        for index, p in zip(same, tested, strict=True):
            p_values[index] = p
    return p_values


def sign_flip_p_values(series: Sequence[Sequence[float]], *, seed: int, comparisons: int | None = None) -> list[float]:
    """The two-sided p value of each series of paired differences over the same prompts.

    They are to be corrected for so many ``comparisons``, by default those of ``series``: random signs are drawn in
    proportion, because the least p value is the inverse of their number.

    If two arms were alike, each prompt's difference could as well have the other sign (Fisher 1935, chapter 3). The
    p value is the share of random signs under which the mean is at least as far from zero, the observed signs counted
    as one of them (Phipson and Smyth 2010). So it is never zero, and it is 1 where all differences are zero.
    """
    if not series:
        return []
    differences = np.asarray(series, dtype=np.float64).T
    observed = np.abs(differences.sum(axis=0))
    bound = observed - _CLOSE * np.abs(differences).sum(axis=0)  # sums in another order differ in their last digits
    samples = max(_SAMPLES, _SAMPLES_OF_EACH * (comparisons or len(series)))
    rng = np.random.default_rng(seed)
    as_far = np.ones(len(series))
    for start in range(0, samples, _AT_ONCE):
        count = min(_AT_ONCE, samples - start)
        signs = rng.integers(0, 2, size=(count, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_far += (np.abs(signs @ differences) >= bound).sum(axis=0)
    return (as_far / (samples + 1)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979).

    Of comparisons without any true difference, one falls below a level with at most the probability of that level.

    The k-th smallest of m is multiplied by m - k + 1. Example: ``[0.01, 0.04, 0.03]`` becomes ``[0.03, 0.06, 0.06]``.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted

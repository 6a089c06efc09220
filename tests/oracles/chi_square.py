"""Pearson's test that counts come from a distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import chi2

LEAST = 5.0
"""Rarer outcomes are taken together, so that the statistic has its distribution (Cochran 1954)."""


def p_value(counts: Mapping[Any, int], distribution: Mapping[Any, float]) -> float:
    """The probability of a larger statistic if the counts come from the distribution."""
    total = sum(counts.values())
    statistic, cells = 0.0, 0
    rare_count, rare_expected = 0, 0.0
    for outcome, probability in distribution.items():
        expected = total * probability
        if expected < LEAST:
            rare_count += counts.get(outcome, 0)
            rare_expected += expected
        else:
            statistic += (counts.get(outcome, 0) - expected) ** 2 / expected
            cells += 1
    if rare_expected > 0:
        statistic += (rare_count - rare_expected) ** 2 / rare_expected
        cells += 1
    return float(chi2.sf(statistic, cells - 1))

"""95 % intervals of shares and of their paired differences, which keep a width where all prompts agree.

Resampling prompts cannot show what no prompt shows: where nobody refused in 54 answers, every resample has the rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

from alignment.records.evaluation import LEVEL
from alignment.records.interval import Interval

_Z = NormalDist().inv_cdf(1 - LEVEL / 2)
_HALVINGS = 60


def are_shares(*series: Sequence[float]) -> bool:
    """Whether every value says whether a prompt has a property: it is 0 or 1."""
    return all(value in (0.0, 1.0) for values in series for value in values)


def share_interval(hits: int, count: int) -> Interval:
    """The share of ``hits`` with the rates p at which it is at most 1.96 standard errors from p (Wilson 1927).

    Example: 0 of 54 gives 0 to z² / (54 + z²) = 0.066.
    """
    share, spread = hits / count, _Z**2 / count
    middle = share + spread / 2
    reach = _Z * math.sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = ((middle + side) / (1 + spread) for side in (-reach, reach))
    # Rounding must not leave the share outside of its interval where it is 0 or 1.
    return Interval(mean=share, low=min(max(low, 0.0), share), high=max(min(high, 1.0), share))


def paired_share_interval(more: int, less: int, count: int) -> Interval:
    """The difference of two shares over the same prompts with its score interval (Tango 1998, eq. 6 to 8).

    ``more`` prompts have only the first of the two properties, ``less`` only the second, of ``count`` prompts. The
    interval has the differences that are at most 1.96 standard errors from the observed one. The standard error is that
    under the likeliest rates with this difference, so it is not zero where no prompt differs.
    """
    difference = (more - less) / count

    def is_above(candidate: float) -> bool:
        error = math.sqrt(count * max(0.0, _variance(candidate, more, less, count)))
        return count * (difference - candidate) > _Z * error

    def is_below(candidate: float) -> bool:
        error = math.sqrt(count * max(0.0, _variance(candidate, more, less, count)))
        return count * (candidate - difference) > _Z * error

    return Interval(
        mean=difference, low=_farthest(is_above, difference, -1.0), high=_farthest(is_below, difference, 1.0)
    )


def unvaried_interval(value: float, count: int, *, least: float, most: float) -> Interval:
    """The mean of ``count`` values between ``least`` and ``most`` that all equal ``value``.

    Other values may have a share of up to z² / (n + z²) (Wilson 1927) and lie at the end of the range. Of shares, and
    of differences of two shares, these are the intervals of the functions above.

    Example: 20 values of 1 between 0 and 1 give 0.839 to 1.
    """
    share = _Z**2 / (count + _Z**2)
    return Interval(mean=value, low=value - share * (value - least), high=value + share * (most - value))


def _variance(difference: float, more: int, less: int, count: int) -> float:
    """Of one prompt's difference, under the likeliest share of prompts of the kind ``less`` given this difference."""
    slope = -more - less + (2 * count - more + less) * difference
    root = math.sqrt(max(0.0, slope**2 + 8 * count * less * difference * (1 - difference)))
    return 2 * (root - slope) / (4 * count) + difference * (1 - difference)


def _farthest(is_outside: Callable[[float], bool], inside: float, end: float) -> float:
    """The last value between ``inside`` and ``end`` that is not outside of the interval."""
    if not is_outside(end):
        return end
    outside = end
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
    return inside

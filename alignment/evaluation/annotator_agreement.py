"""Agreement between annotators: Krippendorff's α (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).

The library is imported where it is needed, so that a plan can name it without loading it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from alignment.core.errors import ConfigError

PACKAGE = "krippendorff>=0.9,<0.10"


def krippendorff_alpha(points_of_prompts: Sequence[Sequence[float]]) -> float | None:
    """α for ordered values: 1 for full agreement, 0 for that of chance, below 0 for less.

    ``points_of_prompts`` has the votes on each prompt as points of one arm, from 0 to 1. None if no prompt has two
    votes, or if all votes on such prompts are the same, since then chance alone would agree on everything.

    Raises:
        ConfigError: the library is not installed.
    """
    compared = [points for points in points_of_prompts if len(points) > 1]
    values = sorted({point for points in compared for point in points})
    if len(values) < 2:
        return None
    try:
        import krippendorff
        import numpy as np
    except ImportError:
        raise ConfigError(
            "the agreement between annotators needs the package krippendorff, which is not installed",
            where="judge.kind",
            remedy=f"pip install '{PACKAGE}'",
        ) from None
    # A row for each prompt, a column for each value: who gave a vote does not matter to α.
    counts = np.array([[points.count(value) for value in values] for points in compared])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return float(krippendorff.alpha(value_counts=counts, value_domain=values, level_of_measurement="ordinal"))

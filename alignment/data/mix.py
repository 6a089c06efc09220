"""Selects the rows of several sources for one data set, by share or by count, and nested subsets of a source. Indices
are arrays: ten million of them take 80 MB, and as Python integers five times as much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from alignment.config.data import MixedConfig
from alignment.core.errors import DataError

Indices = NDArray[np.int64]


def mixed(own: int, sources: Sequence[tuple[MixedConfig, int]], generator: torch.Generator, *, where: str) -> Indices:
    """The indices of all ``own`` rows and of the rows that each source contributes, in random order. ``sources`` holds
    each source's configuration and number of rows. Indices count through the own rows and then through the sources.
    Rows are drawn without replacement. A source without a share or a count contributes all its rows. A share is of the
    whole, rounded to a row. Example: 80 own rows and a share of .2 give 20 others. Raises DataError: a source has fewer
    rows than its configuration asks for."""
    counts = [source.count or others for source, others in sources if source.share is None]
    rest = 1.0 - sum(source.share for source, _ in sources if source.share is not None)
    total = (own + sum(counts)) / rest
    parts = [np.arange(own)]
    first = own
    for number, (source, others) in enumerate(sources):
        wanted = (source.count or others) if source.share is None else round(source.share * total)
        if wanted > others:
            raise DataError(
                f"has {others} rows, but {wanted} are needed",
                where=f"{where}.mix[{number}]",
                remedy="lower its share or count, or give it more rows",
            )
        parts.append(first + _drawn(others, wanted, generator))
        first += others
    indices = np.concatenate(parts)
    return indices[_drawn(len(indices), len(indices), generator)]


def subset(count: int, fraction: float, generator: torch.Generator) -> Indices:
    """Sorted indices of ⌈fraction · count⌉ of ``count`` rows, drawn without replacement. They are the first of one
    permutation, so under one seed a smaller fraction gives a subset of a larger one's rows. The fraction counts as
    written: .07 of 100 rows are 7, although 0.07 * 100 is a little more."""
    return np.sort(_drawn(count, math.ceil(Fraction(str(fraction)) * count), generator))


def some(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Sorted indices of at most ``wanted`` of ``count`` rows, drawn without replacement."""
    return sorted(_drawn(count, wanted, generator).tolist())


def _drawn(count: int, wanted: int, generator: torch.Generator) -> Indices:
    drawn: Indices = torch.randperm(count, generator=generator)[:wanted].numpy()
    return drawn

"""Which rows of several sources make a data set, by share or by count, and parts that lie within larger parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from alignment.config.data import MixedConfig
from alignment.core.errors import DataError


def mixed(own: int, parts: Sequence[tuple[MixedConfig, int]], generator: torch.Generator, *, where: str) -> list[int]:
    """The places of all ``own`` rows and of what each part's configuration wants of its rows, in random order.

    ``parts`` say how many rows each has; places count through own rows and parts, one after another. Rows are drawn
    without replacement. Shares are of the whole, up to half a row. Example: 80 own rows and a share of .2 give 20
    others.

    Raises:
        DataError: a source has fewer rows than are wanted.
    """
    counts = [part.count for part, _ in parts if part.count is not None]
    rest = 1.0 - sum(part.share for part, _ in parts if part.share is not None)
    total = (own + sum(counts)) / rest
    places = list(range(own))
    first = own
    for number, (part, others) in enumerate(parts):
        wanted = part.count if part.share is None else round(part.share * total)
        assert wanted is not None, "a plan refuses a part without share and count"
        if wanted > others:
            raise DataError(
                f"{others} rows are there and {wanted} are wanted",
                where=f"{where}.mix[{number}]",
                remedy="lower its share or count, or give it more rows",
            )
        places += [first + place for place in torch.randperm(others, generator=generator)[:wanted].tolist()]
        first += others
    return [places[place] for place in torch.randperm(len(places), generator=generator).tolist()]


def subset(count: int, fraction: float, generator: torch.Generator) -> list[int]:
    """The places, in order, of ⌈fraction · count⌉ of ``count`` rows, drawn without replacement.

    They are the first of one permutation, so a smaller fraction under the same seed gives some of a larger one's. The
    fraction counts as it is written: .07 of 100 rows are 7, although 0.07 * 100 is a little more.
    """
    return some(count, math.ceil(Fraction(str(fraction)) * count), generator)


def some(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """The places, in order, of at most ``wanted`` of ``count`` rows, drawn without replacement."""
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())

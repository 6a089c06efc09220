"""Rows of several sources in one list, by share or by count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from alignment.config.data import MixedConfig
from alignment.errors import DataError

Row = TypeVar("Row")


def mixed(
    own: Sequence[Row], parts: Sequence[tuple[MixedConfig, Sequence[Row]]], generator: torch.Generator, *, where: str
) -> list[Row]:
    """All of ``own`` and what each part's configuration wants of its rows, drawn without replacement, in random order.

    Shares are of the whole, up to half a row. Example: 80 own rows and a share of .2 give 20 others.

    Raises:
        DataError: a source has fewer rows than are wanted.
    """
    counts = [part.count for part, _ in parts if part.count is not None]
    rest = 1.0 - sum(part.share for part, _ in parts if part.share is not None)
    total = (len(own) + sum(counts)) / rest
    rows = list(own)
    for number, (part, others) in enumerate(parts):
        wanted = part.count if part.share is None else round(part.share * total)
        assert wanted is not None, "a plan refuses a part without share and count"
        if wanted > len(others):
            raise DataError(
                f"{len(others)} rows are there and {wanted} are wanted",
                where=f"{where}.mix[{number}]",
                remedy="lower its share or count, or give it more rows",
            )
        rows += [others[place] for place in torch.randperm(len(others), generator=generator)[:wanted].tolist()]
    return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]

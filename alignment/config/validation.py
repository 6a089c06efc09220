"""How a stage judges its model on rows that it does not learn from, while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import BETWEEN, NOT_NEGATIVE, POSITIVE


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """A look at held-out rows after every ``every`` optimiser steps (0: never), and after the last.

    The held-out rows are those of a ``share`` of the prompts, which are then not learned from, or all rows of a source
    of their own, ``data``. A look computes the training objective on them, without dropout. With ``keep_best`` the
    stage hands on the weights of the least held-out loss, not the last ones. ``patience`` ends the stage after that
    many looks in a row without a new least loss.
    """

    share: Annotated[float | None, BETWEEN] = None
    data: DataConfig = field(default_factory=DataConfig)
    every: Annotated[int, NOT_NEGATIVE] = 0
    keep_best: bool = False
    patience: Annotated[int | None, POSITIVE] = None

    @property
    def on(self) -> bool:
        """Whether there are any looks."""
        return self.every > 0

"""How a stage judges its model on rows that it does not learn from, while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import BETWEEN, NOT_NEGATIVE, POSITIVE


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Evaluation on held-out rows, the validation, after every ``every`` optimiser steps (0: never) and after the last.

    The held-out rows are the rows of a ``share`` of the prompts, which are then not trained on, or all rows of a
    separate source, ``data``. A validation computes the training objective on them, without dropout. With ``keep_best``
    the stage keeps the weights with the lowest held-out loss, not the last ones. ``patience`` ends the stage after that
    many validations in a row without a new lowest loss.
    """

    share: Annotated[float | None, BETWEEN] = None
    data: DataConfig = field(default_factory=DataConfig)
    every: Annotated[int, NOT_NEGATIVE] = 0
    keep_best: bool = False
    patience: Annotated[int | None, POSITIVE] = None

    @property
    def on(self) -> bool:
        """Whether there is any validation."""
        return self.every > 0

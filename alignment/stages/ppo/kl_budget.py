"""Ends a stage whose policy moved too far from the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KlBudget:
    """The budget is exceeded when two batches in a row have a KL above ``limit`` (nats per sequence).

    The KL of a single batch is too noisy. ``was_above`` is whether the last batch was above; checkpoints store it.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self.was_above = False

    def is_exceeded(self, kl: float) -> bool:
        """Whether the budget is exceeded after the next batch, whose mean KL is ``kl``."""
        is_above = self._limit is not None and kl > self._limit
        is_exceeded = is_above and self.was_above
        self.was_above = is_above
        return is_exceeded


class EndsOverBudget(TrainerCallback):
    """Ends the training when ``over_budget`` returns True; nothing was learned from the last batch."""

    def __init__(self, over_budget: Callable[[], bool]) -> None:
        self._over_budget = over_budget

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops on all processes, because they have the same rollout batch."""
        if self._over_budget():
            control.should_log = True
            control.should_save = False  # checkpoints are made only between updates
            control.should_training_stop = True

"""The end of a stage whose policy went too far from the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KlBudget:
    """The KL of a single batch is noisy, so two in a row above ``limit`` (nats a sequence) exceed the budget.

    ``was_above`` says whether the last batch was; a checkpoint holds it.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self.was_above = False

    def is_exceeded(self, kl: float) -> bool:
        """Takes in the mean KL of the next batch."""
        is_above = self._limit is not None and kl > self._limit
        is_exceeded = is_above and self.was_above
        self.was_above = is_above
        return is_exceeded


class EndsOverBudget(TrainerCallback):
    """Ends the training once ``over_budget`` says so; nothing was learned from the last batch."""

    def __init__(self, over_budget: Callable[[], bool]) -> None:
        self._over_budget = over_budget

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All processes have the same rollout batch, so they agree."""
        if self._over_budget():
            control.should_log = True
            control.should_save = False  # inside an update
            control.should_training_stop = True

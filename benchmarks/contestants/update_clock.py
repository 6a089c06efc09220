"""Times the steps of TRL's trainers, which log each one at its end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.measure import Steps


class UpdateClock(TrainerCallback):
    """Notes each step or update in ``steps``, and what was logged of it in ``updates``.

    A log without the metric named ``loss``, such as a trainer's closing summary, belongs to no step.
    """

    def __init__(self, steps: Steps, *, loss: str) -> None:
        self._steps = steps
        self._loss = loss
        self.updates: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first update begins."""
        self._steps.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Logging reads the loss, so the step has been computed."""
        if logs and self._loss in logs:
            self._steps.ended(float(logs[self._loss]))
            self.updates.append(dict(logs))

"""Times the updates of TRL's reinforcement learning trainers, which log each one at its end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.measure import Steps


class UpdateClock(TrainerCallback):
    """Tells ``steps`` of each update. An update is what is logged with a figure named ``loss``; other logs, such as a
    trainer's closing summary, are none."""

    def __init__(self, steps: Steps, *, loss: str) -> None:
        self._steps = steps
        self._loss = loss
        self.updates: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keeps all figures of an update."""
        if logs and self._loss in logs:
            self._steps.ended(float(logs[self._loss]))
            self.updates.append(dict(logs))

"""Writes a few answers of every update to ``samples.jsonl``, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.records.step_log import MetricsLog
from alignment.training.context import StageContext
from alignment.training.rl.experience import Rollout


class Samples:
    """Writes the first answer to each of the first ``number`` prompts of a rollout batch, one per line."""

    def __init__(self, context: StageContext, tokenizer: Any, *, group: int, number: int = 4) -> None:
        self._context = context
        self._tokenizer = tokenizer
        self._group = group
        self._number = number
        self._log = MetricsLog(context.content / "samples.jsonl")

    def write(self, update: int, rollout: Rollout, scores: Sequence[float]) -> None:
        """Writes on the main process only. ``scores`` are the training scores; each scorer's own are written too."""
        if not self._context.is_main:
            return
        self._log.keep_through(update - 1)  # a resumed stage samples this update again
        for row in range(0, min(self._number * self._group, len(scores)), self._group):
            kl = float((rollout.readings.logprobs[row] - rollout.readings.reference_logprobs[row]).sum())
            sample = {
                "row": rollout.rows[row],
                "prompt": self._tokenizer.decode(rollout.prompts[row]),
                "answer": self._tokenizer.decode(rollout.answers[row]),
                "score": scores[row],
                "kl": kl,
                "scorers": rollout.scores.of_answer(row),
            }
            self._log.append(update, sample)

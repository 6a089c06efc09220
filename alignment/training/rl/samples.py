"""A few answers of every update, to be read: ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.records.step_log import MetricsLog
from alignment.training.context import StageContext
from alignment.training.rl.experience import Rollout


class Samples:
    """Writes the first answers to the first ``number`` prompts of a rollout batch, a line each."""

    def __init__(self, context: StageContext, tokenizer: Any, *, group: int, number: int = 4) -> None:
        self._context = context
        self._tokenizer = tokenizer
        self._group = group
        self._number = number
        self._log = MetricsLog(context.content / "samples.jsonl")

    def write(self, update: int, rollout: Rollout, scores: Sequence[float]) -> None:
        """Only the main process writes. ``scores`` are what training maximises; each scorer's own are written too."""
        if not self._context.is_main:
            return
        self._log.keep_through(update - 1)  # a resumed stage samples this update again
        for row in range(0, min(self._number * self._group, len(scores)), self._group):
            kl = float((rollout.logprobs[row] - rollout.reference_logprobs[row]).sum())
            sample = {
                "row": rollout.rows[row],
                "prompt": self._tokenizer.decode(rollout.prompts[row]),
                "answer": self._tokenizer.decode(rollout.answers[row]),
                "score": scores[row],
                "kl": kl,
                "scorers": rollout.scores.of_answer(row),
            }
            self._log.append(update, sample)

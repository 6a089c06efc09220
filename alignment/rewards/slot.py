"""The interface between reinforcement learning and the scorers of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from alignment.rewards.scores import Scores


class Rewards(Protocol):
    """One or several scorers, and how their scores become one.

    A process scores its own share of a rollout batch with ``scores``; once the shares of all processes are together,
    ``total`` gives each answer one score, the same on every process.
    """

    def scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Scores:
        """What each scorer gives to each answer, on the CPU.

        ``prompts`` and ``answers`` are token ids of the policy's tokenizer, answers with their end if it came; ``rows``
        are the indices of the prompts in the stage's data, for scorers that look at other fields of a row.

        Raises:
            RewardError: a scorer did not give one usable number an answer; names row, scorer and value.
        """

    def observe(self, scores: Scores) -> None:
        """Running means and deviations take in the scores of a whole batch, before its ``total``."""

    def total(self, scores: Scores) -> Tensor:
        """``[answers]`` float32: the weighted sum of normalised and clipped scores."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on, as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state`` returned."""

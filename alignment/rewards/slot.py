"""The interface between reinforcement learning and the scorers of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from alignment.rewards.scores import Scores


class Rewards(Protocol):
    """One or more scorers, and how their scores are combined.

    Each process scores its own share of a rollout batch with ``scores``. Once the shares of all processes are gathered,
    ``total`` gives each answer one score, the same on every process.
    """

    def scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Scores:
        """The score of each answer by each scorer, on the CPU.

        ``prompts`` and ``answers`` are token ids of the policy's tokenizer, answers with the end token if it was
        sampled. ``rows`` are the indices of the prompts in the stage's data, for scorers that read fields of a row.

        Raises:
            RewardError: a scorer did not give one usable number per answer; names row, scorer and value.
        """

    def observe(self, scores: Scores) -> None:
        """Updates the running normalisation with the scores of a whole batch, before its ``total``."""

    def total(self, scores: Scores) -> Tensor:
        """``[answers]`` float32: the weighted sum of normalised and clipped scores."""

    def of_ensembles(self, scores: Scores) -> dict[str, Tensor]:
        """``[answers]`` of each ensemble, for metrics: its combined score, and how far its members are apart."""

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state`` returned."""

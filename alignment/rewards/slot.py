"""What PPO needs of whatever scores its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class Rewards(Protocol):
    """One or several scorers and how they are put together.

    A process scores its own share of a rollout batch with ``raw``; once the shares of all processes are together,
    ``total`` makes one score an answer, the same on every process.
    """

    def raw(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[str, list[float]]:
        """Each scorer's scores, one an answer, by the scorer's name.

        ``prompts`` and ``answers`` are token ids of the policy's tokenizer, answers with their end if it came; ``rows``
        are the indices of the prompts in the stage's data, for scorers that look at other fields of a row.

        Raises:
            RewardError: a score is missing, too much, no number or not finite; names row, scorer and value.
        """

    def total(self, raw: Mapping[str, Tensor], *, learn: bool) -> Tensor:
        """``[answers]``: the weighted sum of normalised and clipped scores.

        With ``learn`` the running means and deviations take these scores in first.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on, as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state`` gave."""

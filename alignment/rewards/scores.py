"""Scores of answers, the same type from scorers to advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The score of each answer by each scorer. ``values`` is ``[scorers, answers]`` float32, one row for each of
    ``names``. Example: ``Scores(names=("regex", "length"), values=torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.25,
    1.0]]))``."""

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Scores:
        """From the ``[answers]`` scores of each scorer."""
        return cls(names=tuple(named), values=torch.stack(list(named.values())).float())

    def by_name(self) -> dict[str, Tensor]:
        """``[answers]`` scores of each scorer."""
        return dict(zip(self.names, self.values, strict=True))

    def of_answer(self, index: int) -> dict[str, float]:
        """The scores of one answer by scorer."""
        return dict(zip(self.names, self.values[:, index].tolist(), strict=True))


def gathered_scores(shares: Sequence[Scores], order: Sequence[tuple[int, int]]) -> Scores:
    """Scores of a whole batch from its shares; ``order`` gives the share of each answer and its index there."""
    values = torch.stack([shares[share].values[:, index] for share, index in order], dim=1)
    return Scores(names=shares[0].names, values=values)


class Rewards(Protocol):
    """One or more scorers, and how their scores are combined. Each process scores its own share of a rollout batch with
    ``scores``. Once the shares of all processes are gathered, ``total`` gives each answer one score, the same on every
    process."""

    def scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Scores:
        """The score of each answer by each scorer, on the CPU. ``prompts`` and ``answers`` are token ids of the
        policy's tokenizer, answers with the end token if it was sampled. ``rows`` are the indices of the prompts in the
        stage's data, for scorers that read fields of a row. Raises RewardError: a scorer did not give one usable number
        per answer; names row, scorer and value."""

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

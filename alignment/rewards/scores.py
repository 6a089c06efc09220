"""Scores of answers, the same type from scorers to advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The score of each answer by each scorer.

    ``values`` is ``[scorers, answers]`` float32, one row for each of ``names``.
    Example: ``Scores(names=("regex", "length"), values=torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.25, 1.0]]))``.
    """

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

"""What is subtracted from an answer's score before PPO maximises it: for a missing end, and for length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignment.algos.length_penalties import of_each_token, of_overlong
from alignment.stages.ppo.config import OverlongConfig, PpoConfig
from alignment.stages.ppo.kind import LENGTH, OVERLONG


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalties:
    """``missing_eos`` for an answer without an end, ``per_token`` for each token, and up to ``overlong.weight`` for
    the last ``overlong.buffer`` tokens before ``longest``."""

    missing_eos: float
    per_token: float
    overlong: OverlongConfig
    longest: int

    def of_length(self, lengths: Tensor) -> dict[str, Tensor]:
        """``[answers]`` float64 of answers with ``[answers]`` tokens, their end included, by the name in metrics."""
        penalties = {}
        if self.per_token:
            penalties[LENGTH] = of_each_token(lengths, self.per_token)
        if self.overlong.buffer:
            share = of_overlong(lengths, longest=self.longest, buffer=self.overlong.buffer)
            penalties[OVERLONG] = self.overlong.weight * share
        return penalties

    def subtracted(self, scores: Tensor, lengths: Tensor, ended: Tensor) -> Tensor:
        """``[answers]`` float32: the scores less all penalties; ``ended`` is bool, whether an answer has an end."""
        left = scores - self.missing_eos * (~ended).float()
        for penalty in self.of_length(lengths).values():
            left = (left.double() - penalty).float()
        return left


def penalties_of(config: PpoConfig) -> Penalties:
    """Those that the configuration names."""
    return Penalties(
        missing_eos=config.missing_eos_penalty,
        per_token=config.length_penalty,
        overlong=config.overlong,
        longest=config.max_new_tokens,
    )

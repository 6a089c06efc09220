"""How a stage watches for over-optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.rules import NOT_NEGATIVE, POSITIVE
from alignment.config.scoring import ScorerConfig


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Watching for over-optimisation (Gao et al. 2022): rising scores that a held-out scorer does not share.

    Every ``every`` updates (0: never) the policy answers ``prompts`` rows of the stage's data that training never sees;
    the stage's own scorers and ``scorer``, which has to be named, judge the answers. With ``keep_best`` the stage hands
    on the policy that ``scorer`` liked best, not the last one; a later policy counts as better where it gains more than
    a standard error, paired by prompt. Two rollout batches in a row with a mean KL above ``max_kl`` (nats a sequence)
    end the stage, looked at or not; a policy that was looked at and lies above it is never the best, but without
    ``every`` the stage hands on the one that went over. ``scorer`` is never normalised, and is called by every process.
    """

    every: Annotated[int, NOT_NEGATIVE] = 0
    prompts: Annotated[int, POSITIVE] = 64
    scorer: ScorerConfig = field(default_factory=lambda: ScorerConfig(source=""))
    keep_best: bool = True
    max_kl: Annotated[float | None, POSITIVE] = None

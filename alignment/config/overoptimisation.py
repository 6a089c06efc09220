"""How a stage watches for over-optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.rules import NOT_NEGATIVE, POSITIVE
from alignment.config.scoring import ScorerConfig


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Watches for over-optimisation (Gao et al. 2022): scores that rise while a held-out scorer's do not.

    Every ``every`` updates (0: never) the policy answers ``prompts`` rows of the stage's data on which it is never
    trained. The stage's own scorers and the held-out ``scorer``, which has no default, judge the answers. With
    ``keep_best`` the stage keeps the policy that ``scorer`` rated best, not the last one; a later policy is better only
    if it gains more than a standard error, paired by prompt. Two rollout batches in a row with a mean KL above
    ``max_kl`` (nats per sequence) end the stage, even if ``every`` is 0. A policy above ``max_kl`` never counts as the
    best, but without ``every`` the stage keeps the policy that exceeded it. ``scorer`` is never normalised, and only
    the main process calls it.
    """

    every: Annotated[int, NOT_NEGATIVE] = 0
    prompts: Annotated[int, POSITIVE] = 64
    scorer: ScorerConfig = field(default_factory=lambda: ScorerConfig(source=""))
    keep_best: bool = True
    max_kl: Annotated[float | None, POSITIVE] = None

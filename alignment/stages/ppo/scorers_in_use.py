"""Which scorers a PPO stage uses, by the field of its configuration that names each.

Nothing here imports torch, because the plan and the rehearsal use it too.
"""

from __future__ import annotations

from alignment.config.scoring import ScorerConfig, ScoreSourceConfig
from alignment.rewards.scorer_sources import in_list, with_members
from alignment.stages.ppo.config import PpoConfig

GUARD = "guard.scorer"
"""The field of the guard's held-out scorer."""


def maximised(config: PpoConfig) -> dict[str, ScorerConfig]:
    """The scorers whose weighted sum PPO maximises."""
    return in_list(config.scorers)


def in_use(config: PpoConfig) -> dict[str, ScoreSourceConfig]:
    """Every scorer that a stage calls, members of ensembles too; the held-out scorer only if the guard is on."""
    held_out = {GUARD: config.guard.scorer} if config.guard.every > 0 else {}
    return with_members(maximised(config) | held_out)

"""What a reward card can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import NOT_NEGATIVE, POSITIVE
from alignment.config.scoring import ScoreSourceConfig
from alignment.config.stage_fields import not_identity, reference_to
from alignment.config.too_long import TooLongConfig


@dataclass(kw_only=True, slots=True)
class RewardCardConfig:
    """A reward model held against pairs, and beside it what is told by length and by words alone.

    ``reward`` may also be one that no stage made. ``learned`` are the pairs that it learned from: a bag of words learns
    from the same, and with ``leave_out_learned`` no pair is judged whose prompt stands there. Without a source these
    are the pairs of the stage that made the model, but for what that stage mixes in; of a model from elsewhere nothing
    is known then, and there is no bag of words. ``rule`` scores both answers, and how often it prefers the same one as
    the model is shown. ``invariance_pairs`` are scored again alone, padded, in another order
    and in float32; 0 scores none. ``num_worst`` pairs are kept to read.
    """

    kind: str = "reward_card"
    reward: str = reference_to("stage:reward", "reward", external=True)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    learned: DataConfig = field(default_factory=DataConfig)
    leave_out_learned: bool = True
    rule: ScoreSourceConfig | None = None
    max_length: Annotated[int, POSITIVE] = 2048
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    micro_batch_tokens: Annotated[int, POSITIVE] = not_identity(4096)
    invariance_pairs: Annotated[int, NOT_NEGATIVE] = 16
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    num_worst: Annotated[int, NOT_NEGATIVE] = 10

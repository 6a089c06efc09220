"""Settings of a reward card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.rules import NOT_NEGATIVE, POSITIVE
from alignment.config.scoring import ScoreSourceConfig
from alignment.config.stage import not_identity, reference_to


@dataclass(kw_only=True, slots=True)
class RewardCardConfig:
    """Tests a reward model on pairs, and compares it with baselines that see only an answer's length or its words.

    ``reward`` may also be a model that no stage made. ``learned`` names the pairs on which it was trained. A bag of
    words is trained on the same pairs, and with ``leave_out_learned`` pairs whose prompts they contain are not judged.
    By default these are the pairs of the stage that made the model, without mixed-in rows. For a model from elsewhere
    they are unknown, and there is no bag of words. ``rule`` scores both answers, and the card shows how often it agrees
    with the model. ``invariance_pairs`` are scored again alone, padded, in another order and in float32; 0 turns this
    off. The card lists the ``num_worst`` worst pairs.
    """

    kind: str = "reward_card"
    reward: str = reference_to("stage:reward", "reward", external=True)
    data: DataConfig = field(default_factory=DataConfig)
    learned: DataConfig = field(default_factory=DataConfig)
    leave_out_learned: bool = True
    rule: ScoreSourceConfig | None = None
    max_length: Annotated[int, POSITIVE] = 2048
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    micro_batch_tokens: Annotated[int, POSITIVE] = not_identity(4096)
    invariance_pairs: Annotated[int, NOT_NEGATIVE] = 16
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    num_worst: Annotated[int, NOT_NEGATIVE] = 10

"""Settings of a stage that trains a reward model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to
from alignment.core.fingerprint import IF_SET


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """A Bradley-Terry reward model: a scalar score at the last token of an answer (Stiennon et al. 2020, eq. 1).

    ``margin`` times the difference of a pair's scores is subtracted from the difference of its rewards in the loss
    (Touvron et al. 2023, eq. 2); rows then need scores.

    ``center_coefficient`` weighs (r_chosen + r_rejected)² in the loss (Eisenstein et al. 2023). ``eval_fraction`` of
    the prompts is held out for the accuracy, and for the offset that makes chosen answers score 0 on average.
    """

    kind: str = "reward"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, adam_eps=1e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    margin: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    center_coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    eval_fraction: Annotated[float, BELOW_ONE] = 0.1
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

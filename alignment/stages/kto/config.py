"""Settings of a stage that learns from single answers that are labelled as desirable or undesirable."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to


class KtoLoss(str, Enum):
    """The losses of TRL's KTO trainer.

    h is an answer's log-ratio to the reference, and w the weight of its label. ``kto``: w (1 − σ(β (h − z))) for a
    desirable answer and w (1 − σ(β (z − h))) for an undesirable one, where z ≥ 0 estimates the KL divergence from the
    reference (Ethayarajh et al. 2024, eq. 7). ``apo_zero_unpaired``: the same with z = 0, for answers that are better
    than those of the policy (D'Oosterlinck et al. 2024).
    """

    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss needs the KL divergence, which is estimated from other answers of the same batch."""
        return self is KtoLoss.kto


@dataclass(kw_only=True, slots=True)
class KtoConfig:
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024). The reference is the policy at the start of the stage.

    A weight of null is chosen from the numbers of desirable and undesirable rows, such that the ratio of
    desirable_weight × desirable rows to undesirable_weight × undesirable rows lies in [1, 4/3] (eq. 8); the weight of
    the label that has enough rows stays at 1. Rows are shuffled once, and every epoch goes through them in that order.
    With ``precompute_reference`` the reference's log-probabilities are computed once and cached next to the artifacts,
    which pays off over several epochs.
    """

    kind: str = "kto"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: Annotated[float, POSITIVE] = 0.1
    loss: KtoLoss = KtoLoss.kto
    desirable_weight: Annotated[float | None, POSITIVE] = None
    undesirable_weight: Annotated[float | None, POSITIVE] = None
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

"""What a stage of direct preference optimisation can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage_fields import not_identity, reference_to
from alignment.config.too_long import TooLongConfig


class DpoLoss(str, Enum):
    """Preference losses that TRL's DPO trainer offers and that we test, of log-ratios to the reference.

    ``sigmoid``: −log σ(β Δ) of their sums over answers (Rafailov et al. 2023). ``sigmoid_norm``: the same of means
    over an answer's tokens (Lambert et al. 2024), with a larger beta. ``hinge``: max(0, 1 − β Δ) (Zhao et al. 2023).
    ``ipo``: (Δ − 1/(2 β))² of means (Azar et al. 2023).
    """

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023). The reference is the policy at the start of the stage.

    With ``precompute_reference`` its log-probabilities are computed once and kept beside the artifacts: worth it for
    several epochs, or several stages on the same pairs. Otherwise it runs beside the policy.
    """

    kind: str = "dpo"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: Annotated[float, POSITIVE] = 0.1
    loss: DpoLoss = DpoLoss.sigmoid
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

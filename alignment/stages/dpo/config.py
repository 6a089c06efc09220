"""Settings of a direct preference optimisation stage."""

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
from alignment.config.validation import ValidationConfig
from alignment.core.fingerprint import IF_SET


class DpoLoss(str, Enum):
    """Those preference losses of TRL's DPO trainer that we test.

    Δ is the log-ratio to the reference of the chosen answer, less that of the rejected one. ``sigmoid``: −log σ(β Δ),
    with log-ratios summed over an answer's tokens (Rafailov et al. 2023). ``sigmoid_norm``: the same with means over
    the tokens (Lambert et al. 2024); use a larger beta. ``hinge``: max(0, 1 − β Δ) (Zhao et al. 2023). ``ipo``:
    (Δ − 1/(2 β))² with means (Azar et al. 2023).
    """

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023). The reference is the policy at the start of the stage.

    With ``precompute_reference`` its log-probabilities are computed once and cached next to the artifacts, which pays
    off over several epochs, or several stages on the same pairs. Otherwise they are computed in every step.
    """

    kind: str = "dpo"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: Annotated[float, POSITIVE] = 0.1
    loss: DpoLoss = DpoLoss.sigmoid
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

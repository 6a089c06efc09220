"""Settings of a direct preference optimisation stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import BELOW_HALF, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to
from alignment.core.fingerprint import IF_SET


class DpoLoss(str, Enum):
    """Losses for a pair. Δ is the chosen answer's log-ratio to the reference minus the rejected answer's; h is β Δ.

    ``sigmoid``: −log σ(h), with log-ratios summed over an answer's tokens (Rafailov et al. 2023). ``sigmoid_norm``: the
    same with means over the tokens (Lambert et al. 2024); use a larger beta. ``hinge``: max(0, 1 − h) (Zhao et al.
    2023). ``ipo``: (Δ − 1/(2 β))² with means (Azar et al. 2023). ``robust``: ``sigmoid``, unbiased although a share
    ``label_smoothing`` of the labels is flipped (Chowdhury et al. 2024). ``apo_zero``: raises chosen answers and
    lowers rejected ones, each against the reference; ``apo_down``: lowers both, rejected ones more (D'Oosterlinck et
    al. 2024, eqs. 7 and 8).

    Two take no reference. ``simpo``: −log σ(β (m_c − m_r) − ``target_margin``), with the means m of log p over an
    answer's tokens (Meng et al. 2024, eq. 6). ``orpo``: −m_c − ``odds_weight`` log σ(log odds of chosen over rejected),
    where an answer's probability is exp(m) (Hong et al. 2024, eq. 6); it does not need a policy that SFT trained.
    """

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    simpo = "simpo"
    orpo = "orpo"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with its start."""
        return self not in (DpoLoss.simpo, DpoLoss.orpo)


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023). The reference is the policy at the start of the stage.

    With ``precompute_reference`` its log-probabilities are computed once and cached next to the artifacts, which pays
    off over several epochs, or several stages on the same pairs. Otherwise they are computed in every step. A loss
    without a reference computes none.

    ``label_smoothing`` is the share of labels that are flipped. With ``sigmoid`` and ``sigmoid_norm`` it gives the
    conservative loss (Mitchell 2023), and ``robust`` needs it. ``nll_weight`` adds the negative log-likelihood of the
    chosen answer, divided by its tokens (α of Pang et al. 2024). ``margin`` times the difference of a pair's scores is
    subtracted from h (Amini et al. 2024, with their f the identity); rows then need scores. ``target_margin`` is γ of
    ``simpo``, which needs it. ``odds_weight`` is λ of ``orpo``; its default is the value of Hong et al. for Mistral 7B.
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
    label_smoothing: Annotated[float, BELOW_HALF] = field(default=0.0, metadata=IF_SET)
    nll_weight: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    margin: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    target_margin: Annotated[float | None, NOT_NEGATIVE] = field(default=None, metadata=IF_SET)
    odds_weight: Annotated[float, POSITIVE] = field(default=0.1, metadata=IF_SET)
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

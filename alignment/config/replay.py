"""Language modelling alongside reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import NOT_NEGATIVE, POSITIVE


@dataclass(kw_only=True, slots=True)
class PtxConfig:
    """Ordinary language modelling alongside PPO, against forgetting (Ouyang et al. 2022, eq. 2).

    ``coefficient`` is the weight of the token-mean loss on the assistant turns of ``batch_size`` conversations per
    step; 0 turns it off.
    """

    coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    batch_size: Annotated[int, POSITIVE] = 8
    data: DataConfig = field(default_factory=DataConfig)

"""Settings of a supervised fine-tuning stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to
from alignment.core.fingerprint import IF_SET


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning on conversations: only assistant turns are learned, including the end of each turn."""

    kind: str = "sft"
    init: str = reference_to("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    packing: bool = False
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

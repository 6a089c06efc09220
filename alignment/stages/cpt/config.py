"""Settings of a continued-pretraining stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to
from alignment.core.fingerprint import IF_SET


@dataclass(kw_only=True, slots=True)
class CptConfig:
    """Continued pretraining on plain texts: every token is learned, and each text is split into rows of ``max_length``.

    ``packing`` joins short rows, which do not attend to one another.
    """

    kind: str = "cpt"
    init: str = reference_to("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    max_length: Annotated[int, POSITIVE] = 1024
    packing: bool = True
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)

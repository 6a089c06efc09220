"""All settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from alignment.config.launch import LaunchConfig
from alignment.config.model import ModelConfig
from alignment.config.rules import FILLED, NAME, NOT_NEGATIVE, STORE
from alignment.config.stage import StageConfig
from alignment.config.tracking import TrackingConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A recipe after composition.

    ``stages`` maps a stage's name to its configuration; their order follows from their references. ``output`` is the
    folder that contains ``runs/`` and ``artifacts/``. ``artifacts`` is a store that several machines share, such as
    ``s3://bucket/prefix``; the folder ``artifacts/`` is then a cache of it.
    """

    HINTS: ClassVar[dict[str, str]] = {
        "adapter.kind": "each stage has its own: set stages.NAME.adapter.kind for one stage; on the command line, "
        "adapter={value} chooses it for all stages"
    }

    name: Annotated[str, NAME]
    summary: str = ""
    seed: Annotated[int, NOT_NEGATIVE] = 42
    output: Annotated[str, FILLED] = "."
    artifacts: Annotated[str | None, STORE] = None
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: Annotated[dict[str, StageConfig], FILLED] = field(default_factory=dict)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

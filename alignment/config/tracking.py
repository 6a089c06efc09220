"""Where curves go in addition to ``metrics.jsonl``, which is always written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.rules import NAME, TAGS


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases, TensorBoard, both or neither. The other settings are for W&B.

    ``project`` and ``entity`` say where its runs belong (None: the user's own default), ``group`` what they are shown
    under (None: the run's name), ``tags`` which tags they get besides recipe, adapter and sharding.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: Annotated[str, NAME] = "alignment"
    entity: Annotated[str | None, NAME] = None
    group: Annotated[str | None, NAME] = None
    tags: Annotated[list[str], TAGS] = field(default_factory=list)

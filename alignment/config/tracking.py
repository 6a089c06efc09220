"""Where curves go beside ``metrics.jsonl``, which is always written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases, TensorBoard, both or none. What is below the first two is told to W&B.

    ``project`` and ``entity`` say where its runs belong (None: the user's own default), ``group`` what they are shown
    under (None: the run's name), ``tags`` what they carry beside recipe, adapter and sharding.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "alignment"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

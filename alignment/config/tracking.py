"""Where curves go beside ``metrics.jsonl``, which is always written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TrackerKind(str, Enum):
    """``jsonl`` alone, or Weights & Biases beside it."""

    jsonl = "jsonl"
    wandb = "wandb"


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """With ``wandb``: online when the user is logged in, offline otherwise; one group a run, one W&B run a stage."""

    kind: TrackerKind = TrackerKind.jsonl
    project: str = "alignment"

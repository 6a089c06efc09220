"""Where curves go in addition to ``metrics.jsonl``, which is always written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from alignment.config.rules import NAME, TAGS, TRACKING_URL

LABELS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "trackio"}
"""The trackers, by their field of ``TrackingConfig``, with their names for the user."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases, TensorBoard, MLflow, trackio, several of them or none.

    ``project`` is the project of W&B and trackio and the experiment of MLflow. ``group`` is the name under which stages
    are grouped (null: the run's name). ``tags`` are added to the tags for recipe, adapter and sharding. ``entity`` is
    the owner of W&B's project (null: the user's own default). ``mlflow_url`` is MLflow's server (empty:
    ``MLFLOW_TRACKING_URI``).
    """

    wandb: bool = False
    tensorboard: bool = False
    mlflow: bool = False
    trackio: bool = False
    project: Annotated[str, NAME] = "alignment"
    entity: Annotated[str | None, NAME] = None
    group: Annotated[str | None, NAME] = None
    tags: Annotated[list[str], TAGS] = field(default_factory=list)
    mlflow_url: Annotated[str, TRACKING_URL] = ""


def with_only(tracking: TrackingConfig, tracker: str, *, mlflow_url: str = "") -> TrackingConfig:
    """The same settings with this tracker alone, one of ``LABELS``, and with another server if one is given."""
    chosen = replace(tracking, mlflow_url=mlflow_url or tracking.mlflow_url)
    for name in LABELS:
        setattr(chosen, name, name == tracker)
    return chosen

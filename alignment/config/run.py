"""A run's settings, its tracking, and their registration with Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

from alignment.config.launch import Backend, LaunchConfig
from alignment.config.model import AdapterConfig, ModelConfig
from alignment.config.rules import FILLED, NAME, NOT_NEGATIVE, STORE, TAGS, TRACKING_URL
from alignment.config.stage import StageConfig
from alignment.core.files import shipped

LABELS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "trackio"}
"""The trackers, by their field of ``TrackingConfig``, with their names for the user."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases, TensorBoard, MLflow, trackio, several of them or none.

    ``project`` is the project of W&B and trackio and the experiment of MLflow. ``group`` is the name under which stages
    are grouped (null: the run's name). ``tags`` are added to the tags for recipe, adapter and sharding. ``entity`` is
    the owner of W&B's project (null: the user's own default). ``mlflow_url`` is MLflow's server (empty:
    ``MLFLOW_TRACKING_URI``)."""

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


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A recipe after composition.

    ``stages`` maps a stage's name to its configuration; their order follows from their references. ``output`` is the
    folder that contains ``runs/`` and ``artifacts/``. ``artifacts`` is a store that several machines share, such as
    ``s3://bucket/prefix``; the folder ``artifacts/`` is then a cache of it."""

    HINTS: ClassVar[dict[str, str]] = {
        "adapter.kind": "each stage has its own: set stages.NAME.adapter.kind for one stage; on the command line, "
        "adapter={value} chooses it for all stages",
        "adapter": "each stage that trains has its own; `adapter: {value}` counts for all of them in a recipe that has "
        "no list `defaults`",
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


BACKEND = "launch/backend"
"""A group inside another one: where processes run, in addition to how they share a model."""
GROUPS: dict[str, object] = {
    "adapter": AdapterConfig,
    "launch": LaunchConfig,
    BACKEND: Backend,
    "model": ModelConfig,
    "stage": None,
    "tracking": TrackingConfig,
}
SEVERAL = ("tracking",)
"""Groups from which several files may be chosen: ``tracking=[wandb, tensorboard]``."""


def conf_folder() -> Path:
    """The folder of shipped choices."""
    return shipped("conf")


def recipes_folder() -> Path:
    """The folder of shipped recipes."""
    return shipped("recipes")


def recipe_names() -> list[str]:
    """The shipped recipes, by name."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def sweep_names() -> list[str]:
    """The shipped sweeps, by name."""
    return sorted(path.stem for path in (conf_folder() / "sweep").glob("*.yaml"))

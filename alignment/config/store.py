"""Which groups of choices exist, and the dataclass that each group's files fill; a stage's depends on its kind.

Hydra composes the files of ``conf/`` as plain values; ``alignment.config.typed`` checks the result against the
dataclasses. The dataclasses are deliberately not registered as Hydra schemas: Hydra would stop at the first
misspelling, and a user should see all of them.
"""

from __future__ import annotations

from pathlib import Path

from alignment.config.adapter import AdapterConfig
from alignment.config.backend import Backend
from alignment.config.launch import LaunchConfig
from alignment.config.model import ModelConfig
from alignment.config.tracking import TrackingConfig
from alignment.core.resources import shipped

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

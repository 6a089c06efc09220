"""Settings that all stages share, and the fields by which a stage is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Protocol

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import Automatic, Moments


class StageClasses(dict[str, type[Any]]):
    """The dataclass of each kind of stage, by its name; ``problems`` says why other kinds cannot be used."""

    def __init__(
        self, classes: Mapping[str, type[Any]] | None = None, problems: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(classes or {})
        self.problems = dict(problems or {})


class StageConfig(Protocol):
    """Settings of a stage; ``kind`` names the entry of alignment/stages/registry.py that says what they mean."""

    kind: str


class TrainedOptim(Protocol):
    """Settings of the optimiser that every stage that trains has."""

    lr: float
    batch_size: int
    micro_batch_tokens: int | Automatic
    moments: Moments


class TrainedConfig(StageConfig, Protocol):
    """Settings of a stage that trains a model: each has these fields."""

    init: str
    adapter: AdapterConfig
    data: DataConfig

    @property
    def optim(self) -> TrainedOptim: ...


def reference_to(default: str, *artifact_kinds: str, external: bool = False) -> str:
    """A field that names another stage (``stage:NAME``), the base model (``base``) or a folder (``path:FOLDER``). It
    accepts artifacts of these kinds. The fingerprint covers what it points to, not its name. ``external``: a model that
    no stage made is accepted too, from a folder or a hub."""
    return field(default=default, metadata={"reference": artifact_kinds, "external": external, "identity": False})


def not_identity(default: int) -> int:
    """A field that does not change the result, and so is not part of the fingerprint."""
    return field(default=default, metadata={"identity": False})

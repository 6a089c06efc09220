"""What the settings of all stages have in common. The settings themselves are in alignment/stages/<kind>/config.py.

``max_length`` limits the tokens of a whole row, ``max_prompt_length`` and ``max_answer_length`` those of its parts: in
a conversation everything before the last turn, and that turn. ``too_long`` says what happens to longer rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.micro_batch import Automatic
from alignment.config.optim import Moments


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

"""``forgetting.json``: policies on general text and questions, compared with the base model (docs/design/0015)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alignment.core import typed_json
from alignment.core.typed_json import Label, Name
from alignment.records.interval import Interval

FILE = "forgetting.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest losses allowed: the rise of perplexity as a share of the base's, and the drop of right answers as a
    share of the questions.

    None means no limit.
    """

    perplexity_rise: float | None = None
    ability_drop: float | None = None

    @property
    def judge(self) -> bool:
        """Whether there is any limit."""
        return self.perplexity_rise is not None or self.ability_drop is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmForgetting:
    """One arm; ``nats`` is the loss in nats per token, ``ability`` the share of right answers, and ``tasks`` that share
    by task.

    ``rise`` is the rise of the perplexity as a share of the base's, ``drop`` the drop of the share of right answers;
    both are None for the base itself. ``reasons`` say in words which limits were exceeded.
    """

    name: Name
    label: Label = ""
    nats: float | None = None
    perplexity: float | None = None
    ability: float | None = None
    tasks: dict[Name, float] = field(default_factory=dict)
    rise: Interval | None = None
    drop: Interval | None = None
    passed: bool = False
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """All arms, the base model first; every arm has ``passed`` if nothing was ``judged``."""

    num_texts: int | None = None
    num_tokens: int | None = None
    num_questions: int | None = None
    limits: Limits = field(default_factory=Limits)
    judged: bool = True
    arms: list[ArmForgetting] = field(default_factory=list)
    passed: bool = False
    version: int = 1

    def write(self, folder: Path) -> None:
        """Writes the file into an artifact's folder."""
        typed_json.write(folder / FILE, self)

    @staticmethod
    def read(artifact: Path) -> Forgetting:
        """The record of an artifact.

        Raises:
            FileNotFoundError: the artifact has none.
            ArtifactError: it is damaged, or was written by a newer version.
        """
        return typed_json.read(artifact / FILE, Forgetting, remedy=f"delete {artifact} to remake it")

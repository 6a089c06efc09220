"""The forms of a scorer's ``source``, for the plan that checks it and the worker that builds it. No user code is
imported or run here. A source is ``reward`` (the stage's reward model), a reference to another reward model
(``stage:NAME``, ``path:FOLDER``, ``hub:ORG/NAME@REVISION``), a function (``FILE.py:FUNCTION`` of a user's file, or
``bundled:NAME.py:FUNCTION`` of a file that ships with the project), ``server``, ``grade``, ``ensemble``, or the name of
a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from alignment.config.scoring import ScorerConfig, ScoreSourceConfig
from alignment.core.files import shipped
from alignment.rewards.rules.all_rules import RULES

S = TypeVar("S", bound=ScoreSourceConfig)

REWARD = "reward"
"""Both the source and the field of the stage that it reads."""

CHOICE = "choice"
"""A metric of the policy itself: which of a row's choices it finds likeliest."""

GRADE = "grade"
"""A model at an endpoint that grades answers: a scorer's own ``grader``, or for a metric that of its stage."""

SERVER = "server"
"""A reward model or classifier behind HTTP."""

ENSEMBLE = "ensemble"
"""Several scorers whose scores become one."""

GROUPS = {SERVER: "server", GRADE: "grader", ENSEMBLE: "ensemble"}
"""Sources that a group of settings describes, by the name of that group."""

_REFERENCES = ("stage:", "path:", "hub:")
_BUNDLED = "bundled:"


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionSource:
    """A function and its file: ``FunctionSource(file=Path("/home/me/score.py"), name="brevity")``. ``bundled`` is the
    file's name after ``bundled:`` if it ships with the project, and empty for a user's file."""

    file: Path
    name: str
    bundled: str = ""

    def __str__(self) -> str:
        """The source, the same in any folder: a user's file by its absolute path."""
        return f"{_BUNDLED}{self.bundled}:{self.name}" if self.bundled else f"{self.file}:{self.name}"


def function_of(source: str) -> FunctionSource | None:
    """The function that ``FILE.py:FUNCTION`` or ``bundled:NAME.py:FUNCTION`` names; None for a source of another form.
    A user's file is made absolute."""
    file, _, name = source.rpartition(":")
    if is_reference(source) or not file.endswith(".py"):
        return None
    if file.startswith(_BUNDLED):
        bundled = file.removeprefix(_BUNDLED)
        return FunctionSource(file=shipped("data") / bundled, name=name, bundled=bundled)
    return FunctionSource(file=Path(file).expanduser().absolute(), name=name)


def is_reference(source: str) -> bool:
    """Whether a source refers to another reward model than the stage's."""
    return source.startswith(_REFERENCES)


def is_known(source: str) -> bool:
    named = source == REWARD or source in RULES or source in GROUPS
    return named or is_reference(source) or function_of(source) is not None


def in_list(scorers: Sequence[S]) -> dict[str, S]:
    """The scorers of a stage's list by the field of each: ``scorers[0]``, ``scorers[1]`` and so on."""
    return {f"scorers[{number}]": scorer for number, scorer in enumerate(scorers)}


def with_members(scorers: Mapping[str, ScoreSourceConfig]) -> dict[str, ScoreSourceConfig]:
    """The scorers and all members of ensembles among them, by the field of each: ``scorers[0].ensemble.members[1]``."""
    every: dict[str, ScoreSourceConfig] = {}
    for field, scorer in scorers.items():
        every[field] = scorer
        ensemble = scorer.ensemble if isinstance(scorer, ScorerConfig) else None
        if scorer.source == ENSEMBLE and ensemble is not None:
            every |= {member_field(field, number): member for number, member in enumerate(ensemble.members)}
    return every


def member_field(field: str, number: int) -> str:
    return f"{field}.ensemble.members[{number}]"


def source_field(field: str) -> str:
    """The configuration field of a scorer's source: ``scorers[0].source``."""
    return f"{field}.source"


def input_field(field: str, source: str) -> str | None:
    """The input of the stage that holds a scorer's reward model; None for a scorer that is not a reward model."""
    if source == REWARD:
        return REWARD
    return source_field(field) if is_reference(source) else None


def label(source: str) -> str:
    """A short name for metrics: ``/home/me/score.py:brevity`` → ``brevity``, ``stage:judge`` → ``judge``."""
    return source.rstrip("/").rpartition(":")[2].partition("@")[0].rpartition("/")[2] or source

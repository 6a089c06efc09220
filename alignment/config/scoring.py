"""Settings of what scores answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignment.config.rules import NAME, PATTERN, POSITIVE, SCORE


@dataclass(kw_only=True, slots=True)
class ScoreSourceConfig:
    """Where a score comes from.

    ``source`` is ``reward`` (the model that the stage's ``reward`` names), another reward model (``stage:NAME``,
    ``path:FOLDER``, ``hub:ORG/NAME@REVISION``), ``FILE.py:FUNCTION`` (your code), ``bundled:NAME.py:FUNCTION``, or a
    rule: ``exact_answer``, ``regex`` (with ``pattern``) or ``length`` (with ``target``, in words).
    """

    source: str = ""
    pattern: Annotated[str | None, PATTERN] = None
    target: Annotated[int | None, POSITIVE] = None


@dataclass(kw_only=True, slots=True)
class ScorerConfig(ScoreSourceConfig):
    """One part of an answer's score: ``weight`` times the score that ``source`` gives it.

    With ``normalize`` the running mean is subtracted from scores, which are then divided by the running standard
    deviation; ``clip`` then limits the absolute value.
    """

    source: str = "reward"
    weight: Annotated[float, SCORE] = 1.0
    normalize: bool = False
    clip: Annotated[float | None, POSITIVE] = None


@dataclass(kw_only=True, slots=True)
class MetricConfig(ScoreSourceConfig):
    """A metric of an evaluation: the mean of the scores that ``source`` gives the answers, shown under ``name``."""

    name: Annotated[str, NAME] = ""
    higher_is_better: bool = True

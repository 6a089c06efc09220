"""Settings of what scores answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from alignment.config.rules import FILLED, NAME, PATTERN, POSITIVE, SCORE, Rule
from alignment.core.fingerprint import IF_SET

MEAN, MAJORITY = "mean", "majority"
_PASS = re.compile(r"pass@([1-9][0-9]{0,3})")
AGGREGATE = Rule(
    lambda value: value in (MEAN, MAJORITY) or _PASS.fullmatch(value) is not None,
    f"{MEAN}, {MAJORITY}, or pass@K, such as pass@4",
)


def pass_size(aggregate: str) -> int | None:
    """K of ``pass@K``; None for another aggregate."""
    match = _PASS.fullmatch(aggregate)
    return int(match[1]) if match else None


@dataclass(kw_only=True, slots=True)
class ScoreSourceConfig:
    """Where a score comes from.

    ``source`` is ``reward`` (the model that the stage's ``reward`` names), another reward model (``stage:NAME``,
    ``path:FOLDER``, ``hub:ORG/NAME@REVISION``), ``FILE.py:FUNCTION`` (your code), ``bundled:NAME.py:FUNCTION``, or a
    rule (alignment/rewards/rules): ``regex`` has a ``pattern``, ``length`` a ``target`` in words, ``json_schema`` a
    ``schema``.
    """

    source: str = ""
    pattern: Annotated[str | None, PATTERN] = None
    target: Annotated[int | None, POSITIVE] = None
    schema: dict[str, Any] | None = field(default=None, metadata=IF_SET)


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
    """A metric of an evaluation, shown under ``name``: the scores that ``source`` gives the answers.

    Two sources are for metrics alone: ``choice``, and ``grade``, which asks the stage's ``grader``. A ``rubric`` is for
    ``grade``, in place of the grader's own.

    ``aggregate`` makes one score of those of several answers to a prompt (``answers.per_prompt``): their ``mean``;
    ``pass@K``, the probability that one of K is correct, which is an answer of at least ``passing_score``; or
    ``majority``, the score of the most frequent final answer, for ``exact_answer``.
    """

    name: Annotated[str, NAME] = ""
    higher_is_better: bool = True
    aggregate: Annotated[str, AGGREGATE] = MEAN
    passing_score: Annotated[float, SCORE] = 1.0
    rubric: Annotated[str | None, FILLED] = field(default=None, metadata=IF_SET)

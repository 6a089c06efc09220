"""What gives scores to answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignment.config.rules import PATTERN, POSITIVE, SCORE


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    """One part of an answer's score: ``weight`` times what ``source`` says of it.

    ``source`` is ``reward`` (the model that the stage's ``reward`` names), another reward model (``stage:NAME``,
    ``path:FOLDER``, ``hub:ORG/NAME@REVISION``), ``FILE.py:FUNCTION`` (your code), ``bundled:NAME.py:FUNCTION``, or a
    rule: ``exact_answer``, ``regex`` (with ``pattern``) or ``length`` (with ``target``, in words).
    With ``normalize`` the running mean is taken off and the running standard deviation divided out; ``clip`` then
    bounds the absolute value.
    """

    source: str = "reward"
    weight: Annotated[float, SCORE] = 1.0
    normalize: bool = False
    clip: Annotated[float | None, POSITIVE] = None
    pattern: Annotated[str | None, PATTERN] = None
    target: Annotated[int | None, POSITIVE] = None

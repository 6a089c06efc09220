"""Settings of a forgetting measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import FRACTION, NOT_NEGATIVE, POSITIVE


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """Which abilities of the base model the policies lost; a run in which a policy exceeds a limit ends with code 10.

    The base model and then each of ``arms`` read the plain texts of ``data`` and choose answers to ``questions``. An
    arm passes if its perplexity rose by at most ``max_perplexity_rise`` of the base's (.2: from 20 to 24), and its
    share of right answers fell by at most ``max_ability_drop`` (.1: from .64 to .54). The default limits are a choice
    and were not tuned. null turns a limit off; with both off, arms are measured but not judged.
    """

    kind: str = "forgetting"
    arms: list[str] = field(default_factory=list, metadata={"reference": ("policy",), "identity": False})
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/texts"))
    questions: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/questions"))
    max_perplexity_rise: Annotated[float | None, NOT_NEGATIVE] = 0.2
    max_ability_drop: Annotated[float | None, FRACTION] = 0.1
    bootstrap_samples: Annotated[int, POSITIVE] = 2000

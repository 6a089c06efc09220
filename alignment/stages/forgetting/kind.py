"""The stage kind ``forgetting``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.config.faults import Fault
from alignment.config.rules import FRACTION, NOT_NEGATIVE, POSITIVE
from alignment.config.run import RunConfig
from alignment.core.artifacts import FORGETTING
from alignment.data.records import PlainText, Question
from alignment.stages.base import DataSlot, LaunchShape, Reported, RunsOn, StageKind
from alignment.stages.shared.kind_answers import of_arms


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """Which abilities of the base model the policies lost; a run in which a policy exceeds a limit ends with code 10.

    The base model and then each of ``arms`` read the plain texts of ``data`` and choose answers to ``questions``. An
    arm passes if its perplexity rose by at most ``max_perplexity_rise`` of the base's (.2: from 20 to 24), and its
    share of right answers fell by at most ``max_ability_drop`` (.1: from .64 to .54). The default limits are a choice
    and were not tuned. null turns a limit off; with both off, arms are measured but not judged."""

    kind: str = "forgetting"
    arms: list[str] = field(default_factory=list, metadata={"reference": ("policy",), "identity": False})
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/texts"))
    questions: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/questions"))
    max_perplexity_rise: Annotated[float | None, NOT_NEGATIVE] = 0.2
    max_ability_drop: Annotated[float | None, FRACTION] = 0.1
    bootstrap_samples: Annotated[int, POSITIVE] = 2000


def _data(config: ForgettingConfig) -> list[DataSlot]:
    return [
        DataSlot(field="data", data=config.data, record=PlainText),
        DataSlot(field="questions", data=config.questions, record=Question),
    ]


def _faults(config: ForgettingConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    if not config.arms:
        yield Fault(where=f"{where}.arms", message="is empty; list the policies to measure, for example [stage:sft]")
    for number, arm in enumerate(config.arms):
        if arm in UNTRAINED_ARMS:
            message = f"{arm!r} was not trained; remove it, the base model is measured anyway"
            yield Fault(where=f"{where}.arms[{number}]", message=message)


def _reported(config: ForgettingConfig) -> Reported:
    return Reported(held_out=("passed", *of_arms(("perplexity", "ability"), ["base", *config.arms])))


KIND = StageKind(
    name="forgetting",
    summary="how much policies forgot about general text and questions, with a gate",
    config=ForgettingConfig,
    revision=9,
    produces=FORGETTING,
    run="alignment.stages.forgetting.run:run",
    rehearse="alignment.stages.shared.base_check:refuse_base_without_logprobs",
    data=_data,
    faults=_faults,
    metrics=_reported,
    launch=LaunchShape(runs_on=RunsOn.replicas),
)

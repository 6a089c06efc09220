"""The stage kind ``forgetting``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.config.faults import Fault
from alignment.core.artifacts import FORGETTING
from alignment.data.records import PlainText, Question
from alignment.stages.base import DataSlot, LaunchShape, Outcome, References, Reported, RunsOn, StageKind
from alignment.stages.forgetting.config import ForgettingConfig
from alignment.stages.shared.kind_answers import of_arms


def _data(config: ForgettingConfig) -> list[DataSlot]:
    return [
        DataSlot(field="data", data=config.data, record=PlainText),
        DataSlot(field="questions", data=config.questions, record=Question),
    ]


def _reference_faults(config: ForgettingConfig, where: str) -> Iterator[Fault]:
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
    references=References(faults=_reference_faults),
    launch=LaunchShape(runs_on=RunsOn.replicas),
    outcome=Outcome(metrics=_reported),
)

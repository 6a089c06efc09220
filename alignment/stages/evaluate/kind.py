"""What the rest of the package asks a stage of this kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from alignment.config.evaluating import FEW_SHOT, FewShotConfig, JudgeConfig, JudgeKind
from alignment.config.faults import Fault, unread_faults
from alignment.config.run import RunConfig
from alignment.core.artifacts import EVALUATION
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.evaluation.endpoint import api_key
from alignment.evaluation.house_style import METRICS
from alignment.stages.base import DataSlot, LaunchShape, Outcome, Reported, RunsOn, StageKind
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.judge_faults import judge_faults
from alignment.stages.shared.kind_answers import of_arms


def _data(config: EvaluateConfig) -> list[DataSlot]:
    return [
        DataSlot(field="data", data=config.data, record=HeldOutPrompt),
        DataSlot(
            field="few_shot.data",
            data=config.few_shot.data,
            record=Conversation,
            rows=CONVERSATIONS,
            in_use=FEW_SHOT in config.arms,
        ),
    ]


def _as_read(config: EvaluateConfig) -> EvaluateConfig:
    return config if FEW_SHOT in config.arms else replace(config, few_shot=FewShotConfig())


def _faults(config: EvaluateConfig, run: RunConfig, where: str) -> Iterator[Fault]:
    yield from judge_faults(config, where, hang_seconds=run.launch.hang_seconds)
    if config.judge.kind is JudgeKind.none:
        names, reader = ("max_prompts", "max_invalid"), "only a judge (judge.kind)"
        yield from unread_faults(config.judge, JudgeConfig(), names, f"{where}.judge", reader)


def _check_machine(config: EvaluateConfig, where: str) -> None:
    if config.judge.kind is JudgeKind.endpoint:
        api_key(config.judge.endpoint, where=f"{where}.judge")


def _metrics(config: EvaluateConfig) -> Reported:
    names = tuple(metric.name for metric in METRICS)
    return Reported(held_out=of_arms((*names, "loss", "win_rate"), config.arms))


KIND = StageKind(
    name="evaluate",
    summary="arms side by side on held-out prompts",
    config=EvaluateConfig,
    revision=6,
    produces=EVALUATION,
    run="alignment.stages.evaluate.run:run",
    data=_data,
    faults=_faults,
    as_read=_as_read,
    launch=LaunchShape(runs_on=RunsOn.one_process, check_machine=_check_machine),
    outcome=Outcome(metrics=_metrics),
)

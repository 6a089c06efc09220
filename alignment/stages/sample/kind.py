"""The stage kind ``sample``, as the rest of the package sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from alignment.config.faults import Fault, unread_faults
from alignment.config.run import RunConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.core.artifacts import ROWS
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.records.stages import COUNTS
from alignment.rewards.scorer_sources import REWARD, in_list, is_known, with_members
from alignment.stages.base import (
    DataSlot,
    LaunchShape,
    MadeRows,
    Outcome,
    References,
    Reported,
    RunsOn,
    StageKind,
)
from alignment.stages.sample.config import SampleConfig, Select
from alignment.stages.sample.sampling_tables import lines, tables
from alignment.stages.shared.kind_answers import (
    check_engine,
    missing_reward_faults,
    reward_model_slots,
    sampling_faults,
    sampling_refusals,
)

_ASKED = {"role": "user", "content": "2 + 2?"}
_PAIR = {"messages": [_ASKED], "chosen": "4.", "rejected": "5.", "chosen_score": 1.0, "rejected_score": 0.0}
_EXAMPLES: Mapping[Select, str] = {
    select: json.dumps(row)
    for select, row in {
        Select.best: {"messages": [_ASKED, {"role": "assistant", "content": "4."}], "score": 1.0},
        Select.best_worst: _PAIR,
        Select.all_pairs: _PAIR,
        Select.labels: {"messages": [_ASKED], "completion": "4.", "label": True, "score": 1.0},
    }.items()
}
"""A row that each selection makes."""


def _data(config: SampleConfig) -> list[DataSlot]:
    left_out = [
        DataSlot(field=f"leave_out[{number}]", data=data, record=HeldOutPrompt)
        for number, data in enumerate(config.leave_out)
    ]
    return [DataSlot(field="data", data=config.data, record=Prompt), *left_out]


def _rows(config: SampleConfig) -> MadeRows:
    others = {f"select={select.value}": row for select, row in _EXAMPLES.items() if select is not config.select}
    return MadeRows(example=_EXAMPLES[config.select], others=others)


def _scorers(config: SampleConfig) -> dict[str, ScoreSourceConfig]:
    return with_members(in_list(config.scorers))


def _faults(config: SampleConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    yield from sampling_faults(config.sampling, f"{where}.sampling")
    yield from missing_reward_faults(_scorers(config), config.reward, where)
    sources = [scorer.source for scorer in _scorers(config).values()]
    if config.reward is not None and REWARD not in sources and all(map(is_known, sources)):
        message = f"{config.reward!r} is unused: no scorer is '{REWARD}'; write null, or add the scorer"
        yield Fault(where=f"{where}.reward", message=message)
    if not config.select.makes_pairs:
        reader = "only select 'best_worst' and 'all_pairs'"
        yield from unread_faults(config, SampleConfig(), ("min_margin",), where, reader)
    else:
        yield from unread_faults(config, SampleConfig(), ("threshold",), where, "only select 'best' and 'labels'")
    compares = config.select.makes_pairs or (config.select is Select.labels and config.threshold is None)
    if compares and config.completions_per_prompt < 2:
        message = f"1, but select '{config.select.value}' compares the answers to a prompt; use 2 or more"
        yield Fault(where=f"{where}.completions_per_prompt", message=message)


def _reported(_: SampleConfig) -> Reported:
    return Reported(training=("score", "best_score"), counts=COUNTS)


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    doubts = []
    if metrics.get("answers") and metrics.get("answers_repeated", 0.0) > metrics["answers"] / 2:
        doubts.append(
            "more than half of the answers repeat another answer to the same prompt, so there was little to choose "
            "from; "
            "raise temperature"
        )
    if metrics.get("prompts") and metrics.get("prompts_tied") == metrics["prompts"]:
        doubts.append(
            "all answers to each prompt had the same score, so the first one was always chosen; use a scorer that "
            "distinguishes them"
        )
    return doubts


KIND = StageKind(
    name="sample",
    summary="a policy's answers, scored and turned into rows for other stages",
    config=SampleConfig,
    revision=9,
    produces=ROWS,
    run="alignment.stages.sample.run:run",
    rehearse="alignment.stages.sample.sampled_base:refuse_base",
    data=_data,
    rows=_rows,
    leaves_out="leave_out",
    scorers=_scorers,
    faults=_faults,
    references=References(more=lambda config: reward_model_slots(_scorers(config))),
    launch=LaunchShape(
        runs_on=RunsOn.replicas,
        refusals=lambda config, launch: sampling_refusals(config.sampling, launch),
        check_machine=lambda config, where: check_engine(config.sampling, where),
    ),
    outcome=Outcome(metrics=_reported, doubts=_doubts, lines=lines, tables=tables),
)

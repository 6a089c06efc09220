"""The stage kind ``sample``, as the rest of the package sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.faults import Fault, unread_faults
from alignment.config.launch import SamplingConfig
from alignment.config.rules import FILLED, NOT_NEGATIVE, POSITIVE, SCORE
from alignment.config.run import RunConfig
from alignment.config.scoring import ScorerConfig, ScoreSourceConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import ROWS
from alignment.core.fingerprint import IF_SET
from alignment.records.stages import COUNTS, SAMPLING_FILE, Sampling
from alignment.rewards.scorer_sources import REWARD, in_list, is_known, with_members
from alignment.stages import base
from alignment.stages.shared import kind_answers as parts


class Select(str, Enum):
    """The rows that are made from the answers to a prompt.

    ``best``: a conversation with the answer of the highest score (best of n, rejection sampling; RAFT, Dong et al.
    2023). ``best_worst``: a pair of the best and the worst answer. ``all_pairs``: every pair of answers. ``labels``:
    each answer with a label, good or bad."""

    best = "best"
    best_worst = "best_worst"
    all_pairs = "all_pairs"
    labels = "labels"

    @property
    def makes_pairs(self) -> bool:
        """Whether the rows are pairs."""
        return self in (Select.best_worst, Select.all_pairs)


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Samples ``completions_per_prompt`` answers of a ``policy`` to each prompt, scores them, and makes rows of them.

    An answer's score is the weighted sum of ``scorers``; a scorer with ``normalize`` is normalised over all answers of
    the stage. ``select`` says which rows are made. Two answers form a pair if their scores differ, by at least
    ``min_margin``. ``threshold`` is the score from which an answer counts as good: ``best`` leaves out a prompt whose
    best answer is below it, and for ``labels`` null means the mean of the prompt's scores.

    Answers that repeat another one to the same prompt or are empty are left out. With ``ended_only`` so are answers
    that reach ``max_new_tokens``, because a stage would learn to stop where they were cut. Each prompt is asked once,
    unless it overlaps with the prompts of ``leave_out``; an empty list stands for the data of the run's evaluations.
    ``sampling`` says how answers are sampled."""

    kind: str = "sample"
    policy: str = reference_to("stage:sft", "policy")
    reward: str | None = reference_to("stage:reward", "reward", external=True)
    scorers: Annotated[list[ScorerConfig], FILLED] = field(default_factory=lambda: [ScorerConfig()])
    data: DataConfig = field(default_factory=DataConfig)
    leave_out: list[DataConfig] = field(default_factory=list)
    completions_per_prompt: Annotated[int, POSITIVE] = 4
    temperature: Annotated[float, POSITIVE] = 1.0
    max_prompt_length: Annotated[int, POSITIVE] = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    ended_only: bool = True
    select: Select = Select.best_worst
    min_margin: Annotated[float, NOT_NEGATIVE] = 0.0
    threshold: Annotated[float | None, SCORE] = None
    batch_size: Annotated[int, POSITIVE] = not_identity(128)
    sampling: SamplingConfig = field(default_factory=SamplingConfig, metadata=IF_SET)


_LEFT_OUT = {
    "prompts_evaluated": "prompts that are also evaluated",
    "prompts_repeated": "prompts asked already",
    "rows_too_long": "rows that are too long",
    "answers_repeated": "repeated answers",
    "answers_empty": "empty answers",
    "answers_without_end": "answers without an end",
}


def lines(artifact: Path) -> list[str]:
    """What was made, and what was left out; nothing without ``sampling.json``."""
    if not (artifact / SAMPLING_FILE).is_file():
        return []
    record = Sampling.read(artifact)
    made = (
        f"{artifact.name}: {record.rows} rows ({record.select}) of {record.answers} answers to {record.prompts} prompts"
    )
    counts = {words: getattr(record, name) for name, words in _LEFT_OUT.items()}
    left_out = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    return [f"{made}; left out: {left_out}" if left_out else made]


def tables(artifact: Path) -> list[base.ResultTable]:
    """What the best of several answers scores, and how far it can be from the policy."""
    record = Sampling.read(artifact)
    rows = [
        (f"best of {best.answers}", [base.Cell(text=f"{best.score:.3f}"), base.Cell(text=f"{best.kl_bound:.2f}")])
        for best in record.best_of
    ]
    note = (
        f"Of {record.answers} answers to {record.prompts} prompts, {record.rows} rows were made ({record.select}). The "
        "KL divergence of the best of n from the policy is at most log n − (n − 1)/n (Beirami et al. 2024). Scores are "
        "those that chose the rows, so judge a policy that learns from them by another metric."
    )
    columns = {"score": "mean score", "kl": "KL at most, nats"}
    return [base.ResultTable(title="Best of n", note=note, columns=columns, rows=rows)]


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


def _rows(config: SampleConfig) -> base.MadeRows:
    others = {f"select={select.value}": row for select, row in _EXAMPLES.items() if select is not config.select}
    return base.MadeRows(example=_EXAMPLES[config.select], others=others)


def _scorers(config: SampleConfig) -> dict[str, ScoreSourceConfig]:
    return with_members(in_list(config.scorers))


def _faults(config: SampleConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    yield from parts.sampling_faults(config.sampling, f"{where}.sampling")
    yield from parts.missing_reward_faults(_scorers(config), config.reward, where)
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


KIND = base.StageKind(
    name="sample",
    summary="a policy's answers, scored and turned into rows for other stages",
    config=SampleConfig,
    revision=9,
    produces=ROWS,
    run="alignment.stages.sample.run:run",
    rehearse="alignment.stages.sample.run:refuse_base",
    data=parts.asked_slots,
    rows=_rows,
    scorers=_scorers,
    faults=_faults,
    slots=lambda config: parts.reward_model_slots(_scorers(config)),
    metrics=lambda _: base.Reported(training=("score", "best_score"), counts=COUNTS),
    launch=parts.sampled_launch(base.RunsOn.replicas),
    display=base.Display(doubts=_doubts, lines=lines, tables=tables),
)

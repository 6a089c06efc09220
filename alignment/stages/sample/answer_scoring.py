"""Scores a policy's answers to prompts, in parts that the processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignment.data.records import Prompt
from alignment.evaluation.arms import TOKENS
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import in_list
from alignment.rewards.scores import Scores
from alignment.stages.sample.config import SampleConfig
from alignment.stages.shared.answer_sampling import AskedPrompts, in_parts, spans_of
from alignment.stages.shared.answer_scores import asking_of
from alignment.training.context import StageContext


def answer_scores(
    config: SampleConfig,
    context: StageContext,
    tokenizer: Any,
    records: Sequence[Prompt],
    asked: AskedPrompts,
    answers: Sequence[Sequence[Sequence[int]]],
) -> tuple[Scores, list[float]]:
    """The score of each answer by each scorer, and in total, prompt by prompt.

    ``records`` are all rows of the stage's data, ``tokenizer`` is the policy's.

    Raises:
        DataError: a row lacks a field that a scorer needs, or a function's file changed since the run was planned.
        ModelError: a reward model cannot be loaded, or its tokenizer does not fit.
        RewardError: a scorer failed, or did not return one usable number per answer.
    """
    context.progress("loading scorers")
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    rewards = build_rewards(in_list(config.scorers), context.spec, tokenizer, records, None, run, asking_of(context))
    spans = spans_of(config, asked)

    def score(number: int) -> list[list[float]]:
        of_part = [(asked.rows[i], asked.ids[i], answer) for i in spans[number] for answer in answers[i]]
        rows, prompts, sampled = (list(column) for column in zip(*of_part, strict=True))
        values: list[list[float]] = rewards.scores(prompts, sampled, rows).values.tolist()
        return values

    parts = in_parts(context, "scoring", spans, asked, score)
    scores = Scores(names=tuple(rewards.names), values=torch.cat([torch.tensor(part) for part in parts], dim=1))
    rewards.observe(scores)  # a normalised scorer is normalised over all answers
    return scores, rewards.total(scores).tolist()

"""Scores every arm's answers with the metrics of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import answer_ids, prompt_ids, tokenize_rows
from alignment.evaluation.arms import TOKENS, Answered
from alignment.rewards.build import build_scorer
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import REWARD
from alignment.rewards.scorers import Answers
from alignment.stages.evaluate.answering import ArmPrompts
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared.answer_scores import scores_of
from alignment.training.context import StageContext


def answers_to_score(
    tokenizer: Any, rows: Sequence[HeldOutPrompt], arm_prompts: Mapping[str, ArmPrompts], arms: Mapping[str, Answered]
) -> dict[str, Answers]:
    """Each arm's answers after the plain prompt, as scorers see them; ``tokenizer`` is the run's."""
    prompts = tokenize_rows(rows, lambda row: prompt_ids(tokenizer, row.messages))
    return {
        name: Answers(
            prompt_ids=prompts,
            answer_ids=_in_our_tokens(tokenizer, rows, arm) if arm_prompts[name].own_tokens else arm.ids,
            texts=[answer.text for answer in arm.answers],
            prompts=rows,
            rows=range(len(rows)),
        )
        for name, arm in arms.items()
    }


def _in_our_tokens(tokenizer: Any, rows: Sequence[HeldOutPrompt], arm: Answered) -> list[list[int]]:
    """Answers of a model with another tokenizer, in the run's tokens."""
    rows_of_ids = []
    for row, answer in zip(rows, arm.answers, strict=True):
        ids = answer_ids(tokenizer, row.messages, answer.text)
        rows_of_ids.append(ids if answer.ended or len(ids) == 1 else ids[:-1])
    return rows_of_ids


def scores_by_arm(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    rows: Sequence[HeldOutPrompt],
    answers: Mapping[str, Answers],
    rewards: Mapping[str, list[float] | None],
) -> dict[str, dict[str, list[float]]]:
    """Every arm's scores by each metric, one per prompt; ``rewards`` are those of the stage's reward model.

    Raises:
        DataError: a row lacks what a metric needs, or a function's file changed since the run was planned.
        ModelError: a reward model cannot be loaded, or its tokenizer does not fit.
        RewardError: a metric failed, or did not return one usable number per answer.
    """
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in answers}
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    total = sum(metric.source != REWARD for metric in config.metrics) * len(answers) * len(rows)
    done = 0

    def progress(number: int) -> None:
        nonlocal done
        done += number
        context.progress("scoring", done, total)

    for number, metric in enumerate(config.metrics):
        if metric.source == REWARD:
            for name, by_reward in rewards.items():
                assert by_reward is not None, "the plan refuses this metric without a reward model"
                scores[name][metric.name] = by_reward
            continue
        scorer = build_scorer(f"metrics[{number}]", metric, context.spec, tokenizer, rows, run)
        for name, of_arm in answers.items():
            scores[name][metric.name] = scores_of(scorer, of_arm, source=metric.source, progress=progress)
    return scores

"""Scores both answers of every pair with the rule of a reward card."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.config.scoring import ScoreSourceConfig
from alignment.data.records import PreferencePair, Prompt
from alignment.rewards.build import build_scorer
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorers import Answers
from alignment.stages.reward_card.kind import RULE
from alignment.stages.shared.answer_scores import asking_of, scores_of
from alignment.training.context import StageContext


def scores_by_rule(rule: ScoreSourceConfig, context: StageContext, pairs: Sequence[PreferencePair]) -> list[float]:
    """The rule's score of each chosen and rejected answer in turn.

    Raises:
        DataError: a row lacks what the rule needs, or a function's file changed since the run was planned.
        RewardError: the rule failed, or did not return one usable number per answer.
    """
    prompts = [
        Prompt(messages=pair.messages, tools=pair.tools, row=pair.row, where=pair.where)
        for pair in pairs
        for _ in ("chosen", "rejected")
    ]
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=1)
    # A rule needs neither tokenizer nor model.
    scorer = build_scorer(RULE, rule, context.spec, None, prompts, run, asking_of(context))
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    no_tokens: list[list[int]] = [[] for _ in texts]
    answers = Answers(prompt_ids=no_tokens, answer_ids=no_tokens, texts=texts, prompts=prompts, rows=range(len(texts)))
    done = 0

    def progress(number: int) -> None:
        nonlocal done
        done += number
        context.progress("scoring by the rule", done, len(texts))

    return scores_of(scorer, answers, source=rule.source, progress=progress)

"""Proximal policy optimisation in a recipe that `align new` writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Question, Reasoned, Rows
from alignment.core.artifacts import REWARD_MODEL
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair, Prompt
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import (
    adapter_rate,
    data_of,
    from_start,
    maximises_scores,
    new_tokens,
    row_limit,
    rows_with_answers,
)

_WITH_PROMPTS = (Prompt, PreferencePair, LabelledAnswer, Conversation)
"""Records that have prompts; the first that are there are asked."""
_COMPLETIONS, _EPISODES = 4, 32
_LEAST_UPDATES, _MOST_UPDATES = 20, 200
_QUICKSTART = "as in quickstart"


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if Prompt in circumstances.rows and PreferencePair not in circumstances.rows:
        yield SCORER


def _stage(circumstances: Circumstances) -> NewStage | None:
    scorer, models = circumstances.answer(SCORER), circumstances.made.get(REWARD_MODEL, ())
    rows = next((circumstances.rows[record] for record in _WITH_PROMPTS if record in circumstances.rows), None)
    if rows is None or not (scorer or models) or not maximises_scores(circumstances):
        return None
    answers = new_tokens(rows_with_answers(circumstances), circumstances)
    left = replace(circumstances, positions=circumstances.positions - answers.value)
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        **_scores(scorer, models[0] if models else ""),
        **_size(rows),
        "critic": Reasoned(
            value="shared", why="one pass for policy and values; separate needs memory for a second model"
        ),
        "prompt_baseline": Reasoned(value=True, why=f"scores of different prompts are not comparable; {_QUICKSTART}"),
        "gae_lambda": Reasoned(value=1.0, why=f"a shared critic starts at 0; {_QUICKSTART}"),
        "value_clip": Reasoned(value=10.0, why=_QUICKSTART),
        **row_limit(rows, left, "max_prompt_length", part="prompts"),
        "max_new_tokens": answers,
        "kl": {
            "coefficient": Reasoned(
                value=0.05, why="Huang et al. 2024; a larger value keeps the policy closer to its start"
            )
        },
    }
    return NewStage(why="Samples answers to the prompts and raises their scores.", settings=settings, reads=rows)


def _scores(scorer: str, model: str) -> dict[str, Any]:
    """What scores answers: the run's reward model, what the user named, or both."""
    reward = f"stage:{model}" if model else None
    why = "trained on the pairs above" if model else "none; the scorers below are used instead"
    settings: dict[str, Any] = {"reward": Reasoned(value=reward, why=why)}
    if scorer:
        sources = [*(["reward"] if model else []), scorer]
        value = [{"source": source} for source in sources]
        settings["scorers"] = Reasoned(value=value, why="their scores are added; give each a weight if needed")
    return settings


def _size(rows: Rows) -> dict[str, Any]:
    """Updates, and how many answers each samples."""
    asked = max(1, min(rows.prompts, _EPISODES // _COMPLETIONS))
    passes = math.ceil(rows.prompts / asked)
    updates = min(_MOST_UPDATES, max(_LEAST_UPDATES, passes))
    bounds = f"chosen, not tuned: from {_LEAST_UPDATES} to {_MOST_UPDATES}"
    why = f"{passes:,} ask all {rows.prompts:,} prompts once ({bounds})"
    rate = adapter_rate(1e-4, "chosen, not tuned: 3e-5 in qwen_0_5b_rlhf_lora, 1e-3 in quickstart")
    size = Reasoned(value=asked * _COMPLETIONS, why=f"answers to {asked} prompts in an update (chosen, not tuned)")
    return {
        "updates": Reasoned(value=updates, why=why),
        "completions_per_prompt": Reasoned(value=_COMPLETIONS, why=_QUICKSTART),
        "optim": {"lr": rate, "critic_lr": Reasoned(value=1e-4, why="like the policy's"), "batch_size": size},
    }


PROPOSALS = Proposals(questions=_questions, stage=_stage)

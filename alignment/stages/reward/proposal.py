"""A reward model in a recipe that `align new` writes."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.new_recipe import BY_REWARD_MODEL, FROM_PAIRS, Circumstances, NewStage, Question, Reasoned
from alignment.data.records import PreferencePair
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit

_FEW_PROMPTS = 20


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if PreferencePair in circumstances.rows:
        yield FROM_PAIRS


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PreferencePair)
    if rows is None or circumstances.answer(FROM_PAIRS) not in BY_REWARD_MODEL:
        return None
    share = 0.1 if rows.prompts >= _FEW_PROMPTS else 0.0
    why = f"of {rows.prompts:,} different prompts, for its accuracy" if share else "too few prompts to hold any out"
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        **optimiser(
            rows,
            lr=adapter_rate(1e-4, "chosen, not tuned"),
            epochs=Reasoned(value=1, why="Stiennon et al. 2020"),
        ),
        **row_limit(rows, circumstances),
        "eval_fraction": Reasoned(value=share, why=why),
    }
    return NewStage(why="Learns to score answers from the pairs.", settings=settings, reads=rows)


PROPOSALS = Proposals(questions=_questions, stage=_stage)

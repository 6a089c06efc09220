"""Direct preference optimisation in a recipe that `align new` writes."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.new_recipe import DIRECTLY, FROM_PAIRS, Circumstances, NewStage, Question, Reasoned
from alignment.data.records import PreferencePair
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit, validation


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if PreferencePair in circumstances.rows:
        yield FROM_PAIRS


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PreferencePair)
    if rows is None or circumstances.answer(FROM_PAIRS) not in DIRECTLY:
        return None
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        "beta": Reasoned(
            value=0.1, why="Rafailov et al. 2023, appendix B; a smaller value lets the policy move further"
        ),
        **optimiser(
            rows,
            lr=adapter_rate(5e-5, "chosen, not tuned"),
            epochs=Reasoned(value=1, why="chosen, not tuned: pairs are soon memorised"),
        ),
        **row_limit(rows, circumstances),
        **validation(rows, epochs=1),
    }
    return NewStage(why="Learns to prefer the better answer of each pair.", settings=settings, reads=rows)


PROPOSALS = Proposals(questions=_questions, stage=_stage)

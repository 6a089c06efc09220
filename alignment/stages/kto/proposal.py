"""Kahneman–Tversky optimisation in a recipe that `align new` writes."""

from __future__ import annotations

from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.data.records import LabelledAnswer
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(LabelledAnswer)
    if rows is None:
        return None
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        "beta": Reasoned(value=0.1, why="Ethayarajh et al. 2024, section 4.2"),
        **optimiser(
            rows,
            lr=adapter_rate(5e-5, "chosen, not tuned"),
            epochs=Reasoned(value=1, why="chosen, not tuned"),
        ),
        **row_limit(rows, circumstances),
    }
    return NewStage(why="Learns from answers that are labelled good or bad.", settings=settings, reads=rows)


PROPOSALS = Proposals(stage=_stage)

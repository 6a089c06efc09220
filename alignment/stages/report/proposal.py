"""A report in a recipe that `align new` writes."""

from __future__ import annotations

from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.core.artifacts import EVALUATION, POLICY
from alignment.stages.base import Proposals


def _stage(circumstances: Circumstances) -> NewStage | None:
    if not circumstances.made.get(POLICY):
        return None
    why = "One page about the run."
    if circumstances.made.get(EVALUATION):
        return NewStage(why=why, settings={})
    return NewStage(why=why, settings={"evaluation": Reasoned(value=None, why="there are no held-out prompts")})


PROPOSALS = Proposals(stage=_stage)

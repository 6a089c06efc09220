"""An evaluation in a recipe that `align new` writes."""

from __future__ import annotations

from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Reasoned
from alignment.core.artifacts import POLICY, REWARD_MODEL
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import data_of, maximises_scores, new_tokens, rows_with_answers


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows, policies = circumstances.held_out, circumstances.made.get(POLICY, ())
    if rows is None or not policies:
        return None
    models, scorer = circumstances.made.get(REWARD_MODEL, ()), circumstances.answer(SCORER)
    reward = f"stage:{models[0]}" if models else None
    arms = ["base", *(f"stage:{name}" for name in policies)]
    no_metric = "without a metric, no arm is called better; name what makes an answer good (docs/evaluation.md)"
    trained_on = maximises_scores(circumstances)
    why = "also what is trained on: add another metric" if trained_on else "the scorer that you named"
    metric = Reasoned(value=[{"name": "score", "source": scorer}], why=why)
    settings = {
        **data_of(rows),
        "arms": Reasoned(value=arms, why="all answer the same prompts"),
        "reference": Reasoned(value=circumstances.start, why="the KL of each arm is measured from this one"),
        "reward": Reasoned(value=reward, why="its scores are shown" if models else "there is no reward model"),
        "metrics": metric if scorer else Reasoned(value=[], why=no_metric),
        "max_new_tokens": new_tokens(rows_with_answers(circumstances), circumstances),
    }
    return NewStage(why="Every policy answers prompts on which none was trained.", settings=settings, reads=rows)


PROPOSALS = Proposals(stage=_stage)

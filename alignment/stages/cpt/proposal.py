"""Continued pretraining in a recipe that `align new` writes."""

from __future__ import annotations

import math

from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.data.records import PlainText
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import adapter_rate, batch_size, data_of

_LONGEST = 1024


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PlainText)
    if rows is None:
        return None
    length = min(_LONGEST, circumstances.positions)
    counted = rows.lengths.rows
    tokens = sum(counted) / max(1, len(counted)) * rows.number
    packed = max(1, math.ceil(tokens / length))
    why = f"about {tokens:,.0f} tokens make {packed:,} rows (chosen, not tuned)"
    optim = {
        "lr": adapter_rate(1e-4, "chosen, not tuned"),
        "batch_size": Reasoned(value=batch_size(packed), why=why),
        "epochs": Reasoned(value=1, why="chosen, not tuned: text that is seen too often is memorised"),
    }
    limit = Reasoned(value=length, why="texts are split into rows of this many tokens, and short ones are joined")
    settings = {**data_of(rows), "optim": optim, "max_length": limit}
    return NewStage(why="First, the model learns to continue plain text.", settings=settings, reads=rows)


PROPOSALS = Proposals(stage=_stage)

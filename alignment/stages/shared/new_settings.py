"""Settings that several kinds of stage propose for a new recipe, each with its reason. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignment.config.new_recipe import Circumstances, Reasoned, Rows, common_length, number_above, share_above
from alignment.core.artifacts import REWARD_MODEL
from alignment.core.wording import counted
from alignment.data.records import Prompt

_LARGEST_BATCH, _LEAST_STEPS = 32, 30
_STEP = 16
"""Lengths are multiples of this."""
_DROPPED = 0.1
"""The share of rows that may be too long, as ``too_long.max_share`` has it."""
_MANY_PROMPTS, _MOST_PROMPTS = 200, 2_000
"""From how many different prompts a tenth of them is held out for validation, and from how many a twentieth."""
_LOOKS = 10
_UNTUNED = "chosen, not tuned"


def data_of(rows: Rows) -> dict[str, Any]:
    """The setting ``data``."""
    return {"data": Reasoned(value=dict(rows.settings), why=_described(rows))}


def from_start(circumstances: Circumstances, usual: str) -> dict[str, Any]:
    """The setting ``init``, unless it is the ``usual`` one."""
    if circumstances.start == usual:
        return {}
    why = "the base model: no earlier stage learns answers" if circumstances.start == "base" else "the earlier stage"
    return {"init": Reasoned(value=circumstances.start, why=why)}


def maximises_scores(circumstances: Circumstances) -> bool:
    """Whether something asks for a stage that maximises scores: prompts without answers, or a reward model. A scorer
    that the user names does not: it may be only the metric of the evaluation."""
    return Prompt in circumstances.rows or bool(circumstances.made.get(REWARD_MODEL))


def optimiser(rows: Rows, *, lr: Reasoned, epochs: Reasoned) -> dict[str, Any]:
    """The setting ``optim``: a batch that leaves some steps to an epoch."""
    size = batch_size(rows.number)
    steps = math.ceil(rows.number / size)
    why = f"{rows.number:,} rows make {steps:,} steps an epoch ({_UNTUNED}: at most {_LARGEST_BATCH})"
    return {"optim": {"lr": lr, "batch_size": Reasoned(value=size, why=why), "epochs": epochs}}


def batch_size(rows: int) -> int:
    """The largest power of two up to 32 with which an epoch has 30 steps; at least 4, or all rows."""
    size = 2 ** int(math.log2(max(1, rows / _LEAST_STEPS)))
    return max(1, min(rows, max(4, min(_LARGEST_BATCH, size))))


def epochs_of_answers(rows: Rows) -> Reasoned:
    """Few rows are seen more often."""
    epochs = 3 if rows.number < 1_000 else 2 if rows.number < 10_000 else 1
    return Reasoned(value=epochs, why=f"{_UNTUNED}: 3 below 1,000 rows, 2 below 10,000, else 1")


def row_limit(
    rows: Rows, circumstances: Circumstances, name: str = "max_length", *, part: str = "rows"
) -> dict[str, Any]:
    """The limit ``name`` on the tokens of a row, or of another ``part`` of it, and what follows for longer ones."""
    lengths = getattr(rows.lengths, part)
    limit = _limit(common_length(lengths), circumstances.positions)
    dropped = share_above(lengths, limit)
    settings: dict[str, Any] = {name: Reasoned(value=limit, why=_why_limit(rows, lengths, limit, dropped))}
    if dropped > _DROPPED:
        share = min(1.0, math.ceil(100 * dropped + 1) / 100)
        why = f"no more than {circumstances.positions:,} tokens fit; longer rows are left out"
        settings["too_long"] = {"max_share": Reasoned(value=share, why=why)}
    return settings


def rows_with_answers(circumstances: Circumstances) -> Rows | None:
    """The first rows whose answers were measured, those of preferences before conversations."""
    return next((rows for rows in circumstances.rows.values() if any(rows.lengths.answers)), None)


def new_tokens(rows: Rows | None, circumstances: Circumstances) -> Reasoned:
    """The longest answer to sample; at least half of what the model reads is left for prompts."""
    most = max(1, circumstances.positions // 2)
    if rows is None or not any(rows.lengths.answers):
        return Reasoned(value=min(256, most), why=f"{_UNTUNED}: the rows have no answers to measure")
    limit = _limit(common_length(rows.lengths.answers), most)
    share = 1 - share_above(rows.lengths.answers, limit)
    longer = number_above(rows.lengths.answers, limit)
    more = f"; {counted(longer, 'is', 'are')} longer" if longer else ""
    return Reasoned(
        value=limit, why=f"{share:.0%} of the answers in {', '.join(rows.files)} have at most this many tokens{more}"
    )


def validation(rows: Rows, *, epochs: float) -> dict[str, Any]:
    """The setting ``validation``, where there are prompts enough to hold some out."""
    if rows.prompts < _MANY_PROMPTS:
        return {}
    share = 0.1 if rows.prompts < _MOST_PROMPTS else 0.05
    steps = math.ceil((1 - share) * rows.number / batch_size(rows.number) * epochs)
    return {
        "validation": {
            "share": Reasoned(value=share, why=f"of {rows.prompts:,} different prompts; {_UNTUNED}"),
            "every": Reasoned(value=max(1, steps // _LOOKS), why=f"about {_LOOKS} validations in {steps:,} steps"),
            "keep_best": Reasoned(value=True, why="keep the step with the lowest held-out loss"),
        }
    }


def adapter_rate(value: float, source: str) -> Reasoned:
    """A learning rate for adapters."""
    return Reasoned(value=value, why=f"{source}; with all weights (adapter: full), use about a tenth")


def _limit(tokens: int, positions: int) -> int:
    return min(max(_STEP, math.ceil(tokens / _STEP) * _STEP), positions)


def _why_limit(rows: Rows, lengths: Sequence[int], limit: int, dropped: float) -> str:
    measured = len(lengths)
    which = f"the longest of {measured:,}" if measured >= rows.number else f"the longest of the first {measured:,}"
    longest = max(lengths, default=0)
    if not dropped:
        return f"{which} has {longest:,} tokens"
    longer = counted(number_above(lengths, limit), "row is", "rows are")
    return f"{which} has {longest:,} tokens; {longer} longer than this and left out"


def _described(rows: Rows) -> str:
    prompts = f", {rows.prompts:,} different prompts" if 0 < rows.prompts < rows.number else ""
    return f"{rows.number:,} rows{prompts}"

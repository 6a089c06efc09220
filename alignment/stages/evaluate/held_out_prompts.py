"""The prompts of an evaluation, each once: answers to the same prompt are no independent trials of an arm."""

from __future__ import annotations

import json

from alignment.data.counted import counted
from alignment.data.records import HeldOutPrompt
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared.stage_rows import list_left_out, rows_of
from alignment.training.context import StageContext


def held_out_prompts(config: EvaluateConfig, context: StageContext) -> list[HeldOutPrompt]:
    """The first row of each prompt; ``left_out.jsonl`` lists the others, and a note counts them.

    Raises:
        DataError: a row cannot be read.
    """
    rows = rows_of(context, HeldOutPrompt, config.data)
    first: dict[str, HeldOutPrompt] = {}
    for row in rows:
        first.setdefault(_asked(row), row)
    repeats = [(row, earlier) for row in rows if (earlier := first[_asked(row)]) is not row]
    list_left_out(
        context,
        ({"where": row.where, "reason": f"its prompt repeats that of {earlier.where}"} for row, earlier in repeats),
    )
    if repeats and context.is_main:
        context.notes.append(
            f"of {counted(len(rows), 'held-out row')}, {len(repeats):,} that ask what an earlier row asks are left "
            "out: each prompt counts once"
        )
    return list(first.values())


def _asked(row: HeldOutPrompt) -> str:
    """All that an arm reads of a row."""
    turns = [turn.as_dict() for turn in row.messages]
    return json.dumps([turns, row.tools, row.later_turns, row.choices], sort_keys=True, default=str)

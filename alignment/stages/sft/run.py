"""Supervised fine-tuning on conversations, which alignment/data/tokens/rendering.py tokenises and masks."""

from __future__ import annotations

from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.stages.sft.kind import SftConfig
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.language_model import learn
from alignment.stages.shared.preference_pairs import hold_out
from alignment.stages.shared.result import StageResult, initial_policy
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext


def run(config: SftConfig, context: StageContext) -> StageResult:
    """Conversations in, policy out."""
    start, tokenizer = initial_policy(context)
    limits = limits_of_parts(config)
    rows, counts = token_rows(context, CONVERSATIONS, config.data, limits, tokenizer)
    learned, held_out = hold_out(config, context, rows, CONVERSATIONS, limits, tokenizer)
    counts["rows"] = float(len(learned))
    return learn(config, context, start, tokenizer, learned, counts, held_out=held_out)

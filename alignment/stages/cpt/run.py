"""Continued pretraining: every token of plain texts is learned."""

from __future__ import annotations

from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import whole_rows
from alignment.stages.cpt.kind import CptConfig
from alignment.stages.shared.language_model import learn
from alignment.stages.shared.preference_pairs import hold_out
from alignment.stages.shared.result import StageResult, initial_policy
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext


def run(config: CptConfig, context: StageContext) -> StageResult:
    """Texts in, policy out. A text longer than ``max_length`` becomes several rows."""
    start, tokenizer = initial_policy(context)
    limits = whole_rows(config)
    rows, counts = token_rows(context, TEXTS, config.data, limits, tokenizer)
    learned, held_out = hold_out(config, context, rows, TEXTS, limits, tokenizer)
    return learn(config, context, start, tokenizer, learned, {"rows": counts["rows"]}, held_out=held_out)

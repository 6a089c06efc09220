"""What each process of the stage does."""

from __future__ import annotations

from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import whole_rows
from alignment.stages.shared.language_model import learn
from alignment.stages.shared.result import StageResult, initial_policy
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext
from toy_stage.kind import ToyConfig


def run(config: ToyConfig, context: StageContext) -> StageResult:
    policy, tokenizer = initial_policy(context)
    rows, counts = token_rows(context, TEXTS, config.data, whole_rows(config), tokenizer)
    rows = rows.map(lambda row: {name: row[name][::-1] for name in ("input_ids", "labels")}, keep_in_memory=True)
    return learn(config, context, policy, tokenizer, rows, counts)

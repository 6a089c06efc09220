"""Supervised fine-tuning on conversations, tokenised and masked by us (alignment/data/tokenize.py)."""

from __future__ import annotations

from alignment.config.stage import SftConfig
from alignment.data.fit import rows_that_fit
from alignment.data.records import Conversation
from alignment.data.tokenize import tokenize_conversation, tokenize_rows
from alignment.models.load import lineage, load_tokenizer
from alignment.stages.language_model import learn
from alignment.stages.result import StageResult
from alignment.stages.rows import rows_of
from alignment.training.context import StageContext


def run(config: SftConfig, context: StageContext) -> StageResult:
    """Conversations in, policy out."""
    spec = context.spec
    context.progress("loading")
    found = lineage(spec, spec.inputs["init"])
    tokenizer = load_tokenizer(found.base)
    records = rows_of(context, Conversation, config.data)
    rows = tokenize_rows(records, lambda record: tokenize_conversation(tokenizer, record.messages, record.tools))
    kept, dropped = rows_that_fit(
        rows, lambda row: len(row.input_ids), max_length=config.max_length, where=f"stages.{spec.stage}"
    )
    return learn(config, context, found, tokenizer, kept, {"rows": float(len(kept)), "rows_too_long": float(dropped)})

"""Continued pretraining: every token of plain text is learned, before any conversation."""

from __future__ import annotations

from alignment.config.stage import CptConfig
from alignment.data.records import PlainText
from alignment.data.tokenize import tokenize_rows, tokenize_text
from alignment.models.load import lineage, load_tokenizer
from alignment.stages.language_model import learn
from alignment.stages.result import StageResult
from alignment.stages.rows import rows_of
from alignment.training.context import StageContext


def run(config: CptConfig, context: StageContext) -> StageResult:
    """Texts in, policy out. A text longer than ``max_length`` becomes several rows."""
    spec = context.spec
    context.progress("loading")
    found = lineage(spec, spec.inputs["init"])
    tokenizer = load_tokenizer(found.base)
    texts = rows_of(context, PlainText, config.data)
    cut = tokenize_rows(texts, lambda record: tokenize_text(tokenizer, record.text, max_length=config.max_length))
    rows = [row for text in cut for row in text]
    return learn(config, context, found, tokenizer, rows, {"rows": float(len(rows)), "texts": float(len(texts))})

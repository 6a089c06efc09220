"""Preference pairs as token ids, shared by the stages that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.data import DataConfig
from alignment.data.fit import rows_that_fit
from alignment.data.records import PreferencePair
from alignment.data.tokenize import answer_ids, prompt_ids, tokenize_rows
from alignment.stages.rows import rows_of
from alignment.training.context import StageContext


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPair:
    """A prompt ready for an answer, and two answers up to and including the end of the turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def read_pairs(
    context: StageContext, tokenizer: Any, data: DataConfig, *, max_length: int, where: str
) -> tuple[list[TokenizedPair], int]:
    """The pairs that fit, and how many were too long."""
    records = rows_of(context, PreferencePair, data)

    def tokenize(record: PreferencePair) -> TokenizedPair:
        return TokenizedPair(
            prompt=prompt_ids(tokenizer, record.messages, record.tools),
            chosen=answer_ids(tokenizer, record.messages, record.chosen, record.tools),
            rejected=answer_ids(tokenizer, record.messages, record.rejected, record.tools),
        )

    pairs = tokenize_rows(records, tokenize)
    return rows_that_fit(pairs, lambda pair: pair.longest, max_length=max_length, where=where)

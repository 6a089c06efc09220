"""Preference pairs as token ids, shared by the stages that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from alignment.config.data import DataConfig
from alignment.config.too_long import TooLongConfig
from alignment.data.tokens.row_kinds import PAIRS
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext


class PairsConfig(Protocol):
    """Settings of a stage that learns from pairs."""

    data: DataConfig
    max_length: int
    max_prompt_length: int | None
    max_answer_length: int | None
    too_long: TooLongConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPair:
    """A prompt ready for an answer, and two answers up to and including the end of the turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_pairs(
    config: PairsConfig, context: StageContext, tokenizer: Any
) -> tuple[list[TokenizedPair], dict[str, float]]:
    """The pairs within the limits, and how many there are, were too long or were cut."""
    rows, counts = token_rows(context, PAIRS, config.data, limits_of_parts(config), tokenizer)
    return [TokenizedPair(**row) for row in rows], counts

"""Preference pairs as token ids, shared by the stages that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.stage import DpoConfig, RewardConfig
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import PAIRS
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPair:
    """A prompt ready for an answer, and two answers up to and including the end of the turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_pairs(
    config: RewardConfig | DpoConfig, context: StageContext, tokenizer: Any
) -> tuple[list[TokenizedPair], dict[str, float]]:
    """The pairs within the limits, and how many there are, were too long or were cut."""
    rows, counts = token_rows(context, PAIRS, config.data, Limits.of(config), tokenizer)
    return [TokenizedPair(**row) for row in rows], counts

"""Refuses held-out prompts that the base model cannot answer before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.config.evaluating import FEW_SHOT
from alignment.core.errors import ModelError
from alignment.core.model_files import positions_in, reason_of_positions
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_ids, tokenize_rows
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.shown_prompts import Shown, shown_otherwise, unchanged
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext


def refuse_long_prompts(config: EvaluateConfig, context: StageContext) -> None:
    """Checks the first turn of every arm that has the base model's tokenizer and positions.

    Later turns contain answers, and models from outside have positions of their own; both are checked when they are
    asked (answering.py).

    Raises:
        ModelError: a prompt and its answer may be longer than the base model's positions.
        DataError: a row cannot be read or rendered, or there are too few examples.
    """
    spec = context.spec
    positions = positions_in(spec.base_path)
    if positions is None:
        return
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    rows = rows_of(context, HeldOutPrompt, config.data)
    otherwise = shown_otherwise(config, context, rows)
    arms = [name for name in config.arms if spec.arms[name].is_of_run]
    by_prompt = {otherwise.get(name, unchanged): name for name in reversed(arms)}  # most arms have the same prompts
    for shown, arm in by_prompt.items():
        _refuse(config, context, tokenizer, rows, shown, arm=arm, positions=positions)


def _refuse(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    rows: Sequence[HeldOutPrompt],
    shown: Shown,
    *,
    arm: str,
    positions: int,
) -> None:
    lengths = tokenize_rows(rows, lambda row: [len(prompt_ids(tokenizer, shown(row), row.tools))])
    tokens = [length for (length,) in lengths]
    longest = max(range(len(rows)), key=tokens.__getitem__)
    if tokens[longest] + config.max_new_tokens <= positions:
        return
    number = sum(length + config.max_new_tokens > positions for length in tokens)
    where = f"stages.{context.spec.stage}"
    lower = f"{where}.max_new_tokens" + (f" or {where}.few_shot.count" if arm == FEW_SHOT else "")
    raise ModelError(
        f"with its prompt of {tokens[longest]} tokens and an answer of up to {config.max_new_tokens} tokens, the arm "
        f"{arm!r} needs more than the {positions} positions of {context.spec.model.source}"
        f"{reason_of_positions(context.spec.base_path)}; {number} of {len(rows)} rows are too long",
        where=rows[longest].where,
        remedy=f"leave out rows that are too long, or lower {lower}",
    )

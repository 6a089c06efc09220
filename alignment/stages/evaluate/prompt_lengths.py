"""Refuses held-out rows that the base model cannot read before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.core.errors import ModelError
from alignment.core.model_files import positions_in, reason_of_positions
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_ids, tokenize_rows
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.exchanges import continued, letter_rows
from alignment.rewards.scorer_sources import CHOICE
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.prompts import Shown, reference_ids, shown_otherwise, unchanged
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext


def refuse_long_prompts(config: EvaluateConfig, context: StageContext) -> None:
    """Checks every arm that has the base model's tokenizer and positions: the first prompts with an answer to them,
    and what is scored after a prompt, which are references and choices.

    Later prompts contain answers, and models from outside have positions of their own; both are checked when they are
    asked (answering.py).

    Raises:
        ModelError: a prompt and its answer may be longer than the base model's positions; or a prompt and its reference
            answer, or a question with its choices, is longer.
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
        for text, lengths in _read_texts(config, tokenizer, rows, shown):
            longest = max(range(len(rows)), key=lengths.__getitem__)
            if lengths[longest] <= positions:
                continue
            number, where = sum(length > positions for length in lengths), f"stages.{spec.stage}"
            lower = [f"{where}.few_shot.count"] if arm == FEW_SHOT else []
            if text.startswith("an answer"):
                lower.insert(0, f"{where}.max_new_tokens")
            raise ModelError(
                f"with its prompt and {text.format(lengths[longest])} together, the arm {arm!r} needs more than "
                f"the {positions} positions of {spec.model.source}{reason_of_positions(spec.base_path)}; {number} of "
                f"{len(rows)} rows are too long",
                where=rows[longest].where,
                remedy="leave out rows that are too long" + (f", or lower {' or '.join(lower)}" if lower else ""),
            )


def _read_texts(
    config: EvaluateConfig, tokenizer: Any, rows: Sequence[HeldOutPrompt], shown: Shown
) -> Iterator[tuple[str, list[int]]]:
    """What a policy writes or scores after a prompt, in words for its tokens, and the tokens of each row to its end."""
    tokens = tokenize_rows(rows, lambda row: [len(prompt_ids(tokenizer, shown(row), row.tools))])
    most = config.max_new_tokens
    yield f"an answer of up to {most} tokens, {{}}", [length + most for (length,) in tokens]
    after = tokenize_rows(rows, lambda row: _tokens_with_reference(tokenizer, row, shown))
    yield "its reference answer of {} tokens", after
    if any(metric.source == CHOICE for metric in config.metrics):
        yield "its choices of {} tokens", letter_rows(tokenizer, rows, shown).lengths


def _tokens_with_reference(tokenizer: Any, row: HeldOutPrompt, shown: Shown) -> int:
    """The tokens of the longest conversation that ends with a reference answer; 0 without one.

    A reference answer follows those of the turns before.
    """
    references, longest = list(takewhile(bool, row.references)), 0
    for number, reference in enumerate(references):
        messages = shown(continued(row, references[:number]))
        ids = reference_ids(tokenizer, messages, reference, row.tools)
        longest = max(longest, len(prompt_ids(tokenizer, messages, row.tools)) + len(ids))
    return longest


def refuse_base(config: EvaluateConfig, context: StageContext) -> None:
    """Checks the base model of the arms, and the first turn of every arm.

    Raises:
        ModelError: a prompt and its answer may be longer than the base model's positions, it cannot be sampled from, or
            its head does more than one matrix product.
        DataError: a row cannot be read or rendered, or there are too few examples.
    """
    refuse_long_prompts(config, context)
    spec = context.spec
    arms = [name for name in config.arms if spec.arms[name].is_of_run]
    if arms:
        refuse_base_that_cannot_answer(spec, config.sampling, scored=_are_scored(arms, config, context))


def _are_scored(arms: Sequence[str], config: EvaluateConfig, context: StageContext) -> bool:
    """Whether log-probabilities are asked for, as in run.py: of the answers of arms that are compared with the
    reference, of choices, or of reference answers."""
    spec = context.spec
    others = {name for name in arms if spec.arms[name].path != spec.inputs["reference"].path}
    if others - {FEW_SHOT, PROMPTED} and config.answers.temperature in (0.0, 1.0):
        return True
    if any(metric.source == CHOICE for metric in config.metrics):
        return True
    return any(row.reference for row in rows_of(context, HeldOutPrompt, config.data))

"""The prompts of every arm of an evaluation, in the arm's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.shown_prompts import Shown, shown_otherwise, unchanged
from alignment.stages.evaluate.turn_prompts import TurnPrompts, first_turn
from alignment.stages.shared.arm_policies import refuse_without_template, tokenizer_of
from alignment.training.context import StageContext


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmPrompts:
    """The prompts of an arm, in its own tokens: those of the ``first`` turn, and how it is ``shown`` any row.

    ``own_tokens``: the arm has its own tokenizer, so figures that depend on tokens cannot be compared with other arms.
    ``plain``: its prompts are the held-out prompts, unchanged, so its answers can be compared with the reference's.
    """

    policy: Lineage
    tokenizer: Any
    first: TurnPrompts
    shown: Shown
    plain: bool
    own_tokens: bool


def prompts_of_arms(
    config: EvaluateConfig, context: StageContext, tokenizer: Any, rows: Sequence[HeldOutPrompt]
) -> dict[str, ArmPrompts]:
    """The prompts of every arm; ``tokenizer`` is the run's.

    Raises:
        ModelError: an artifact has another tokenizer, or an external model has no chat template.
        DataError: a row cannot be rendered, or there are too few examples.
    """
    otherwise, arms = shown_otherwise(config, context, rows), context.spec.arms
    return {name: _arm_prompts(context, arms[name], tokenizer, rows, otherwise.get(name)) for name in config.arms}


def _arm_prompts(
    context: StageContext, stage_input: StageInput, ours: Any, rows: Sequence[HeldOutPrompt], shown: Shown | None
) -> ArmPrompts:
    tokenizer = tokenizer_of(context, stage_input, ours)
    own_tokens = tokenizer is not ours and tokenizer_hashes(tokenizer) != tokenizer_hashes(ours)
    if own_tokens:
        refuse_without_template(context, stage_input, tokenizer)
    return ArmPrompts(
        policy=lineage(context.spec, stage_input),
        tokenizer=tokenizer,
        first=first_turn(tokenizer, rows, shown or unchanged, with_references=not own_tokens),
        shown=shown or unchanged,
        plain=shown is None,
        own_tokens=own_tokens,
    )

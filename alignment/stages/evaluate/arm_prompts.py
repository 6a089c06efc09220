"""The prompts of every arm of an evaluation, in the arm's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.data.turns import Message
from alignment.evaluation.arms import with_system_prompt
from alignment.evaluation.few_shot import draw_examples, with_examples
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.turn_prompts import Shown, TurnPrompts, first_turn
from alignment.stages.shared.arm_policies import refuse_without_template, tokenizer_of
from alignment.stages.shared.stage_rows import rows_of
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
    system_prompt = config.system_prompt or ""  # the plan refuses an arm that needs one without it
    shown: dict[str, Shown] = {PROMPTED: lambda row: with_system_prompt(row.messages, system_prompt)}
    if FEW_SHOT in config.arms:
        examples = _examples(config, context, rows)
        shown[FEW_SHOT] = lambda row: with_examples(row.messages, examples)
    arms = context.spec.arms
    return {name: _arm_prompts(context, arms[name], tokenizer, rows, shown.get(name)) for name in config.arms}


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
        first=first_turn(tokenizer, rows, shown or _unchanged, with_references=not own_tokens),
        shown=shown or _unchanged,
        plain=shown is None,
        own_tokens=own_tokens,
    )


def _unchanged(row: HeldOutPrompt) -> Sequence[Message]:
    return row.messages


def _examples(config: EvaluateConfig, context: StageContext, rows: Sequence[HeldOutPrompt]) -> list[Message]:
    conversations = rows_of(context, Conversation, config.few_shot.data, field="few_shot.data")
    return draw_examples(
        conversations,
        rows,
        count=config.few_shot.count,
        generator=context.generator("few_shot"),
        where=f"stages.{context.spec.stage}.few_shot",
    )

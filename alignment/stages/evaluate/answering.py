"""The prompts of every arm of an evaluation, and its answers: cached ones, or made by its policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.core.errors import ModelError
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.tokenize import end_ids
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.data.turns import Message
from alignment.evaluation.arms import (
    Answered,
    TokenSum,
    answer_and_score,
    read_answers,
    sequence_logprobs,
    with_system_prompt,
)
from alignment.evaluation.few_shot import draw_examples, with_examples
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.generate import Sampling
from alignment.stages.evaluate import answer_cache
from alignment.stages.evaluate.answer_cache import CachedAnswers
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.turn_prompts import (
    AnsweredTurn,
    Shown,
    TurnPrompts,
    conversations,
    first_turn,
    later_turn,
    together,
)
from alignment.stages.shared.arm_policies import Policies, refuse_without_template, tokenizer_of
from alignment.stages.shared.served_policies import served_answer_and_score
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


def answers_of(
    arm_prompts: ArmPrompts,
    config: EvaluateConfig,
    context: StageContext,
    policies: Policies,
    rows: Sequence[HeldOutPrompt],
    *,
    with_logprobs: bool,
    progress: Callable[[int], None],
) -> Answered:
    """An arm's answers; ``progress`` receives how many turns are done.

    Raises:
        ModelError: a conversation with its next answer may be longer than the policy's positions.
        DataError: a row cannot be rendered with an arm's own answers.
    """
    per_prompt = config.answers.per_prompt
    turns: list[AnsweredTurn] = []
    done = 0
    for number in range(max(row.num_turns for row in rows)):
        asked = arm_prompts.first
        if number > 0:
            asked = later_turn(
                arm_prompts.tokenizer,
                rows,
                arm_prompts.shown,
                conversations(rows, turns, per_prompt),
                number=number,
                with_references=not arm_prompts.own_tokens,
            )

        def of_arm(answers: int, before: int = done) -> None:
            progress(before + answers // per_prompt)

        turns.append(
            _answers_in(asked, arm_prompts, config, context, policies, with_logprobs=with_logprobs, progress=of_arm)
        )
        done += len(asked.rows)
    return together(rows, turns, per_prompt)


def _answers_in(
    asked: TurnPrompts,
    arm_prompts: ArmPrompts,
    config: EvaluateConfig,
    context: StageContext,
    policies: Policies,
    *,
    with_logprobs: bool,
    progress: Callable[[int], None],
) -> AnsweredTurn:
    """An arm's answers in one turn: cached ones, or made by its policy; ``progress`` receives how many are done."""
    ends = sorted(end_ids(arm_prompts.tokenizer))
    num_answers = len(asked.rows) * config.answers.per_prompt
    file = answer_cache.file_of(
        context,
        arm_prompts.policy,
        asked,
        config.answers,
        max_new_tokens=config.max_new_tokens,
        ends=ends,
        with_logprobs=with_logprobs,
        engine=config.sampling.engine,
    )
    cached = answer_cache.read(file, num_answers=num_answers)
    if cached is None:
        cached = _made(asked, arm_prompts, config, context, policies, with_logprobs=with_logprobs, progress=progress)
        answer_cache.write(file, cached)
    return AnsweredTurn(
        rows=asked.rows,
        answers=read_answers(arm_prompts.tokenizer, cached.ids),
        logprobs=cached.logprobs,
        references=cached.references,
        seconds=cached.seconds,
    )


def _made(
    asked: TurnPrompts,
    arm_prompts: ArmPrompts,
    config: EvaluateConfig,
    context: StageContext,
    policies: Policies,
    *,
    with_logprobs: bool,
    progress: Callable[[int], None],
) -> CachedAnswers:
    started, per_prompt = time.monotonic(), config.answers.per_prompt
    model = policies.load(arm_prompts.policy)
    _refuse_too_long(model, arm_prompts, asked, config.max_new_tokens, where=f"stages.{context.spec.stage}")
    answer = partial(answer_and_score, batch_size=config.batch_size)
    if policies.served is not None:
        answer = partial(served_answer_and_score, policies.served, arm_prompts.policy)
    ids, scores = answer(
        model,
        [prompt for prompt in asked.prompts for _ in range(len(asked.rows) * per_prompt // len(asked.prompts))],
        _texts_behind(asked, per_prompt),
        max_new_tokens=config.max_new_tokens,
        end_ids=sorted(end_ids(arm_prompts.tokenizer)),
        with_own=with_logprobs,
        progress=progress,
        sampling=_sampling(config, context, asked),
    )
    return CachedAnswers(
        ids=ids,
        logprobs=[sums[0] for sums in scores] if with_logprobs else None,
        references=_reference_sums(model, asked, [sums[-1:] for sums in scores[::per_prompt]]),
        seconds=time.monotonic() - started,
    )


def _texts_behind(asked: TurnPrompts, per_prompt: int) -> list[list[list[int]]]:
    """The texts to score after each answer's prompt: a reference answer to that prompt, once, where there is one."""
    return [
        [reference.ids] if number == 0 and reference is not None and reference.prompt is None else []
        for reference in asked.references
        for number in range(per_prompt)
    ]


def _reference_sums(
    model: PreTrainedModel, asked: TurnPrompts, behind_prompts: Sequence[Sequence[float]]
) -> list[TokenSum | None]:
    """The log-probability of each row's reference; ``behind_prompts`` has those that were scored with the answers."""
    apart = [(reference.prompt, reference.ids) for reference in asked.references if reference and reference.prompt]
    sums = iter(sequence_logprobs(model, [prompt for prompt, _ in apart], [ids for _, ids in apart]) if apart else [])
    return [
        None
        if reference is None
        else TokenSum(logprob=next(sums) if reference.prompt else behind[0], tokens=len(reference.ids))
        for reference, behind in zip(asked.references, behind_prompts, strict=True)
    ]


def _sampling(config: EvaluateConfig, context: StageContext, asked: TurnPrompts) -> Sampling | None:
    """The same random numbers for every arm, and others in each turn; None for greedy answers."""
    if config.answers.temperature == 0.0:
        return None
    per_prompt = config.answers.per_prompt
    generator = context.generator(*answer_cache.seed_of(asked))
    num_rows = max(asked.rows) + 1  # rows without this turn have numbers too, which keeps the others' the same
    uniforms = torch.rand(num_rows * per_prompt, config.max_new_tokens, generator=generator, dtype=torch.float64)
    of_rows = uniforms.view(num_rows, per_prompt, -1)[asked.rows].flatten(0, 1)
    return Sampling(temperature=config.answers.temperature, uniforms=of_rows)


def _refuse_too_long(
    model: PreTrainedModel, arm_prompts: ArmPrompts, asked: TurnPrompts, max_new_tokens: int, *, where: str
) -> None:
    positions = positions_of(model.base_model)
    longest = max(map(len, asked.prompts)) + max_new_tokens
    if longest > positions:
        in_turn = f" in turn {asked.number + 1}" if asked.number else ""
        raise ModelError(
            f"{arm_prompts.policy.source} has {positions} positions, but the longest prompt with its answer needs "
            f"{longest}{in_turn}",
            where=where,
            remedy="lower max_new_tokens or few_shot.count, or leave out longer prompts",
        )

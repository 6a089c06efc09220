"""The prompts of every arm of an evaluation, and its answers: cached ones, or made by its policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.core.artifacts import read_manifest
from alignment.core.errors import ModelError
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.tokenize import answer_ids, end_ids, prompt_ids, tokenize_rows
from alignment.data.tokens.tokenizer import load_tokenizer, stops_alike, tokenizer_hashes
from alignment.data.turns import Message
from alignment.evaluation.arms import Answered, TokenSum, answer_and_score, read_answers, with_system_prompt
from alignment.evaluation.few_shot import draw_examples, with_examples
from alignment.job import StageInput
from alignment.models.assembly.load import DTYPES, Lineage, lineage, load_policy, refuse_other_tokenizer
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling
from alignment.stages.evaluate import answer_cache
from alignment.stages.evaluate.answer_cache import CachedAnswers
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext

Turns = Callable[[HeldOutPrompt], Sequence[Message]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmPrompts:
    """The prompts of an arm, in its own tokens, and the ``turns`` of a row as it sees them.

    ``own_tokens``: the arm has its own tokenizer, so figures that depend on tokens cannot be compared with other arms.
    ``plain``: its prompts are the held-out prompts, unchanged, so its answers can be compared with the reference's.
    """

    policy: Lineage
    tokenizer: Any
    turns: Turns
    prompts: list[list[int]]
    references: list[list[int] | None]
    plain: bool
    own_tokens: bool


class Policies:
    """Loads policies, and holds one at a time; loading the held policy again costs nothing."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._loaded: Lineage | None = None
        self._model: PreTrainedModel | None = None

    def load(self, policy: Lineage) -> PreTrainedModel:
        """The policy with its adapters merged, on this process's device."""
        if self._model is None or policy != self._loaded:
            self._model = None  # free the old weights before loading the new ones
            self._model = load_policy(policy, DTYPES[self._context.spec.model.dtype]).to(self._context.device)
            use_flat_attention(self._model)
            self._loaded = policy
        return self._model

    def release(self) -> None:
        """Frees the weights of the last policy."""
        self._model = self._loaded = None


def prompts_of_arms(
    config: EvaluateConfig, context: StageContext, tokenizer: Any, rows: Sequence[HeldOutPrompt]
) -> dict[str, ArmPrompts]:
    """The prompts of every arm; ``tokenizer`` is the run's.

    Raises:
        ModelError: an artifact has another tokenizer, or an external model has no chat template.
        DataError: a row cannot be rendered, or there are too few examples.
    """
    system_prompt = config.system_prompt or ""  # the plan refuses an arm that needs one without it
    turns: dict[str, Turns] = {PROMPTED: lambda row: with_system_prompt(row.messages, system_prompt)}
    if FEW_SHOT in config.arms:
        examples = _examples(config, context, rows)
        turns[FEW_SHOT] = lambda row: with_examples(row.messages, examples)
    arms = context.spec.arms
    return {name: _arm_prompts(context, arms[name], tokenizer, rows, turns.get(name)) for name in config.arms}


def _arm_prompts(
    context: StageContext, stage_input: StageInput, ours: Any, rows: Sequence[HeldOutPrompt], turns: Turns | None
) -> ArmPrompts:
    tokenizer = _tokenizer_of(context, stage_input, ours)
    own_tokens = tokenizer is not ours and tokenizer_hashes(tokenizer) != tokenizer_hashes(ours)
    shown = turns or _unchanged
    return ArmPrompts(
        policy=lineage(context.spec, stage_input),
        tokenizer=tokenizer,
        turns=shown,
        prompts=tokenize_rows(rows, lambda row: prompt_ids(tokenizer, shown(row))),
        references=[None] * len(rows) if own_tokens else _references(tokenizer, rows, shown),
        plain=turns is None,
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


def _tokenizer_of(context: StageContext, stage_input: StageInput, ours: Any) -> Any:
    """The run's tokenizer if the arm shares it and stops at the same tokens, else that of the external model."""
    path = stage_input.path
    if path is None or read_manifest(path) is not None:
        refuse_other_tokenizer(context.spec, stage_input, ours)
        return ours
    own = load_tokenizer(path)
    if tokenizer_hashes(own) == tokenizer_hashes(ours):
        return ours if stops_alike(own, ours) else own
    if not own.chat_template:
        raise ModelError(
            f"{stage_input.ref} has its own tokenizer without a chat template, so prompts cannot be rendered for it",
            where=f"stages.{context.spec.stage}.arms",
            remedy="put the template that it was trained with into its folder (chat_template.jinja)",
        )
    return own


def _references(tokenizer: Any, rows: Sequence[HeldOutPrompt], turns: Turns) -> list[list[int] | None]:
    return tokenize_rows(rows, lambda row: answer_ids(tokenizer, turns(row), row.reference) if row.reference else None)


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
    """An arm's answers; ``progress`` receives how many are done."""
    ends = sorted(end_ids(arm_prompts.tokenizer))
    per_prompt = config.answers.per_prompt
    file = answer_cache.file_of(
        context,
        arm_prompts.policy,
        arm_prompts.prompts,
        arm_prompts.references,
        config.answers,
        max_new_tokens=config.max_new_tokens,
        ends=ends,
        with_logprobs=with_logprobs,
    )
    cached = answer_cache.read(file, num_answers=len(rows) * per_prompt)
    if cached is None:
        started = time.monotonic()
        model = policies.load(arm_prompts.policy)
        _refuse_too_long(model, arm_prompts, config.max_new_tokens, where=f"stages.{context.spec.stage}")
        ids, scores = answer_and_score(
            model,
            [prompt for prompt in arm_prompts.prompts for _ in range(per_prompt)],
            [texts for reference in arm_prompts.references for texts in _references_once(reference, per_prompt)],
            max_new_tokens=config.max_new_tokens,
            end_ids=ends,
            batch_size=config.batch_size,
            with_own=with_logprobs,
            progress=lambda done: progress(done // per_prompt),
            sampling=_sampling(config, context, len(rows) * per_prompt),
        )
        cached = CachedAnswers(
            ids=ids,
            logprobs=[sums[0] for sums in scores] if with_logprobs else None,
            references=[
                None if reference is None else TokenSum(logprob=sums[-1], tokens=len(reference))
                for sums, reference in zip(scores[::per_prompt], arm_prompts.references, strict=True)
            ],
            seconds=time.monotonic() - started,
        )
        answer_cache.write(file, cached)
    return Answered(
        answers=read_answers(arm_prompts.tokenizer, cached.ids),
        logprobs=cached.logprobs,
        references=cached.references,
        seconds=cached.seconds,
        per_prompt=per_prompt,
    )


def _references_once(reference: list[int] | None, per_prompt: int) -> list[list[list[int]]]:
    """The texts to score after each answer's prompt: the reference answer after the first one, where there is one."""
    return [[] if reference is None else [reference], *([] for _ in range(per_prompt - 1))]


def _sampling(config: EvaluateConfig, context: StageContext, num_answers: int) -> Sampling | None:
    """The same random numbers for every arm; None for greedy answers."""
    if config.answers.temperature == 0.0:
        return None
    generator = context.generator("answers")
    uniforms = torch.rand(num_answers, config.max_new_tokens, generator=generator, dtype=torch.float64)
    return Sampling(temperature=config.answers.temperature, uniforms=uniforms)


def _refuse_too_long(model: PreTrainedModel, arm_prompts: ArmPrompts, max_new_tokens: int, *, where: str) -> None:
    positions = positions_of(model.base_model)
    longest = max(map(len, arm_prompts.prompts)) + max_new_tokens
    if longest > positions:
        raise ModelError(
            f"{arm_prompts.policy.source} has {positions} positions, but the longest prompt with its answer needs "
            f"{longest}",
            where=where,
            remedy="lower max_new_tokens or few_shot.count, or leave out longer prompts",
        )

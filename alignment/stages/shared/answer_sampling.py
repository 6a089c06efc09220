"""Samples a policy's answers to prompts in parts, which the processes share and which an interrupted stage finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from alignment.config.sampling_engine import SamplingConfig
from alignment.data.tokens.tokenize import end_ids
from alignment.engines.completions import SEEDS, Asked, Generation
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.generate import Sampling, generate
from alignment.stages.shared.arm_policies import Policies
from alignment.stages.shared.asked_prompts import AskedPrompts, AskingConfig
from alignment.stages.shared.served_policies import ServedPolicies, served_policies
from alignment.stages.shared.stored_parts import made_in_parts
from alignment.training.context import StageContext

SEED = "answers"
"""The name from which the random numbers of a prompt are derived, with the index of its row."""


BATCHES = 4
"""Batches in a part, at most. Within a part a waiting prompt takes over the row of a finished answer."""

PARTS = 8
"""Parts that a stage has at least before a part has several batches."""


class SampledConfig(AskingConfig, Protocol):
    """Settings of a stage that samples answers to its prompts."""

    completions_per_prompt: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    sampling: SamplingConfig


def sampled_answers(
    config: SampledConfig, context: StageContext, policy: Lineage, tokenizer: Any, asked: AskedPrompts
) -> list[list[list[int]]]:
    """Token ids of ``completions_per_prompt`` answers to each prompt, with the end of the turn if it was generated.

    Each prompt has random numbers of its own, so that its answers do not depend on the other prompts.

    Raises:
        ModelError: a prompt and its answer may be longer than the policy's positions.
    """
    generation = Generation(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, end_ids=sorted(end_ids(tokenizer))
    )
    spans, longest = spans_of(config, asked), max(map(len, asked.ids)) + config.max_new_tokens
    served = served_policies(config.sampling, context)
    if served is None:
        policies = Policies(context)

        def sample(number: int) -> list[list[int]]:
            model = policies.load(policy)
            refuse_too_long(model.base_model, longest)  # of all prompts, so that no part is sampled in vain
            return _own_answers(config, context, model, asked, spans[number], generation)

        answers = in_parts(context, "answering", spans, asked, sample)
        policies.release()
    else:
        with served:
            answers = in_parts(
                context,
                "answering by vLLM",
                spans,
                asked,
                lambda number: _served_answers(config, context, served, asked, spans[number], generation),
                prepare=lambda: served.prepare(policy, longest),
            )
    flat = [answer for part in answers for answer in part]
    count = config.completions_per_prompt
    return [flat[first : first + count] for first in range(0, len(flat), count)]


def _own_answers(
    config: SampledConfig,
    context: StageContext,
    model: PreTrainedModel,
    asked: AskedPrompts,
    indices: Sequence[int],
    generation: Generation,
) -> list[list[int]]:
    count = config.completions_per_prompt
    return generate(
        model,
        [asked.ids[index] for index in indices for _ in range(count)],
        max_new_tokens=generation.max_new_tokens,
        end_ids=generation.end_ids,
        batch_size=config.batch_size,
        sampling=Sampling(
            temperature=generation.temperature,
            uniforms=torch.cat([_uniforms(config, context, asked.rows[index]) for index in indices]),
        ),
    )


def _served_answers(
    config: SampledConfig,
    context: StageContext,
    served: ServedPolicies,
    asked: AskedPrompts,
    indices: Sequence[int],
    generation: Generation,
) -> list[list[int]]:
    requests = [
        Asked(
            prompt=asked.ids[index],
            answers=config.completions_per_prompt,
            seed=context.seed(SEED, asked.rows[index]) % SEEDS,
        )
        for index in indices
    ]
    return [answer.ids for of_prompt in served.answers(requests, generation) for answer in of_prompt]


def spans_of(config: SampledConfig, asked: AskedPrompts) -> list[range]:
    """The prompts of each part: as many as have ``batch_size`` answers, or several times as many if there are enough
    parts for the processes to share."""
    answers = len(asked.rows) * config.completions_per_prompt
    batches = min(BATCHES, max(1, answers // (config.batch_size * PARTS)))
    size = max(1, batches * config.batch_size // config.completions_per_prompt)
    return [range(first, min(first + size, len(asked.rows))) for first in range(0, len(asked.rows), size)]


def in_parts(
    context: StageContext,
    name: str,
    spans: Sequence[range],
    asked: AskedPrompts,
    make: Callable[[int], Any],
    prepare: Callable[[], None] = lambda: None,
) -> list[Any]:
    """What ``make`` makes of each span of prompts; progress is reported under ``name``, in prompts.

    ``prepare`` is called before the first that is not stored yet.
    """
    keys = [[asked.rows[index] for index in span] for span in spans]
    ends = [0, *(span.stop for span in spans)]
    return made_in_parts(
        context,
        name,
        keys,
        make,
        progress=lambda done: context.progress(name, ends[done], len(asked.rows)),
        prepare=prepare,
    )


def _uniforms(config: SampledConfig, context: StageContext, row: int) -> torch.Tensor:
    """``[answers, steps]`` random numbers of a prompt."""
    shape = (config.completions_per_prompt, config.max_new_tokens)
    return torch.rand(*shape, generator=context.generator(SEED, row), dtype=torch.float64)

"""Samples a policy's answers to prompts and scores them, in parts that the processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.data.records import Prompt
from alignment.data.tokens.tokenize import end_ids
from alignment.engines.completions import SEEDS, Asked, Generation
from alignment.evaluation.arms import TOKENS
from alignment.models.assembly.load import lineage
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.generate import Sampling, generate
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import in_list
from alignment.rewards.scores import Scores
from alignment.stages.sample.asked_prompts import AskedPrompts
from alignment.stages.sample.config import SampleConfig
from alignment.stages.sample.stored_parts import made_in_parts
from alignment.stages.shared.arm_policies import Policies
from alignment.stages.shared.asking_servers import asking_of
from alignment.stages.shared.served_policies import ServedPolicies, served_policies
from alignment.training.context import StageContext

SEED = "answers"
"""The name from which the random numbers of a prompt are derived, with the index of its row."""


def sampled_answers(
    config: SampleConfig, context: StageContext, tokenizer: Any, asked: AskedPrompts
) -> list[list[list[int]]]:
    """Token ids of ``completions_per_prompt`` answers to each prompt, with the end of the turn if it was generated.

    Each prompt has random numbers of its own, so that its answers do not depend on the other prompts.

    Raises:
        ModelError: a prompt and its answer may be longer than the policy's positions.
    """
    policy = lineage(context.spec, context.spec.inputs["policy"])
    generation = Generation(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, end_ids=sorted(end_ids(tokenizer))
    )
    spans, longest = _spans(config, asked), max(map(len, asked.ids)) + config.max_new_tokens
    served = served_policies(config.sampling, context)
    if served is None:
        policies = Policies(context)

        def sample(number: int) -> list[list[int]]:
            model = policies.load(policy)
            refuse_too_long(model.base_model, longest)  # of all prompts, so that no part is sampled in vain
            return _own_answers(config, context, model, asked, spans[number], generation)

        answers = _in_parts(context, "answering", spans, asked, sample)
        policies.release()
    else:
        with served:
            answers = _in_parts(
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
    config: SampleConfig,
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
        batch_size=len(indices) * count,
        sampling=Sampling(
            temperature=generation.temperature,
            uniforms=torch.cat([_uniforms(config, context, asked.rows[index]) for index in indices]),
        ),
    )


def _served_answers(
    config: SampleConfig,
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


def answer_scores(
    config: SampleConfig,
    context: StageContext,
    tokenizer: Any,
    records: Sequence[Prompt],
    asked: AskedPrompts,
    answers: Sequence[Sequence[Sequence[int]]],
) -> tuple[Scores, list[float]]:
    """The score of each answer by each scorer, and in total, prompt by prompt.

    ``records`` are all rows of the stage's data, ``tokenizer`` is the policy's.

    Raises:
        DataError: a row lacks a field that a scorer needs, or a function's file changed since the run was planned.
        ModelError: a reward model cannot be loaded, or its tokenizer does not fit.
        RewardError: a scorer failed, or did not return one usable number per answer.
    """
    context.progress("loading scorers")
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    rewards = build_rewards(in_list(config.scorers), context.spec, tokenizer, records, None, run, asking_of(context))
    spans = _spans(config, asked)

    def score(number: int) -> list[list[float]]:
        of_part = [(asked.rows[i], asked.ids[i], answer) for i in spans[number] for answer in answers[i]]
        rows, prompts, sampled = (list(column) for column in zip(*of_part, strict=True))
        values: list[list[float]] = rewards.scores(prompts, sampled, rows).values.tolist()
        return values

    parts = _in_parts(context, "scoring", spans, asked, score)
    scores = Scores(names=tuple(rewards.names), values=torch.cat([torch.tensor(part) for part in parts], dim=1))
    rewards.observe(scores)  # a normalised scorer is normalised over all answers
    return scores, rewards.total(scores).tolist()


def _spans(config: SampleConfig, asked: AskedPrompts) -> list[range]:
    """The prompts of each part: together they have at most ``batch_size`` answers, or one has more."""
    size = max(1, config.batch_size // config.completions_per_prompt)
    return [range(first, min(first + size, len(asked.rows))) for first in range(0, len(asked.rows), size)]


def _uniforms(config: SampleConfig, context: StageContext, row: int) -> torch.Tensor:
    """``[answers, steps]`` random numbers of a prompt."""
    shape = (config.completions_per_prompt, config.max_new_tokens)
    return torch.rand(*shape, generator=context.generator(SEED, row), dtype=torch.float64)


def _in_parts(
    context: StageContext,
    name: str,
    spans: Sequence[range],
    asked: AskedPrompts,
    make: Callable[[int], Any],
    prepare: Callable[[], None] = lambda: None,
) -> list[Any]:
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

"""Samples a policy's answers, scores them, and makes rows for other stages of them (docs/design/0031)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from alignment.algos.sampling import expected_best, kl_bound
from alignment.core.artifacts import ROWS_FILE, read_manifest, write_lines
from alignment.data.records import Prompt
from alignment.data.tokens.tokenize import end_ids
from alignment.data.tokens.tokenizer import generated_text
from alignment.evaluation.arms import TOKENS
from alignment.models.assembly.load import lineage, refuse_other_tokenizer
from alignment.records.stages import COUNTS, BestOf, Sampling
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import in_list
from alignment.rewards.scorers import Scores
from alignment.stages.sample.kind import SampleConfig
from alignment.stages.sample.selected_rows import EMPTY, NO_END, REPEATED, Candidate, OfPrompt, no_rows, rows_of_prompt
from alignment.stages.shared.answer_sampling import (
    SEED,
    AskedPrompts,
    asked_prompts,
    in_parts,
    sampled_answers,
    spans_of,
)
from alignment.stages.shared.answer_scores import asking_of
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.policies import asked_tokenizer
from alignment.stages.shared.result import StageResult
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext


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
    """
    context.progress("loading scorers")
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    rewards = build_rewards(in_list(config.scorers), context.spec, tokenizer, records, None, run, asking_of(context))
    spans = spans_of(config, asked)

    def score(number: int) -> list[list[float]]:
        of_part = [(asked.rows[i], asked.ids[i], answer) for i in spans[number] for answer in answers[i]]
        rows, prompts, sampled = (list(column) for column in zip(*of_part, strict=True))
        values: list[list[float]] = rewards.scores(prompts, sampled, rows).values.tolist()
        return values

    parts = in_parts(context, "scoring", spans, asked, score)
    scores = Scores(names=tuple(rewards.names), values=torch.cat([torch.tensor(part) for part in parts], dim=1))
    rewards.observe(scores)  # a normalised scorer is normalised over all answers
    return scores, rewards.total(scores).tolist()


SAMPLES = "samples.jsonl"


def run(config: SampleConfig, context: StageContext) -> StageResult:
    """A policy, prompts and scorers in; ``rows.jsonl``, ``samples.jsonl`` and ``sampling.json`` out.

    Raises:
        DataError: no prompt is left to ask, or as ``answer_scores``.
        ModelError: a model cannot be loaded, or does not fit.
        StageError: the answers give no row.
    """
    context.progress("loading")
    tokenizer = asked_tokenizer(context, field="policy")
    reward = context.spec.inputs.get("reward")  # checked before anything is sampled
    if reward is not None and reward.path is not None and read_manifest(reward.path) is not None:
        refuse_other_tokenizer(context.spec, reward, tokenizer)
    records = rows_of(context, Prompt, config.data)
    asked = asked_prompts(config, context, tokenizer, records)
    policy = lineage(context.spec, context.spec.inputs["policy"])
    answers = sampled_answers(config, context, policy, tokenizer, asked)
    by_scorer, totals = answer_scores(config, context, tokenizer, records, asked, answers)
    candidates = _candidates(tokenizer, answers, totals)
    prompts = [records[row] for row in asked.rows]
    made = [rows_of_prompt(config, prompt, of_prompt) for prompt, of_prompt in zip(prompts, candidates, strict=True)]
    sampling = _summary(config, asked, candidates, made)
    if not sampling.rows:
        raise no_rows(config, context, candidates, made)
    if context.is_main:
        write_lines(context.content / ROWS_FILE, (row for of_prompt in made for row in of_prompt.rows))
        samples = _samples(context, prompts, asked, answers, by_scorer, candidates, made)
        write_lines(context.content / SAMPLES, samples)
        sampling.write(context.content)
        context.trackers.table("samples", samples)
    counts = {name: float(getattr(sampling, name)) for name in COUNTS}
    scores = {"score": sampling.best_of[0].score, "best_score": sampling.best_of[-1].score}
    return StageResult(metrics=counts | scores)


def _candidates(
    tokenizer: Any, answers: Sequence[Sequence[Sequence[int]]], totals: Sequence[float]
) -> list[list[Candidate]]:
    ends, scores = end_ids(tokenizer), iter(totals)
    return [
        [
            Candidate(text=generated_text(tokenizer, answer), score=next(scores), ended=answer[-1] in ends)
            for answer in of_prompt
        ]
        for of_prompt in answers
    ]


def _samples(
    context: StageContext,
    prompts: Sequence[Prompt],
    asked: AskedPrompts,
    answers: Sequence[Sequence[Sequence[int]]],
    by_scorer: Scores,
    candidates: Sequence[Sequence[Candidate]],
    made: Sequence[OfPrompt],
) -> list[dict[str, Any]]:
    """A line for each answer, used or not."""
    policy = context.spec.input_fingerprints.get("policy", "")
    lines: list[dict[str, Any]] = []
    for row, prompt, ids, of_prompt, outcome in zip(asked.rows, prompts, answers, candidates, made, strict=True):
        for number, (tokens, answer) in enumerate(zip(ids, of_prompt, strict=True)):
            line = {
                "row": row,
                "id": prompt.id,
                "messages": [turn.as_dict() for turn in prompt.messages],
                "number": number,
                "answer": answer.text,
                "score": answer.score,
                "scorers": by_scorer.of_answer(len(lines)),
                "tokens": len(tokens),
                "ended": answer.ended,
                "used_as": outcome.used.get(number, ""),
                "left_out": outcome.left_out.get(number, ""),
                "seed": context.seed(SEED, row),
                "policy": policy,
            }
            lines.append(line)
    return lines


def _summary(
    config: SampleConfig, asked: AskedPrompts, candidates: Sequence[Sequence[Candidate]], made: Sequence[OfPrompt]
) -> Sampling:
    reasons = Counter(reason for of_prompt in made for reason in of_prompt.left_out.values())
    count = config.completions_per_prompt
    sizes = sorted({*(2**power for power in range(count.bit_length())), count})
    return Sampling(
        select=config.select.value,
        prompts=len(asked.rows),
        answers=len(asked.rows) * count,
        rows=sum(len(of_prompt.rows) for of_prompt in made),
        rows_too_long=asked.too_long,
        prompts_evaluated=asked.evaluated,
        prompts_repeated=asked.repeated,
        prompts_without_row=sum(not of_prompt.rows for of_prompt in made),
        prompts_tied=sum(of_prompt.tied for of_prompt in made),
        answers_repeated=reasons[REPEATED],
        answers_empty=reasons[EMPTY],
        answers_without_end=reasons[NO_END],
        best_of=[BestOf(answers=size, score=_mean_best(candidates, size), kl_bound=kl_bound(size)) for size in sizes],
    )


def _mean_best(candidates: Sequence[Sequence[Candidate]], size: int) -> float:
    """The mean over prompts of the expected best score of ``size`` answers."""
    of_prompts = [expected_best([answer.score for answer in of_prompt], size) for of_prompt in candidates]
    return sum(of_prompts) / len(of_prompts)


def refuse_base(config: SampleConfig, context: StageContext) -> None:
    """Checks the base model of the policy.

    Raises:
        ModelError: it cannot be sampled from.
    """
    if context.spec.inputs["policy"].is_of_run:
        refuse_base_that_cannot_answer(context.spec, config.sampling, scored=False)

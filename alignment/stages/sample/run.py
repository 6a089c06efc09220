"""Samples a policy's answers, scores them, and makes rows for other stages of them (docs/design/0031)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from alignment.algos.sampling import expected_best, kl_bound
from alignment.core.artifacts import ROWS_FILE, read_manifest, write_lines
from alignment.core.errors import StageError
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
from alignment.stages.sample.kind import SampleConfig, Select
from alignment.stages.shared import answer_sampling
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.policies import asked_tokenizer
from alignment.stages.shared.result import StageResult
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext

EMPTY, NO_END, REPEATED = "empty", "no end", "repeated"
"""Why an answer is left out."""
_ROUNDING = 2.0**-22
"""By which a score may miss a limit: four times the rounding of a float32 number. It is relative to the larger of the
two, or to 1, because a small sum may have larger summands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An answer to a prompt, its total score, and whether it has an end."""

    text: str
    score: float
    ended: bool


def left_out(candidates: Sequence[Candidate], *, ended_only: bool) -> dict[int, str]:
    """Why answers to a prompt are left out, by their index; of equal texts the first stays."""
    reasons: dict[int, str] = {}
    seen: set[str] = set()
    for index, candidate in enumerate(candidates):
        if not candidate.text.strip():
            reasons[index] = EMPTY
        elif ended_only and not candidate.ended:
            reasons[index] = NO_END
        elif candidate.text.strip() in seen:
            reasons[index] = REPEATED
        else:
            seen.add(candidate.text.strip())
    return reasons


def is_tied(scores: Mapping[int, float]) -> bool:
    """Whether there are several scores, and all are the same."""
    return len(scores) > 1 and len(set(scores.values())) == 1


def best(scores: Mapping[int, float], threshold: float | None) -> int | None:
    """The index of the highest score, the first of equal ones; None if there is none, or it is below ``threshold``."""
    index = max(scores, key=lambda index: (scores[index], -index), default=None)
    return None if index is None or (threshold is not None and not _reaches(scores[index], threshold)) else index


def pairs(scores: Mapping[int, float], *, every: bool, min_margin: float) -> list[tuple[int, int]]:
    """Indices of a better and a worse answer: of ``every`` two answers, or of the best and the worst. Their scores
    differ, by at least ``min_margin``. Pairs with better answers come first."""
    order = sorted(scores, key=lambda index: (-scores[index], index))
    possible = combinations(order, 2) if every else [(order[0], order[-1])] if len(order) > 1 else []
    return [
        (high, low)
        for high, low in possible
        if scores[high] > scores[low] and _reaches(scores[high], scores[low] + min_margin)
    ]


def labels(scores: Mapping[int, float], threshold: float | None) -> dict[int, bool]:
    """Whether each answer is good: its score is at least ``threshold``, or without one above the mean of the scores.
    Without a threshold, a score equal to the mean has no label, and so none if all are the same."""
    if threshold is not None:
        return {index: _reaches(score, threshold) for index, score in scores.items()}
    if not scores or is_tied(scores):  # a mean of equal numbers may be rounded to another one
        return {}
    mean = sum(scores.values()) / len(scores)  # that of 0.2, 0.4 and 0.6, rounded to float32, is 0.40000001
    return {i: score > mean for i, score in scores.items() if not (_reaches(score, mean) and _reaches(mean, score))}


def _reaches(score: float, limit: float) -> bool:
    """Whether a score, rounded to float32, is at least ``limit``: 0.7 becomes 0.69999999, and reaches 0.7."""
    return score >= limit - _ROUNDING * max(abs(score), abs(limit), 1.0)


CHOSEN, REJECTED, GOOD, BAD = "chosen", "rejected", "good", "bad"
"""What an answer is in the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfPrompt:
    """The ``rows`` that were made of a prompt's answers; which of these were ``used`` as what, or ``left_out`` and why,
    by index; whether the usable ones are ``tied``."""

    rows: Sequence[Mapping[str, Any]]
    used: Mapping[int, str]
    left_out: Mapping[int, str]
    tied: bool


def rows_of_prompt(config: SampleConfig, prompt: Prompt, candidates: Sequence[Candidate]) -> OfPrompt:
    """Rows of the answers to a prompt, as ``config.select`` has it. An answer that is chosen in a row and rejected in
    another one counts as chosen."""
    reasons = left_out(candidates, ended_only=config.ended_only)
    scores = {index: answer.score for index, answer in enumerate(candidates) if index not in reasons}
    used: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    if config.select is Select.best:
        index = best(scores, config.threshold)
        if index is not None:
            used[index] = CHOSEN
            row, answer = _asked(prompt), candidates[index]
            messages = [*row["messages"], {"role": "assistant", "content": answer.text}]
            rows.append({**row, "messages": messages, "score": answer.score})
    elif config.select is Select.labels:
        for index, good in labels(scores, config.threshold).items():
            used[index], answer = GOOD if good else BAD, candidates[index]
            rows.append({**_asked(prompt), "completion": answer.text, "label": good, "score": answer.score})
    else:
        for high, low in pairs(scores, every=config.select is Select.all_pairs, min_margin=config.min_margin):
            used = {low: REJECTED, **used, high: CHOSEN}
            better, worse = candidates[high], candidates[low]
            both = {"chosen_score": better.score, "rejected_score": worse.score}
            rows.append({**_asked(prompt), "chosen": better.text, "rejected": worse.text, **both})
    return OfPrompt(rows=rows, used=used, left_out=reasons, tied=is_tied(scores))


def _asked(prompt: Prompt) -> dict[str, Any]:
    """The columns of the prompt; earlier turns of the assistant are not learned again."""
    turns = [
        {**turn.as_dict(), "weight": 0} if turn.role == "assistant" else turn.as_dict() for turn in prompt.messages
    ]
    labels_of_row = {name: value for name, value in (("id", prompt.id), ("task", prompt.task)) if value}
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    return {**labels_of_row, "messages": turns, **tools}


def no_rows(
    config: SampleConfig, context: StageContext, candidates: Sequence[Sequence[Candidate]], made: Sequence[OfPrompt]
) -> StageError:
    """The error of a stage whose answers (``candidates``, by prompt) gave no row, with the reason and a remedy."""
    usable = [
        [answer.score for index, answer in enumerate(of_prompt) if index not in outcome.left_out]
        for of_prompt, outcome in zip(candidates, made, strict=True)
    ]
    scores = [score for of_prompt in usable for score in of_prompt]
    if not scores:
        reasons = Counter(reason for outcome in made for reason in outcome.left_out.values())
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        message = f"none of the {sum(map(len, candidates))} answers can be used ({counts})"
        remedy = "use a policy that answers these prompts, or another chat template; `align chat` shows its answers"
        if reasons.get(NO_END):
            remedy = "raise max_new_tokens, or set ended_only=false to use answers without an end"
    elif config.threshold is not None:
        message = f"no answer reaches the threshold {config.threshold:g}; the best one scores {max(scores):g}"
        remedy = "lower threshold, or raise completions_per_prompt"
    else:
        message, remedy = _no_difference(config, [of_prompt for of_prompt in usable if len(of_prompt) > 1])
    return StageError(message, where=f"stages.{context.spec.stage}", remedy=remedy)


def _no_difference(config: SampleConfig, several: Sequence[Sequence[float]]) -> tuple[str, str]:
    more = "raise temperature or completions_per_prompt"
    if not several:
        return "no prompt has two different answers, so there is nothing to compare", more
    margin = max(max(scores) - min(scores) for scores in several)
    if margin == 0.0:
        message = "the scorers gave all answers to a prompt the same score, so none is better than another"
        return message, f"use scorers that distinguish the answers, or {more}"
    message = (
        f"no two answers to a prompt differ by min_margin, {config.min_margin:g}; the largest margin is {margin:g}"
    )
    return message, f"lower min_margin, or {more}"


def answer_scores(
    config: SampleConfig,
    context: StageContext,
    tokenizer: Any,
    records: Sequence[Prompt],
    asked: answer_sampling.AskedPrompts,
    answers: Sequence[Sequence[Sequence[int]]],
) -> tuple[Scores, list[float]]:
    """The score of each answer by each scorer, and in total, prompt by prompt. ``records`` are all rows of the stage's
    data, ``tokenizer`` is the policy's."""
    context.progress("loading scorers")
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    rewards = build_rewards(
        in_list(config.scorers), context.spec, tokenizer, records, None, run, answer_sampling.asking_of(context)
    )
    spans = answer_sampling.spans_of(config, asked)

    def score(number: int) -> list[list[float]]:
        of_part = [(asked.rows[i], asked.ids[i], answer) for i in spans[number] for answer in answers[i]]
        rows, prompts, sampled = (list(column) for column in zip(*of_part, strict=True))
        values: list[list[float]] = rewards.scores(prompts, sampled, rows).values.tolist()
        return values

    parts = answer_sampling.in_parts(context, "scoring", spans, asked, score)
    scores = Scores(names=tuple(rewards.names), values=torch.cat([torch.tensor(part) for part in parts], dim=1))
    rewards.observe(scores)  # a normalised scorer is normalised over all answers
    return scores, rewards.total(scores).tolist()


SAMPLES = "samples.jsonl"


def run(config: SampleConfig, context: StageContext) -> StageResult:
    """A policy, prompts and scorers in; ``rows.jsonl``, ``samples.jsonl`` and ``sampling.json`` out. Raises DataError:
    no prompt is left to ask, or as ``answer_scores``. Raises ModelError: a model cannot be loaded, or does not fit.
    Raises StageError: the answers give no row."""
    context.progress("loading")
    tokenizer = asked_tokenizer(context, field="policy")
    reward = context.spec.inputs.get("reward")  # checked before anything is sampled
    if reward is not None and reward.path is not None and read_manifest(reward.path) is not None:
        refuse_other_tokenizer(context.spec, reward, tokenizer)
    records = rows_of(context, Prompt, config.data)
    asked = answer_sampling.asked_prompts(config, context, tokenizer, records)
    policy = lineage(context.spec, context.spec.inputs["policy"])
    answers = answer_sampling.sampled_answers(config, context, policy, tokenizer, asked)
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
    asked: answer_sampling.AskedPrompts,
    answers: Sequence[Sequence[Sequence[int]]],
    by_scorer: Scores,
    candidates: Sequence[Sequence[Candidate]],
    made: Sequence[OfPrompt],
) -> list[dict[str, Any]]:
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
                "seed": context.seed(answer_sampling.SEED, row),
                "policy": policy,
            }
            lines.append(line)
    return lines


def _summary(
    config: SampleConfig,
    asked: answer_sampling.AskedPrompts,
    candidates: Sequence[Sequence[Candidate]],
    made: Sequence[OfPrompt],
) -> Sampling:
    reasons = Counter(reason for of_prompt in made for reason in of_prompt.left_out.values())
    count = config.completions_per_prompt
    sizes = sorted({*(2**power for power in range(count.bit_length())), count})
    scores = [[answer.score for answer in of_prompt] for of_prompt in candidates]

    def best_of(size: int) -> float:
        return sum(expected_best(of_prompt, size) for of_prompt in scores) / len(scores)

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
        best_of=[BestOf(answers=size, score=best_of(size), kl_bound=kl_bound(size)) for size in sizes],
    )


def refuse_base(config: SampleConfig, context: StageContext) -> None:
    """Checks the base model of the policy. Raises ModelError: it cannot be sampled from."""
    if context.spec.inputs["policy"].is_of_run:
        refuse_base_that_cannot_answer(context.spec, config.sampling, scored=False)

"""Arms, their answers to the same prompts, scores that are known, and repeated answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from alignment.config.scoring import MAJORITY, pass_size
from alignment.data.tokens.tokenize import end_ids
from alignment.models.forward.answers import answer_statistics, batches, scalar_scores, unwrapped
from alignment.models.forward.generate import Sampling, answer_batch, reading_order
from alignment.models.forward.shared_prompts import can_read, read
from alignment.models.kernels.layout import prepacked

T = TypeVar("T")

TOKENS = 8192
"""Tokens that are scored at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One arm's answer to one prompt. ``ids`` are its tokens, with the end of the turn if it was generated; ``ended``
    says whether it was."""

    ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSum:
    """The log-probability of a text in nats, and the number of tokens that it sums over."""

    logprob: float
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The answers of one arm: ``per_prompt`` to each turn of each held-out prompt, in that order (exchanges.py).
    ``logprobs`` are those of its own answers, in nats; None for an arm whose log-ratio is not needed. ``references``
    are those of the rows' reference answers, one entry per turn, None for a turn without one or an arm with another
    tokenizer. ``seconds`` is the time that generating took, on all processes together. ``turns`` are how many each
    prompt has; empty if each has one."""

    answers: list[Answer]
    logprobs: list[float] | None
    references: list[TokenSum | None]
    seconds: float
    per_prompt: int = 1
    turns: Sequence[int] = ()

    @property
    def ids(self) -> list[list[int]]:
        return [answer.ids for answer in self.answers]

    @property
    def exchanges(self) -> list[Sequence[Answer]]:
        """The first answer in each turn of each prompt; the first answers of all turns are one conversation."""
        return self.by_prompt(self.answers[:: self.per_prompt])

    def by_prompt(self, values: Sequence[T]) -> list[Sequence[T]]:
        """One group per prompt; ``values`` have one entry per turn."""
        if not self.turns:
            return grouped(values, 1)
        return [values[end - size : end] for end, size in zip(accumulate(self.turns), self.turns, strict=True)]

    def of_prompts(self, values: Sequence[float]) -> list[float]:
        """The mean over the turns of each prompt; ``values`` have one entry per turn."""
        return [sum(of_turns) / len(of_turns) for of_turns in self.by_prompt(values)]

    def means(self, values: Sequence[float]) -> list[float]:
        """The mean over the turns of each prompt and the answers in them; ``values`` have one entry per answer."""
        return self.of_prompts(self._of_turns(values))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Like ``means``, but the sum over the turns: of log-probabilities, those of a whole conversation."""
        return [sum(of_turns) for of_turns in self.by_prompt(self._of_turns(values))]

    def _of_turns(self, values: Sequence[float]) -> list[float]:
        return [sum(of_answers) / len(of_answers) for of_answers in grouped(values, self.per_prompt)]


def grouped(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def read_answers(tokenizer: Any, rows: Sequence[list[int]]) -> list[Answer]:
    ends = end_ids(tokenizer)
    return [
        Answer(ids=ids, text=tokenizer.decode(ids, skip_special_tokens=True).strip(), ended=ids[-1] in ends)
        for ids in rows
    ]


def side_by_side(
    prompts: Sequence[Sequence[Sequence[int]]], answers: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[list[int]], list[list[int]]]:
    """All arms' prompts and answers (token ids); rows of one prompt are adjacent, so that it is computed once."""
    return (
        [list(prompt) for of_row in zip(*prompts, strict=True) for prompt in of_row],
        [list(answer) for of_row in zip(*answers, strict=True) for answer in of_row],
    )


@torch.no_grad()
def answer_and_score(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    others: Sequence[Sequence[list[int]]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    with_own: bool,
    progress: Callable[[int], None],
    sampling: Sampling | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """The model's answers to prompts, greedy without ``sampling``, and log p of texts after each prompt, in nats. The
    texts are the model's own answer if ``with_own``, then the ``others``. Where the model allows it, each prompt is
    read once for all of these. Raises ModelError: the model's head does more than one matrix product."""
    answers: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    order = reading_order(prompts)
    with prepacked(model, batch_size):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            asked = [prompts[row] for row in rows]
            reading = read(model, asked) if can_read(model) else None
            batch_answers = answer_batch(
                model,
                asked,
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
                temperature=1.0 if sampling is None else sampling.temperature,
                uniforms=None if sampling is None else sampling.uniforms[rows],
                reading=reading,
            )
            progress(start + len(rows))
            texts = [[*([answer] * with_own), *others[row]] for row, answer in zip(rows, batch_answers, strict=True)]
            sums = logprobs_after_each(model, asked, texts) if reading is None else reading.logprobs(model, texts)
            del reading  # before the next batch is read
            for row, answer, own in zip(rows, batch_answers, sums, strict=True):
                answers[row], scores[row] = answer, own
    return answers, scores


def logprobs_after_each(
    model: PreTrainedModel, prompts: Sequence[list[int]], texts: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """Log-probabilities of any number of texts after each prompt, computed as whole rows."""
    repeated = [prompt for prompt, of_prompt in zip(prompts, texts, strict=True) for _ in of_prompt]
    flat = [text for of_prompt in texts for text in of_prompt]
    sums = iter(sequence_logprobs(model, repeated, flat) if flat else [])
    return [[next(sums) for _ in of_prompt] for of_prompt in texts]


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], *, temperature: float = 1.0
) -> list[float]:
    """Sum of log p(token | prefix) over each answer, in nats."""
    sums: list[torch.Tensor] = []
    with prepacked(model.base_model, TOKENS):
        for part in batches(prompts, answers, tokens=TOKENS, device=model.device):
            logprobs = answer_statistics(model, part, temperature=temperature).logprobs
            sums += [row.sum() for row in logprobs.split(list(part.lengths))]
    return torch.stack(sums).tolist() if sums else []


@torch.no_grad()
def reward_scores(model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
    """The reward model's score at each answer's last token."""
    scores: list[float] = []
    with prepacked(unwrapped(model).base_model, TOKENS):  # the head computes in float32
        for part in batches(prompts, answers, tokens=TOKENS, device=model.device):
            scores += scalar_scores(model, part.rows).tolist()
    return scores


Scores = Mapping[str, Sequence[float | None]]
"""One score per prompt, or per turn of it, keyed by the name of a metric or an arm; None for one without a score."""


def known(scores: Sequence[float | None]) -> list[float]:
    return [score for score in scores if score is not None]


def on_the_same_rows(
    by_arm: Mapping[str, Sequence[float | None]], rows: Sequence[int]
) -> dict[str, list[float | None]]:
    """The scores by arm, None for every answer to a row if an answer of any arm to it has none. ``rows`` are the rows
    of the answers, the same for all arms. If no row is left, there are no arms."""
    without = {row for scores in by_arm.values() for row, score in zip(rows, scores, strict=True) if score is None}
    if without >= set(rows):
        return {}
    return {
        arm: [None if row in without else score for row, score in zip(rows, scores, strict=True)]
        for arm, scores in by_arm.items()
    }


def of_prompts(arm: Answered, scores: Sequence[float | None]) -> list[float | None]:
    """The mean over each prompt's turns; ``scores`` have one entry per turn, None for all turns of a prompt or none."""
    means = []
    for of_turns in arm.by_prompt(scores):
        turns = known(of_turns)
        means.append(sum(turns) / len(turns) if len(turns) == len(of_turns) else None)
    return means


def scores_of_prompts(
    scores: Sequence[float | None], finals: Sequence[str], *, aggregate: str, passing_score: float, per_prompt: int
) -> list[float | None]:
    """One score per prompt from the scores of its ``per_prompt`` answers (MetricConfig has the aggregates). ``finals``
    are the final answers that the majority is taken of. A prompt without scores (None) has none."""
    size = pass_size(aggregate)
    of_prompts: list[float | None] = []
    for group, answers in zip(grouped(scores, per_prompt), grouped(finals, per_prompt), strict=True):
        given = known(group)
        if len(given) < len(group):
            of_prompts.append(None)
        elif aggregate == MAJORITY:
            of_prompts.append(majority_score(answers, given))
        elif size is not None:
            of_prompts.append(pass_at_k([score >= passing_score for score in given], size))
        else:
            of_prompts.append(sum(given) / len(given))
    return of_prompts


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """The probability that at least one of ``k`` of these answers, drawn without replacement, is correct. The unbiased
    estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021, section 2.1, with n answers of which c are correct. Raises
    ValueError: there are fewer than ``k`` answers."""
    if not 1 <= k <= len(correct):
        raise ValueError(f"pass@{k} needs at least {k} answers, and there are {len(correct)}")
    wrong = len(correct) - sum(correct)
    return 1.0 - math.comb(wrong, k) / math.comb(len(correct), k)


def majority_score(answers: Sequence[str], scores: Sequence[float]) -> float:
    """The score of the most frequent final answer (Wang et al. 2023, self-consistency). Answers that are equally
    frequent count with the mean of their scores, as if one of them was drawn. An empty final answer does not vote.
    Without any vote the score is the mean of all."""
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return sum(scores) / len(scores)
    highest = max(votes.values())
    first = [answers.index(answer) for answer, count in votes.items() if count == highest]
    return sum(scores[index] for index in first) / len(first)

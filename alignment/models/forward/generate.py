"""Batched answers with a key-value cache: greedy, or pure ancestral sampling at a temperature. No top-k, top-p or
repetition penalty can leak in from a model's generation config. Sampling inverts the cumulative distribution at one
uniform number per row and step, drawn beforehand. So the same seed gives the same answers for any batch size and any
set of finished rows, except for the rounding of bfloat16 products of other shapes. Equal prompts are read once. Waiting
prompts take over the rows of finished answers; when no prompt waits, finished rows leave the batch and the cache.
Either happens when finished rows are numerous enough to pay for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.costs.recorder import counted_times, on_shadows
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.decoding import DecodingRows, WaitingPrompts, decoding
from alignment.models.forward.shared_prompts import Reading, shared_beginning
from alignment.models.kernels.layout import prepacked

FULL_ENOUGH = 0.75
"""Share of unfinished rows above which finished rows stay, because a few rows less hardly make a step cheaper."""
ASSUMED_LENGTHS = 8
"""How many lengths the answers of a batch have where no token is computed."""
STEPS_ALIKE = 64
"""Steps of a batch that are at most taken as one where no token is computed."""
OnToken = Callable[[int, int], None]
"""Called with the index of the prompt and the token id for each token as it is generated."""
Ends = Callable[[Sequence[int]], bool]
"""Called with an answer's tokens after each new one; returns whether the answer ends there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Ancestral sampling: ``uniforms [prompts, steps]`` in [0, 1), float64, one number per prompt and step."""

    temperature: float
    uniforms: Tensor


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
    on_token: OnToken | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Answers to ``prompts`` (token ids), in their order; an answer ends with one of ``end_ids`` or at the limit. At
    most ``batch_size`` prompts are answered at once. Without ``sampling`` the most likely token is taken. ``progress``
    is called with the number of prompts done, ``on_token`` with each new token. ``ends`` is a further condition for the
    end of an answer. On CPU in bfloat16 the linear weights are meanwhile in memory twice. Raises ValueError: a prompt
    is empty. Raises ModelError: the model has layers that cache something else than keys and values, or a prompt and
    its answer may be longer than the model's positions."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no token")
    order = reading_order(prompts)
    answers = _Answers(
        ids=[[] for _ in prompts],
        max_new_tokens=max_new_tokens,
        end_ids=frozenset(end_ids),
        on_token=None if on_token is None else lambda number, token: on_token(order[number], token),
        ends=ends,
    )
    with prepacked(model, min(batch_size, len(prompts))):
        _answer(
            model,
            WaitingPrompts(
                prompts=[prompts[index] for index in order],
                uniforms=None if sampling is None else _in_order(sampling.uniforms, order),
            ),
            answers,
            batch_size=batch_size,
            temperature=1.0 if sampling is None else sampling.temperature,
            progress=progress,
        )
    in_order = zip(order, answers.ids, strict=True)
    return [ids for _, ids in sorted(in_order, key=lambda indexed: indexed[0])]


def reading_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the prompts, longest first, so that there is little padding; equal prompts are adjacent."""
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])), reverse=True)


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    on_token: OnToken | None = None,
    reading: Reading | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Like ``generate`` for one batch of prompts in ``reading_order``; samples if given ``uniforms [prompts, steps]``.
    ``reading`` holds what the model computed for these prompts; without it they are read here."""
    answers = _Answers(
        ids=[[] for _ in prompts],
        max_new_tokens=max_new_tokens,
        end_ids=frozenset(end_ids),
        on_token=on_token,
        ends=ends,
    )
    drawn = None if uniforms is None else _in_order(uniforms, range(len(prompts)))
    queue = WaitingPrompts(prompts=prompts, uniforms=drawn, reading=reading)
    _answer(model, queue, answers, batch_size=len(prompts), temperature=temperature)
    return answers.ids


def _in_order(uniforms: Tensor, order: Sequence[int]) -> Callable[[slice], Tensor]:
    return lambda numbers: uniforms[list(order[numbers])]


@dataclass(kw_only=True, slots=True)
class _Answers:
    ids: list[list[int]]
    max_new_tokens: int
    end_ids: frozenset[int]
    on_token: OnToken | None
    ends: Ends | None
    ended: set[int] = field(default_factory=set)

    def add(self, number: int, token: int) -> None:
        """Appends a token, unless the answer has ended: its row may stay for some steps."""
        if number in self.ended:
            return
        answer = self.ids[number]
        answer.append(token)
        if self.on_token is not None:
            self.on_token(number, token)
        at_end = token in self.end_ids or len(answer) == self.max_new_tokens
        if at_end or (self.ends is not None and self.ends(answer)):
            self.ended.add(number)


def _answer(
    model: PreTrainedModel,
    queue: WaitingPrompts,
    answers: _Answers,
    *,
    batch_size: int,
    temperature: float,
    progress: Callable[[int], None] | None = None,
) -> None:
    if not queue.prompts or not answers.max_new_tokens:
        return
    base = unwrapped(model)
    refuse_too_long(base.base_model, len(queue.prompts[0]) + answers.max_new_tokens)
    beginning = None
    if queue.reading is None:
        beginning = shared_beginning(base, queue.prompts, min(batch_size, len(queue.prompts)))
    if beginning is not None:
        queue.cut(beginning.tokens)
    rows: DecodingRows | None = None
    unfinished: list[int] = []
    while unfinished or queue.waiting:
        if rows is None or not unfinished:
            rows = None  # its memory is free before a new cache is allocated
            rows = DecodingRows.begin(
                model, queue.next(batch_size), max_new_tokens=answers.max_new_tokens, beginning=beginning
            )
        else:
            free = [row for row in range(len(rows.numbers)) if row not in unfinished]
            entrants = queue.next_group(len(free))
            rows.enter(entrants, free[: len(entrants.numbers)], unfinished=unfinished)
        with decoding(model):
            unfinished = _advance(rows, answers, temperature, refilled=queue.waiting > 0)
        if progress is not None:
            progress(queue.begun - len(unfinished))


def _advance(rows: DecodingRows, answers: _Answers, temperature: float, *, refilled: bool) -> list[int]:
    """Takes steps until no answer is unfinished, or if rows are to be ``refilled``, until finished rows are numerous.
    Returns the rows whose answers are unfinished."""
    while True:
        tokens = rows.next_tokens(temperature)
        if on_shadows():
            tokens = torch.tensor([_assumed(number, answers) for number in rows.numbers], device=rows.model.device)
        for number, token in zip(rows.numbers, tokens.tolist(), strict=True):
            answers.add(number, token)
        unfinished = [row for row, number in enumerate(rows.numbers) if number not in answers.ended]
        if not unfinished:
            return []
        are_few = len(unfinished) <= FULL_ENOUGH * len(rows.numbers)
        if are_few and not refilled:
            tokens = tokens[rows.keep(unfinished)]
        steps = _steps_alike(unfinished, rows, answers) if on_shadows() else 1
        if steps > 1:
            rows.skip(steps - 1)
            for number, token in zip(rows.numbers, tokens.tolist(), strict=True):
                answers.ids[number] += [token] * (steps - 1)
        with counted_times(steps):
            rows.step(tokens)
        if are_few and refilled and len(unfinished) < len(rows.numbers):
            return unfinished


def _steps_alike(unfinished: Sequence[int], rows: DecodingRows, answers: _Answers) -> int:
    """How many steps from here on one stands for where no token is computed: no answer ends in them, and the cache does
    not grow."""
    if len(unfinished) < len(rows.numbers):
        return 1
    longest = max(len(answers.ids[number]) for number in rows.numbers)
    return max(1, min(STEPS_ALIKE, rows.free_columns, answers.max_new_tokens - longest - ASSUMED_LENGTHS))


def _assumed(number: int, answers: _Answers) -> int:
    """A token where none is computed. Answers get nearly as long as they may be, because shorter ones cost less, but
    not all equally long: otherwise every tensor would fit where an earlier one was."""
    steps_left = answers.max_new_tokens - len(answers.ids[number])
    ends = steps_left == 1 + number % ASSUMED_LENGTHS
    end_ids = answers.end_ids
    return min(end_ids if ends and end_ids else set(range(len(end_ids) + 1)) - end_ids)

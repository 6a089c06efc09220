"""Answers with log-probabilities, scores and advantages, in the partition of an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from alignment.models.forward.answers import micro_batches_of
from alignment.models.forward.rows import sent
from alignment.records.training import MetricsLog
from alignment.rewards.scorers import Scores, gathered_scores
from alignment.training.context import StageContext
from alignment.training.micro_batches import as_many_as_most


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Token ids of prompts, and the index of each in the stage's data."""

    ids: Sequence[Sequence[int]]
    rows: Sequence[int]

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Sampled answers to prompts, and their scores; one entry per row.

    ``rows`` are the indices of the prompts in the stage's data, and ``versions`` those of the weights that sampled.
    ``sampled_logprobs`` are an engine's, one float32 tensor ``[tokens of the answer]`` per row; None if the policy
    itself sampled. ``scores`` is ``[scorers, rows]``. Tensors are on the CPU, so that they can be sent between
    processes.
    """

    rows: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    versions: list[int]
    sampled_logprobs: list[Tensor] | None
    scores: Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """What the models say of answers: one float32 tensor ``[tokens of the answer]`` per row, on the CPU.

    Without a critic ``values`` is None.
    """

    logprobs: list[Tensor]
    reference_logprobs: list[Tensor]
    entropy: list[Tensor]
    values: list[Tensor] | None


Rows = list[int]
"""Rows of a batch that are computed at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The micro-batches of an update: ``minibatches[m][rank]`` are those of a process, the same in every epoch.

    In bfloat16 a log-probability depends on the rows of its micro-batch. Old log-probabilities are therefore computed
    in those of the partition, too. ``unlearned[rank]`` are rows that no minibatch learns from. A micro-batch without
    rows fills up the minibatch of a process that has fewer than the others.
    """

    minibatches: list[list[list[Rows]]]
    unlearned: list[list[Rows]]

    def of_rank(self, rank: int) -> list[Rows]:
        """All micro-batches of a process that have rows."""
        every = [*(share for minibatch in self.minibatches for share in minibatch[rank]), *self.unlearned[rank]]
        return [rows for rows in every if rows]

    def rows_of(self, minibatch: int) -> Rows:
        """The rows of a minibatch, of all processes."""
        return [row for share in self.minibatches[minibatch] for rows in share for row in rows]


def partition_of(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    learned: Sequence[int],
    *,
    group: int,
    num_minibatches: int,
    world_size: int,
    tokens: int,
) -> Partition:
    """Cuts a batch of ``group`` answers to each prompt into micro-batches of at most ``tokens``.

    The ``learned`` prompts are divided into minibatches in their order, and each minibatch over all processes.
    """

    def shares(of_prompts: Sequence[int], *, evenly: bool) -> list[list[Rows]]:
        own = [rows_of(of_prompts[rank::world_size], group) for rank in range(world_size)]
        ranges = [micro_batches_of(((prompts[i], answers[i]) for i in rows), tokens=tokens) for rows in own]
        if evenly:  # each is a collective call of learning
            ranges = [as_many_as_most(ranges, rank) for rank in range(world_size)]
        return [[[rows[i] for i in indices] for indices in of_rank] for rows, of_rank in zip(own, ranges, strict=True)]

    parts = torch.tensor(learned, dtype=torch.long).tensor_split(num_minibatches)
    others = sorted(set(range(len(answers) // group)).difference(learned))
    return Partition(
        minibatches=[shares(part.tolist(), evenly=True) for part in parts], unlearned=shares(others, evenly=False)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout(Answers):
    """Answers with what policy, reference and value model say of them."""

    readings: Readings


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """The scored rollout batch of an update, of all processes; the same on each process, on the host.

    Tensors are ``[rows, tokens]`` float32, zero outside ``response_mask``, unless stated otherwise. ``by_scorer`` are
    the scores of each scorer, ``scores`` (``[rows]``) those that PPO maximises; ``ended`` is ``[rows]`` bool. ``parts``
    are other ``[rows]`` that the scores are made of, by the metric that is their mean. ``kl`` holds the k1 estimates in
    nats. ``values`` is None without a critic, and ``sampled_logprobs`` (those of an engine) without an engine.
    """

    rollout: Rollout
    by_scorer: Scores
    parts: Mapping[str, Tensor]
    scores: Tensor
    ended: Tensor
    response_mask: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor | None
    reference_logprobs: Tensor
    kl: Tensor
    entropy: Tensor
    values: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """What an update learns from: its whole rollout batch, the same on every process.

    Tensors are ``[rows, tokens]`` float32 unless stated otherwise, zero outside ``response_mask``; ``scores`` is
    ``[rows]``, less all penalties. ``advantages`` are those that the policy learns from. ``values`` and ``returns`` are
    None without a critic. ``importance`` are the weights of tokens in the policy's loss; None weighs all alike.
    ``partition`` has the micro-batches in which ``logprobs`` and ``values`` were computed, and which are learned from.
    ``kl_coefficient`` is that of the KL in the loss.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    response_mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor | None
    scores: Tensor
    advantages: Tensor
    importance: Tensor | None
    returns: Tensor | None
    partition: Partition
    kl_coefficient: float

    def to(self, device: torch.device) -> Experience:
        """The same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **sent(values, device))


def interleave(shares: Sequence[Answers], *, group: int) -> Answers:
    """The whole batch in order; each of n processes made ``group`` answers to every n-th prompt."""
    world = len(shares)
    total = sum(len(share.answers) for share in shares)
    order = [(row // group % world, row // group // world * group + row % group) for row in range(total)]
    lists = {field.name: [getattr(share, field.name) for share in shares] for field in fields(Answers)}
    del lists["scores"]
    return Answers(
        **{name: _in_order(parts, order) for name, parts in lists.items()},
        scores=gathered_scores([share.scores for share in shares], order),
    )


def in_rows(shares: Sequence[Readings], partition: Partition) -> Readings:
    """The readings of all processes, each of its micro-batches in turn, in the order of the rows."""
    index_of = {
        row: (rank, index)
        for rank in range(len(shares))
        for index, row in enumerate(row for rows in partition.of_rank(rank) for row in rows)
    }
    order = [index_of[row] for row in sorted(index_of)]
    return Readings(
        **{field.name: _in_order([getattr(share, field.name) for share in shares], order) for field in fields(Readings)}
    )


def _in_order(parts: Sequence[list[Any] | None], order: Sequence[tuple[int, int]]) -> Any:
    """Entries of the processes' lists, each by rank and index; None if the processes have no lists."""
    lists = [part for part in parts if part is not None]
    return [lists[rank][index] for rank, index in order] if lists else None


def rows_of(prompts: Sequence[int], group: int) -> list[int]:
    """The rows of ``group`` answers to each of these prompts. Example: prompts 0 and 2, group 2: rows 0 1 4 5."""
    return [prompt * group + answer for prompt in prompts for answer in range(group)]


def response_mask(answers: Sequence[Sequence[int]]) -> Tensor:
    """``[rows, tokens]``: True on an answer's tokens, including its EOS; it depends on lengths, never on token ids."""
    lengths = torch.tensor([len(answer) for answer in answers])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Converts ``[answer tokens]`` of a stream to ``[rows, tokens]``, zero outside the mask."""
    # By indices, because the gradient by a mask would wait for the device.
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
    return torch.where(mask, flat[index], 0.0)


def stack(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Converts one tensor per row to ``[rows, tokens]``, zero outside the mask."""
    return spread(torch.cat(list(rows)), mask)


def prompt_order(count: int, start: int, number: int, generator: Callable[[int], torch.Generator]) -> list[int]:
    """Indices of the prompts ``start … start + number − 1`` of a run; each pass over all is a new permutation.

    ``generator`` returns the generator of a pass by its number, so the order depends on the seed alone, and a resumed
    run uses the same prompts.
    """
    passes = range(start // count, (start + number - 1) // count + 1)
    orders = {number_of_pass: torch.randperm(count, generator=generator(number_of_pass)) for number_of_pass in passes}
    return [int(orders[episode // count][episode % count]) for episode in range(start, start + number)]


@dataclass(eq=False)
class Samples:
    """Writes the first answer to each of the first ``number`` prompts of a rollout batch, one per line."""

    context: StageContext
    tokenizer: Any
    group: int
    number: int = 4

    def __post_init__(self) -> None:
        self._log = MetricsLog(self.context.content / "samples.jsonl")

    def write(self, update: int, rollout: Rollout, scores: Sequence[float]) -> None:
        """Writes on the main process only. ``scores`` are the training scores; each scorer's own are written too."""
        if not self.context.is_main:
            return
        self._log.keep_through(update - 1)  # a resumed stage samples this update again
        for row in range(0, min(self.number * self.group, len(scores)), self.group):
            kl = float((rollout.readings.logprobs[row] - rollout.readings.reference_logprobs[row]).sum())
            sample = {
                "row": rollout.rows[row],
                "prompt": self.tokenizer.decode(rollout.prompts[row]),
                "answer": self.tokenizer.decode(rollout.answers[row]),
                "score": scores[row],
                "kl": kl,
                "scorers": rollout.scores.of_answer(row),
            }
            self._log.append(update, sample)

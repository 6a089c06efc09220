"""Samples answers to prompts, and evaluates them with policy, value model, reference and scorers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from alignment.models.assembly.load import products_in
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.kernels.nf4 import reused_norms
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo.engine import RolloutEngine, SampledAnswers
from alignment.stages.ppo.experience import (
    Answers,
    Partition,
    Prompts,
    Readings,
    Rollout,
    in_rows,
    interleave,
    partition_of,
    prompt_order,
    rows_of,
)
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.training.context import StageContext
from alignment.training.sharding import own_of_all, shared

Cut = Callable[[Answers], Partition]
"""Divides answers that are scored into micro-batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episodes:
    """How episodes are made; ``per_update`` is their number in an update, over all processes.

    An answer ends at one of ``end_ids``, or after ``max_new_tokens``. ``group`` answers are sampled for each prompt;
    they are in adjacent rows, so that their prompt is computed once. Log-probabilities are taken at ``temperature``.
    ``micro_batch_tokens`` limits the tokens of a micro-batch, except in sampling: a process samples its whole share at
    once.
    """

    prompts: Prompts
    end_ids: frozenset[int]
    per_update: int
    group: int
    max_new_tokens: int
    temperature: float
    micro_batch_tokens: int

    @property
    def prompts_per_update(self) -> int:
        """How many prompts are drawn in one update."""
        return self.per_update // self.group


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draw:
    """This process's prompts of a batch, one entry a row, and the random numbers of each row."""

    prompts: list[list[int]]
    rows: list[int]
    uniforms: Tensor


@dataclass(eq=False)
class Rollouts:
    """Each process makes its share of a batch and receives all other shares, so that it holds the whole batch.

    ``gathered`` gathers sharded weights. The answers of an update can be sampled ahead, before it begins.
    """

    roles: Roles
    context: StageContext
    episodes: Episodes
    engine: RolloutEngine
    rewards: Rewards
    gathered: Callable[[], AbstractContextManager[None]]
    _ahead: dict[int, Future[SampledAnswers]] = field(default_factory=dict)

    def of_update(self, update: int, metrics: UpdateMetrics, partition_of: Cut) -> tuple[Rollout, Partition]:
        """The episodes of an update, which do not depend on the number of processes, and how they were cut."""
        draw, ahead = self._draw_of(update), self._ahead.get(update)
        return self._make(draw, self.episodes.group, update, metrics, partition_of, ahead=ahead)

    def sample_ahead(self, update: int) -> None:
        """Begins to sample the answers of a later update with the engine's weights, beside whatever follows."""
        draw = self._draw_of(update)
        thread = ThreadPoolExecutor(1, thread_name_prefix="sampling ahead")
        self._ahead = {update: thread.submit(self.engine.answers, draw.prompts, draw.uniforms)}
        thread.shutdown(wait=False)

    def of_prompts(self, prompts: Prompts, version: int, metrics: UpdateMetrics) -> Rollout:
        """One answer to each prompt by the policy as it is now, ``version``, sampled with the same random numbers in
        every call."""
        draw = self._own(prompts, range(len(prompts)), self._uniforms(len(prompts), "guard"), 1)
        rollout, _ = self._make(draw, 1, version, metrics, lambda answers: self.cut(answers, (), group=1))
        return rollout

    def cut(self, answers: Answers, learned: Sequence[int], *, group: int, num_minibatches: int = 1) -> Partition:
        """How answers are divided over minibatches, processes and micro-batches; ``learned`` are indices of prompts."""
        return partition_of(
            answers.prompts,
            answers.answers,
            learned,
            group=group,
            num_minibatches=num_minibatches,
            world_size=self.context.world_size,
            tokens=self.episodes.micro_batch_tokens,
        )

    def _draw_of(self, update: int) -> _Draw:
        number = self.episodes.prompts_per_update
        prompts = self.episodes.prompts
        drawn = prompt_order(
            len(prompts), update * number, number, lambda round_: self.context.generator("prompts", round_)
        )
        uniforms = self._uniforms(self.episodes.per_update, "sampling", update)
        return self._own(prompts, drawn, uniforms, self.episodes.group)

    def _own(self, prompts: Prompts, drawn: Sequence[int], uniforms: Tensor, group: int) -> _Draw:
        share = range(self.context.rank, len(drawn), self.context.world_size)
        indices = [drawn[i] for i in share for _ in range(group)]
        return _Draw(
            prompts=[list(prompts.ids[index]) for index in indices],
            rows=[prompts.rows[index] for index in indices],
            uniforms=uniforms[rows_of(share, group)],
        )

    def _uniforms(self, rows: int, name: str, *numbers: int) -> Tensor:
        generator = self.context.generator(name, *numbers)
        return torch.rand(rows, self.episodes.max_new_tokens, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def _make(
        self,
        draw: _Draw,
        group: int,
        version: int,
        metrics: UpdateMetrics,
        partition_of: Cut,
        *,
        ahead: Future[SampledAnswers] | None = None,
    ) -> tuple[Rollout, Partition]:
        """A whole batch; its answers were sampled ahead, or are sampled by the policy as it is now, ``version``."""
        started = time.monotonic()
        if self._ahead:  # the weights that any process samples with must stay until then
            own_of_all(lambda: wait(self._ahead.values()))
        self.engine.follow(version)
        self.context.phase("sampling")
        products = products_in(self.context.spec.model.dtype, self.context.device)
        with self.gathered(), products, reused_norms(self.roles.actor_critic):
            sampled = own_of_all(ahead.result if ahead else lambda: self.engine.answers(draw.prompts, draw.uniforms))
            ended = time.monotonic()
            self.context.phase("scoring")
            answers = interleave(shared(lambda: self._scored(draw, sampled)), group=group)
            partition = partition_of(answers)
            readings = in_rows(shared(lambda: self._read(answers, partition.of_rank(self.context.rank))), partition)
        metrics.add_seconds("rollouts", ended - started)
        metrics.add_seconds("scoring", time.monotonic() - ended)
        of_answers = {entry.name: getattr(answers, entry.name) for entry in fields(Answers)}
        return Rollout(**of_answers, readings=readings), partition

    def _scored(self, draw: _Draw, sampled: SampledAnswers) -> Answers:
        return Answers(
            rows=draw.rows,
            prompts=draw.prompts,
            answers=sampled.ids,
            versions=[sampled.version] * len(sampled.ids),
            sampled_logprobs=sampled.logprobs,
            scores=self.rewards.scores(draw.prompts, sampled.ids, draw.rows),
        )

    def _read(self, answers: Answers, micro_batches: Sequence[Sequence[int]]) -> Readings:
        """The answers of these micro-batches, in their order."""
        lengths = [len(answers.answers[row]) for rows in micro_batches for row in rows]
        if not lengths:  # all of the prompts may be those of other processes
            has_critic = self.roles.actor_critic.value is not None
            return Readings(logprobs=[], reference_logprobs=[], entropy=[], values=[] if has_critic else None)
        streams = [
            answer_stream(
                [answers.prompts[row] for row in rows], [answers.answers[row] for row in rows], self.context.device
            )
            for rows in micro_batches
        ]
        temperature = self.episodes.temperature
        # Log-probabilities are recomputed, because those from sampling differ from the training forward's.
        looks = [self.roles.actor_critic.look(batch, temperature) for batch in streams]
        policy, values = [statistics for statistics, _ in looks], [values for _, values in looks if values is not None]
        with self.roles.reference() as reference:
            reference_logprobs = [answer_statistics(reference, s, temperature=temperature).logprobs for s in streams]
        parts = [
            [s.logprobs for s in policy],
            reference_logprobs,
            [s.entropy for s in policy],
            *([values] * bool(values)),
        ]
        on_host = torch.stack([torch.cat(column).float() for column in parts]).cpu()  # a single wait for the GPU
        # Copies, because a view would travel to other processes with all that it is a view of.
        by_answer = [[part.clone() for part in column.split(lengths)] for column in on_host]
        return Readings(
            logprobs=by_answer[0],
            reference_logprobs=by_answer[1],
            entropy=by_answer[2],
            values=by_answer[3] if values else None,
        )

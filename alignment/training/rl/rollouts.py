"""Samples answers to prompts, and evaluates them with policy, value model, reference and scorers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.models.assembly.load import products_in
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import AnswerStream, answer_statistics, batches
from alignment.models.kernels.dora_norms import reused_norms
from alignment.rewards.slot import Rewards
from alignment.training.context import StageContext
from alignment.training.rl.engine import RolloutEngine, SampledAnswers
from alignment.training.rl.experience import Rollout, interleave, prompt_order, rows_of
from alignment.training.rl.step_metrics import UpdateMetrics
from alignment.training.sharding import own_of_all, shared


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Token ids of prompts, and the index of each in the stage's data."""

    ids: Sequence[Sequence[int]]
    rows: Sequence[int]

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.ids)


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


class Rollouts:
    """Each process makes its share of a batch and receives all other shares, so that it holds the whole batch.

    ``gathered`` gathers sharded weights. The answers of an update can be sampled ahead, before it begins.
    """

    def __init__(
        self,
        roles: Roles,
        context: StageContext,
        *,
        episodes: Episodes,
        engine: RolloutEngine,
        rewards: Rewards,
        gathered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._roles = roles
        self._context = context
        self._episodes = episodes
        self._engine = engine
        self._rewards = rewards
        self.gathered = gathered
        self._ahead: dict[int, Future[SampledAnswers]] = {}

    def of_update(self, update: int, metrics: UpdateMetrics) -> Rollout:
        """The episodes of an update, which do not depend on the number of processes.

        Raises:
            StageError: the engine failed.
        """
        return self._make(self._draw_of(update), self._episodes.group, update, metrics, ahead=self._ahead.get(update))

    def sample_ahead(self, update: int) -> None:
        """Begins to sample the answers of a later update with the engine's weights, beside whatever follows."""
        draw = self._draw_of(update)
        thread = ThreadPoolExecutor(1, thread_name_prefix="sampling ahead")
        self._ahead = {update: thread.submit(self._engine.answers, draw.prompts, draw.uniforms)}
        thread.shutdown(wait=False)

    def of_prompts(self, prompts: Prompts, version: int, metrics: UpdateMetrics) -> Rollout:
        """One answer to each prompt by the policy as it is now, ``version``, sampled with the same random numbers in
        every call."""
        uniforms = self._uniforms(len(prompts), "guard")
        return self._make(self._own(prompts, range(len(prompts)), uniforms, 1), 1, version, metrics)

    def _draw_of(self, update: int) -> _Draw:
        number = self._episodes.prompts_per_update
        prompts = self._episodes.prompts
        drawn = prompt_order(
            len(prompts), update * number, number, lambda round_: self._context.generator("prompts", round_)
        )
        uniforms = self._uniforms(self._episodes.per_update, "sampling", update)
        return self._own(prompts, drawn, uniforms, self._episodes.group)

    def _own(self, prompts: Prompts, drawn: Sequence[int], uniforms: Tensor, group: int) -> _Draw:
        share = range(self._context.rank, len(drawn), self._context.world_size)
        indices = [drawn[i] for i in share for _ in range(group)]
        return _Draw(
            prompts=[list(prompts.ids[index]) for index in indices],
            rows=[prompts.rows[index] for index in indices],
            uniforms=uniforms[rows_of(share, group)],
        )

    def _uniforms(self, rows: int, name: str, *numbers: int) -> Tensor:
        generator = self._context.generator(name, *numbers)
        return torch.rand(rows, self._episodes.max_new_tokens, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def _make(
        self,
        draw: _Draw,
        group: int,
        version: int,
        metrics: UpdateMetrics,
        *,
        ahead: Future[SampledAnswers] | None = None,
    ) -> Rollout:
        """A whole batch; its answers were sampled ahead, or are sampled by the policy as it is now, ``version``."""
        started = time.monotonic()
        if self._ahead:  # the weights that any process samples with must stay until then
            own_of_all(lambda: wait(self._ahead.values()))
        self._engine.follow(version)
        self._context.phase("sampling")
        products = products_in(self._context.spec.model.dtype, self._context.device)
        with self.gathered(), products, reused_norms(self._roles.actor_critic):
            answers = own_of_all(ahead.result if ahead else lambda: self._engine.answers(draw.prompts, draw.uniforms))
            sampled = time.monotonic()
            self._context.phase("scoring")
            shares = shared(lambda: self._read(draw, answers))
        whole = interleave(shares, group=group)
        metrics.add_seconds("rollouts", sampled - started)
        metrics.add_seconds("scoring", time.monotonic() - sampled)
        return whole

    def _read(self, draw: _Draw, sampled: SampledAnswers) -> Rollout:
        lengths = [len(answer) for answer in sampled.ids]
        logprobs, entropy, values = self._policy_and_values(draw.prompts, sampled.ids)
        reference = self._reference_logprobs(draw.prompts, sampled.ids)
        columns = [logprobs, reference, entropy, *([] if values is None else [values])]
        on_host = torch.stack([column.float() for column in columns]).cpu()  # a single wait for the GPU
        # Copies, because a view would travel to other processes with all that it is a view of.
        by_answer = [[part.clone() for part in column.split(lengths)] for column in on_host]
        return Rollout(
            rows=draw.rows,
            prompts=draw.prompts,
            answers=sampled.ids,
            versions=[sampled.version] * len(sampled.ids),
            logprobs=by_answer[0],
            sampled_logprobs=sampled.logprobs,
            reference_logprobs=by_answer[1],
            entropy=by_answer[2],
            values=None if values is None else by_answer[3],
            scores=self._rewards.scores(draw.prompts, sampled.ids, draw.rows),
        )

    def _policy_and_values(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities are recomputed, because those from sampling differ from the training forward's."""
        look = self._roles.actor_critic.look
        readings = [look(batch, self._episodes.temperature) for batch in self._micro_batches(prompts, answers)]
        statistics = [statistics for statistics, _ in readings]
        values = [values for _, values in readings if values is not None]
        return (
            torch.cat([tokens.logprobs for tokens in statistics]),
            torch.cat([tokens.entropy for tokens in statistics]),
            torch.cat(values) if values else None,
        )

    def _reference_logprobs(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        with self._roles.reference() as reference:
            logprobs = [
                answer_statistics(reference, batch, temperature=self._episodes.temperature).logprobs
                for batch in self._micro_batches(prompts, answers)
            ]
        return torch.cat(logprobs)

    def _micro_batches(self, prompts: list[list[int]], answers: list[list[int]]) -> Iterator[AnswerStream]:
        return batches(prompts, answers, tokens=self._episodes.micro_batch_tokens, device=self._context.device)

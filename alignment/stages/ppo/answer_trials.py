"""Trials of the sizes of micro-batches on prompts with answers of the largest length, before any answer is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, cycle, islice

import torch

from alignment.models.assembly.modules import recompute
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.rows import SHORTEST_SHARED
from alignment.stages.ppo.experience import Experience, partition_of, response_mask
from alignment.stages.ppo.trainer import PpoTrainer

Prompt = Sequence[int]


class AnswerTrials:
    """``Trials`` (training/size_search.py) of a trainer whose optimiser is ready and whose models may be spoiled. A row
    is a prompt with an answer of ``max_new_tokens`` random tokens. The longest prompt comes first and then the shortest
    ones, each with all answers of its group: then as many tokens as possible are those of answers."""

    def __init__(self, trainer: PpoTrainer) -> None:
        self._trainer = trainer
        self._world_size = trainer.context.world_size
        ascending = sorted(trainer.episodes.prompts.ids, key=len)
        self._prompts = [ascending[-1], *ascending[:-1]]

    def bounds(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the largest share of a minibatch that a process can have."""
        tokens = self._counted(self._rows())
        return tokens[0], sum(tokens)

    def least_step(self) -> int:
        """Takes a step on the shortest row; returns its tokens."""
        return self._step([min(self._prompts, key=len)], limit=1)

    def step(self, limit: int) -> int:
        """Takes a step on the largest micro-batch of at most ``limit`` tokens; returns its tokens."""
        rows = self._rows()
        number = sum(tokens <= limit for tokens in accumulate(self._counted(rows)))
        return self._step(rows[: max(1, number)], limit=limit)

    def _rows(self) -> list[Prompt]:
        """The prompt of each row of the largest share."""
        episodes = self._trainer.episodes
        minibatch = math.ceil(episodes.prompts_per_update / self._trainer.config.num_minibatches)
        share = math.ceil(minibatch / self._world_size)
        return [prompt for prompt in islice(cycle(self._prompts), share) for _ in range(episodes.group)]

    def _counted(self, rows: Sequence[Prompt]) -> list[int]:
        """The tokens of each row, as micro-batches count them: a prompt that follows an equal one costs none."""
        answer = self._trainer.episodes.max_new_tokens
        shared = [
            row is before and len(row) >= SHORTEST_SHARED for row, before in zip(rows, [None, *rows], strict=False)
        ]
        return [answer + len(row) * (not is_shared) for row, is_shared in zip(rows, shared, strict=True)]

    def _step(self, rows: list[Prompt], *, limit: int) -> int:
        trainer = self._trainer
        model, everywhere = trainer.model_wrapped, [row for row in rows for _ in range(self._world_size)]
        tokens = max(limit, sum(self._counted(rows)))
        episodes = replace(trainer.episodes, micro_batch_tokens=tokens)
        model.eval()
        recompute(model)
        replace(trainer.learner, episodes=episodes).learn(
            model,
            self._experience(everywhere, tokens=tokens),
            0,
            update=trainer.config.critic_warmup,  # from here on the policy learns too
            step=0,
        )
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return sum(self._counted(rows))

    def _experience(self, prompts: Sequence[Prompt], *, tokens: int) -> Experience:
        """Answers as an update learns from them, in one micro-batch; their numbers mean nothing."""
        trainer = self._trainer
        width = trainer.episodes.max_new_tokens
        vocabulary = unwrapped(trainer.roles.policy).get_input_embeddings().num_embeddings
        answers = torch.randint(vocabulary, (len(prompts), width)).tolist()
        zeros = torch.zeros(len(prompts), width)
        has_critic = trainer.roles.actor_critic.value is not None
        experience = Experience(
            prompts=prompts,
            answers=answers,
            response_mask=response_mask(answers),
            logprobs=zeros,
            reference_logprobs=zeros,
            values=zeros if has_critic else None,
            scores=zeros[:, 0],
            advantages=zeros + 1.0,
            importance=None,
            returns=zeros if has_critic else None,
            partition=partition_of(
                prompts,
                answers,
                range(len(prompts)),
                group=1,
                num_minibatches=1,
                world_size=self._world_size,
                tokens=tokens,
            ),
            kl_coefficient=trainer.kl_controller.coefficient,
        )
        return experience.to(trainer.args.device)

"""The first phase of an update: answers are sampled and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.algos.ppo import k1, of_each_token, of_overlong
from alignment.core.errors import StageError
from alignment.costs.recorder import on_shadows
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.experience import Answers, Partition, ScoredBatch, response_mask, stack
from alignment.stages.ppo.kind import LENGTH, OVERLONG
from alignment.stages.ppo.rollouts import Rollouts
from alignment.stages.ppo.step_metrics import UpdateMetrics

log = logging.getLogger(__name__)

START_KL_TOLERANCE = 0.02
"""Largest KL, in nats per sequence, that rounding in bfloat16 can cause; with a wrong reference it is far larger."""


@dataclass(eq=False)
class Collector:
    """Makes the scored rollout batch of an update, the same on every process, on the host."""

    rollouts: Rollouts
    rewards: Rewards
    config: PpoConfig
    end_ids: frozenset[int]

    @torch.no_grad()
    def collect(
        self, update: int, metrics: UpdateMetrics, partition_of: Callable[[Answers, Tensor], Partition]
    ) -> tuple[ScoredBatch, Partition]:
        """Samples and scores; updates the running normalisation of scores.

        ``partition_of`` gets the answers and their ``[rows]`` scores.
        """

        def partition(answers: Answers) -> Partition:
            self.rewards.observe(answers.scores)
            return partition_of(answers, self.scores_of(answers))

        rollout, cut = self.rollouts.of_update(update, metrics, partition)
        readings = rollout.readings
        mask = response_mask(rollout.answers)
        logprobs, reference = stack(readings.logprobs, mask), stack(readings.reference_logprobs, mask)
        kl = k1(logprobs, reference) * mask
        if update == 0 and not on_shadows():
            refuse_wrong_reference(kl)
        sampled = rollout.sampled_logprobs
        batch = ScoredBatch(
            rollout=rollout,
            by_scorer=rollout.scores,
            parts=length_penalties(self.config, lengths_of(rollout))
            | {f"score/{name}": values for name, values in self.rewards.of_ensembles(rollout.scores).items()},
            scores=self.scores_of(rollout),
            ended=self._ended(rollout),
            response_mask=mask,
            logprobs=logprobs,
            sampled_logprobs=None if sampled is None else stack(sampled, mask),
            reference_logprobs=reference,
            kl=kl,
            entropy=stack(readings.entropy, mask),
            values=None if readings.values is None else stack(readings.values, mask),
        )
        return batch, cut

    def scores_of(self, answers: Answers) -> Tensor:
        """``[rows]`` scores that PPO maximises: the sum over scorers, less all penalties."""
        scores = self.rewards.total(answers.scores) - self.config.missing_eos_penalty * (~self._ended(answers)).float()
        for penalty in length_penalties(self.config, lengths_of(answers)).values():
            scores = (scores.double() - penalty).float()
        return scores

    def _ended(self, answers: Answers) -> Tensor:
        """``[rows]`` bool: whether each answer has an end."""
        return torch.tensor([answer[-1] in self.end_ids for answer in answers.answers])


def refuse_wrong_reference(kl: Tensor) -> None:
    """Policy and reference are the same before the first step, so ``kl [rows, tokens]`` must be zero.

    Raises:
        StageError: its mean per row exceeds ``START_KL_TOLERANCE``.
    """
    worst = float(kl.sum(-1).abs().mean())
    if worst > START_KL_TOLERANCE:
        raise StageError(
            f"at step 0 the KL to the reference is {worst:.4f} nats per sequence, not 0, so the reference is not the "
            f"policy from which the stage started",
            remedy="nothing was trained; please report this with the stage.yaml of the run",
        )


def warn_of_equal_scores(scores: Tensor) -> None:
    """If all of several scores are equal, no answer is preferred, and the update only moves back towards the
    reference."""
    if len(scores) > 1 and float(scores.max() - scores.min()) == 0.0:
        log.warning(
            "all %d answers of this update score %g, so there is nothing to learn from them. If this continues: read "
            "samples.jsonl, raise max_new_tokens if no answer ends, or choose a scorer that gives different scores.",
            len(scores),
            float(scores[0]),
        )


def lengths_of(answers: Answers) -> Tensor:
    """``[rows]`` int: the tokens of each answer, its end included."""
    return torch.tensor([len(answer) for answer in answers.answers])


def length_penalties(config: PpoConfig, lengths: Tensor) -> dict[str, Tensor]:
    """``[answers]`` float64: what answers with ``[answers]`` tokens lose for their length, by the name in metrics."""
    penalties = {}
    if config.length_penalty:
        penalties[LENGTH] = of_each_token(lengths, config.length_penalty)
    if config.overlong.buffer:
        share = of_overlong(lengths, longest=config.max_new_tokens, buffer=config.overlong.buffer)
        penalties[OVERLONG] = config.overlong.weight * share
    return penalties

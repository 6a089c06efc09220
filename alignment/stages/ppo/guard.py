"""Detects over-optimisation: scores held-out answers with the training score and with a held-out scorer.

As a policy moves away from its start, the score that it maximises keeps rising, while the quality that the score
measures peaks and falls (Gao et al. 2022, in the square root of the KL). Only a scorer that training does not use can
show that.

Evaluations are noisy, and the highest of many noisy means is partly luck. A later policy therefore replaces an earlier
one only if it is better by more than a standard error of the difference, paired by prompt (the one-standard-error rule,
Breiman et al. 1984, section 3.4.3): among policies that the prompts cannot distinguish, it keeps an earlier one, which
is nearer to the reference. The best score is a mean over the prompts that selected it, so it is optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.scoring import GuardConfig
from alignment.records.training import MetricsLog
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo.experience import Prompts, Rollout
from alignment.stages.ppo.rollouts import Rollouts
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.training.context import StageContext
from alignment.training.sharding import everyones, shared
from alignment.training.validation import BestWeights

BEST = "guard_best.safetensors"


def better_beyond_noise(later: Tensor, earlier: Tensor) -> bool:
    """Whether ``later [prompts]`` scores exceed ``earlier [prompts]`` by more than a standard error, paired by prompt.

    Example: differences of .3, .1, .2 have mean .2 and standard error .058, so the later policy is better.
    """
    differences = later.double() - earlier.double()
    mean = float(differences.mean())
    if len(differences) == 1:
        return mean > 0.0
    return mean > 0.0 and mean > float(differences.std()) / math.sqrt(len(differences))


class Guard:
    """Evaluates a policy at regular intervals, writes ``guard.jsonl``, and keeps the best weights.

    ``scorer`` is the held-out scorer; ``proxy`` computes a rollout's training scores.
    """

    def __init__(
        self,
        config: GuardConfig,
        context: StageContext,
        prompts: Prompts,
        *,
        scorer: Rewards,
        policy: nn.Module,
        proxy: Callable[[Rollout], Tensor],
    ) -> None:
        self._config = config
        self._context = context
        self._prompts = prompts
        self._scorer = scorer
        self._proxy = proxy
        self._log = MetricsLog(context.content / "guard.jsonl")
        self._best = BestWeights(policy, file=BEST)
        self._best_scores: Tensor | None = None  # [prompts]
        self.best_updates = 0

    def evaluate(self, updates: int, rollouts: Rollouts) -> dict[str, float]:
        """Means over the held-out prompts: ``guard/proxy``, ``guard/scorer``, ``guard/kl`` (nats per sequence).

        ``guard/best_update`` is the update of the best policy so far. Every process must call this. Evaluating the same
        policy again gives the same ``guard/scorer`` and ``guard/kl``.
        """
        rollout = rollouts.of_prompts(self._prompts, updates, UpdateMetrics(lambda values: values[None]))
        own = (rollout.prompts, rollout.answers, rollout.rows) if self._context.is_main else ([], [], [])
        with rollouts.gathered():  # a reward model may share the policy's weights
            scores = self._scorer.total(shared(lambda: self._scorer.scores(*own))[0])  # [prompts], asked for by one
        pairs = zip(rollout.readings.logprobs, rollout.readings.reference_logprobs, strict=True)
        metrics = {
            "guard/proxy": float(self._proxy(rollout).mean()),
            "guard/scorer": float(scores.mean()),
            "guard/kl": sum(float((policy - reference).sum()) for policy, reference in pairs) / len(rollout.answers),
        }
        if everyones(self._is_best(scores, metrics["guard/kl"]))[0]:  # the main process decides for all
            self._best_scores, self.best_updates = scores.cpu(), updates
            self._best.record()
        metrics["guard/best_update"] = float(self.best_updates)
        if self._context.is_main:
            self._log.keep_through(updates - 1)  # a resumed stage evaluates again
            self._log.append(updates, metrics)
        return metrics

    def _is_best(self, scores: Tensor, kl: float) -> bool:
        if self._best_scores is None:
            return True  # the reference
        limit = self._config.max_kl
        return (limit is None or kl <= limit) and better_beyond_noise(scores, self._best_scores)

    def finish(self, updates: int, rollouts: Rollouts) -> dict[str, float]:
        """Evaluates once more, restores the best weights if ``keep_best``, and returns the metrics of both."""
        last = self.evaluate(updates, rollouts)
        assert self._best_scores is not None, "the first evaluation records a policy"
        best = {"guard/best_scorer": float(self._best_scores.mean())}
        if self._config.keep_best:
            self._best.restore()
            best["guard/kept_update"] = float(self.best_updates)
        return {**last, **best}

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the best weights so far to a checkpoint folder; returns the rest of the state as plain values."""
        self._best.save(folder)
        scores = None if self._best_scores is None else self._best_scores.tolist()
        return {"best_updates": self.best_updates, "best_scores": scores}

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Restores what ``save`` wrote."""
        if state["best_scores"] is not None:
            self.best_updates, self._best_scores = state["best_updates"], torch.tensor(state["best_scores"])
            self._best.load(folder, main=self._context.is_main)

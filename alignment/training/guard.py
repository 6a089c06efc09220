"""Watching for over-optimisation: held-out answers, judged by what PPO maximises and by a second opinion.

As a policy moves away from where it started, the score that it maximises rises on, while what the score stands for
peaks and falls (Gao et al. 2022, in the square root of the KL). Only a scorer that training does not see can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.config.stage import GuardConfig
from alignment.rewards.slot import Rewards
from alignment.training.context import StageContext
from alignment.training.experience import Rollout
from alignment.training.metrics import MetricsLog
from alignment.training.ppo_figures import UpdateFigures
from alignment.training.rollouts import Prompts, Rollouts
from alignment.training.sharding import everyones, put, whole_state

BEST = "guard_best.safetensors"


class Guard:
    """Looks at a policy every so many updates, writes ``guard.jsonl``, and keeps the weights that did best.

    ``scorer`` is the second opinion; ``proxy`` turns a rollout batch into the scores that training would take.
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
        self._policy = policy
        self._proxy = proxy
        self._log = MetricsLog(context.content / "guard.jsonl")
        self._best: dict[str, Tensor] = {}
        self.best_updates = 0
        self.best_gold = float("-inf")

    def due(self, updates: int) -> bool:
        """Whether the policy is looked at after this many updates."""
        return updates % self._config.every == 0

    def look(self, updates: int, rollouts: Rollouts) -> dict[str, float]:
        """Means over the held-out prompts: ``guard/proxy``, ``guard/gold``, ``guard/kl`` (nats a sequence).

        Every process must call this. The same policy gets the same figures, whenever it is asked.
        """
        found = rollouts.of_prompts(self._prompts, UpdateFigures(lambda values: values[None]))
        with rollouts.gathered():  # a reward model may share the policy's weights
            gold = self._scorer.raw(found.prompts, found.answers, found.rows)
        total = self._scorer.total({name: torch.tensor(scores) for name, scores in gold.items()}, learn=False)
        pairs = zip(found.logprobs, found.reference_logprobs, strict=True)
        figures = {
            "guard/proxy": float(self._proxy(found).mean()),
            "guard/gold": float(total.mean()),
            "guard/kl": sum(float((mine - theirs).sum()) for mine, theirs in pairs) / len(found.answers),
        }
        if everyones(self._is_best(figures))[0]:  # all do as the main process finds
            self.best_gold, self.best_updates = figures["guard/gold"], updates
            named = dict(self._policy.named_parameters())  # a tied weight once, since it is written once
            weights = whole_state(self._policy, trained_only=True)
            self._best = {name: held for name, held in weights.items() if name in named}
        if self._context.is_main:
            self._log.keep_through(updates - 1)  # a resumed stage looks again
            self._log.append(updates, figures)
        return figures

    def _is_best(self, figures: dict[str, float]) -> bool:
        limit = self._config.max_kl
        is_first = self.best_gold == float("-inf")  # the reference
        return figures["guard/gold"] > self.best_gold and (is_first or limit is None or figures["guard/kl"] <= limit)

    def finish(self, updates: int, rollouts: Rollouts) -> dict[str, float]:
        """Looks once more, puts the best weights back if that is wanted, and says which these are."""
        last = self.look(updates, rollouts)
        kept = {"guard/best_gold": self.best_gold, "guard/best_update": float(self.best_updates)}
        if self._config.keep_best:
            self._put_back()
            kept["guard/kept_update"] = float(self.best_updates)
        return {**last, **kept}

    def _put_back(self) -> None:
        for name, parameter in self._policy.named_parameters():
            if parameter.requires_grad:
                put(parameter, self._best.get(name))

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the best weights so far beside a checkpoint; returns the rest as plain values."""
        if self._best:
            save_file({name: weights.contiguous() for name, weights in self._best.items()}, folder / BEST)
        known = self.best_gold != float("-inf")
        return {"best_updates": self.best_updates, "best_gold": self.best_gold if known else None}

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Takes back what ``save`` wrote."""
        if state["best_gold"] is not None:
            self.best_updates, self.best_gold = state["best_updates"], state["best_gold"]
            self._best = load_file(folder / BEST) if self._context.is_main else {}

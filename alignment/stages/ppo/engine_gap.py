"""How far the engine that sampled is from the policy that learns, and what corrects the difference."""

from __future__ import annotations

from torch import Tensor

from alignment.algos.importance import truncated_importance
from alignment.config.sampling_engine import RolloutSamplingConfig
from alignment.core.errors import StageError
from alignment.engines.completions import OTHER_WEIGHTS
from alignment.stages.ppo.engine_checks import BEYOND, CAPPED, GAP, IMPORTANCE, LARGEST_GAP, STALENESS
from alignment.training.rl.experience import ScoredBatch
from alignment.training.rl.step_metrics import UpdateMetrics


class EngineGap:
    """Compares an engine's log-probabilities with the policy's; ``where`` is the setting of the engine."""

    def __init__(self, config: RolloutSamplingConfig, *, whole_answers: bool, where: str) -> None:
        self._config = config
        self._whole_answers = whole_answers
        self._where = where

    def importance(self, batch: ScoredBatch, update: int, metrics: UpdateMetrics) -> Tensor | None:
        """``[rows, tokens]`` weights of the policy's loss; None without an engine or without a cap.

        Raises:
            StageError: the engine's answers are of a version that is too old, or of other weights.
        """
        if batch.sampled_logprobs is None:
            return None
        self._add_gap(batch, batch.sampled_logprobs, update, metrics)
        cap = self._config.importance_cap
        if cap is None:
            return None
        weights = truncated_importance(
            batch.logprobs,
            batch.sampled_logprobs,
            batch.response_mask,
            cap=cap,
            whole_answers=self._whole_answers,
        )
        capped = (weights >= cap * (1 - 1e-6)).float()
        metrics.add_means({IMPORTANCE: weights, CAPPED: capped}, batch.response_mask)
        return weights

    def _add_gap(self, batch: ScoredBatch, sampled: Tensor, update: int, metrics: UpdateMetrics) -> None:
        gap = (batch.logprobs - sampled).abs() * batch.response_mask
        metrics.add_means({GAP: gap, BEYOND: (gap > self._config.gap_bound).float()}, batch.response_mask)
        metrics.values[LARGEST_GAP] = float(gap.max())
        staleness = update - min(batch.rollout.versions)
        metrics.values[STALENESS] = float(staleness)
        if not 0 <= staleness <= self._config.max_staleness:
            raise StageError(
                f"answers of update {update} were sampled by the policy of update {min(batch.rollout.versions)}",
                where=self._where,
                remedy="they were not used for training; please report this with the stage.yaml of the run",
            )
        if staleness == 0 and metrics.values[GAP] > OTHER_WEIGHTS:
            raise StageError(
                f"the engine's log-probabilities differ from the policy's by {metrics.values[GAP]:.2f} nats per token, "
                "so it has other weights",
                where=self._where,
                remedy="its answers were not used for training; check that the server has the model from which the "
                "stage starts",
            )

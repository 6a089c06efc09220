"""Estimators of KL(policy ‖ reference) from samples of the policy, and controllers of the KL coefficient.

k1 = log π − log ref is unbiased and the only one whose use in a reward has the true KL gradient; k3 = e^(−k1) − 1 + k1
has the same mean, less variance, and is never negative (Schulman 2020, "Approximating KL divergence"). Both are logged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate in nats; unbiased, may be negative."""
    return logprobs - reference_logprobs


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate in nats; unbiased, never negative."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedKl:
    """A constant KL coefficient."""

    coefficient: float

    def after(self, kl: float, num_episodes: int) -> FixedKl:
        """The same controller: the coefficient does not depend on the observed KL."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveKl:
    """A KL coefficient that steers the KL towards ``target`` nats per sequence (Ziegler et al. 2019, section 2.2).

    Example: at KL 12, target 6 and horizon 10,000, 256 episodes raise the coefficient by the factor 1.00512.
    """

    coefficient: float
    target: float
    horizon: int

    def after(self, kl: float, num_episodes: int) -> AdaptiveKl:
        """The controller after ``num_episodes`` episodes whose mean KL was ``kl`` nats per sequence."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * num_episodes / self.horizon
        return AdaptiveKl(coefficient=self.coefficient * factor, target=self.target, horizon=self.horizon)


KlController = FixedKl | AdaptiveKl
"""What sets the KL coefficient of an update from the KL of earlier ones."""

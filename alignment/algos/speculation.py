"""What speculative decoding gains from a draft (Leviathan et al. 2023)."""

from __future__ import annotations


def tokens_per_step(acceptance: float, gamma: int) -> float:
    """The expected number of tokens that one pass of the target yields, (1 − α^(γ+1)) / (1 − α) (equation 1).

    ``acceptance`` is α, the mean probability that a drafted token is accepted; ``gamma`` tokens are drafted at a time.
    """
    return float(sum(acceptance**power for power in range(gamma + 1)))


def expected_speed_up(acceptance: float, gamma: int, cost_ratio: float) -> float:
    """How many times faster than the target alone, (1 − α^(γ+1)) / ((1 − α)(γc + 1)) (theorem 3.8).

    ``cost_ratio`` is c, the time of a pass of the draft divided by that of the target. Verifying γ + 1 tokens is
    assumed to take as long as one pass of the target.
    """
    return tokens_per_step(acceptance, gamma) / (gamma * cost_ratio + 1.0)

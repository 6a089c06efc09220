"""Rewards a token and generalised advantage estimation written as the double sum of Schulman et al. 2016, eq. 16."""

from __future__ import annotations

Rows = list[list[float]]


def token_rewards(scores: list[float], kl: Rows, lengths: list[int], *, kl_coefficient: float) -> Rows:
    """r_t = −β·KL_t for t < length, plus the score at t = length − 1, 0 beyond."""
    rows = []
    for score, costs, length in zip(scores, kl, lengths, strict=True):
        row = []
        for t in range(len(costs)):
            reward = -kl_coefficient * costs[t] if t < length else 0.0
            if t == length - 1:
                reward += score
            row.append(reward)
        rows.append(row)
    return rows


def advantages(rewards: Rows, values: Rows, lengths: list[int], *, gamma: float, gae_lambda: float) -> Rows:
    """A_t = Σ_{l ≥ 0, t + l < length} (γλ)^l · (r_{t+l} + γ·V_{t+l+1} − V_{t+l}), with V = 0 from the length on."""
    rows = []
    for reward, value, length in zip(rewards, values, lengths, strict=True):
        row = []
        for t in range(len(reward)):
            total = 0.0
            for step in range(t, length):
                after = value[step + 1] if step + 1 < length else 0.0
                total += (gamma * gae_lambda) ** (step - t) * (reward[step] + gamma * after - value[step])
            row.append(total)
        rows.append(row)
    return rows


def returns(rewards: Rows, values: Rows, lengths: list[int], *, gamma: float, gae_lambda: float) -> Rows:
    """G_t = A_t + V_t for t < length, 0 beyond."""
    estimates = advantages(rewards, values, lengths, gamma=gamma, gae_lambda=gae_lambda)
    return [
        [a + v if t < length else 0.0 for t, (a, v) in enumerate(zip(row, value, strict=True))]
        for row, value, length in zip(estimates, values, lengths, strict=True)
    ]

"""A judge's win rate if both arms wrote equally long answers (Dubois et al. 2024, length-controlled AlpacaEval)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.evaluation.bag_of_words import sigmoid
from alignment.records.interval import Interval

_PENALTY = 0.01
"""Keeps the fit finite where an arm wins every prompt, or where lengths alone separate wins from losses."""
_EACH_WAY = 0.05
"""The smallest share of prompts on which each arm has the longer answer."""
_STEPS = 50
_AT_ONCE = 250

Array = NDArray[np.float64]


def win_rate(points: Sequence[float], extra_length: Sequence[float], *, samples: int, seed: int) -> Interval | None:
    """The win rate at equal lengths with its 95 % interval, over resampled prompts; None if it cannot be told.

    ``points`` are 1, .5 or 0 a prompt; ``extra_length`` is by how much the arm's answer is longer. The model is
    logit P(win) = θ + φ · tanh(extra length / its standard deviation), and the win rate at equal lengths is σ(θ). The
    paper's term for the difficulty of a prompt is left out: it is estimated from many arms, and an evaluation has few.

    It cannot be told unless each arm has the longer answer on a share of ``_EACH_WAY`` of the prompts: otherwise
    nothing was seen near equal lengths, and length and arm are nearly the same thing.
    """
    won, lengths = np.asarray(points, dtype=np.float64), np.asarray(extra_length, dtype=np.float64)
    spread = lengths.std()
    if len(won) < 2 or min((lengths > 0.0).mean(), (lengths < 0.0).mean()) < _EACH_WAY:
        return None
    features = np.stack([np.ones_like(lengths), np.tanh(lengths / spread)], axis=1)
    mean = sigmoid(_fit(features, won, np.ones((1, len(won))))[0, 0])
    rng = np.random.default_rng(seed)
    rates = []
    for start in range(0, samples, _AT_ONCE):
        count = min(_AT_ONCE, samples - start)
        picks = rng.integers(0, len(won), size=(count, len(won)))
        weights = np.stack([np.bincount(pick, minlength=len(won)) for pick in picks]).astype(np.float64)
        rates.append(sigmoid(_fit(features, won, weights)[:, 0]))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return Interval(mean=float(mean), low=float(low), high=float(high))


def _fit(features: Array, won: Array, weights: Array) -> Array:
    """``[resamples, 2]`` coefficients of a logistic regression with a slight ridge, by Newton's method.

    ``weights`` are ``[resamples, prompts]``: how often each prompt was drawn.
    """
    coefficients = np.zeros((len(weights), features.shape[1]))
    ridge = _PENALTY * np.eye(features.shape[1])
    for _ in range(_STEPS):
        chance = sigmoid(coefficients @ features.T)
        gradient = (weights * (won - chance)) @ features - _PENALTY * coefficients
        curvature = np.einsum("rn,ni,nj->rij", weights * chance * (1.0 - chance), features, features) + ridge
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step = np.clip(step, -2.0, 2.0)  # far out the curvature is small, and a whole step would overshoot
        coefficients += step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients

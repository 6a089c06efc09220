"""Preference losses of one pair and their gradients, from their papers, in plain numbers. An answer is the list of its
tokens' log-probabilities under the policy and under the reference. The gradient of a loss with respect to a token's
log-probability is the same for all tokens of an answer, so an answer has one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """``[tokens]`` log-probabilities in nats, and the difference of the answers' scores."""

    chosen: Sequence[float]
    rejected: Sequence[float]
    reference_chosen: Sequence[float]
    reference_rejected: Sequence[float]
    score_difference: float = 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and its derivative with respect to the log-probability of each token of the two answers."""

    value: float
    by_chosen: float
    by_rejected: float


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def of_logit(logit: float, slope_chosen: float, slope_rejected: float, *, flipped: float = 0.0) -> Loss:
    """−(1 − ε) ln σ(h) − ε ln σ(−h), where h rises by the slopes with the log-probability of a token."""
    value = -(1.0 - flipped) * math.log(sigma(logit)) - flipped * math.log(sigma(-logit))
    by_logit = -(1.0 - flipped) * (1.0 - sigma(logit)) + flipped * sigma(logit)
    return Loss(value, by_logit * slope_chosen, by_logit * slope_rejected)


def ratios(pair: Pair) -> tuple[float, float]:
    """ln π/π_ref of both answers."""
    return sum(pair.chosen) - sum(pair.reference_chosen), sum(pair.rejected) - sum(pair.reference_rejected)


def dpo(pair: Pair, *, beta: float, label_smoothing: float = 0.0, margin: float = 0.0) -> Loss:
    """Rafailov et al. 2023, eq. 7; with ε, Mitchell 2023; with a margin, Amini et al. 2024."""
    chosen, rejected = ratios(pair)
    logit = beta * (chosen - rejected) - margin * pair.score_difference
    return of_logit(logit, beta, -beta, flipped=label_smoothing)


def normalised_dpo(pair: Pair, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """Lambert et al. 2024: means over tokens."""
    chosen, rejected = ratios(pair)
    logit = beta * (chosen / len(pair.chosen) - rejected / len(pair.rejected))
    return of_logit(logit, beta / len(pair.chosen), -beta / len(pair.rejected), flipped=label_smoothing)


def robust(pair: Pair, *, beta: float, label_smoothing: float) -> Loss:
    """Chowdhury et al. 2024: ((1 − ε) L(y_w, y_l) − ε L(y_l, y_w)) / (1 − 2 ε)."""
    right = dpo(pair, beta=beta)
    turned = Pair(
        chosen=pair.rejected,
        rejected=pair.chosen,
        reference_chosen=pair.reference_rejected,
        reference_rejected=pair.reference_chosen,
    )
    wrong = dpo(turned, beta=beta)
    scale = 1.0 - 2.0 * label_smoothing
    return Loss(
        ((1.0 - label_smoothing) * right.value - label_smoothing * wrong.value) / scale,
        ((1.0 - label_smoothing) * right.by_chosen - label_smoothing * wrong.by_rejected) / scale,
        ((1.0 - label_smoothing) * right.by_rejected - label_smoothing * wrong.by_chosen) / scale,
    )


def hinge(pair: Pair, *, beta: float) -> Loss:
    """Zhao et al. 2023."""
    chosen, rejected = ratios(pair)
    logit = beta * (chosen - rejected)
    return Loss(1.0 - logit, -beta, beta) if logit < 1.0 else Loss(0.0, 0.0, 0.0)


def ipo(pair: Pair, *, beta: float) -> Loss:
    """Azar et al. 2023, eq. 17, with means over tokens."""
    chosen, rejected = ratios(pair)
    excess = chosen / len(pair.chosen) - rejected / len(pair.rejected) - 1.0 / (2.0 * beta)
    return Loss(excess**2, 2.0 * excess / len(pair.chosen), -2.0 * excess / len(pair.rejected))


def apo_zero(pair: Pair, *, beta: float) -> Loss:
    """D'Oosterlinck et al. 2024, eq. 7."""
    chosen, rejected = (sigma(beta * ratio) for ratio in ratios(pair))
    return Loss(1.0 - chosen + rejected, -beta * chosen * (1.0 - chosen), beta * rejected * (1.0 - rejected))


def apo_down(pair: Pair, *, beta: float) -> Loss:
    """D'Oosterlinck et al. 2024, eq. 8."""
    ratio_chosen, ratio_rejected = ratios(pair)
    chosen, gap = sigma(beta * ratio_chosen), sigma(beta * (ratio_chosen - ratio_rejected))
    return Loss(chosen + 1.0 - gap, beta * chosen * (1.0 - chosen) - beta * gap * (1.0 - gap), beta * gap * (1.0 - gap))


def simpo(pair: Pair, *, beta: float, target_margin: float) -> Loss:
    """Meng et al. 2024, eq. 6."""
    chosen, rejected = sum(pair.chosen) / len(pair.chosen), sum(pair.rejected) / len(pair.rejected)
    logit = beta * chosen - beta * rejected - target_margin
    return of_logit(logit, beta / len(pair.chosen), -beta / len(pair.rejected))


def orpo(pair: Pair, *, odds_weight: float) -> Loss:
    """Hong et al. 2024, eqs. 4, 6 and 7."""
    chosen = math.exp(sum(pair.chosen) / len(pair.chosen))
    rejected = math.exp(sum(pair.rejected) / len(pair.rejected))
    logit = math.log(chosen / (1.0 - chosen)) - math.log(rejected / (1.0 - rejected))
    ratio = of_logit(logit, 1.0 / (1.0 - chosen) / len(pair.chosen), -1.0 / (1.0 - rejected) / len(pair.rejected))
    return Loss(
        -math.log(chosen) + odds_weight * ratio.value,
        -1.0 / len(pair.chosen) + odds_weight * ratio.by_chosen,
        odds_weight * ratio.by_rejected,
    )


def with_nll(loss: Loss, pair: Pair, *, nll_weight: float) -> Loss:
    """Pang et al. 2024: plus α times −log π(y_w) / |y_w|."""
    nll = -sum(pair.chosen) / len(pair.chosen)
    return Loss(loss.value + nll_weight * nll, loss.by_chosen - nll_weight / len(pair.chosen), loss.by_rejected)

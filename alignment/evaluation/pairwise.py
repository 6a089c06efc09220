"""Win rates of one arm against another: combining both orders, ties, position bias and agreement.

A win counts only if both orders name the same answer; contradicting verdicts make a tie (Zheng et al. 2023, section
3.4). A prompt with an invalid verdict counts as invalid only, never as a win, tie or loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.config.evaluating import PROMPTED, UNTRAINED_ARMS, JudgeConfig
from alignment.evaluation.grammar import Verdict

WIN, TIE, LOSS = 1.0, 0.5, 0.0
"""Points that the judged arm gets for a prompt."""

_LEAN = {Verdict.first: 1.0, Verdict.second: -1.0, Verdict.tie: 0.0}


def pairs_of(config: JudgeConfig, arms: Sequence[str], *, reference: str) -> list[tuple[str, str]]:
    """The pairs to judge: the configured ones, or every trained arm against the reference and ``base+prompt``."""
    if config.pairs:
        return [(pair.arm, pair.against) for pair in config.pairs]
    trained = [arm for arm in arms if arm not in UNTRAINED_ARMS]
    return [(arm, other) for arm in trained for other in (reference, PROMPTED) if other in arms and other != arm]


@dataclass(frozen=True, kw_only=True, slots=True)
class BothOrders:
    """The verdicts on one prompt: with the arm's answer shown first, and with it shown second."""

    arm_first: Verdict
    arm_second: Verdict

    @property
    def valid(self) -> bool:
        """Whether neither verdict is invalid."""
        return Verdict.invalid not in (self.arm_first, self.arm_second)

    @property
    def agree(self) -> bool:
        """Whether both name the same answer, or both say tie."""
        assert self.valid
        return _LEAN[self.arm_first] == -_LEAN[self.arm_second]

    @property
    def points(self) -> float | None:
        """The arm's points on this prompt; None if a verdict is invalid."""
        if not self.valid:
            return None
        if not self.agree:
            return TIE
        return {Verdict.first: WIN, Verdict.tie: TIE, Verdict.second: LOSS}[self.arm_first]

    @property
    def lean(self) -> float:
        """Preference for the position: 1 if both verdicts name the answer shown first, -1 if both name the second."""
        return (_LEAN[self.arm_first] + _LEAN[self.arm_second]) / 2


def points_of(score: float | None, other: float | None) -> float | None:
    """The points of an answer by comparing its score with the other's; equal scores tie. None without both."""
    if score is None or other is None:
        return None
    return WIN if score > other else LOSS if score < other else TIE


def invalid_share(judged: Sequence[BothOrders]) -> float:
    """The share of invalid verdicts."""
    verdicts = [verdict for orders in judged for verdict in (orders.arm_first, orders.arm_second)]
    return sum(verdict is Verdict.invalid for verdict in verdicts) / len(verdicts)


def agreement(judged: Sequence[BothOrders]) -> float | None:
    """The share of valid prompts on which both orders agree; None if no prompt is valid."""
    valid = [orders for orders in judged if orders.valid]
    return sum(orders.agree for orders in valid) / len(valid) if valid else None


def position_bias(judged: Sequence[BothOrders]) -> float | None:
    """Verdicts for the answer shown first minus those for the second, as a share of the valid ones, from -1 to 1.

    A judge that agrees with itself in both orders has 0; a judge that always names the first answer has 1.
    """
    valid = [orders for orders in judged if orders.valid]
    return sum(orders.lean for orders in valid) / len(valid) if valid else None


def same_share(points: Sequence[float], other_points: Sequence[float]) -> float:
    """The share of prompts with the same points."""
    return sum(point == other for point, other in zip(points, other_points, strict=True)) / len(points)


def kappa(points: Sequence[float], other_points: Sequence[float]) -> float | None:
    """Cohen's κ of two judges' points (Cohen 1960): agreement beyond what chance gives at their frequencies.

    None if chance alone makes them agree on everything.
    """
    number = len(points)
    counts, other_counts = Counter(points), Counter(other_points)
    chance = sum(counts[point] * other_counts[point] for point in (WIN, TIE, LOSS)) / number**2
    return None if chance == 1.0 else (same_share(points, other_points) - chance) / (1.0 - chance)

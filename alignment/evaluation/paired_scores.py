"""Compares two evaluations prompt by prompt, which is more precise than comparing their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.records.evaluation import read_samples
from alignment.records.interval import Interval

SAMPLES = 2000
SEED = 0


def scores(artifact: Path, arm: str) -> dict[str, dict[str, float]]:
    """Every score of an arm's answers, by metric and by prompt."""
    by_metric: dict[str, dict[str, float]] = {}
    for sample in read_samples(artifact):
        answer = sample.answers.get(arm)
        for metric, score in answer.scores.items() if answer is not None else ():
            by_metric.setdefault(metric, {})[sample.prompt] = score
    return by_metric


def prompts(artifact: Path) -> set[str]:
    """Every prompt of an evaluation, whether it has scores or not."""
    return {sample.prompt for sample in read_samples(artifact)}


def in_both(scores: dict[str, float], other_scores: dict[str, float]) -> tuple[dict[str, float], dict[str, float], int]:
    """The scores on prompts that both have, and how many prompts only one has."""
    both = [prompt for prompt in scores if prompt in other_scores]
    only_one = len(scores.keys() ^ other_scores.keys())
    return {prompt: scores[prompt] for prompt in both}, {prompt: other_scores[prompt] for prompt in both}, only_one


def difference(scores: dict[str, float], other_scores: dict[str, float]) -> Interval | None:
    """The mean of ``scores`` minus ``other_scores`` with its 95 % interval; None without scores on the same prompts."""
    from alignment.evaluation.bootstrap import Intervals  # NumPy, which a plan does without

    if differences(scores, other_scores) is None:
        return None
    intervals = Intervals(samples=SAMPLES, seed=SEED)
    return intervals.of_difference(list(scores.values()), [other_scores[prompt] for prompt in scores])


def differences(scores: dict[str, float], other_scores: dict[str, float]) -> list[float] | None:
    """``scores`` minus ``other_scores`` on each prompt; None without scores on the same prompts."""
    if not scores or scores.keys() != other_scores.keys():
        return None
    return [scores[prompt] - other_scores[prompt] for prompt in scores]


def corrected_p_values(series: Sequence[Sequence[float]]) -> list[float]:
    """The p value of each series of differences, corrected for their number (``adjusted_p_values``)."""
    from alignment.evaluation.significance import adjusted_p_values  # NumPy

    return adjusted_p_values(series, seed=SEED)[1]


def p_values_among(series: Sequence[Sequence[float]], *, comparisons: int) -> list[float]:
    """The p value of each series of differences, corrected for so many ``comparisons`` that might have been made
    (Bonferroni)."""
    from alignment.evaluation.significance import p_values_of  # NumPy

    return [min(1.0, p * comparisons) for p in p_values_of(series, seed=SEED, comparisons=comparisons)]

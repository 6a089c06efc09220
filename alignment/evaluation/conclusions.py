"""What can and cannot be concluded from an evaluation of this size, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.evaluation.evaluation_record import NOTHING


def conclusions(
    num_prompts: int,
    comparisons: Sequence[Mapping[str, Any]],
    judge: Mapping[str, Any] | None,
    labels: Mapping[str, str],
) -> list[str]:
    """A sentence on which arms gold tells apart, one on what it would not see, and one on the judge if there is one."""
    found = [_apart(num_prompts, comparisons, labels), _limit(comparisons)]
    if judge is not None:
        found.append(_judged(judge, labels))
    return [sentence for sentence in found if sentence]


def _apart(num_prompts: int, comparisons: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    if not comparisons:
        return ""
    apart, open_ = [], []
    for one in comparisons:
        arm, against = labels[one["arm"]], labels[one["against"]]
        if one["real"]:
            apart.append(f"{arm} is {'better' if one['difference'] > 0 else 'worse'} than {against}")
        else:
            open_.append(f"{arm} and {against}")
    told = [", ".join(apart)] if apart else []
    told += [f"{', '.join(open_)} cannot be told apart"] if open_ else []
    return f"{num_prompts} prompts, by gold: {'; '.join(told)}."


def _limit(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """By the pairs that were not told apart, or by all of them; a pair without any spread says nothing."""
    pairs = [one for one in comparisons if not one["real"]] or comparisons
    sizes = [one["detectable"] for one in pairs if one["detectable"]]
    if not sizes:
        return ""
    low, high = f"{min(sizes):.2f}", f"{max(sizes):.2f}"
    size = low if low == high else f"{low} to {high} (by pair)"
    return (
        f"A true difference in gold below about {size} would be missed more than one time in five at this number of "
        "prompts."
    )


def _judged(judge: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    told = []
    for one in judge["pairs"]:
        arm, against = labels[one["arm"]], labels[one["against"]]
        if one["verdict"] == NOTHING:
            told.append(f"of {arm} and {against} {NOTHING} ({one['invalid']:.0%} of the verdicts are invalid)")
        else:
            rate = one["win_rate"]
            told.append(
                f"{arm} wins {rate['mean']:.2f} against {against} ({rate['low']:.2f} to {rate['high']:.2f}), "
                f"{one['verdict']}"
            )
    return f"By {judge['name']} on {judge['num_prompts']} prompts, ties as half a win: {'; '.join(told)}."

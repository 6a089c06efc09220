"""Explains answers that give no row at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from alignment.core.errors import StageError
from alignment.stages.sample.config import SampleConfig
from alignment.stages.sample.row_making import OfPrompt
from alignment.stages.sample.selection import NO_END, Candidate
from alignment.training.context import StageContext


def no_rows(
    config: SampleConfig,
    context: StageContext,
    candidates: Sequence[Sequence[Candidate]],
    made: Sequence[OfPrompt],
) -> StageError:
    """The error of a stage whose answers (``candidates``, by prompt) gave no row, with the reason and a remedy."""
    usable = [
        [answer.score for index, answer in enumerate(of_prompt) if index not in outcome.left_out]
        for of_prompt, outcome in zip(candidates, made, strict=True)
    ]
    scores = [score for of_prompt in usable for score in of_prompt]
    if not scores:
        reasons = Counter(reason for outcome in made for reason in outcome.left_out.values())
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        message = f"none of the {sum(map(len, candidates))} answers can be used ({counts})"
        remedy = _of_reasons(reasons)
    elif config.threshold is not None:
        message = f"no answer reaches the threshold {config.threshold:g}; the best one scores {max(scores):g}"
        remedy = "lower threshold, or raise completions_per_prompt"
    else:
        message, remedy = _no_difference(config, [of_prompt for of_prompt in usable if len(of_prompt) > 1])
    return StageError(message, where=f"stages.{context.spec.stage}", remedy=remedy)


def _of_reasons(reasons: Mapping[str, int]) -> str:
    """What to do about answers that were left out for these reasons."""
    if reasons.get(NO_END):
        return "raise max_new_tokens, or set ended_only=false to use answers without an end"
    return "use a policy that answers these prompts, or another chat template; `align chat` shows its answers"


def _no_difference(config: SampleConfig, several: Sequence[Sequence[float]]) -> tuple[str, str]:
    """Message and remedy, given the scores of the prompts that have several answers left."""
    more = "raise temperature or completions_per_prompt"
    if not several:
        return "no prompt has two different answers, so there is nothing to compare", more
    margin = max(max(scores) - min(scores) for scores in several)
    if margin == 0.0:
        message = "the scorers gave all answers to a prompt the same score, so none is better than another"
        return message, f"use scorers that distinguish the answers, or {more}"
    message = (
        f"no two answers to a prompt differ by min_margin, {config.min_margin:g}; the largest margin is {margin:g}"
    )
    return message, f"lower min_margin, or {more}"

"""Where a judge or the reward model says the opposite of the primary metric. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.records.evaluation import BETTER, WORSE, Evaluation, JudgedPair


def contradictions(evaluation: Evaluation) -> list[str]:
    """A sentence for each pair of arms that really differs in the primary metric, but the other way round by the
    judge's win rate or the reward model's scores, with a difference that is real as well."""
    return [
        f"By {evaluation.primary}, {evaluation.label(better)} is better than {evaluation.label(worse)}, but {others}."
        for better, worse in _real_pairs(evaluation)
        if (others := " and ".join([*_judged(evaluation, better, worse), *_rewarded(evaluation, better, worse)]))
    ]


def _real_pairs(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """The better and the worse arm of each real difference in the primary metric."""
    for item in evaluation.comparisons:
        verdict = evaluation.verdict(item)
        if verdict == BETTER:
            yield item.arm, item.against
        elif verdict == WORSE:
            yield item.against, item.arm


def _judged(evaluation: Evaluation, better: str, worse: str) -> Iterator[str]:
    if evaluation.judge is None:
        return
    for pair in evaluation.judge.pairs:
        if pair.win_rate is not None and _preferred(pair) == worse and {pair.arm, pair.against} == {better, worse}:
            rate = pair.win_rate.mean if pair.arm == worse else 1 - pair.win_rate.mean
            yield f"{evaluation.judge.name} prefers {evaluation.label(worse)} (win rate {rate:.2f})"


def _preferred(pair: JudgedPair) -> str:
    """The arm that the judge really prefers; empty if it prefers none, or judged too few prompts to say."""
    return {BETTER: pair.arm, WORSE: pair.against}.get(pair.verdict, "")


def _rewarded(evaluation: Evaluation, better: str, worse: str) -> Iterator[str]:
    for item in evaluation.reward_comparisons:
        gain = item if item.arm == worse else item.turned()
        if (gain.arm, gain.against) == (worse, better) and evaluation.is_real(gain) and gain.difference > 0:
            yield f"the reward model scores {evaluation.label(worse)} higher ({gain.difference:+.3f})"

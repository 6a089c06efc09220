"""A judge held against people: pairs of answers of which people have chosen one."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignment.data.records import PreferencePair
from alignment.evaluation.pairwise import TIE
from alignment.records.evaluation import BETTER, TOO_FEW, WORSE, Judge, JudgedPair

CHOSEN, REJECTED = "chosen", "rejected"
"""What the two sides are called where arms stand otherwise."""


def one_of_each_prompt(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The first pair of each prompt; pairs of one prompt are no independent trials of a judge."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        turns = [turn.as_dict() for turn in pair.messages]
        first.setdefault(json.dumps([turns, pair.tools], sort_keys=True, default=str), pair)
    return list(first.values())


def agrees(pair: JudgedPair) -> bool:
    """Whether the judge names people's answer more often than chance, on enough prompts."""
    return pair.verdict == BETTER


def verdict_on_judge(pair: JudgedPair) -> str:
    """The judge's agreement with people, in a few words."""
    if pair.win_rate is None or pair.verdict == TOO_FEW:
        return pair.verdict
    if pair.verdict == BETTER:
        return "agrees with people"
    return "contradicts people" if pair.verdict == WORSE else "chance may agree as often"


def labelled_conclusions(judge: Judge | None) -> list[str]:
    """A sentence on how often the judge agrees with people, and on what follows if chance would as often."""
    pair = None if judge is None else judge.labelled
    if judge is None or pair is None:
        return []
    if pair.win_rate is None:
        return [
            f"Nothing can be concluded about {judge.name} as a judge: {pair.invalid or 0:.0%} of its verdicts on "
            f"{pair.prompts} labelled pairs are invalid."
        ]
    low, high = pair.win_rate.bounds or (TIE, TIE)
    agreement = (
        f"{judge.name} agrees with people on {pair.win_rate.mean:.0%} of {pair.counted} pairs ({low:.0%} to "
        f"{high:.0%}), ties counted as half"
    )
    if pair.verdict == TOO_FEW:
        return [f"{agreement}, but these are too few to distinguish it from chance."]
    if pair.verdict == BETTER:
        return [f"{agreement}; chance gives 50%."]
    if pair.verdict == WORSE:
        return [f"{agreement}, less often than chance: its win rates say nothing about what people prefer."]
    return [f"{agreement}, which cannot be distinguished from chance: its win rates say nothing."]

"""What is said of a judge that was held against people's labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alignment.data.records import PreferencePair
from alignment.data.turns import Message
from alignment.evaluation.labelled_pairs import agrees, labelled_conclusions, one_of_each_prompt, verdict_on_judge
from alignment.records.evaluation import Judge, JudgedPair
from alignment.records.interval import Interval


def judged(**changes: Any) -> JudgedPair:
    usual = {
        "arm": "chosen",
        "against": "rejected",
        "prompts": 50,
        "wins": 24,
        "ties": 4,
        "losses": 22,
        "win_rate": Interval(mean=0.52, low=0.4, high=0.64),
        "verdict": "no real difference",
    }
    return JudgedPair(**usual | changes)


TOO_FEW = "fewer than 10 prompts"
BETTER = {"wins": 39, "losses": 7, "win_rate": Interval(mean=0.82, low=0.72, high=0.91), "verdict": "better"}
WORSE = {"wins": 7, "losses": 39, "win_rate": Interval(mean=0.18, low=0.09, high=0.28), "verdict": "worse"}
FEW = {"wins": 6, "ties": 0, "losses": 0, "win_rate": Interval(mean=1.0, low=1.0, high=1.0), "verdict": TOO_FEW}
BROKEN = {"wins": 2, "ties": 0, "losses": 0, "win_rate": None, "verdict": "nothing can be concluded", "invalid": 0.96}


@pytest.mark.parametrize(
    ("changes", "sentence", "words", "trusted"),
    [
        (
            {},
            "m agrees with people on 52% of 50 pairs (40% to 64%), ties counted as half, which cannot be "
            "distinguished from chance: its win rates say nothing.",
            "chance may agree as often",
            False,
        ),
        (
            BETTER,
            "m agrees with people on 82% of 50 pairs (72% to 91%), ties counted as half; chance gives 50%.",
            "agrees with people",
            True,
        ),
        (
            WORSE,
            "m agrees with people on 18% of 50 pairs (9% to 28%), ties counted as half, less often than chance: its "
            "win rates say nothing about what people prefer.",
            "contradicts people",
            False,
        ),
        (
            FEW,
            "m agrees with people on 100% of 6 pairs (100% to 100%), ties counted as half, but these are too few to "
            "distinguish it from chance.",
            TOO_FEW,
            False,
        ),
        (
            BROKEN,
            "Nothing can be concluded about m as a judge: 96% of its verdicts on 50 labelled pairs are invalid.",
            "nothing can be concluded",
            False,
        ),
    ],
)
def test_a_judge_is_trusted_only_beyond_chance(
    changes: dict[str, Any], sentence: str, words: str, trusted: bool
) -> None:
    pair = judged(**changes)
    assert labelled_conclusions(Judge(name="m", labelled=pair)) == [sentence]
    assert verdict_on_judge(pair) == words
    assert agrees(pair) is trusted


def test_without_labels_nothing_is_said() -> None:
    assert labelled_conclusions(None) == labelled_conclusions(Judge(name="m")) == []


def test_a_prompt_is_judged_once() -> None:
    def pair(prompt: str, chosen: str) -> PreferencePair:
        return PreferencePair(messages=(Message(role="user", content=prompt),), chosen=chosen, rejected="no")

    pairs = [pair("a", "1"), pair("b", "2"), pair("a", "3")]
    assert one_of_each_prompt(pairs) == pairs[:2]
    with_tools = replace(pairs[0], tools=({"type": "function", "function": {"name": "look"}},))
    assert one_of_each_prompt([pairs[0], with_tools]) == [pairs[0], with_tools]

"""Refusals are told by a list of phrases, and what a message says of somebody is none."""

from __future__ import annotations

import pytest

from alignment.evaluation.refusals import PHRASES, is_refusal


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't do that.", True),
        ("I’m sorry, but I can’t do that.", True),
        ("As an AI, I have no opinion.", True),
        ("I  cannot\nhelp with that.", True),
        ("The training is on 21 March.", False),
        ("I can't come on Monday.", False),
        ("I am sorry that the heating is off.", False),
        ("", False),
    ],
)
def test_an_answer_refuses_by_a_phrase_of_the_list(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) is refuses


def test_phrases_are_written_as_they_are_looked_for() -> None:
    assert all(phrase == " ".join(phrase.lower().split()) for phrase in PHRASES)

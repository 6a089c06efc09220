"""The quickstart's rules for an answer, and the data that ships: large enough, all different, good where it says so."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.core.files import shipped
from alignment.data.near_duplicates import NearDuplicates
from alignment.data.overlap import HeldOut, LocatedText
from alignment.data.reading import read_records
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, PreferencePair, Prompt, Question, Record
from alignment.data.source_files import locate
from alignment.data.turns import Message
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.scorer_sources import function_of
from alignment.rewards.scorers import Answers
from data.quickstart.house_style import (
    MAX_WORDS,
    fact_recall,
    facts,
    invented,
    normalise,
    source_text,
    style,
    style_and_facts,
    style_checks,
)
from tests.oracles.close import close

NOTICE = (
    "Stairwell notice: The cellar bike room gets a new lock on 3 May. Old keys stop working that day. New keys are "
    "handed out by Mr Novak in the laundry between 17:00 and 18:30, one per flat, against a deposit of 10 euros. "
    "Where do I get a new key, and does it cost me anything?"
)
FACTS = [["laundry"], ["10 euros", "ten euros"], ["3 May", "May 3"]]
GOOD = "Mr Novak hands out keys in the laundry between 17:00 and 18:30. The lock changes on 3 May; each costs 10 euros."


def _scored(answer: str, key_facts: list[list[str]] = FACTS) -> tuple[float, float, float]:
    arguments: Any = ([[{"role": "user", "content": NOTICE}]], [answer], [{"facts": key_facts}])
    return style_and_facts(*arguments)[0], style(*arguments)[0], facts(*arguments)[0]


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (GOOD, (1.0, 1.0, 1.0)),
        ("", (0.0, 0.0, 0.0)),
        ("\n\t\n", (0.0, 0.0, 0.0)),
        (NOTICE.upper(), (0.0, 0.0, 1.0)),  # a copy carries every fact
        (f"The text: {NOTICE.replace(',', '')}", (0.0, 0.0, 1.0)),
        ("The notice tells residents about a change in the house.", (0.0, 1.0, 0.0)),
        ("I am unable to answer. Go to the laundry.", (0.0, 0.0, 1 / 3)),
        ("Sure, ask in the laundry and bring 10 euros", (0.25 * 2 / 3, 0.25, 2 / 3)),  # filler, and no full stop
    ],
)
def test_a_score_is_style_times_facts(answer: str, scores: tuple[float, float, float]) -> None:
    for score, expected in zip(_scored(answer), scores, strict=True):
        close(score, expected)
    close(_scored(answer)[1], math.prod(style_checks(answer, source=NOTICE).values()))


def test_answers_to_the_shipped_prompts_have_the_scores_that_they_had_when_the_rule_was_part_of_the_package() -> None:
    """Recorded at commit 0334c9b: good answers and bad ones, by the same path as a user's own function."""
    lines = (shipped("data") / "quickstart/validation.jsonl").read_text(encoding="utf-8").splitlines()
    prompts, texts = [], []
    for row in map(json.loads, lines):
        prompts += [Prompt(messages=tuple(Message(**turn) for turn in row["messages"]), row=row)] * 7
        reference, text = row["reference"], row["messages"][-1]["content"]
        texts += [reference, "", text, f"Sure! {reference} Let me know if you need more."]
        texts += [f"- {reference}\n- Call Zoe at 9:99.", reference[:60], f"{reference} {text[:200]}"]
    answers = Answers(prompt_ids=[], answer_ids=[], texts=texts, prompts=prompts, rows=range(len(texts)))
    columns = []
    for name in ("style_and_facts", "style", "facts"):
        source = function_of(f"bundled:quickstart/house_style.py:{name}")
        assert source is not None
        columns.append(FunctionScorer(source, load_function(source, planned=None)).scores(answers).tolist())
    assert [sum(column) for column in columns] == [156.11916666666676, 193.20250000000004, 547.5666666666666]
    scores_json = json.dumps([list(scores) for scores in zip(*columns, strict=True)])
    assert hashlib.sha256(scores_json.encode()).hexdigest() == (
        "14d02c857c06ee7b4c19781fd39ba84037cb7706f516d1b49d6a4b9f396445a0"
    )


KEYS = "the keys are in the laundry"
CHECKS: dict[tuple[str, float], list[str]] = {
    ("filler", 0.5): [
        *(
            f"{opening} {KEYS}."
            for opening in ("CERTAINLY,", '"Sure,', "As an AI I see", "Based on the text", "Answer:")
        ),
        *(f"Here: {KEYS}. {closing}" for closing in ("I hope this helps!", "If you have any questions, ask.")),
    ],
    ("filler", 1.0): [GOOD, "The course of the river changes.", "If you need a key, go to the laundry."],
    ("plain", 0.25): [
        "- keys",
        "2) keys",
        "The **keys** are there.",
        "```\nkeys\n```",
        "| keys | laundry |",
        "<b>keys</b>",
    ],
    ("plain", 1.0): [GOOD, "3 May is the day.", "The lock costs 5 * 2 euros.", "Fewer than 5 < 6 flats.", "Flat #3."],
    ("answered", 0.0): ["I'm sorry, but I cannot help with that.", "I'm not able to say."],
    ("answered", 1.0): [GOOD, "The shop is unable to deliver."],
    ("finished", 1.0): ["Is it closed?", 'She said "closed."', "(It is closed.)", "No.  "],
    ("finished", 0.5): ["It is closed", "It is closed,"],
    ("grounded", 0.5): ["Ask Ida."],
    ("grounded", 0.25): ["Ask Ida or Leon in Rome."],
    ("sentences", 1.0): ["It rains. It rains."],
    ("sentences", 0.5): ["It rains. It rains. It rains."],
    ("sentences", 0.0): ["It rains. " * 4],
    ("length", 1.0): ["word " * MAX_WORDS],
    ("length", 0.9): ["word " * (MAX_WORDS + 5)],
    ("length", 0.0): ["word " * 2 * MAX_WORDS],
}


@pytest.mark.parametrize(("check", "factor"), CHECKS)
def test_a_check_of_the_style_costs_its_factor(check: str, factor: float) -> None:
    factors = {answer: style_checks(answer, source=NOTICE)[check] for answer in CHECKS[check, factor]}
    assert factors == pytest.approx(dict.fromkeys(factors, factor))


@pytest.mark.parametrize(
    ("answer", "source", "unknown"),
    [
        ("The lock is new on 4 June.", NOTICE, ["4", "June"]),
        ("Ask Mr Nowak, or Mr Novak's neighbour.", NOTICE, ["Nowak"]),
        ("It opens at 17:15 and costs €10, 10 euros, 10% or 10.50.", NOTICE, ["17:15", "10.50"]),
        ("Berlin opens a sentence. Paris does as well.", NOTICE, []),
        ("There are 13 or 30 cats.", "There are three cats.", ["13", "30"]),
        ("We meet at 7 p.m. then, or 8 pm.", "We meet at 7 pm or 8pm.", []),
        ("It was Anna's.", "It was Anna’s.", []),
        ("It was the Joneses' or the Jones' dog.", "The Jones family and the Joneses.", []),
    ],
)
def test_numbers_and_names_that_the_text_lacks_are_found(answer: str, source: str, unknown: list[str]) -> None:
    assert invented(answer, source=source) == unknown


ALL = DataConfig(source="")
CONVERSATIONS = read_records(locate("bundled:quickstart/conversations"), Conversation, ALL)
PAIRS = read_records(locate("bundled:quickstart/preferences"), PreferencePair, ALL)
HELD_OUT, VALIDATION = (
    read_records(locate(f"bundled:quickstart/{name}"), HeldOutPrompt, ALL) for name in ("heldout", "validation")
)
_DEMONSTRATIONS = locate("bundled:quickstart/conversations").read_text().splitlines()
STYLES = {row["id"]: row["style"] for row in map(json.loads, _DEMONSTRATIONS)}
FILES: dict[str, list[Any]] = {
    "conversations": CONVERSATIONS,
    "preferences": PAIRS,
    "heldout": HELD_OUT,
    "validation": VALIDATION,
}
ROWS = [row for rows in FILES.values() for row in rows]


def _source(messages: Sequence[Message]) -> str:
    return source_text([message.as_dict() for message in messages])


def _style(answer: str, messages: Sequence[Message]) -> float:
    return math.prod(style_checks(answer, source=_source(messages)).values())


def _good_answers() -> Iterator[tuple[str, str, Sequence[Message]]]:
    for row in CONVERSATIONS:
        if STYLES[row.id] == "house":
            yield row.id, row.messages[-1].content, row.messages[:-1]
    for pair in PAIRS:
        yield pair.id, pair.chosen, pair.messages
    for prompt in (*HELD_OUT, *VALIDATION):
        yield prompt.id, prompt.reference, prompt.messages


def test_every_good_answer_keeps_the_house_style() -> None:
    assert [(name, answer) for name, answer, turns in _good_answers() if _style(answer, turns) != 1.0] == []


def test_demonstrations_are_of_five_styles_and_only_house_style_keeps_the_rule() -> None:
    assert Counter(STYLES.values()) == {"chatty": 46, "house": 45, "list": 45, "restating": 45, "long": 44}
    others = [row for row in CONVERSATIONS if STYLES[row.id] != "house"]
    assert max(_style(row.messages[-1].content, row.messages[:-1]) for row in others) <= 0.5


def test_every_reference_carries_its_facts_and_most_of_them_stand_in_the_prompt() -> None:
    """At least one wording of nearly every fact is in the text; the others are paraphrases."""
    rows = [*HELD_OUT, *VALIDATION]
    assert (len(HELD_OUT), len(VALIDATION)) == (252, 102)
    assert [row.id for row in rows if fact_recall(row.reference, row.row["facts"]) != 1.0] == []
    assert [row.id for row in rows if len(row.row["facts"]) < 2] == []
    verbatim = [fact_recall(_source(row.messages), [fact]) for row in rows for fact in row.row["facts"]]
    assert mean(verbatim) > 0.9


MOST: dict[str, tuple[str | None, float]] = {
    "verbose": (None, 0.5),
    "filler": (None, 0.5),
    "markup": ("plain", 0.25),
    "invented": (None, 1.0),
    "omits": (None, 1.0),
    "vague": (None, 1.0),
    "sft_sample": (None, 1.0),
}
"""Of each flaw the check that sees it, if it is one, and how well answers may do in it at most."""


def test_every_flaw_is_there_none_is_most_of_the_pairs_and_the_rule_sees_it() -> None:
    flaws = Counter(pair.flaw for pair in PAIRS)
    assert set(flaws) == set(MOST)
    assert min(flaws.values()) >= 10
    assert max(flaws.values()) <= len(PAIRS) / 2
    for flaw, (check, most) in MOST.items():
        checks = [style_checks(pair.rejected, source=_source(pair.messages)) for pair in PAIRS if pair.flaw == flaw]
        assert max(factors[check] if check else math.prod(factors.values()) for factors in checks) <= most, flaw
    shorter = mean(len(pair.rejected.split()) < len(pair.chosen.split()) for pair in PAIRS)
    assert 0.1 < shorter < 0.9, "otherwise a length would be all there is to learn"


TEXTS = read_records(locate("bundled:general/texts"), PlainText, ALL)
QUESTIONS = read_records(locate("bundled:general/questions"), Question, ALL)
TALKS = read_records(locate("bundled:general/conversations"), Conversation, ALL)
GENERAL: dict[str, list[Record]] = {"texts": [*TEXTS], "questions": [*QUESTIONS], "conversations": [*TALKS]}


def _all_of(rows: Sequence[Any]) -> list[LocatedText]:
    parts_of = [
        [
            *(turn.content for turn in getattr(row, "messages", ())),
            *getattr(row, "choices", ()),
            getattr(row, "text", ""),
        ]
        for row in rows
    ]
    return [
        LocatedText(where=row.where, text="\n".join(filter(None, parts)))
        for row, parts in zip(rows, parts_of, strict=True)
    ]


def test_every_row_has_an_id_of_its_own() -> None:
    assert [len(rows) for rows in GENERAL.values()] == [48, 110, 124]
    for rows in (ROWS, [*TEXTS, *QUESTIONS, *TALKS]):
        assert len({row.id for row in rows if row.id}) == len(rows)


def test_no_two_prompts_or_answers_are_nearly_the_same_and_they_begin_in_many_ways() -> None:
    """Prompts over all files, so that nothing held out is learned from."""
    prompts = ["\n".join(turn.content for turn in row.messages if turn.role == "user") for row in ROWS]
    first_turns = [next(turn.content for turn in row.messages if turn.role == "user") for row in ROWS]
    good, rejected = [answer for _, answer, _ in _good_answers()], [pair.rejected for pair in PAIRS]
    for texts in (prompts, good, rejected):
        repeats = NearDuplicates()
        for number, text in enumerate(texts):
            repeats.add(LocatedText(where=str(number), text=text))
        assert repeats.pairs == []
    for texts in (first_turns, good, rejected):
        assert len({" ".join(normalise(text).split()[:4]) for text in texts}) / len(texts) > 0.9


def test_nothing_in_a_general_file_stands_in_another_or_in_the_quickstart() -> None:
    files = [_all_of(rows) for rows in (*GENERAL.values(), ROWS)]
    for texts in files[:-1]:
        others = [text for other in files if other is not texts for text in other]
        assert list(HeldOut(others).overlaps(texts)) == []
        assert list(HeldOut(texts).overlaps(others)) == []
        assert not any(list(HeldOut(texts[:index]).overlaps([text])) for index, text in enumerate(texts) if index)

"""The quickstart's rules: every part of the style both ways, and the answers that must score zero or one."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest

from alignment.core.resources import shipped
from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.scorer_sources import function_of
from alignment.rewards.scorers import Answers
from data.quickstart.house_style import (
    MAX_WORDS,
    copied,
    fact_recall,
    facts,
    invented,
    normalise,
    sentences,
    style,
    style_and_facts,
    style_checks,
)
from tests.oracles.close import close

SOURCE = (
    "Stairwell notice: The cellar bike room gets a new lock on 3 May. Old keys stop working that day. New keys are "
    "handed out by Mr Novak in the laundry between 17:00 and 18:30, one per flat, against a deposit of 10 euros. "
    "Where do I get a new key, and does it cost me anything?"
)
FACTS = [["laundry"], ["10 euros", "ten euros"], ["3 May", "May 3"]]
GOOD = "Mr Novak hands out keys in the laundry between 17:00 and 18:30. The lock changes on 3 May; each costs 10 euros."


def _factor(answer: str, check: str, source: str = SOURCE) -> float:
    return style_checks(answer, source=source)[check]


def _scored(answer: str, key_facts: list[list[str]] = FACTS) -> tuple[float, float, float]:
    """Both together, style and facts of an answer to ``SOURCE``."""
    arguments: Any = ([[{"role": "user", "content": SOURCE}]], [answer], [{"facts": key_facts}])
    return style_and_facts(*arguments)[0], style(*arguments)[0], facts(*arguments)[0]


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_a_good_answer_scores_one_in_everything() -> None:
    assert _scored(GOOD) == (1.0, 1.0, 1.0)
    assert set(style_checks(GOOD, source=SOURCE).values()) == {1.0}


def test_both_are_style_times_facts_and_style_is_the_product_of_its_checks() -> None:
    answer = "Sure, ask in the laundry and bring 10 euros"
    both, of_style, of_facts = _scored(answer)
    checks = style_checks(answer, source=SOURCE)
    close(of_style, math.prod(checks.values()))
    close(of_facts, 2 / 3)
    close(both, of_style * of_facts)
    assert checks["filler"] == checks["finished"] == 0.5


@pytest.mark.parametrize("answer", ["", "   ", "\n\t\n"])
def test_an_empty_answer_scores_zero(answer: str) -> None:
    assert _scored(answer) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("answer", [SOURCE, SOURCE.upper(), SOURCE.replace(",", ""), f"The text: {SOURCE}"])
def test_a_copied_prompt_scores_zero_although_it_carries_every_fact(answer: str) -> None:
    assert _scored(answer) == (0.0, 0.0, 1.0)


def test_a_fluent_answer_without_facts_scores_zero() -> None:
    assert _scored("The notice tells residents about a change in the house.") == (0.0, 1.0, 0.0)


def test_every_score_lies_between_zero_and_one() -> None:
    for answer in (GOOD, "- 99\n- 98", "Sure! **Berlin** 12 Paris 13", "a " * 500, "?", ".", "1. 2. 3. 4."):
        every = (*_scored(answer), *style_checks(answer, source=SOURCE).values())
        assert all(0.0 <= score <= 1.0 for score in every)


def test_turns_of_the_assistant_are_no_source() -> None:
    turns = [("system", "Ask Ida."), ("user", "When?"), ("assistant", "Leon knows."), ("user", "So?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    assert style([prompt, prompt], ["Ask Ida.", "Ask Leon."], [{}, {}]) == [1.0, 0.5]


def test_answers_to_the_shipped_prompts_have_the_scores_that_they_had_when_the_rule_was_part_of_the_package() -> None:
    """Recorded at commit 0334c9b: good answers and bad ones, by the same path as a user's own function."""
    lines = (shipped("data") / "quickstart/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts, texts = [], []
    for row in map(json.loads, lines):
        prompt = Prompt(messages=tuple(Message(**turn) for turn in row["messages"]), row=row)
        prompts += [prompt] * 7
        texts += _good_and_bad(row["reference"], row["messages"][-1]["content"])
    answers = Answers(prompt_ids=[], answer_ids=[], texts=texts, prompts=prompts, rows=range(len(texts)))
    columns = []
    for name in ("style_and_facts", "style", "facts"):
        source = function_of(f"bundled:quickstart/house_style.py:{name}")
        assert source is not None
        scorer = FunctionScorer(source, load_function(source, planned=None))
        columns.append(scorer.scores(answers).tolist())
    assert [sum(column) for column in columns] == [156.11916666666676, 193.20250000000004, 547.5666666666666]
    scores_json = json.dumps([list(scores) for scores in zip(*columns, strict=True)])
    assert hashlib.sha256(scores_json.encode()).hexdigest() == (
        "14d02c857c06ee7b4c19781fd39ba84037cb7706f516d1b49d6a4b9f396445a0"
    )


def _good_and_bad(reference: str, text: str) -> list[str]:
    return [
        reference,
        "",
        text,
        f"Sure! {reference} Let me know if you need more.",
        f"- {reference}\n- Call Zoe at 9:99.",
        reference[:60],
        f"{reference} {text[:200]}",
    ]


# ---- sentences and length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One sentence.", 1),
        ("No full stop", 1),
        ("One. Two.", 2),
        ("One! Two? Three.", 3),
        ("It costs 4.50 a day. Bring cash.", 2),
        ("Mr. Novak and Mrs. Lee met Dr. Ito on St. John Street.", 1),
        ("J. Novak called.", 1),
        ("Bring fruit, e.g. apples, etc. and a bag.", 1),
        ("It opens at 7 a.m. Bring your key.", 2),
        ("It opens at 7 a.m. and closes at 9 p.m. on Monday.", 1),
        ("He waited ... and left.", 1),
        ('She said "Go." Then she left.', 2),
        ("She said “Go.” Then she left.", 2),
        ("(It rained.) We left.", 2),
        ("First line\nsecond line", 2),
        ("Approx. 5 kg vs. 6 kg.", 1),
        ("Version 2.1.3 is out.", 1),
        ("", 0),
        ("   \n ", 0),
    ],
)
def test_sentences_are_counted_as_a_reader_would(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_the_parts_of_a_text_together_are_the_text() -> None:
    assert sentences("Mr. Novak came. He left at 7 a.m. It rained!") == [
        "Mr. Novak came.",
        "He left at 7 a.m.",
        "It rained!",
    ]


@pytest.mark.parametrize(("count", "factor"), [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.0), (7, 0.0)])
def test_more_than_two_sentences_cost_half_and_more_than_three_all(count: int, factor: float) -> None:
    assert _factor(" ".join(["It rains."] * count), "sentences") == factor


@pytest.mark.parametrize(
    ("words", "factor"),
    [(1, 1.0), (MAX_WORDS, 1.0), (MAX_WORDS + 5, 0.9), (75, 0.5), (2 * MAX_WORDS, 0.0), (200, 0.0)],
)
def test_length_costs_linearly_beyond_the_limit(words: int, factor: float) -> None:
    close(_factor("word " * words, "length"), factor)


@pytest.mark.parametrize(
    ("answer", "factor"),
    [
        ("It is closed.", 1.0),
        ("Is it closed?", 1.0),
        ('She said "closed."', 1.0),
        ("She said “closed.”", 1.0),
        ("(It is closed.)", 1.0),
        ("It is closed", 0.5),
        ("It is closed and the", 0.5),
        ("It is closed,", 0.5),
        ("It is closed:", 0.5),
        ("It is closed.  ", 1.0),
    ],
)
def test_an_answer_that_breaks_off_costs_half(answer: str, factor: float) -> None:
    assert _factor(answer, "finished") == factor


# ---- filler, markup, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "Sure, the keys are in the laundry.",
        "Sure! The keys are in the laundry.",
        "CERTAINLY, the keys are in the laundry.",
        "Of course. The keys are in the laundry.",
        "Great question! The keys are in the laundry.",
        "Here is a summary. The keys are in the laundry.",
        "Here's the answer. The keys are in the laundry.",
        "Okay, the keys are in the laundry.",
        "Based on the text the keys are in the laundry.",
        "According to the note the keys are in the laundry.",
        "In summary, the keys are in the laundry.",
        "To summarise, the keys are in the laundry.",
        "Answer: the keys are in the laundry.",
        "Summary:\tthe keys are in the laundry.",
        "The text says that the keys are in the laundry.",
        "As an AI I know that the keys are in the laundry.",
        "Let me tell you where the keys are.",
        '"Sure, the keys are in the laundry."',
        "The keys are in the laundry. Let me know if you need more.",
        "The keys are in the laundry. I hope this helps!",
        "The keys are in the laundry, feel free to ask.",
        "The keys are in the laundry. Please note that it closes early.",
        "The keys are in the laundry. Is there anything else?",
        "Overall, the keys are in the laundry.",
        "The keys are in the laundry. Don't hesitate to ask.",
        "The keys are in the laundry. If you have any questions, ask.",
    ],
)
def test_filler_at_either_end_costs_half(answer: str) -> None:
    assert _factor(answer, "filler") == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "Make sure to bring 10 euros.",
        "The course of the river changes.",
        "Surely nobody minds.",
        "Oklahoma is far.",
        "The notes say nothing of it.",
        "Text the caretaker before noon.",
        "It hopes to open in May.",
        "If you need a key, go to the laundry.",
        "Hope sank when the answer came.",
    ],
)
def test_ordinary_words_are_no_filler(answer: str) -> None:
    assert _factor(answer, "filler") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "- keys in the laundry",
        "* keys in the laundry",
        "• keys in the laundry",
        "# Keys",
        "> keys in the laundry",
        "1. Keys in the laundry.",
        "2) Keys in the laundry.",
        "The **keys** are there.",
        "The __keys__ are there.",
        "The `keys` are there.",
        "```\nkeys\n```",
        "| keys | laundry |",
        "The <b>keys</b> are there.",
        "The keys are there.<br/>Come.",
        "Keys: laundry.\nDeposit: 10 euros.",
        "Keys are there.\n\nBring 10 euros.",
    ],
)
def test_lists_and_markup_cost_three_quarters(answer: str) -> None:
    assert _factor(answer, "plain") == 0.25


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "The bike-room lock changes – on 3 May – at noon.",
        "3 May is the day.",
        "The lock costs 5 * 2 euros.",
        "Fewer than 5 < 6 flats.",
        "Flat #3 and 1.5 hours.",
        "Write to a_b@example.org.",
        "The total is 10.50 (ten and a half).",
    ],
)
def test_dashes_numbers_and_signs_in_a_sentence_are_no_markup(answer: str) -> None:
    assert _factor(answer, "plain") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I cannot help with that.",
        "I am unable to answer.",
        "I'm not able to say.",
        "I cannot provide that.",
        "Unfortunately I can't assist with this.",
        "As an AI I have no access.",
        "I am a language model.",
    ],
)
def test_a_refusal_scores_zero(answer: str) -> None:
    assert _factor(answer, "answered") == 0.0
    assert _scored(answer + " Go to the laundry.", [["laundry"]]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "Mr Novak cannot come on 3 May.",
        "I cannot come on Monday, so please leave the key.",
        "The shop is unable to deliver.",
        "He is sorry for the noise.",
        "I'm sorry that the parcel came late, and I am unable to come on Friday.",
    ],
)
def test_saying_that_something_is_impossible_is_no_refusal(answer: str) -> None:
    assert _factor(answer, "answered") == 1.0


# ---- grounded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "unknown"),
    [
        (GOOD, []),
        ("The lock is new on 4 May.", ["4"]),
        ("The lock is new on 3 June.", ["June"]),
        ("Ask Mr Nowak.", ["Nowak"]),
        ("Ask Mr Novak's neighbour.", []),
        ("It opens at 17:15.", ["17:15"]),
        ("It costs €10, 10 euros, 10%.", []),
        ("It costs 10.50 euros.", ["10.50"]),
        ("Ask Ida and Leon on Monday.", ["Ida", "Leon", "Monday"]),
        ("Keys and I agree, I'm sure, I'll go.", []),
        ("Berlin opens a sentence. Paris does as well.", []),
    ],
)
def test_numbers_and_names_that_the_text_lacks_are_found(answer: str, unknown: list[str]) -> None:
    assert invented(answer, source=SOURCE) == unknown


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("There are 3 cats.", "There are three cats."),
        ("There are Three cats.", "There are 3 cats."),
        ("It seats 12.", "It seats twelve."),
        ("It costs 1200 euros.", "It costs 1,200 euros."),
        ("It costs 1,200 euros.", "It costs 1200 euros."),
        ("We meet at 7 pm.", "We meet at 7pm."),
        ("We meet at 7 p.m. then.", "We meet at 7 pm."),
        ("They met the Lees.", "They met Lee."),
        ("The “Green” door.", 'The "Green" door.'),
        ("It was Anna's.", "It was Anna’s."),
        ("It was Anna.", "It was Anna's bike."),
        ("It was Anna’s bike.", "It was for Anna."),
        ("It was the Joneses' or the Jones' dog.", "The Jones family and the Joneses."),
    ],
)
def test_the_same_number_or_name_written_otherwise_is_not_invented(answer: str, source: str) -> None:
    assert invented(answer, source=source) == []


def test_a_small_number_in_words_does_not_vouch_for_a_larger_one() -> None:
    assert invented("There are 13 cats.", source="There are three cats.") == ["13"]
    assert invented("There are 30 cats.", source="There are three cats.") == ["30"]


@pytest.mark.parametrize(("answer", "factor"), [(GOOD, 1.0), ("Ask Ida.", 0.5), ("Ask Ida or Leon in Rome.", 0.25)])
def test_each_invention_costs_more(answer: str, factor: float) -> None:
    assert _factor(answer, "grounded") == factor


# ---- own words ------------------------------------------------------------------------------------------------------


def test_a_short_extract_is_not_a_copy() -> None:
    assert not copied("The cellar bike room gets a new lock on 3 May.", source=SOURCE)


def test_a_long_answer_in_other_words_is_not_a_copy() -> None:
    words = SOURCE.split()
    assert not copied(" ".join(reversed(words)), source=SOURCE)


def test_most_of_a_text_is_a_copy() -> None:
    words = SOURCE.split()
    assert copied(" ".join(words[: int(0.8 * len(words))]), source=SOURCE)
    assert not copied(" ".join(words[: int(0.6 * len(words))]), source=SOURCE)


def test_a_source_of_a_few_words_cannot_be_copied() -> None:
    assert not copied("The shop is closed on Monday.", source="The shop is closed on Monday.")


# ---- facts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "recall"),
    [
        ("In the laundry for ten euros on May 3.", 1.0),
        ("IN THE LAUNDRY, for 10 euros!", 2 / 3),
        ("In the laundry-room.", 1 / 3),
        ("In the laundrymat for 110 euros on 13 May.", 0.0),
        ("for 10\neuros", 1 / 3),
        ("", 0.0),
    ],
)
def test_facts_count_as_whole_words_in_any_of_their_wordings(answer: str, recall: float) -> None:
    close(fact_recall(answer, FACTS), recall)


@pytest.mark.parametrize("wrong", [[], "21 March", ["21 March"], [[]], [["21 March", 21]], [[""]], None])
def test_facts_of_another_form_are_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="'facts' must be a list of facts, each a list of wordings; it is "):
        facts([[]], ["Anything."], [{"facts": wrong}])


def test_a_row_without_facts_is_an_error_that_names_the_column() -> None:
    with pytest.raises(KeyError, match="facts"):
        facts([[]], ["Anything."], [{}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 7:30 A.M., “sharp”!", "it's 7:30 am sharp"),
        ("1,200.50 € – 10%", "1200.50 € 10"),
        ("£5, $6 and €7", "5 6 and 7"),
        ("e-mail: a.b@c.de", "e mail a b@c de"),
        ("'quoted' text...", "quoted text"),
        ("  many\n blanks ", "many blanks"),
    ],
)
def test_normalising_keeps_words_times_and_decimals(text: str, expected: str) -> None:
    assert normalise(text) == expected

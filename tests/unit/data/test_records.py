"""What a stage's record holds of a row: references, labels, scores, choices; and what a misspelt column is told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.core.errors import DataError
from alignment.data.fields import Fields, SetAside
from alignment.data.formats import FORMATS, detect
from alignment.data.reading import read_records, right_form
from alignment.data.records import HeldOutPrompt, LabelledAnswer, PreferencePair, Prompt, Question
from alignment.data.source_files import locate
from alignment.data.turns import Message
from alignment.stages.registry import kinds

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4."}
ASKED = (Message(role="user", content="2 + 2?"),)
RANKED = [{"text": "5.", "rank": 2}, {"text": "4.", "rank": 1}]
PAIR = {"messages": [USER], "chosen": "4.", "rejected": "5."}
THOUGHT_AND_ANSWER = "<think>\n2 and 2.\n</think>\n\n4."


def _made(record: Any, row: Any, form: str = "messages") -> Any:
    (made,) = record.of(FORMATS[form].read(Fields(row, where="x:1", example="")))
    return made


@pytest.mark.parametrize(
    ("last", "more", "reference"),
    [
        ([ANSWER], {}, "4."),
        ([ANSWER | {"reasoning_content": "2 and 2."}], {}, THOUGHT_AND_ANSWER),
        ([ANSWER | {"content": THOUGHT_AND_ANSWER}], {}, THOUGHT_AND_ANSWER),
        ([{**ANSWER, "content": "", "thinking": "Add.", "tool_calls": [{"name": "add"}]}], {}, ""),
        ([ANSWER], {"reference": "Four."}, "Four."),
        ([], {"reference": 4.0}, "4"),
        ([], {"reference": 4.5}, "4.5"),
        ([], {"reference": 1234567890123456.0}, "1234567890123456"),
        ([], {"reference": -0.0}, "0"),
        ([], {"reference": 1e16}, "1e+16"),
        ([], {"reference": 10**400}, str(10**400)),
        ([], {"reference": None}, ""),
        ([], {"reference": math.nan}, ""),  # as pandas writes an absent text
        ([], {"reference": ["4.", "Four."]}, ""),  # for metrics that take the best of several
        ([], {}, ""),
        ([ANSWER], {"label": True}, "4."),
        ([ANSWER], {"label": False}, ""),  # a bad answer is no reference
        ([ANSWER], {"label": False, "reference": "Four."}, "Four."),
    ],
)
def test_a_held_out_prompt_may_have_a_reference_in_a_column_or_as_its_last_turn(
    last: list[Any], more: dict[str, Any], reference: str
) -> None:
    prompt = _made(HeldOutPrompt, {"messages": [USER, *last], **more}, "kto" if "label" in more else "messages")
    assert (prompt.messages, prompt.reference) == (ASKED, reference)


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("kto", {"prompt": "2 + 2?", "completion": "4.", "label": True}, [("4.", True)]),
        ("kto", {"messages": [USER, ANSWER], "label": "false"}, [("4.", False)]),
        ("kto", {"prompt": [USER], "completion": [ANSWER], "label": True}, [("4.", True)]),  # TRL's conversations
        ("kto", {"prompt": "2 + 2?", "completion": ANSWER, "label": False}, [("4.", False)]),
        ("kto", {"messages": [USER], "completion": "4.", "label": 1}, [("4.", True)]),
        ("preference", PAIR, [("4.", True), ("5.", False)]),
        ("ranked", {"prompt": "2 + 2?", "completions": RANKED}, [("4.", True), ("5.", False)]),
    ],
)
def test_a_labelled_answer_is_read_from_a_label_or_from_a_pair(
    form: str, row: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    records = list(LabelledAnswer.of(FORMATS[form].read(Fields(row, where="x:1", example=""))))
    assert [(record.answer, record.desirable) for record in records] == expected
    assert {(record.messages, record.where) for record in records} == {(ASKED, "x:1")}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected", "margin"),
    [(9, 2.5, (9.0, 2.5), 6.5), (-1, -1, (-1.0, -1.0), 0.0), ("9", " 2.5 ", (9.0, 2.5), 6.5)],  # text is as in CSV
)
def test_a_pair_holds_the_scores_of_its_row(chosen: Any, rejected: Any, expected: Any, margin: float) -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": chosen, "rejected_score": rejected}, "preference")
    assert (pair.scores, pair.margin()) == (expected, margin)


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"chosen_score": 9},
        {"chosen_score": "nan", "rejected_score": "1"},
        {"chosen_score": "", "rejected_score": "1"},
        {"chosen_score": True, "rejected_score": 0},
        {"chosen_score": 1e308, "rejected_score": -1e308},
        {"chosen_score": 1, "rejected_score": math.inf},
    ],
)
def test_a_pair_without_two_finite_numbers_has_no_scores_and_no_margin(scores: dict[str, Any]) -> None:
    pair = _made(PreferencePair, PAIR | scores, "preference")
    assert pair.scores is None
    with pytest.raises(DataError, match="'rejected_score'") as caught:
        pair.margin()
    assert caught.value.where == "x:1"


@pytest.mark.parametrize(("answer", "right"), [("4", 1), (" 4", 1), (1, 1), (0, 0)])
def test_the_answer_to_a_question_is_one_of_its_choices_or_the_index_of_one(answer: Any, right: int) -> None:
    row = {"id": 7, "task": "sums", "question": "2 + 2?", "choices": ["3", "4 ", "5"], "answer": answer}
    question = Question(messages=ASKED, choices=("3", "4", "5"), right=right, id="7", task="sums")
    assert _made(Question, row, "choices") == question


def test_a_ranked_row_with_one_best_answer_is_a_question() -> None:
    completions = [{"text": "3", "score": 1}, {"text": "4", "score": 9}, {"text": "5", "score": 1}]
    assert _made(Question, {"prompt": "2 + 2?", "completions": completions}, "ranked").right == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [("sft", "conversations"), ("reward", "preferences"), ("ppo", "preferences"), ("evaluate", "heldout")],
)
def test_every_shipped_row_fits_the_stages_that_read_it(kind: str, name: str) -> None:
    record = kinds()[kind].data(kinds()[kind].config())[0].record
    rows = read_records(locate(f"bundled:quickstart/{name}"), record, DataConfig(source=""))
    assert len({row.id for row in rows}) == len(rows) >= 100


# ---- rows that give no record ---------------------------------------------------------------------------------------


def _graded(**answers: float) -> dict[str, Any]:
    return {"prompt": "?", "completions": [{"text": text, "score": score} for text, score in answers.items()]}


CHOICES = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "4"}
NO_RECORD: list[tuple[Any, str, Any, str]] = [
    (PreferencePair, "preference", PAIR | {"rejected": None}, "'rejected' must be text"),
    (PreferencePair, "preference", PAIR | {"rejected": " 4."}, "'rejected' is the same as 'chosen'"),
    (PreferencePair, "preference", PAIR | {"messages": [USER, ANSWER]}, "'messages' must end with a user turn"),
    (PreferencePair, "preference", {"prompt": None, "chosen": "4.", "rejected": "5."}, "'prompt' is null"),
    (Prompt, "messages", {"messages": [ANSWER]}, "'messages' must end with a user turn"),
    (LabelledAnswer, "messages", {"messages": [USER, ANSWER]}, "'label' is missing"),
    (LabelledAnswer, "ranked", _graded(a=1, b=2, c=3), "'label' is missing: the row has 3 answers"),
    (LabelledAnswer, "kto", {"messages": [USER], "label": True}, "'completion' is missing"),
    (LabelledAnswer, "preference", PAIR | {"rejected": "4. "}, "'rejected' is the same as 'chosen'"),
    (LabelledAnswer, "ranked", _graded(a=1, b=1), "same rank"),
    (LabelledAnswer, "text", {"text": "2 + 2 is 4."}, "plain text"),
    (Question, "messages", {"messages": [USER]}, "'choices' is missing"),
    (Question, "choices", CHOICES | {"answer": "6"}, "'answer' is '6'"),
    (Question, "choices", CHOICES | {"answer": 3}, "'answer' is 3"),
    (Question, "choices", CHOICES | {"answer": "-1"}, "'answer' is '-1'"),
    (Question, "choices", CHOICES | {"answer": -1}, "'answer' is -1"),
    (Question, "choices", CHOICES | {"answer": True}, "'answer' must be text"),
    (Question, "choices", CHOICES | {"choices": ["4", "4 ", "5"]}, "'choices' contains '4' twice"),
    (Question, "choices", CHOICES | {"choices": ["4"]}, "'choices' has fewer than two"),
    (Question, "choices", CHOICES | {"choices": []}, "'choices' must be a list and not empty"),
    (Question, "choices", CHOICES | {"choices": ["4", ""]}, "'choices[1]'"),
    (Question, "ranked", _graded(a=9, b=9), "'choices' has several best answers"),
    *(
        (PreferencePair, "votes", {"prompt": "2 + 2?", "answers": answers, "preferred": "dpo"}, "'answers' must map")
        for answers in (None, ["4.", "5."], {"dpo": "4."}, {"dpo": "4.", "sft": "5.", "base": "6."})
    ),
]


@pytest.mark.parametrize(("record", "form", "row", "message"), NO_RECORD)
def test_a_row_without_a_record_is_named_by_its_field(record: Any, form: str, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(record.of(FORMATS[form].read(Fields(row, where="x:1", example=right_form(FORMATS[form], record)))))
    assert caught.value.where == "x:1"
    assert message in caught.value.message
    assert isinstance(caught.value, SetAside) or caught.value.remedy


MISSPELT: list[tuple[Any, str, Any, str, str]] = [
    (
        PreferencePair,
        "preference",
        {"prompt": "a", "choosen": "4.", "rejected": "5."},
        "'chosen' is missing",
        "choosen",
    ),
    (PreferencePair, "preference", {"promt": "a", "chosen": "4.", "rejected": "5."}, "'messages' is missing", "promt"),
    (PreferencePair, "prompt", {"prompt": "a", "choosen": "4.", "rejected": "5."}, "", "{chosen: choosen}"),
    (LabelledAnswer, "prompt_completion", {"prompt": "a", "completion": "4.", "labell": True}, "", "{label: labell}"),
]


@pytest.mark.parametrize(("record", "form", "row", "message", "word"), MISSPELT)
def test_a_misspelt_column_is_named(record: Any, form: str, row: Any, message: str, word: str) -> None:
    with pytest.raises(DataError) as caught:
        list(record.of(FORMATS[form].read(Fields(row, where="x:1", example=""))))
    assert caught.value.message.startswith(message)
    assert word in f"{caught.value.message} {caught.value.remedy}"


@pytest.mark.parametrize(
    ("row", "field"),
    [({"prompt": 3, "chosen": "4.", "rejected": "5."}, "prompt"), ({"chosen": "4.", "rejected": "5."}, "chosen")],
)
def test_rows_that_fit_no_format_are_held_against_the_one_with_most_of_their_columns(row: Any, field: str) -> None:
    with pytest.raises(DataError) as caught:
        detect([row], where="x").read(Fields(row, where="x:1", example=""))
    assert caught.value.message.startswith(f"'{field}'")


def test_scores_that_contradict_a_preference_give_no_margin() -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": 1, "rejected_score": 2}, "preference")
    with pytest.raises(DataError, match=r"x:1: .*scores 1, less than the rejected one with 2"):
        pair.margin()

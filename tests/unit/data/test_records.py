"""A row becomes a record or an error with file and line, the field, and a row of the right form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.core.errors import DataError
from alignment.data.bundled_files import locate
from alignment.data.fields import Fields
from alignment.data.formats import FORMATS, detect
from alignment.data.reading import read_records, right_form
from alignment.data.records import Conversation, HeldOutPrompt, LabelledAnswer, PreferencePair, Prompt, Question
from alignment.data.row_files import NotUtf8, RawRow, rows_of
from alignment.data.turns import Message
from alignment.stages.registry import kinds

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4."}
ALL = DataConfig(source="")
THOUGHT_AND_ANSWER = "<think>\n2 and 2.\n</think>\n\n4."
RECORD_TYPES = [Conversation, PreferencePair, Prompt, HeldOutPrompt]


def _made(record: Any, row: Any, where: str = "x:1") -> Any:
    form = FORMATS["preference" if record is PreferencePair else "messages"]
    (made,) = record.of(form.read(Fields(row, where=where, example=right_form(form, record))))
    return made


@pytest.mark.parametrize("record", RECORD_TYPES)
def test_the_example_in_an_error_is_itself_a_right_row(record: Any) -> None:
    assert _made(record, json.loads(record.EXAMPLE)).messages


WRONG = [
    (
        Conversation,
        {},
        "'messages' is missing; the row has no fields",
    ),
    (
        Conversation,
        {"dialogue": []},
        "'messages' is missing; the row has 'dialogue'",
    ),
    (Conversation, [], "a row must be a JSON object; this one is []"),
    (Conversation, {"messages": []}, "'messages' must be a list of turns and not empty; it is []"),
    (Conversation, {"messages": [USER]}, "'messages' must end with an assistant turn; the last one's role is 'user'"),
    (
        Conversation,
        {"messages": [{"role": "human", "content": "x"}]},
        "'messages[0].role' must be one of system, user, assistant, tool; it is 'human'",
    ),
    (
        Conversation,
        {"messages": [{"role": "user", "content": " "}]},
        "'messages[0].content' must be text and not empty; it is ' '",
    ),
    (
        Conversation,
        {"messages": [USER, {"role": "system", "content": "x"}, ANSWER]},
        "'messages[1].role' is 'system'; only the first turn may be",
    ),
    (PreferencePair, {"messages": [USER], "chosen": "4."}, "'rejected' is missing; the row has 'messages', 'chosen'"),
    (
        PreferencePair,
        {"messages": [USER], "chosen": "4.", "rejected": None},
        "'rejected' must be text and not empty; it is None",
    ),
    (
        PreferencePair,
        {"messages": [USER], "chosen": "4.", "rejected": " 4."},
        "'rejected' is the same as 'chosen', so there is no preference",
    ),
    (
        PreferencePair,
        {"messages": [USER, ANSWER], "chosen": "4.", "rejected": "5."},
        "'messages' must end with a user turn; the last one's role is 'assistant'",
    ),
    (Prompt, {"messages": [ANSWER]}, "'messages' must end with a user turn; the last one's role is missing"),
    (Question, {"messages": [USER]}, "'choices' is missing: the row does not have two answers to choose from"),
]


@pytest.mark.parametrize(("record", "row", "message"), WRONG, ids=[text[:40] for *_, text in WRONG])
def test_a_wrong_row_is_named_exactly(record: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _made(record, row, where="rows.jsonl:7")
    form = FORMATS["preference" if record is PreferencePair else "messages"]
    assert str(caught.value) == f"rows.jsonl:7: {message}\n  → a row of the right form: {right_form(form, record)}"


def test_a_prompt_drops_the_answer_that_a_row_ends_with() -> None:
    prompt = _made(Prompt, {"messages": [USER, ANSWER]})
    assert prompt.messages == (Message(role="user", content="2 + 2?"),)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": [USER, ANSWER]}, "4."),
        ({"messages": [USER, ANSWER | {"reasoning_content": "2 and 2."}]}, THOUGHT_AND_ANSWER),
        ({"messages": [USER, ANSWER | {"content": THOUGHT_AND_ANSWER}]}, THOUGHT_AND_ANSWER),
        ({"messages": [USER, {**ANSWER, "content": "", "thinking": "Add.", "tool_calls": [{"name": "add"}]}]}, ""),
        ({"messages": [USER, ANSWER], "reference": "Four."}, "Four."),
        ({"messages": [USER], "reference": "Four."}, "Four."),
        ({"messages": [USER], "reference": 4}, "4"),
        ({"messages": [USER], "reference": 4.0}, "4"),
        ({"messages": [USER], "reference": 4.5}, "4.5"),
        ({"messages": [USER], "reference": 1234567890123456.0}, "1234567890123456"),
        ({"messages": [USER], "reference": -0.0}, "0"),
        ({"messages": [USER], "reference": 1e16}, "1e+16"),
        ({"messages": [USER], "reference": 10**400}, str(10**400)),
        ({"messages": [USER], "reference": None}, ""),
        ({"messages": [USER], "reference": math.nan}, ""),  # as pandas writes an absent text
        ({"messages": [USER], "reference": ["4.", "Four."]}, ""),  # for metrics that take the best of several
        ({"messages": [USER]}, ""),
    ],
)
def test_a_held_out_prompt_may_have_a_reference_in_a_column_or_as_its_last_turn(
    row: dict[str, Any], reference: str
) -> None:
    prompt = _made(HeldOutPrompt, row)
    assert prompt.messages == (Message(role="user", content="2 + 2?"),)
    assert prompt.reference == reference


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("preference", {"messages": [USER], "chosen": "4.", "rejected": "5."}),
        ("ranked", {"prompt": "2 + 2?", "completions": [{"text": "4.", "rank": 1}, {"text": "5.", "rank": 2}]}),
        ("votes", {"prompt": "2 + 2?", "answers": {"dpo": "4.", "sft": "5."}, "preferred": "dpo"}),
    ],
)
def test_answers_that_people_ranked_are_no_choices(form: str, row: dict[str, Any]) -> None:
    """The better one always stands first, so a policy that only likes the first letter would choose right."""
    (prompt,) = HeldOutPrompt.of(FORMATS[form].read(Fields(row, where="x:1", example="")))
    assert (prompt.choices, prompt.right) == ((), None)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [({"label": True}, "4."), ({"label": False}, ""), ({"label": False, "reference": "Four."}, "Four.")],
)
def test_an_answer_that_is_labelled_as_bad_is_no_reference(changes: dict[str, Any], reference: str) -> None:
    row = {"messages": [USER, ANSWER], **changes}
    (prompt,) = HeldOutPrompt.of(FORMATS["kto"].read(Fields(row, where="x:1", example="")))
    assert prompt.reference == reference
    assert prompt.messages == (Message(role="user", content="2 + 2?"),)


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("kto", {"prompt": "2 + 2?", "completion": "4.", "label": True}, [("4.", True)]),
        ("kto", {"prompt": "2 + 2?", "completion": "5.", "label": False}, [("5.", False)]),
        ("kto", {"messages": [USER, ANSWER], "label": "false"}, [("4.", False)]),
        ("kto", {"prompt": [USER], "completion": [ANSWER], "label": True}, [("4.", True)]),  # TRL's conversations
        ("kto", {"prompt": "2 + 2?", "completion": ANSWER, "label": False}, [("4.", False)]),
        ("kto", {"messages": [USER], "completion": "4.", "label": 1}, [("4.", True)]),
        ("preference", {"messages": [USER], "chosen": "4.", "rejected": "5."}, [("4.", True), ("5.", False)]),
        (
            "ranked",
            {"prompt": "2 + 2?", "completions": [{"text": "5.", "rank": 2}, {"text": "4.", "rank": 1}]},
            [("4.", True), ("5.", False)],
        ),
    ],
)
def test_a_labelled_answer_is_read_from_a_label_or_from_a_pair(
    form: str, row: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    records = list(LabelledAnswer.of(FORMATS[form].read(Fields(row, where="x:1", example=""))))
    assert [(record.answer, record.desirable) for record in records] == expected
    assert {record.messages for record in records} == {(Message(role="user", content="2 + 2?"),)}
    assert {record.where for record in records} == {"x:1"}


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("messages", {"messages": [USER, ANSWER]}, "'label' is missing: the row has no label"),
        (
            "ranked",
            {"prompt": "?", "completions": [{"text": str(rank), "rank": rank} for rank in range(3)]},
            "'label' is missing: the row has 3 answers of different rank",
        ),
        ("kto", {"messages": [USER], "label": True}, "'completion' is missing: the row has a label, but no answer"),
        ("preference", {"messages": [USER], "chosen": "4.", "rejected": "4. "}, "'rejected' is the same as 'chosen'"),
        (
            "ranked",
            {"prompt": "?", "completions": [{"text": "4.", "rank": 1}, {"text": "5.", "rank": 1}]},
            "'answers' all have the same rank",
        ),
        ("text", {"text": "2 + 2 is 4."}, "is plain text, without a prompt or an answer"),
    ],
)
def test_a_row_that_does_not_label_an_answer_is_refused(form: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(LabelledAnswer.of(FORMATS[form].read(Fields(row, where="x:1", example=LabelledAnswer.EXAMPLE))))


PAIR = {"messages": [USER], "chosen": "4.", "rejected": "5."}


@pytest.mark.parametrize(
    ("scores", "expected", "margin"),
    [
        ({"chosen_score": 9, "rejected_score": 2.5}, (9.0, 2.5), 6.5),
        ({"chosen_score": -1, "rejected_score": -1}, (-1.0, -1.0), 0.0),
        ({"chosen_score": "9", "rejected_score": " 2.5 "}, (9.0, 2.5), 6.5),  # as in CSV
    ],
)
def test_a_pair_holds_the_scores_of_its_row(
    scores: dict[str, Any], expected: tuple[float, float], margin: float
) -> None:
    pair = _made(PreferencePair, PAIR | scores)
    assert pair.scores == expected
    assert pair.margin() == margin


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"chosen_score": 9},
        {"chosen_score": "nine", "rejected_score": 1},
        {"chosen_score": "nan", "rejected_score": "1"},
        {"chosen_score": "", "rejected_score": "1"},
        {"chosen_score": True, "rejected_score": 0},
        {"chosen_score": 1e308, "rejected_score": -1e308},
    ],
)
def test_a_pair_without_two_numbers_has_no_scores_and_no_margin(scores: dict[str, Any]) -> None:
    pair = _made(PreferencePair, PAIR | scores)
    assert pair.scores is None
    with pytest.raises(DataError) as caught:
        pair.margin()
    assert str(caught.value).startswith("x:1: the row has no numbers in 'chosen_score' and 'rejected_score'")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_named_where_a_margin_is_learned(score: float) -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": 1, "rejected_score": score})
    with pytest.raises(DataError) as caught:
        pair.margin()
    assert caught.value.where == "x:1"
    assert "'rejected_score'" in caught.value.message
    assert str(score) in caught.value.message


def test_scores_that_contradict_a_preference_give_no_margin() -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": 1, "rejected_score": 2})
    with pytest.raises(DataError, match="x:1: the chosen answer scores 1, less than the rejected one with 2"):
        pair.margin()


def test_pairs_of_graded_answers_have_their_scores_and_those_of_ranked_ones_none() -> None:
    def pairs(name: str, *values: float) -> list[Any]:
        completions = [{"text": f"answer {number}", name: value} for number, value in enumerate(values)]
        row = {"prompt": "2 + 2?", "completions": completions}
        return list(PreferencePair.of(FORMATS["ranked"].read(Fields(row, where="x:1", example=""))))

    assert [pair.scores for pair in pairs("rating", 1, 5, 3)] == [(5.0, 1.0), (3.0, 1.0), (5.0, 3.0)]
    assert [pair.scores for pair in pairs("rank", 1, 2)] == [None]


@pytest.mark.parametrize("answers", [None, ["4.", "5."], {"dpo": "4."}, {"dpo": "4.", "sft": "5.", "base": "6."}])
def test_a_vote_that_is_not_on_two_answers_is_refused(answers: Any) -> None:
    row = {"prompt": "2 + 2?", "answers": answers, "preferred": "dpo"}
    with pytest.raises(DataError, match="'answers' must map the names of two arms to their answers; it is "):
        FORMATS["votes"].read(Fields(row, where="x:1", example=""))


def test_rows_are_read_in_order_up_to_the_limit_and_blank_lines_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"id": str(number), "messages": [USER, ANSWER]}) for number in range(4)]
    file.write_text("\n\n".join(rows))
    assert [row.id for row in read_records(file, Conversation, ALL)] == ["0", "1", "2", "3"]
    assert [row.id for row in read_records(file, Conversation, DataConfig(source="", limit=2))] == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "rows.jsonl:1: not JSON: "),
        (b'{"a": "1\n', "rows.jsonl:1: not JSON: Unterminated string starting at column 7"),
        (b'{"a": "1\t"}', "rows.jsonl:1: not JSON: Invalid control character at column 9"),
        (b'\n\n{"a": "\xff"}', "rows.jsonl:3: not UTF-8: "),
        (b"[" * 100_000, "rows.jsonl:1: not JSON: "),
        (b"\n \n", "rows.jsonl: contains no rows"),
    ],
)
def test_a_file_that_does_not_parse_is_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, ALL)
    assert message in str(caught.value)


def _lines_read(file: Path, content: bytes) -> list[RawRow | DataError]:
    file.write_bytes(content)
    return list(rows_of(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1\n', "not JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": 1, b}\r\n', "not JSON: Expecting property name enclosed in double quotes at column 10"),
    ],
)
def test_a_line_that_is_not_json_has_one_line_number(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    *_, error = _lines_read(file, b"{}\n{}\n{}\n" + line)
    assert isinstance(error, DataError)
    assert (error.where, error.message) == (f"{file}:4", message)


def test_a_json_document_names_the_line_of_its_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[\n{"a": 1},\n{"a": }\n]\n')
    with pytest.raises(DataError) as caught:
        list(rows_of(file))
    assert str(caught.value).startswith(f"{file}:3: not JSON: Expecting value at column 7\n")


def test_a_byte_that_is_not_utf_8_is_named_with_its_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first, error = _lines_read(file, '{"a": "größer"}\n'.encode() + '{"a": "größer"}\n'.encode("latin-1"))
    assert isinstance(first, RawRow)
    assert isinstance(error, NotUtf8)
    assert (error.where, error.message) == (f"{file}:2", "not UTF-8: byte 0xf6 at column 10 ('ö' in Latin-1)")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_of_another_unicode_encoding_is_recognised(tmp_path: Path, name: str, encoding: str) -> None:
    file = tmp_path / name
    file.write_bytes('{"a": "b"}\n'.encode(encoding))
    with pytest.raises(DataError) as caught:
        list(rows_of(file))
    name = encoding.upper()
    assert str(caught.value) == (
        f"{file}: is {name}, not UTF-8\n  → convert it: iconv -f {name} -t UTF-8 {file} > NEW_FILE"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, "chosen": "4.", "rejected": "5."}, "'prompt' is null"),
        (
            {"prompt": "2 + 2?", "choosen": "4.", "rejected": "5."},
            "'chosen' is missing; the row has 'prompt', 'choosen', 'rejected'; did you mean 'chosen' by 'choosen'?",
        ),
        (
            {"promt": "2 + 2?", "chosen": "4.", "rejected": "5."},
            "'messages' is missing, and so are 'prompt', 'conversations', 'instruction', 'question'; "
            "the row has 'promt', 'chosen', 'rejected'; did you mean 'prompt' by 'promt'?",
        ),
    ],
)
def test_a_null_and_a_misspelt_column_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        FORMATS["preference"].read(Fields(row, where="x:1", example=""))
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("record", "row", "columns"),
    [
        (PreferencePair, {"prompt": "2 + 2?", "choosen": "4.", "rejected": "5."}, "{chosen: choosen}"),
        (LabelledAnswer, {"prompt": "2 + 2?", "completion": "4.", "labell": True}, "{label: labell}"),
    ],
)
def test_a_misspelt_column_is_named_where_rows_are_read_as_another_format(
    record: type[Any], row: dict[str, Any], columns: str
) -> None:
    form = FORMATS["prompt" if record is PreferencePair else "prompt_completion"]
    with pytest.raises(DataError) as caught:
        list(record.of(form.read(Fields(row, where="x:1", example=""))))
    assert columns in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "field"),
    [({"prompt": 3, "chosen": "4.", "rejected": "5."}, "prompt"), ({"chosen": "4.", "rejected": "5."}, "chosen")],
)
def test_rows_that_fit_no_format_are_held_against_the_one_with_most_of_their_columns(
    row: dict[str, Any], field: str
) -> None:
    with pytest.raises(DataError) as caught:
        detect([row], where="x").read(Fields(row, where="x:1", example=""))
    assert caught.value.message.startswith(f"'{field}'")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("sft", "conversations"), ("reward", "preferences"), ("ppo", "preferences"), ("evaluate", "heldout")],
)
def test_every_shipped_row_fits_the_stages_that_read_it(kind: str, name: str) -> None:
    rows = read_records(locate(f"bundled:quickstart/{name}"), kinds()[kind].data(kinds()[kind].config())[0].record, ALL)
    assert len(rows) >= 100
    assert len({row.id for row in rows}) == len(rows)


def test_a_prompt_carries_its_row_and_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [USER, ANSWER], "answer": "#### 4", "nested": {"a": [1]}}
    file.write_text("\n" + json.dumps(row) + "\n")
    (prompt,) = read_records(file, Prompt, ALL)
    assert prompt.row == row
    assert prompt.where == f"{file}:2"
    assert prompt == Prompt(messages=(Message(role="user", content="2 + 2?"),)), "the row is no part of what it is"


CHOICES = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "4"}


@pytest.mark.parametrize(("answer", "right"), [("4", 1), (" 4", 1), (1, 1), (0, 0)])
def test_the_answer_to_a_question_is_one_of_its_choices_or_the_place_of_one(answer: Any, right: int) -> None:
    row = {"id": 7, "task": "sums", "question": "2 + 2?", "choices": ["3", "4 ", "5"], "answer": answer}
    assert _question(row) == Question(
        messages=(Message(role="user", content="2 + 2?"),), choices=("3", "4", "5"), right=right, id="7", task="sums"
    )


def test_a_ranked_row_with_one_best_answer_is_a_question() -> None:
    completions = [{"text": "3", "score": 1}, {"text": "4", "score": 9}, {"text": "5", "score": 1}]
    assert _question({"prompt": "2 + 2?", "completions": completions}).right == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "6"}, "'answer' is '6', which is not one of the choices: '3', '4', '5'"),
        ({"answer": 3}, "'answer' is 3, but the indices of 3 choices are 0 to 2"),
        ({"answer": True}, "'answer' must be text and not empty; it is True"),
        ({"choices": ["4", "4 ", "5"]}, "'choices' contains '4' twice; all must be different"),
        ({"choices": ["4"]}, "'choices' has fewer than two answers to choose from"),
        ({"choices": []}, "'choices' must be a list and not empty; it is []"),
        ({"choices": ["4", ""]}, "'choices[1]' must be text and not empty; it is ''"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_exactly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        _question(CHOICES | changes)
    assert str(caught.value) == f"rows.jsonl:7: {message}\n  → a row of the right form: {FORMATS['choices'].row}"


def test_a_question_with_two_best_answers_is_refused() -> None:
    completions = [{"text": "4", "score": 9}, {"text": "four", "score": 9}]
    with pytest.raises(DataError, match="'choices' has several best answers; it must have exactly one"):
        _question({"prompt": "2 + 2?", "completions": completions})


def _question(row: dict[str, Any]) -> Question:
    form = FORMATS["ranked" if "completions" in row else "choices"]
    fields = Fields(row, where="rows.jsonl:7", example=right_form(form, Question))
    (question,) = Question.of(form.read(fields))
    return question

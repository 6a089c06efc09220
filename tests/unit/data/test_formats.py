"""Rows of every public format become the records that a stage wants, or an error that names the field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.config.data import DataConfig
from alignment.core.errors import DataError
from alignment.data.fields import Fields, SetAside
from alignment.data.formats import FORMATS, detect, format_of
from alignment.data.reading import Reading, iterate, read_records, start
from alignment.data.records import (
    Conversation,
    HeldOutPrompt,
    LabelledAnswer,
    PlainText,
    PreferencePair,
    Prompt,
    Question,
    Record,
)
from tests.public import PUBLIC, WRITTEN, needs_public_data

ANSWER = {"role": "assistant", "content": "4."}
ASKED = {"role": "user", "content": "2 + 2?"}
GIVES: dict[str, tuple[str | None, int, str | None]] = {
    # the last turn of the conversation, pairs, the prompt
    "hh": ("4.", 1, "2 + 2?"),
    "chosen_rejected": ("4.", 1, "2 + 2?"),
    "preference": ("4.", 1, "2 + 2?"),
    "stack_exchange": ("4.", 1, "2 + 2?"),
    "chosen_messages": ("4.", 1, "2 + 2?"),
    "votes": ("4.", 1, "2 + 2?"),
    "ranked": ("4.", 1, "2 + 2?"),
    "choices": ("4.", 1, "2 + 2?"),
    "kto": ("4.", 0, "2 + 2?"),
    "messages": ("Hello.", 0, "Hi"),
    "sharegpt": ("Hello.", 0, "Hi"),
    "prompt_completion": ("4.", 0, "2 + 2?"),
    "alpaca": ("4.", 0, "Add the numbers.\n\n2 and 2"),
    "question_answer": ("2 and 2 make 4.\n#### 4", 0, "2 + 2?"),
    "turns": (None, 0, "Write a haiku."),
    "prompt": (None, 0, "Summarise: the shop is closed on Monday."),
    "text": (None, 0, None),
}


def _records(record: type[Record], row: Any, name: str | None = None) -> list[Any]:
    form = FORMATS[name] if name else format_of(row)
    assert form is not None
    return list(record.of(form.read(Fields(row, where="rows.jsonl:7", example=form.row))))


def _or_none(record: type[Record], row: Any) -> list[Any]:
    try:
        return _records(record, row)
    except DataError:
        return []


def test_every_format_is_in_the_table() -> None:
    assert set(GIVES) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_row_of_a_format_is_told_from_all_others_and_gives_its_records(name: str) -> None:
    row = json.loads(FORMATS[name].row)
    assert format_of(row) is FORMATS[name]
    last, pairs, asked = GIVES[name]
    assert [conversation.messages[-1].content for conversation in _or_none(Conversation, row)] == (
        [last] if last else []
    )
    assert len(_or_none(PreferencePair, row)) == pairs
    assert [prompt.messages[-1].content for prompt in _or_none(Prompt, row)] == ([asked] if asked else [])
    for pair in _or_none(PreferencePair, row):
        assert (pair.chosen, pair.rejected) == ("4.", "5.")


OTHER_FORMS = {
    "a prompt of turns, answers as text": (
        "preference",
        {"prompt": [ASKED], "chosen": "4.", "rejected": "5."},
    ),
    "answers as turns": (
        "preference",
        {"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5."}]},
    ),
    "ShareGPT pairs": (
        "preference",
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4."},
            "rejected": {"from": "gpt", "value": "5."},
        },
    ),
    "an instruction with two answers": ("preference", {"instruction": "2 + 2?", "chosen": "4.", "rejected": "5."}),
    "UltraFeedback with its prompt again": (
        "chosen_rejected",
        {"prompt": "2 + 2?", "chosen": [ASKED, ANSWER], "rejected": [ASKED, {"role": "assistant", "content": "5."}]},
    ),
    "ranks, 1 is best": (
        "ranked",
        {"prompt": "2 + 2?", "completions": [{"content": "5.", "rank": 2}, {"content": "4.", "rank": 1}]},
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_writings_of_a_pair_are_the_same_pair(name: str) -> None:
    form, row = OTHER_FORMS[name]
    row_format = format_of(row)
    assert row_format is not None
    assert row_format.name == form
    (pair,) = _records(PreferencePair, row)
    assert [turn.as_dict() for turn in pair.messages] == [ASKED]
    assert (pair.chosen, pair.rejected) == ("4.", "5.")


WHOLE_PAIR = {"chosen": [ASKED, ANSWER], "rejected": [ASKED, {**ANSWER, "content": "5."}]}
BRIEF = {"role": "system", "content": "Be brief."}
EARLIER = {"role": "user", "content": "Hi."}
CALCULATOR = {"name": "calculator", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**WHOLE_PAIR, "system": "Be brief."}, [BRIEF, ASKED]),
        ({**WHOLE_PAIR, "system": ""}, [ASKED]),
        ({name: [BRIEF, *turns] for name, turns in WHOLE_PAIR.items()} | {"system": "Be long."}, [BRIEF, ASKED]),
        ({**WHOLE_PAIR, "prompt": [BRIEF, ASKED]}, [ASKED]),  # the whole conversation says what its prompt was
        (
            {"prompt": [EARLIER]} | {name: [ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [EARLIER, ANSWER, ASKED],
        ),
        (
            {"prompt": "Hi.", "system": "Be brief."} | {name: [ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [BRIEF, EARLIER, ANSWER, ASKED],
        ),
        (
            {"prompt": "Hi."} | {name: [BRIEF, ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [BRIEF, EARLIER, ANSWER, ASKED],
        ),
        (
            {"prompt": [ANSWER, ASKED]} | {name: [ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [ANSWER, ASKED],  # the conversations have the prompt already
        ),
        (
            {"prompt": "2 + 2?"} | {name: [BRIEF, ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [BRIEF, ANSWER, ASKED],
        ),
        (
            {"prompt": [EARLIER, ANSWER]} | {name: [ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [ANSWER, ASKED],
        ),
        (
            {"prompt": " "} | {name: [ANSWER, *turns] for name, turns in WHOLE_PAIR.items()},
            [ANSWER, ASKED],
        ),
    ],
)
def test_what_comes_before_two_conversations_is_part_of_their_prompt(
    row: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    (pair,) = _records(PreferencePair, row)
    assert [turn.as_dict() for turn in pair.messages] == expected
    assert (pair.chosen, pair.rejected) == ("4.", "5.")


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", ["chosen_rejected", "hh"])
def test_two_answers_without_a_prompt_are_a_fault_of_their_row(name: str, system: str) -> None:
    answers = ("Assistant: 4.", "Assistant: 5.") if name == "hh" else ([ANSWER], [{**ANSWER, "content": "5."}])
    row = {"chosen": answers[0], "rejected": answers[1], "system": system}
    with pytest.raises(DataError, match="must end with a user turn; the last one's role is missing"):
        _records(PreferencePair, row, name)
    if name == "chosen_rejected":
        (pair,) = _records(PreferencePair, {**row, "prompt": "2 + 2?"}, name)
        assert [turn.as_dict() for turn in pair.messages] == [*([BRIEF] if system else []), ASKED]


@pytest.mark.parametrize("score", [math.nan, math.inf, 10**400], ids=["NaN", "infinite", "too large"])
@pytest.mark.parametrize("record", [PreferencePair, Conversation, LabelledAnswer, PlainText, Question])
def test_answers_are_not_compared_by_what_is_no_finite_number(record: Any, score: float) -> None:
    """Any comparison with NaN is false, so either answer would be the better one."""
    row = {"prompt": "?", "completions": [{"text": "a", "score": 1.0}, {"text": "b", "score": score, "rank": 1}]}
    with pytest.raises(DataError, match=r"'completions\[1\]' has a score or rank that is not a finite number"):
        _records(record, row, "ranked")
    (prompt,) = _records(Prompt, row, "ranked")
    assert prompt.messages[0].content == "?"


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"text"}))
def test_every_format_keeps_the_tools_and_the_system_text_of_its_rows(name: str) -> None:
    row = {**json.loads(FORMATS[name].row), "tools": [CALCULATOR], "system": "Be brief."}
    example = FORMATS[name].read(Fields(row, where="x:1", example=""))
    assert [tool["function"]["name"] for tool in example.tools] == ["calculator"]
    assert example.turns[0].as_dict() == BRIEF
    assert [turn.role for turn in example.turns].count("system") == 1


def test_choices_in_another_notation_are_refused_and_not_left_out() -> None:
    """Otherwise the row would be a question without choices, whose answer is their index."""
    with pytest.raises(DataError, match="'choices' must be a list, or JSON of one; it is "):
        _records(Conversation, {"question": "2 + 2?", "choices": "['3', '4']", "answer": "1"})


def test_free_text_that_begins_with_a_bracket_is_no_list_of_choices() -> None:
    row = {"question": "2 + 2?", "choices": "[A] 3 [B] 4", "answer": "B"}
    (conversation,) = _records(Conversation, row)
    assert conversation.messages[-1].content == "B"


@pytest.mark.parametrize(("answer", "right"), [("1", 1), (" 1 ", 1), ("3", 0), (1, 1)])
def test_the_index_of_a_choice_may_be_text_that_is_no_choice_itself(answer: Any, right: int) -> None:
    """As every index of a CSV is."""
    (question,) = _records(Question, {"question": "2 + 2?", "choices": ["3", "4"], "answer": answer})
    assert question.right == right


@pytest.mark.parametrize(("answer", "problem"), [("2", "not one of the choices"), (2, "indices"), (-1, "indices")])
def test_an_index_without_a_choice_is_a_fault(answer: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"'answer' is '?{answer}'?, .*{problem}"):
        _records(Question, {"question": "2 + 2?", "choices": ["3", "4"], "answer": answer})


def test_a_ranked_list_gives_every_pair_of_different_rank_and_its_best_answer() -> None:
    scored = [{"text": text, "score": score} for text, score in (("b", 5), ("a", 9), ("c", 5), ("d", 1))]
    row = {"prompt": "?", "completions": scored}
    pairs = {(pair.chosen, pair.rejected) for pair in _records(PreferencePair, row)}
    assert pairs == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    (conversation,) = _records(Conversation, row)
    assert conversation.messages[-1].content == "a"
    with pytest.raises(SetAside, match="all have the same rank"):
        _records(PreferencePair, {"prompt": "?", "completions": [scored[0], scored[2]]})


def test_a_bad_answer_is_set_aside_where_it_would_be_learned_and_still_a_prompt() -> None:
    row = {"messages": [ASKED, ANSWER], "label": False}
    for record in (Conversation, PlainText):
        with pytest.raises(SetAside, match="'label' says that the answer is bad"):
            _records(record, row)
    (prompt,) = _records(Prompt, row)
    assert [turn.as_dict() for turn in prompt.messages] == [ASKED]
    assert _records(PlainText, row | {"label": True}) == [PlainText(text="2 + 2?\n\n4.")]
    assert _records(Conversation, {"prompt": "?", "completion": "4.", "label": "True"})


@pytest.mark.parametrize("question", [{"prompt": "2 + 2?"}, {"messages": [ASKED]}])
def test_the_text_beside_a_prompt_is_learned_as_text_and_the_prompt_is_asked(question: dict[str, Any]) -> None:
    """Cosmopedia has the prompt that its text was written for."""
    row = question | {"text": "A sum is a number.", "format": "textbook"}
    assert _records(PlainText, row) == [PlainText(text="A sum is a number.")]
    (prompt,) = _records(Prompt, row)
    assert [turn.as_dict() for turn in prompt.messages] == [ASKED]
    assert _records(PlainText, row | {"text": " "}) == [PlainText(text="2 + 2?")]


def test_a_text_beside_an_answer_is_not_learned_twice() -> None:
    """Such a text is often the whole conversation in some template."""
    row = {"prompt": "2 + 2?", "completion": "4.", "text": "Q: 2 + 2? A: 4."}
    assert _records(PlainText, row) == [PlainText(text="2 + 2?\n\n4.")]


@pytest.mark.parametrize("more", [{}, {"prompt": "2 + 2?"}], ids=["alone", "with another column"])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5."}]},  # LLaMA-Factory
        {"conversations": [ASKED, {**ANSWER, "content": "5."}]},
        {"instruction": "2 + 2?", "output": "5."},
        {"question": "2 + 2?", "answer": "5."},
    ],
    ids=["ShareGPT", "turns", "Alpaca", "question and answer"],
)
def test_a_label_counts_in_whatever_columns_its_answer_is(row: dict[str, Any], more: dict[str, Any]) -> None:
    """SFT would otherwise learn the bad answers too."""
    bad = row | more | {"label": False}
    with pytest.raises(SetAside, match="'label' says that the answer is bad"):
        _records(Conversation, bad)
    with pytest.raises(SetAside, match="'label' says that the answer is bad"):
        _records(PlainText, bad)
    (answer,) = _records(LabelledAnswer, bad)
    assert (answer.answer, answer.desirable) == ("5.", False)
    assert [turn.as_dict() for turn in answer.messages] == [ASKED]
    if "conversations" in row:
        with pytest.raises(SetAside, match="'label' says that the answer is bad"):
            _records(Conversation, row | more | {"label": 0})
    (good,) = _records(Conversation, row | more | {"label": "true"})
    assert [turn.content for turn in good.messages] == ["2 + 2?", "5."]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]}, "arithmetic"),
        *(({"instruction": "2 + 2?", "output": "4."}, label) for label in ("arithmetic", 0, "1")),
        *(({"question": "2 + 2?", "answer": "4."}, label) for label in ("arithmetic", 0, "1")),
    ],
)
def test_a_label_that_is_a_class_does_not_judge_the_answer(row: dict[str, Any], label: Any) -> None:
    (conversation,) = _records(Conversation, row | {"label": label})
    assert conversation.messages[-1].content == "4."
    with pytest.raises(DataError, match=r"'label' is not read in this format; .*read the rows with format=kto"):
        _records(LabelledAnswer, row | {"label": label})


@pytest.mark.parametrize(("bad", "is_label"), [(False, True), (0, True), ("0", True), ("no", False)])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]},
        {"instruction": "2 + 2?", "output": "4."},
        {"question": "2 + 2?", "answer": "4."},
        {"prompt": "2 + 2?", "completion": "4."},
    ],
)
def test_a_column_that_is_mapped_to_a_label_is_never_a_class(
    tmp_path: Path, row: dict[str, Any], bad: Any, is_label: bool
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row | {"good": bad}) + "\n" + json.dumps(row | {"good": True}) + "\n")
    data = DataConfig(source="", columns={"label": "good"})
    if is_label:
        assert [answer.desirable for answer in read_records(file, LabelledAnswer, data)] == [False, True]
        assert len(read_records(file, Conversation, data)) == 1
        return
    for record in (LabelledAnswer, Conversation):
        with pytest.raises(DataError, match="'label' must be true or false"):
            read_records(file, record, data)


def test_transcripts_with_an_empty_turn_are_set_aside() -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}
    with pytest.raises(SetAside, match="'chosen' has an empty turn of the Assistant"):
        _records(PreferencePair, row)


def test_pairs_that_answer_different_prompts_are_set_aside() -> None:
    row = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4.", "rejected": "\n\nHuman: 2+2\n\nAssistant: 5."}
    with pytest.raises(SetAside, match="'rejected' differs from 'chosen' before its last turn"):
        _records(PreferencePair, row)


def test_a_transcript_keeps_its_turns_and_its_blank_lines() -> None:
    start = "\n\nHuman: First.\n\nSecond line.\n\nAssistant: Yes.\n\nHuman: Really?\n\nAssistant:"
    (pair,) = _records(PreferencePair, {"chosen": f"{start} Of course.", "rejected": f"{start} No."})
    assert [(turn.role, turn.content) for turn in pair.messages] == [
        ("user", "First.\n\nSecond line."),
        ("assistant", "Yes."),
        ("user", "Really?"),
    ]
    assert (pair.chosen, pair.rejected) == ("Of course.", "No.")


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Add.", "input": "2 and 2", "output": "4."}, "Add.\n\n2 and 2"),
        ({"question": "2 + 2?", "answer": "4."}, "2 + 2?"),
        ({"messages": [ASKED, ANSWER]}, "2 + 2?"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]}, "2 + 2?"),
    ],
)
def test_the_whole_text_of_an_example_in_another_column_is_no_prompt(row: dict[str, Any], question: str) -> None:
    """Some files have the text that was made of a row beside it; the question would contain the answer."""
    whole = row | {"prompt": "Below is a task. ### Task: 2 + 2? ### Output: 4."}
    (conversation,) = _records(Conversation, whole)
    assert [turn.content for turn in conversation.messages] == [question, "4."]
    (prompt,) = _records(Prompt, whole)
    assert [turn.content for turn in prompt.messages] == [question]


def test_a_labelled_answer_that_ends_with_a_tool_call_is_refused() -> None:
    """Its text alone would teach to announce the call and to stop."""
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    turn = {"role": "assistant", "content": "Let me add them.", "tool_calls": calls}
    with pytest.raises(DataError, match="'messages' ends with a tool call, but labelled answers are learned as text"):
        _records(LabelledAnswer, {"messages": [ASKED, turn], "label": True}, "kto")


def test_system_and_history_of_alpaca_go_before_its_instruction() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    (conversation,) = _records(Conversation, row)
    assert [(turn.role, turn.content) for turn in conversation.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_tools_calls_and_their_results_are_kept_in_both_forms() -> None:
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4."},
        ],
        "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
    }
    openai = {
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
            ANSWER,
        ],
        "tools": [TOOL],
    }
    for row, call_id, of_call in ((sharegpt, {}, {}), (openai, {"id": "1"}, {"tool_call_id": "1", "name": "add"})):
        (conversation,) = _records(Conversation, row)
        assert list(conversation.tools) == [TOOL]
        assert [turn.role for turn in conversation.messages] == ["user", "assistant", "tool", "assistant"]
        assert list(conversation.messages[1].tool_calls) == [call_id | CALL]
        assert conversation.messages[2].as_dict() == {"role": "tool", "content": "4"} | of_call


@pytest.mark.parametrize(("value", "text"), [(7, "7"), ("", ""), (None, "")])
def test_the_id_of_a_call_is_text(value: Any, text: str) -> None:
    turn = {"role": "tool", "content": "4", "tool_call_id": value}
    (conversation,) = _records(Conversation, {"messages": [ASKED, turn, ANSWER]})
    assert conversation.messages[1].call_id == text
    with pytest.raises(DataError, match=r"'messages\[1\]\.tool_call_id' must be text; it is \[1\]"):
        _records(Conversation, {"messages": [ASKED, turn | {"tool_call_id": [1]}, ANSWER]})


def test_a_turn_of_weight_0_is_read_and_not_learned() -> None:
    row = {"messages": [ASKED, {**ANSWER, "weight": 0}, ASKED, {**ANSWER, "weight": 1}]}
    (conversation,) = _records(Conversation, row)
    assert [turn.learned for turn in conversation.messages] == [True, False, True, True]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_of_its_own_is_read(field: str) -> None:
    thought = {**ANSWER, field: "Two and two."}
    (conversation,) = _records(
        Conversation, {"messages": [ASKED, thought, {**ASKED, field: "x"}, {**ANSWER, field: None}]}
    )
    assert [turn.thought for turn in conversation.messages] == ["", "Two and two.", "", ""]
    (shared,) = _records(
        Conversation,
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes", field: "Hm."}]},
        "sharegpt",
    )
    assert shared.messages[1].thought == "Hm."
    whole = f"<think>\nTwo and two.\n</think>\n\n{ANSWER['content']}"
    (pair,) = _records(PreferencePair, {"chosen": [ASKED, thought], "rejected": [ASKED, ANSWER]}, "chosen_rejected")
    assert (pair.chosen, pair.rejected) == (whole, ANSWER["content"])
    (labelled,) = _records(LabelledAnswer, {"messages": [ASKED, thought], "label": True}, "kto")
    assert labelled.answer == whole


def _part(kind: str, value: Any) -> list[dict[str, Any]]:
    return [{"type": kind, "value": value}]


def test_a_weight_of_null_counts_as_absent(tmp_path: Path) -> None:
    """Parquet gives every turn every field, so a file with a weight on some turns has null on the others."""
    turns = [ASKED, {**ANSWER, "weight": 0}, ASKED, ANSWER, {**ASKED, "loss_weight": 0}, {**ANSWER, "loss_weight": 1}]
    parquet.write_table(pa.table({"messages": [turns]}), tmp_path / "turns.parquet")
    (record,) = iterate(tmp_path / "turns.parquet", Conversation, DataConfig())
    assert [turn.learned for turn in record.messages if turn.role == "assistant"] == [False, True, True]


def test_the_newest_files_of_llamafactory_are_read_with_their_parts_and_weights() -> None:
    """Two rows as its repository has them: a call is a part, and every turn says whether it is learned."""
    call = '{"name": "add", "arguments": {"a": 2}}'
    row = {
        "messages": [
            {"role": "user", "content": _part("text", "2 + 2?"), "loss_weight": 0.0},
            {"role": "assistant", "content": _part("tool_call", call), "loss_weight": 0.0},
            {"role": "tool", "content": _part("text", "4"), "loss_weight": 0.0},
            {"role": "assistant", "content": [*_part("text", "It is "), *_part("text", "4.")], "loss_weight": 1.0},
        ],
        "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
    }
    (conversation,) = _records(Conversation, row)
    assert [turn.role for turn in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert list(conversation.messages[1].tool_calls) == [CALL]
    assert conversation.messages[3].content == "It is 4."
    assert [turn.learned for turn in conversation.messages if turn.role == "assistant"] == [False, True]
    asked = {"role": "user", "content": _part("text", "2 + 2?"), "loss_weight": 0.0}
    answers = [{"role": "assistant", "content": _part("text", text), "loss_weight": 1.0} for text in ("4.", "5.")]
    (pair,) = _records(
        PreferencePair, {"chosen_messages": [asked, answers[0]], "rejected_messages": [asked, answers[1]]}
    )
    assert [turn.as_dict() for turn in pair.messages] == [ASKED]
    assert (pair.chosen, pair.rejected) == ("4.", "5.")


@pytest.mark.parametrize("column", ["images", "audios", "videos", "image"])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "preference", "text"])
def test_a_row_with_media_is_refused_and_says_what_to_do(name: str, column: str) -> None:
    row = json.loads(FORMATS[name].row)
    assert format_of({**row, column: []}) is FORMATS[name]
    assert _records(PlainText, {**row, column: []}, name) == _records(PlainText, row, name)
    with pytest.raises(DataError, match=f"rows.jsonl:7: '{column}' contains media") as caught:
        _records(PlainText, {**row, column: ["data/1.jpg"]}, name)
    assert f"or remove the column '{column}'" in caught.value.remedy


FAULTS = [
    ("alpaca", {"instruction": "Add.", "output": ""}, "'output' must be text and not empty; it is ''"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "'input' must be text; it is 3"),
    ("alpaca", {"instruction": "a", "output": "b", "history": ["x"]}, "'history[0]' must be a question and an answer"),
    ("kto", {"prompt": "a", "completion": "b", "label": "maybe"}, "'label' must be true or false; it is 'maybe'"),
    ("hh", {"chosen": "Hello", "rejected": "x"}, "'chosen' must be a transcript that begins with 'Human:'"),
    ("ranked", {"prompt": "a", "completions": [{"text": "b"}]}, "'completions[0]' has no number under any of score"),
    ("ranked", {"prompt": "a", "completions": [{"score": 1}]}, "'completions[0]' has no text under any of text"),
    ("ranked", {"prompt": "a", "completions": "b"}, "'completions' must be a list and not empty; it is 'b'"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "'conversations[0].from' must be one of system"),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "'conversations[0].value' must be JSON; it is '{'",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "must have parts that are text or tool calls",
    ),
    ("messages", {"messages": [{**ASKED, "weight": 2}]}, "'messages[0].weight' must be 0 or 1; it is 2"),
    ("messages", {"messages": [{**ANSWER, "loss_weight": 0.5}]}, "'messages[0].loss_weight' must be 0 or 1; it is 0.5"),
    (
        "messages",
        {"messages": [{**ASKED, "loss_weight": 1.0}, ANSWER]},
        "'messages[0].loss_weight' marks a turn of the user to be learned",
    ),
    (
        "chosen_rejected",
        {"chosen": [ASKED, {**ANSWER, "tool_calls": [CALL]}], "rejected": [ASKED, ANSWER]},
        "'chosen' ends with a tool call",
    ),
    (
        "messages",
        {"messages": [ASKED, {**ANSWER, "thinking": ["x"]}]},
        "'messages[1].thinking' must be text; it is ['x']",
    ),
    ("messages", {"messages": [ASKED], "tools": [3]}, "'tools[0]' must be an object with a 'name'; it is 3"),
    ("messages", {"messages": str([ASKED, ANSWER])}, "'messages' must be a list of turns, or JSON of one"),
    (
        "sharegpt",
        {"conversations": str([{"from": "human"}])},
        "'conversations' must be a list of turns, or JSON of one",
    ),
    ("turns", {"turns": [""]}, "'turns[0]' must be text and not empty; it is ''"),
    ("turns", {"turns": ["Hi", " "]}, "'turns[1]' must be text and not empty; it is ' '"),
]


@pytest.mark.parametrize(("name", "row", "message"), FAULTS, ids=[text[:40] for *_, text in FAULTS])
def test_a_fault_is_named_by_the_column_of_the_format(name: str, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _records(Conversation, row, name)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:7: ")


@pytest.mark.parametrize(
    ("reference", "first", "later"),
    [
        (None, "", ("",)),
        ([], "", ("",)),
        ("144", "144", ("",)),
        (["144", "72"], "144", ("72",)),
        (["144", None], "144", ("",)),
    ],
)
def test_an_evaluation_asks_every_turn_and_reads_a_reference_for_each(
    reference: Any, first: str, later: tuple[str, ...]
) -> None:
    row = {"turns": ["12 times 12?", "Half of that?"], "reference": reference}
    (prompt,) = _records(HeldOutPrompt, row)
    assert [turn.content for turn in prompt.messages] == ["12 times 12?"]
    assert prompt.later_turns == ("Half of that?",)
    assert (prompt.reference, prompt.later_references, prompt.num_turns) == (first, later, 2)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (["144"], "'reference' must have an entry for each of the 2 turns; it has 1"),
        (["144", 72], "'reference[1]' must be text; it is 72"),
    ],
)
def test_references_must_fit_the_turns(reference: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _records(HeldOutPrompt, {"turns": ["12 times 12?", "Half of that?"], "reference": reference})
    assert message in str(caught.value)


def test_where_no_row_fits_its_columns_still_tell_what_is_wrong_with_it() -> None:
    assert detect([{"messages": []}, {"messages": 3, "id": 1}], where="x").name == "messages"


def test_most_rows_decide_and_unknown_columns_are_listed() -> None:
    alpaca, pair = json.loads(FORMATS["alpaca"].row), json.loads(FORMATS["preference"].row)
    assert detect([alpaca, pair, alpaca], where="x").name == "alpaca"
    with pytest.raises(DataError) as caught:
        detect([{"q": "a"}, {"r": 1}], where="rows.csv")
    assert "no known format has the columns 'q', 'r'" in str(caught.value)


# file, format, conversations, pairs, prompts; pairs are 0 where rows hold none
OURS = [
    ("transcripts.jsonl", "hh", 2, 2, 2),
    ("pairs.jsonl", "preference", 3, 3, 3),
    ("instructions.json", "alpaca", 3, 0, 3),
    ("system_pairs.json", "preference", 2, 2, 2),
    ("labelled.json", "kto", 2, 0, 4),
    ("toolcalls.json", "sharegpt", 3, 0, 3),
    ("identity.json", "alpaca", 2, 0, 2),
    ("texts.jsonl", "text", 0, 0, 0),
    ("sums.jsonl", "question_answer", 6, 0, 6),
    ("questions.jsonl", "turns", 0, 0, 2),
    ("instructions_with_text.json", "alpaca", 2, 0, 2),
    ("chat.json", "sharegpt", 1, 0, 1),
    ("whole_pairs.json", "chosen_rejected", 1, 1, 1),
    ("answers_by_rank.json", "stack_exchange", 2, 2, 2),
]
FILES = [
    ("hh-rlhf/harmless_base.jsonl", "hh", 1524, 1524, 1524),
    ("oasst/pairs.jsonl", "preference", 412, 412, 412),
    ("llamafactory-demo/alpaca_en_demo.json", "alpaca", 999, 0, 999),
    ("llamafactory-demo/dpo_en_demo.json", "preference", 300, 300, 300),
    ("llamafactory-demo/kto_en_demo.json", "kto", 150, 0, 300),
    ("llamafactory-demo/glaive_toolcall_en_demo.json", "sharegpt", 300, 0, None),
    ("llamafactory-demo/identity.json", "alpaca", 91, 0, 91),
    ("llamafactory-demo/c4_demo.jsonl", "text", 0, 0, 0),  # texts, for continued pretraining
    ("gsm8k/train.jsonl", "question_answer", 2000, 0, 2000),
    ("mt-bench/question.jsonl", "turns", 0, 0, 80),
    ("torchtune-tiny/alpaca_tiny.json", "alpaca", None, 0, None),
    ("torchtune-tiny/chat_tiny.json", "sharegpt", 1, 0, 1),
    ("torchtune-tiny/hh_rlhf_tiny.json", "chosen_rejected", 1, 1, 1),
    ("torchtune-tiny/stack_exchange_paired_tiny.json", "stack_exchange", None, None, None),
]


SHAPES = [
    *(pytest.param(WRITTEN / file, *expected, id=f"ours: {file}") for file, *expected in OURS),
    *(pytest.param(PUBLIC / file, *expected, id=file, marks=needs_public_data) for file, *expected in FILES),
]


@pytest.mark.parametrize(("file", "name", "conversations", "pairs", "prompts"), SHAPES)
def test_files_in_public_shapes_are_what_they_are(
    file: Path, name: str, conversations: int | None, pairs: int | None, prompts: int | None
) -> None:
    data = DataConfig(source="", placeholders={"name": "Ada", "author": "Bob"})
    reading = start(file, data)
    assert reading.format.name == name
    for record_type, expected in ((Conversation, conversations), (PreferencePair, pairs), (Prompt, prompts)):
        record_reading = Reading(path=reading.path, format=reading.format)
        if expected == 0:
            with pytest.raises(DataError):
                list(iterate(reading.path, record_type, data, reading=record_reading))
            continue
        records = list(iterate(reading.path, record_type, data, reading=record_reading))
        assert len(records) == (record_reading.rows - record_reading.set_aside.count if expected is None else expected)
        assert not record_reading.faults.count
        assert not any(
            "{{" in turn.content for record in records for turn in record.messages if file.name == "identity.json"
        )


def _cells(row: Any) -> list[str]:
    """What the user guide's table says of a row, from the records that it gives."""
    texts, conversations, pairs, answers, prompts = (
        _or_none(record, row) for record in (PlainText, Conversation, PreferencePair, LabelledAnswer, Prompt)
    )
    labels = [f"`{json.dumps(answer.answer)}` {'good' if answer.desirable else 'bad'}" for answer in answers]
    return [
        f"learns `{json.dumps(texts[0].text)}`" if texts else "–",
        f"learns `{json.dumps(conversations[0].messages[-1].content)}`" if conversations else "–",
        f"`{json.dumps(pairs[0].chosen)}` over `{json.dumps(pairs[0].rejected)}`" if pairs else "–",
        ", ".join(labels) or "–",
        f"asks `{json.dumps(prompts[0].messages[-1].content)}`" if prompts else "–",
    ]


def test_the_user_guide_shows_every_format_with_what_its_row_gives() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    shown = {name.split("`")[1]: (row.strip("`"), cells) for name, row, *cells in lines if cells}
    assert list(shown) == list(FORMATS)
    for name, (row, cells) in shown.items():
        assert row == FORMATS[name].row
        assert cells == _cells(json.loads(row))

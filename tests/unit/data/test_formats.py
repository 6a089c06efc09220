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
from alignment.data.reading import Reading, iterate, start
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
from tests.hub import PUBLIC, WRITTEN, needs_public_data

BRIEF = {"role": "system", "content": "Be brief."}
EARLIER = {"role": "user", "content": "Hi."}
ASKED = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4."}
WORSE = ANSWER | {"content": "5."}
SHARED = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]}
ALPACA = {"instruction": "2 + 2?", "output": "4."}
QUESTION = {"question": "2 + 2?", "answer": "4."}
COMPLETED = {"prompt": "2 + 2?", "completion": "4."}


def _records(record: type[Record], row: Any, name: str | None = None) -> list[Any]:
    form = FORMATS[name] if name else format_of(row)
    assert form is not None
    return list(record.of(form.read(Fields(row, where="rows.jsonl:7", example=form.row))))


def _or_none(record: type[Record], row: Any) -> list[Any]:
    try:
        return _records(record, row)
    except DataError:
        return []


def _texts(record: Any) -> list[str]:
    return [turn.content for turn in record.messages]


def _cells(row: Any) -> list[str]:
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
        assert format_of(json.loads(row)) is FORMATS[name]
        assert cells == _cells(json.loads(row))


def test_every_format_keeps_the_tools_and_the_system_text_of_its_rows() -> None:
    for name in FORMATS.keys() - {"text"}:
        row = {**json.loads(FORMATS[name].row), "tools": [{"name": "calculator"}], "system": "Be brief."}
        example = FORMATS[name].read(Fields(row, where="x:1", example=""))
        assert [tool["function"]["name"] for tool in example.tools] == ["calculator"], name
        assert example.turns[0].as_dict() == BRIEF
        assert [turn.role for turn in example.turns].count("system") == 1


@pytest.mark.parametrize("column", ["images", "audios", "videos", "image"])
def test_a_row_with_media_is_refused_in_every_format(column: str) -> None:
    for name in ("messages", "sharegpt", "alpaca", "preference", "text"):
        row = json.loads(FORMATS[name].row)
        assert format_of({**row, column: []}) is FORMATS[name]
        assert _records(PlainText, {**row, column: []}, name) == _records(PlainText, row, name)
        with pytest.raises(DataError, match=f"rows.jsonl:7: '{column}' contains media") as caught:
            _records(PlainText, {**row, column: ["data/1.jpg"]}, name)
        assert f"'{column}'" in caught.value.remedy


def test_most_rows_decide_and_unknown_columns_are_listed() -> None:
    pair = json.loads(FORMATS["preference"].row)
    assert detect([ALPACA, pair, ALPACA], where="x").name == "alpaca"
    assert detect([{"messages": []}, {"messages": 3, "id": 1}], where="x").name == "messages", "though no row fits"
    with pytest.raises(DataError, match=r"rows\.csv: .*'q', 'r'"):
        detect([{"q": "a"}, {"r": 1}], where="rows.csv")


# file, format, conversations, pairs, prompts; pairs are 0 where rows hold none
OURS = [
    ("transcripts.jsonl", "hh", 2, 2, 2),
    ("instructions.json", "alpaca", 3, 0, 3),
    ("system_pairs.json", "preference", 2, 2, 2),
    ("labelled.json", "kto", 2, 0, 4),
    ("toolcalls.json", "sharegpt", 3, 0, 3),
    ("texts.jsonl", "text", 0, 0, 0),
    ("sums.jsonl", "question_answer", 6, 0, 6),
    ("chat.json", "sharegpt", 1, 0, 1),
    ("whole_pairs.json", "chosen_rejected", 1, 1, 1),
    ("answers_by_rank.json", "stack_exchange", 2, 2, 2),
]
FILES = [
    ("hh-rlhf/harmless_base.jsonl", "hh", 1524, 1524, 1524),
    ("llamafactory-demo/kto_en_demo.json", "kto", 150, 0, 300),
    ("llamafactory-demo/glaive_toolcall_en_demo.json", "sharegpt", 300, 0, None),
    ("gsm8k/train.jsonl", "question_answer", 2000, 0, 2000),
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
        assert file.name != "identity.json" or not any("{{" in text for record in records for text in _texts(record))


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("preference", {"prompt": [ASKED], "chosen": "4.", "rejected": "5."}),
        ("preference", {"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": [WORSE]}),
        (
            "preference",
            {
                "conversations": SHARED["conversations"][:1],
                "chosen": {"from": "gpt", "value": "4."},
                "rejected": {"from": "gpt", "value": "5."},
            },
        ),
        ("preference", {"instruction": "2 + 2?", "chosen": "4.", "rejected": "5."}),
        ("chosen_rejected", {"prompt": "2 + 2?", "chosen": [ASKED, ANSWER], "rejected": [ASKED, WORSE]}),
        ("ranked", {"prompt": "2 + 2?", "completions": [{"content": "5.", "rank": 2}, {"content": "4.", "rank": 1}]}),
    ],
    ids=["turns and texts", "answers as turns", "ShareGPT", "instruction", "UltraFeedback", "ranks, 1 is best"],
)
def test_other_writings_of_a_pair_are_the_same_pair(form: str, row: dict[str, Any]) -> None:
    row_format = format_of(row)
    assert row_format is not None
    assert row_format.name == form
    (pair,) = _records(PreferencePair, row)
    assert [turn.as_dict() for turn in pair.messages] == [ASKED]
    assert (pair.chosen, pair.rejected) == ("4.", "5.")


@pytest.mark.parametrize(
    ("before", "more", "expected"),
    [
        ([], {"system": "Be brief."}, [BRIEF, ASKED]),
        ([BRIEF], {"system": "Be long."}, [BRIEF, ASKED]),
        ([], {"prompt": [BRIEF, ASKED]}, [ASKED]),  # the whole conversation says what its prompt was
        ([ANSWER], {"prompt": [EARLIER]}, [EARLIER, ANSWER, ASKED]),
        ([ANSWER], {"prompt": [ANSWER, ASKED]}, [ANSWER, ASKED]),  # the conversations have the prompt already
        ([ANSWER], {"prompt": [EARLIER, ANSWER]}, [ANSWER, ASKED]),
    ],
)
def test_what_comes_before_two_conversations_is_part_of_their_prompt(
    before: list[Any], more: dict[str, Any], expected: list[Any]
) -> None:
    whole = {"chosen": [*before, ASKED, ANSWER], "rejected": [*before, ASKED, WORSE]}
    (pair,) = _records(PreferencePair, whole | more)
    assert [turn.as_dict() for turn in pair.messages] == expected
    assert (pair.chosen, pair.rejected) == ("4.", "5.")


SCORED = [{"text": text, "score": score} for text, score in (("b", 5), ("a", 9), ("c", 5), ("d", 1))]


def test_a_ranked_list_gives_every_pair_of_different_rank_and_its_best_answer() -> None:
    row = {"prompt": "?", "completions": SCORED}
    pairs = {(pair.chosen, pair.rejected) for pair in _records(PreferencePair, row)}
    assert pairs == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert [_texts(conversation) for conversation in _records(Conversation, row)] == [["?", "a"]]


@pytest.mark.parametrize("score", [math.nan, math.inf, 10**400], ids=["NaN", "infinite", "too large"])
def test_answers_are_not_compared_by_what_is_no_finite_number(score: float) -> None:
    """Any comparison with NaN is false, so either answer would be the better one."""
    row = {"prompt": "?", "completions": [{"text": "a", "score": 1.0}, {"text": "b", "score": score, "rank": 1}]}
    for record in (PreferencePair, Conversation, LabelledAnswer, PlainText, Question):
        with pytest.raises(DataError, match=r"'completions\[1\]' has .* not a finite number"):
            _records(record, row, "ranked")
    assert [_texts(prompt) for prompt in _records(Prompt, row, "ranked")] == [["?"]]


ANSWERED = [{"messages": [ASKED, ANSWER]}, {"conversations": [ASKED, ANSWER]}, SHARED, ALPACA, QUESTION]


@pytest.mark.parametrize("more", [{}, {"prompt": "2 + 2?"}], ids=["alone", "with another column"])
@pytest.mark.parametrize("row", ANSWERED)
def test_a_label_counts_in_whatever_columns_its_answer_is(row: dict[str, Any], more: dict[str, Any]) -> None:
    """SFT would otherwise learn the bad answers too."""
    for label in (False, 0) if "conversations" in row else (False,):
        for record in (Conversation, PlainText):
            with pytest.raises(SetAside, match="'label'"):
                _records(record, row | more | {"label": label})
    (answer,) = _records(LabelledAnswer, row | more | {"label": False})
    assert (answer.answer, answer.desirable) == ("4.", False)
    assert [turn.as_dict() for turn in answer.messages] == [ASKED]
    assert [_texts(prompt) for prompt in _records(Prompt, row | {"label": False})] == [["2 + 2?"]]
    assert [_texts(good) for good in _records(Conversation, row | more | {"label": "true"})] == [["2 + 2?", "4."]]
    assert _records(PlainText, row | more | {"label": True}) == [PlainText(text="2 + 2?\n\n4.")]


def test_system_and_history_of_alpaca_go_before_its_instruction() -> None:
    row = {"instruction": "c", "input": "e", "output": "d", "system": "s", "history": [["a", "b"]]}
    (conversation,) = _records(Conversation, row)
    assert [turn.role for turn in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert _texts(conversation) == ["s", "a", "b", "c\n\ne", "d"]


@pytest.mark.parametrize(
    ("reference", "references"),
    [
        (None, ("", "")),
        ([], ("", "")),
        ("144", ("144", "")),
        (["144", "72"], ("144", "72")),
        (["144", None], ("144", "")),
    ],
)
def test_an_evaluation_asks_every_turn_and_reads_a_reference_for_each(
    reference: Any, references: tuple[str, ...]
) -> None:
    (prompt,) = _records(HeldOutPrompt, {"turns": ["12 times 12?", "Half of that?"], "reference": reference})
    assert _texts(prompt) == ["12 times 12?"]
    assert prompt.later_turns == ("Half of that?",)
    assert ((prompt.reference, *prompt.later_references), prompt.num_turns) == (references, 2)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
WRITTEN_CALL = '{"name": "add", "arguments": {"a": 2}}'
WRITTEN_TOOLS = '[{"name": "add", "parameters": {"type": "object"}}]'


def _part(kind: str, value: Any, weight: float) -> dict[str, Any]:
    return {"content": [{"type": kind, "value": value}], "loss_weight": weight}


CALLING: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]] = {
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": WRITTEN_CALL},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4."},
            ],
            "tools": WRITTEN_TOOLS,
        },
        {},
        {},
    ),
    "OpenAI": (
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
                    ],
                },
                {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
        {"id": "1"},
        {"tool_call_id": "1", "name": "add"},
    ),
    "LLaMA-Factory": (
        {
            "messages": [
                {"role": "user", **_part("text", "2 + 2?", 0.0)},
                {"role": "assistant", **_part("tool_call", WRITTEN_CALL, 0.0)},
                {"role": "tool", **_part("text", "4", 0.0)},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "value": "4"}, {"type": "text", "value": "."}],
                    "loss_weight": 1.0,
                },
            ],
            "tools": WRITTEN_TOOLS,
        },
        {},
        {},
    ),
}


@pytest.mark.parametrize("name", CALLING)
def test_tools_calls_and_their_results_are_kept_in_every_form(name: str) -> None:
    row, call_id, of_call = CALLING[name]
    (conversation,) = _records(Conversation, row)
    assert list(conversation.tools) == [TOOL]
    assert [turn.role for turn in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert list(conversation.messages[1].tool_calls) == [call_id | CALL]
    assert conversation.messages[2].as_dict() == {"role": "tool", "content": "4"} | of_call
    assert conversation.messages[3].content == "4."
    learned = [turn.learned for turn in conversation.messages if turn.role == "assistant"]
    assert learned == [name != "LLaMA-Factory", True]


def test_a_turn_of_weight_0_is_not_learned_and_a_weight_of_null_counts_as_absent(tmp_path: Path) -> None:
    """Parquet gives every turn every field, so a file with a weight on some turns has null on the others."""
    turns = [ASKED, {**ANSWER, "weight": 0}, ASKED, ANSWER, {**ASKED, "loss_weight": 0}, {**ANSWER, "loss_weight": 1}]
    parquet.write_table(pa.table({"messages": [turns]}), tmp_path / "turns.parquet")
    (stored,) = iterate(tmp_path / "turns.parquet", Conversation, DataConfig())
    for conversation in (stored, *_records(Conversation, {"messages": turns})):
        learned = [turn.learned for turn in conversation.messages if turn.role == "assistant"]
        assert learned == [False, True, True]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_of_its_own_is_read(field: str) -> None:
    thought = {**ANSWER, field: "Two and two."}
    turns = [ASKED, thought, {**ASKED, field: "x"}, {**ANSWER, field: None}]
    (conversation,) = _records(Conversation, {"messages": turns})
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


FAULTS: list[tuple[type[Record], str, Any, str]] = [
    (Conversation, "alpaca", {"instruction": "Add.", "output": ""}, "'output'"),
    (Conversation, "alpaca", {"instruction": "a", "output": "b", "history": ["x"]}, "'history[0]'"),
    (Conversation, "kto", COMPLETED | {"label": "maybe"}, "'label' must be true or false"),
    (Conversation, "hh", {"chosen": "Hello", "rejected": "x"}, "'chosen'"),
    (Conversation, "ranked", {"prompt": "a", "completions": [{"text": "b"}]}, "'completions[0]' has no number"),
    (Conversation, "ranked", {"prompt": "a", "completions": "b"}, "'completions'"),
    (Conversation, "sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "'conversations[0].from'"),
    (
        Conversation,
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "'conversations[0].value' must be JSON",
    ),
    (Conversation, "messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts"),
    (Conversation, "messages", {"messages": [{**ASKED, "weight": 2}]}, "'messages[0].weight'"),
    (Conversation, "messages", {"messages": [{**ASKED, "loss_weight": 1.0}, ANSWER]}, "loss_weight' marks"),
    (
        Conversation,
        "messages",
        {"messages": [ASKED, {"role": "tool", "content": "4", "tool_call_id": [1]}, ANSWER]},
        "'messages[1].tool_call_id' must be text",
    ),
    (
        Conversation,
        "chosen_rejected",
        {"chosen": [ASKED, {**ANSWER, "tool_calls": [CALL]}], "rejected": [ASKED, ANSWER]},
        "'chosen' ends with a tool call",
    ),
    (
        LabelledAnswer,
        "kto",
        {"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}], "label": True},
        "'messages' ends with a tool call",
    ),
    (Conversation, "messages", {"messages": [ASKED, {**ANSWER, "thinking": ["x"]}]}, "'messages[1].thinking'"),
    (Conversation, "messages", {"messages": str([ASKED, ANSWER])}, "'messages' must be a list of turns, or JSON"),
    (Conversation, "turns", {"turns": [""]}, "'turns[0]'"),
    (HeldOutPrompt, "turns", {"turns": ["a", "b"], "reference": ["144"]}, "'reference' must have"),
]


@pytest.mark.parametrize(("record", "name", "row", "message"), FAULTS, ids=[text[:40] for *_, text in FAULTS])
def test_a_fault_is_named_by_the_column_of_the_format(record: Any, name: str, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _records(record, row, name)
    assert caught.value.where == "rows.jsonl:7"
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("row", "labels"), [(SHARED, ["arithmetic"]), (ALPACA, ["arithmetic", 0, "1"]), (QUESTION, ["arithmetic", 0, "1"])]
)
def test_a_label_that_is_a_class_does_not_judge_the_answer(row: dict[str, Any], labels: list[Any]) -> None:
    for label in labels:
        assert [_texts(made) for made in _records(Conversation, row | {"label": label})] == [["2 + 2?", "4."]]
        with pytest.raises(DataError, match=r"'label' .*format=kto"):
            _records(LabelledAnswer, row | {"label": label})


def test_choices_in_another_notation_are_refused_and_free_text_is_none() -> None:
    """Otherwise the row would be a question without choices, whose answer is their index."""
    with pytest.raises(DataError, match="'choices' must be a list, or JSON of one"):
        _records(Conversation, {"question": "2 + 2?", "choices": "['3', '4']", "answer": "1"})
    (conversation,) = _records(Conversation, {"question": "2 + 2?", "choices": "[A] 3 [B] 4", "answer": "B"})
    assert conversation.messages[-1].content == "B"

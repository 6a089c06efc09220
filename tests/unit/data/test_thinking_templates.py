"""Templates of thinking models: each answer is learned exactly, behind the prompt that it is generated from.

The templates are those that people use (tests/real_templates.py).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.data.records import Conversation
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import CONVERSATIONS, Tokenized, tokenized
from alignment.data.tokens.tokenize import IGNORED, answer_ids, prompt_ids, turn_end_id
from alignment.data.turns import Message
from tests.real_templates import ARGUMENTS, CASES, DEEPSEEK, GPT_OSS, NAME, PHI_4, QWEN, Case, dressed, text_of
from tests.templates import DEEPSEEK_LIKE, PHI_LIKE

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
LIMITS = Limits(row=100_000)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _answer(text: str, thought: str = "", **more: Any) -> Message:
    return Message(role="assistant", content=text, thought=thought, **more)


def _talk(asked: str, answer: str, thought: str = "") -> list[Message]:
    return [_user(asked), _answer(answer, thought)]


CALL = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": NAME, "description": "Adds.", "parameters": {"type": "object"}}}
SYSTEM = Message(role="system", content="Be brief.")
PLAIN = [
    turn for pair in (("Open?", "From nine."), ("Thanks", "Bye."), ("Still there?", "Yes.")) for turn in _talk(*pair)
]
THOUGHTFUL = [*_talk("2 + 2?", "Four.", "Two and two."), *_talk("Sure?", "Quite.", "I count\n\nagain.")]
CALLING = [
    _user("2 + 2?"),
    _answer("", "I need the tool.", tool_calls=(CALL,)),
    Message(role="tool", content="4"),
    _answer("It is four.", "The tool says so."),
]


def _real(name: str, family: Any = QWEN, options: Any = None) -> Any:
    template = text_of(name)
    assert template is not None, "TRL ships it"
    return dressed(family, template, options)


def _tokenizer(case: Case) -> Any:
    template = text_of(case.name)
    if template is None:
        pytest.skip(f"there is no template {case.name} on this machine")
    return dressed(case.family, template, case.options)


def _tokenized(tokenizer: Any, messages: list[Message], tools: tuple[Any, ...] = ()) -> Tokenized:
    record = Conversation(messages=tuple(messages), tools=tools, where="x:1")
    (row,) = tokenized(tokenizer, CONVERSATIONS, [record], LIMITS)
    if row.fault is not None:
        raise row.fault
    return row


def _runs(row: Any) -> list[tuple[list[int], list[int]]]:
    """Each run of learned tokens, with all tokens before it."""
    runs, end = [], 0
    for learned, run in groupby(row["labels"], key=lambda label: label != IGNORED):
        start, end = end, end + len(list(run))
        runs += [(row["input_ids"][:start], row["input_ids"][start:end])] if learned else []
    return runs


def _check(case: Case, messages: list[Message], tools: tuple[Any, ...] = ()) -> Tokenized:
    """Each answer is learned once, in order, behind the very tokens of its prompt."""
    tokenizer = _tokenizer(case)
    whole = _tokenized(tokenizer, messages, tools)
    runs = [run for row in whole.rows for run in _runs(row)]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    assert [tokenizer.decode(learned) for _, learned in runs] == [case.learned(messages[index]) for index in answers]
    for index, (read, _) in zip(answers, runs, strict=True):
        assert tokenizer.decode(read) == tokenizer.decode(prompt_ids(tokenizer, messages[:index], tools))
    return whole


@every_case
@pytest.mark.parametrize("system", [False, True], ids=["no system turn", "a system turn"])
def test_answers_without_thoughts_are_learned_exactly(case: Case, system: bool) -> None:
    messages = [SYSTEM, *PLAIN] if system else PLAIN
    if case.without_thought and (case.takes_system or not system):
        whole = _check(case, messages)
        assert len(whole.rows) == (1 if case.keeps else 3)
        assert whole.lost == frozenset()
    else:
        with pytest.raises(DataError, match="renders a prompt differently when an answer follows it"):
            _tokenized(_tokenizer(case), messages)


@every_case
def test_answers_with_thoughts_are_learned_exactly_in_a_field_or_between_tags(case: Case) -> None:
    if not case.with_thought:
        return
    whole = _check(case, THOUGHTFUL)
    assert len(whole.rows) == (1 if case.keeps else 2)
    tagged = [
        replace(turn, thought="", content=f"<think>\n{turn.thought}\n</think>\n\n{turn.content}")
        if turn.thought
        else turn
        for turn in THOUGHTFUL
    ]
    assert _tokenized(_tokenizer(case), tagged).rows == whole.rows


@every_case
def test_calls_are_learned_exactly_and_results_are_read(case: Case) -> None:
    if not case.calls:
        return
    messages = CALLING if case.with_thought else [replace(message, thought="") for message in CALLING]
    whole = _check(case, messages, (TOOL,))
    assert "4" in _tokenizer(case).decode(whole.rows[-1]["input_ids"])


def test_an_answer_behind_calls_is_learned_behind_the_thoughts_that_led_to_them() -> None:
    """gpt-oss drops them once the answer follows, but a model reads them when it answers."""
    tokenizer = _real("gptoss", GPT_OSS)
    read, learned = _runs(_tokenized(tokenizer, CALLING, (TOOL,)).rows[-1])[-1]
    assert "analysis<|message|>I need the tool.<|end|>" in tokenizer.decode(read)
    assert tokenizer.decode(learned).startswith("<|channel|>analysis<|message|>The tool says so.<|end|>")


@every_case
def test_an_answer_of_its_own_has_the_tokens_of_the_conversation(case: Case) -> None:
    """So pairs and prompts are rendered as conversations are."""
    tokenizer = _tokenizer(case)
    thought = "Hm." if case.with_thought else ""
    turn = _answer("Yes.", thought)
    content = f"<think>\n{thought}\n</think>\n\nYes." if thought else "Yes."
    (row,) = _tokenized(tokenizer, [PLAIN[0], turn]).rows
    ids = prompt_ids(tokenizer, PLAIN[:1]) + answer_ids(tokenizer, PLAIN[:1], content)
    assert row["input_ids"] == ids
    assert ids[-1] == turn_end_id(tokenizer)


# ---- what is lost ---------------------------------------------------------------------------------------------------


JSON_AND_TRIMMED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>"
    "{{ message.content | trim if message.role == 'user' else message.content | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
ODD = _talk("  Say:\n\n  “a” \n", 'He said: "yes".\nThen <|im_end|> he left.')
OTHER_CALL = {"type": "function", "function": {"name": NAME, "arguments": {"b": "eleven", "c": [True, None, 7]}}}
TWO_CALLS = [_user("2 + 2?"), _answer("", tool_calls=(CALL, OTHER_CALL))]


@pytest.mark.parametrize(
    ("name", "family", "messages", "lost"),
    [
        ("qwen3", QWEN, THOUGHTFUL, {"thoughts of earlier turns"}),
        ("qwen3", QWEN, THOUGHTFUL[:2], set()),
        ("qwen3_training", QWEN, THOUGHTFUL, set()),
        (DEEPSEEK_LIKE, DEEPSEEK, THOUGHTFUL[:2], {"thoughts of answers that are learned"}),
        (PHI_LIKE, PHI_4, [SYSTEM, *PLAIN[:2]], {"system turns"}),
        (PHI_LIKE, PHI_4, PLAIN, set()),
        (JSON_AND_TRIMMED, PHI_4, ODD, set()),
        ("gptoss", GPT_OSS, TWO_CALLS, {"calls of tools"}),
        ("qwen3", QWEN, TWO_CALLS, set()),
    ],
)
def test_what_a_template_drops_is_named(name: str, family: Any, messages: list[Message], lost: set[str]) -> None:
    """What is trimmed or written as JSON is not lost."""
    tokenizer = dressed(family, text_of(name) or name)
    assert _tokenized(tokenizer, messages).lost == lost


def _learned_alone(tokenizer: Any, messages: list[Message]) -> str:
    """The one answer that is learned of the messages."""
    ((_, learned),) = (run for row in _tokenized(tokenizer, messages).rows for run in _runs(row))
    return str(tokenizer.decode(learned))


# ---- faults that say what to set ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "options", "messages", "remedy"),
    [
        ("nemotron_3_nano", QWEN, {}, PLAIN, "set model.template_options.enable_thinking=false"),
        # TRL's would have the same option
        ("qwen3", QWEN, {"enable_thinking": False}, THOUGHTFUL, "set model.template_options.enable_thinking=true"),
        ("qwen3_5_nothink", QWEN, {}, THOUGHTFUL, "set model.template_options.enable_thinking=true"),
        ("deepseek_r1_distill", DEEPSEEK, {}, THOUGHTFUL, "set model.chat_template=trl:deepseek_r1_distill_training"),
        # TRL's own for it drops thoughts too
        ("deepseekv3", DEEPSEEK, {}, THOUGHTFUL, "set model.chat_template=chatml"),
    ],
)
def test_an_answer_that_contradicts_its_prompt_names_what_helps(
    name: str, family: Any, options: Any, messages: list[Message], remedy: str
) -> None:
    with pytest.raises(DataError, match="renders a prompt differently when an answer follows it") as caught:
        _tokenized(_real(name, family, options), messages)
    assert caught.value.remedy.startswith(remedy)
    assert "the prompt ends with" in caught.value.message


# ---- thoughts that a model wrote ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_5_think", "qwen3_8_training"])
def test_a_generated_answer_without_its_opening_tag_is_read_as_thought_and_answer(name: str) -> None:
    """The prompt ends with the tag, so a model does not write it."""
    tokenizer = _real(name)
    written = [_user("2 + 2?"), _answer("Two and two.\n</think>\n\nFour."), _user("Sure?")]
    in_a_field = [written[0], _answer("Four.", "Two and two."), written[2]]
    assert prompt_ids(tokenizer, written) == prompt_ids(tokenizer, in_a_field)


def test_a_template_that_knows_no_thoughts_gets_the_words_of_the_row() -> None:
    tokenizer = dressed(PHI_4, PHI_LIKE)
    assert _learned_alone(tokenizer, _talk("Hi.", "a</think>b")) == "a</think>b<|im_end|>"


def test_a_template_that_takes_arguments_only_as_text_gets_them_as_json() -> None:
    tokenizer = dressed(DEEPSEEK, DEEPSEEK_LIKE)
    call = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2}'
    learned = _learned_alone(tokenizer, [_user("2 + 2?"), _answer("", tool_calls=(CALL,))])
    assert learned == f"{call}<｜end▁of▁sentence｜>"
    refuses = dressed(PHI_4, "{{ messages[0].content + 1 }}")
    with pytest.raises(DataError, match="refuses these messages: can only concatenate str"):
        _tokenized(refuses, [_user("Hi."), _answer("", tool_calls=(CALL,))])


def test_an_answer_that_is_only_context_may_contradict_its_prompt() -> None:
    tokenizer = _real("nemotron_3_nano")
    turns = [_user("Hi."), _answer("Hello.", learned=False), *THOUGHTFUL[:2]]
    ((read, learned),) = _runs(_tokenized(tokenizer, turns).rows[0])
    assert tokenizer.decode(learned) == "Two and two.\n</think>\nFour.<|im_end|>"
    assert "Hello." in tokenizer.decode(read)

"""The chat templates that people use: exactly the answers are learned, and whatever a row says stays text."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.data.records import PlainText
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import TEXTS, tokenized
from alignment.data.tokens.tokenize import (
    IGNORED,
    TokenizedConversation,
    answer_ids,
    prompt_ids,
    tokenize_conversation,
)
from alignment.data.turns import Message
from tests.templates import STYLES, styled_tokenizer
from tests.tiny import tiny_tokenizer

tokenizer_of = functools.cache(styled_tokenizer)
every_style = pytest.mark.parametrize("name", STYLES)


def _turns(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


def _learned(tokenizer: Any, row: TokenizedConversation) -> list[str]:
    """Runs of learned tokens as text."""
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    runs = groupby(row.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for learned, run in runs if learned]


def _answers(name: str, messages: list[Message]) -> list[str]:
    """What ought to be learned of them."""
    return [STYLES[name].learned(message) for message in messages if message.role == "assistant" and message.learned]


def _control(tokenizer: Any, ids: list[int]) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in ids if token in special]


# ---- what is learned ------------------------------------------------------------------------------------------------

HI = _turns(("user", "Hi."), ("assistant", "Hello."))
MANY = [*HI, *_turns(("user", "Open?"), ("assistant", "From nine."), ("user", "Thanks"), ("assistant", "Bye."))]
CONVERSATIONS = {
    "one turn": HI,
    "many turns": MANY,
    "an answer of one letter": _turns(("user", "Letter?"), ("assistant", "A")),
    "an answer of blanks": _turns(("user", "Hi."), ("assistant", "   ")),
    "blanks around an answer": _turns(("user", " Hi. "), ("assistant", "\n Hello ,  you.\n\n")),
    "a user turn at the end": [*MANY, *_turns(("user", "Still there?"))],
}
CHATML = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
ROWS = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hello.<|eot_id|>",
    ),
    "qwen": ("<|im_start|>system\nYou are a small model.<|im_end|>\n" + CHATML, "Hello.<|im_end|>"),
    "mistral": ("<s>[INST] Hi.[/INST]", " Hello.</s>"),
    "gemma": ("<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\n", "Hello.<end_of_turn>"),
    "chatml": (CHATML, "Hello.<|im_end|>"),
    "smollm2": ("<|im_start|>system\nYou are tiny.<|im_end|>\n" + CHATML, "Hello.<|im_end|>"),
}


@every_style
def test_a_row_is_a_prompt_that_is_read_and_an_answer_that_is_learned(name: str) -> None:
    tokenizer = tokenizer_of(name)
    row = tokenize_conversation(tokenizer, HI)
    read, learned = ROWS[name]
    assert tokenizer.decode(prompt_ids(tokenizer, HI[:1])) == read
    assert tokenizer.decode(row.input_ids) == read + learned
    assert _learned(tokenizer, row) == [learned]


@every_style
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_exactly_the_answers_and_their_ends_are_learned(name: str, case: str) -> None:
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[case]
    row = tokenize_conversation(tokenizer, messages)
    assert _learned(tokenizer, row) == _answers(name, messages)
    assert row.labels[-1] == tokenizer.convert_tokens_to_ids(STYLES[name].end)


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.bos])
def test_a_row_begins_with_the_one_bos_that_it_has(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for ids in (prompt_ids(tokenizer, MANY[:-1]), tokenize_conversation(tokenizer, MANY).input_ids):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@every_style
def test_what_follows_the_last_answer_is_left_out(name: str) -> None:
    tokenizer = tokenizer_of(name)
    longer = tokenize_conversation(tokenizer, CONVERSATIONS["a user turn at the end"])
    assert longer == tokenize_conversation(tokenizer, MANY)


@every_style
@pytest.mark.parametrize("messages", [[], HI[:1]], ids=["no turn", "a user turn"])
def test_a_conversation_without_an_answer_is_an_error(name: str, messages: list[Message]) -> None:
    with pytest.raises(DataError, match="no assistant turn to learn from"):
        tokenize_conversation(tokenizer_of(name), messages)


@every_style
def test_a_turn_that_is_not_to_be_learned_is_context(name: str) -> None:
    tokenizer = tokenizer_of(name)
    wrong = [HI[0], Message(role="assistant", content="Wrong.", learned=False)]
    row = tokenize_conversation(tokenizer, [*wrong, *HI])
    assert _learned(tokenizer, row) == _answers(name, HI)
    assert "Wrong." in tokenizer.decode(row.input_ids)
    with pytest.raises(DataError, match="no assistant turn to learn from"):
        tokenize_conversation(tokenizer, wrong)


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.has_system])
def test_a_system_turn_is_read(name: str) -> None:
    tokenizer = tokenizer_of(name)
    row = tokenize_conversation(tokenizer, [*_turns(("system", "Be brief.")), *HI])
    assert tokenizer.decode(row.input_ids).count("Be brief.") == 1
    assert _learned(tokenizer, row) == _answers(name, HI)


def test_a_family_without_a_system_turn_refuses_it() -> None:
    with pytest.raises(DataError, match="refuses these messages: there is no system role"):
        tokenize_conversation(tokenizer_of("gemma"), [*_turns(("system", "Be brief.")), *HI])


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_family_whose_turns_alternate_refuses_others(name: str) -> None:
    with pytest.raises(DataError, match=r"refuses these messages: user and .* must alternate"):
        tokenize_conversation(tokenizer_of(name), [HI[0], *HI])


# ---- tools ----------------------------------------------------------------------------------------------------------


def _tool(description: str) -> dict[str, Any]:
    function = {"name": "add", "description": description, "parameters": {"type": "object"}}
    return {"type": "function", "function": function}


def _calling(text: str, result: str) -> list[Message]:
    """A call and what came back."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"text": text}}}
    return [Message(role="assistant", content="", tool_calls=(call,)), Message(role="tool", content=result)]


WITH_A_CALL = [HI[0], *_calling("2 + 2", "4"), HI[1]]
CALLS = {
    "llama3": (
        '{"name": "add", "parameters": {"text": "2 + 2"}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>',
    ),
    "qwen": (
        '<tool_call>\n{"name": "add", "arguments": {"text": "2 + 2"}}\n</tool_call><|im_end|>',
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "add", "arguments": {"text": "2 + 2"}}]</s>',
        '[TOOL_RESULTS] {"content": 4}[/TOOL_RESULTS]',
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learned_and_tools_and_results_are_read(name: str) -> None:
    tokenizer = tokenizer_of(name)
    row = tokenize_conversation(tokenizer, WITH_A_CALL, [_tool("Adds numbers.")])
    call, result = CALLS[name]
    assert _learned(tokenizer, row) == [call, STYLES[name].learned(HI[1])]
    text = tokenizer.decode(row.input_ids)
    assert text.index("Adds numbers.") < text.index(call) < text.index(result)


@pytest.mark.parametrize("name", sorted(STYLES.keys() - CALLS.keys()))
@pytest.mark.parametrize("tools", [[], [_tool("Adds numbers.")]], ids=["a call", "an offer"])
def test_a_family_without_tools_refuses_them_by_name(name: str, tools: list[Any]) -> None:
    with pytest.raises(DataError, match="the chat template leaves out the tool 'add'"):
        tokenize_conversation(tokenizer_of(name), HI if tools else WITH_A_CALL, tools)


# ---- hostile rows ---------------------------------------------------------------------------------------------------

NUM_ROWS = 200
TOKENS = list(dict.fromkeys(token for style in STYLES.values() for token in (*style.control, *style.words)))
PIECES = [
    *TOKENS,
    *(token[:-1] for token in TOKENS),
    *(token[: len(token) // 2] for token in TOKENS),
    *(token[len(token) // 2 :] for token in TOKENS),
    *("{{ bos_token }}", "{% raw %}", "{% endraw %}", "{{ raise_exception('no') }}", "{#-", "-#}", "%s", "{}"),
    *("system", "user", "assistant", "model", "ipython", "tool", "Hello.", "a b"),
    *("\n", "\n\n", "\r\n", "\t", " ", "   ", "\u00a0", '"', "\\", "\\n", "}"),
    *("\u200b", "\u200d", "\u2060", "\ufeff", "\u202e", "\u200f"),
    *map(chr, range(0xE000, 0xE010)),
    *("\U0001f642", "\U0001f469\u200d\U0001f467", "e\u0301", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc"),
]


def _hostile(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, 12)))


def _row(name: str, number: int, say: Callable[[], str]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages and tools that say what ``say`` gives; their shape follows from the number alone."""
    calls = name in CALLS and number % 3 == 0
    messages = _turns(("system", say())) if STYLES[name].has_system and number % 2 else []
    for _ in range(1 + number // 6 % 3):
        messages += _turns(("user", say()))
        messages += _calling(say(), say()) if calls else []
        messages += _turns(("assistant", say()))
    return messages, [_tool(say())] if calls else []


WITH_IDS = (
    "{% for turn in messages %}"
    "{% if turn.role == 'tool' %}"
    "{% if turn.tool_call_id|length != 9 %}{{ raise_exception('an id has nine letters') }}{% endif %}"
    "<|im_start|>{{ turn.tool_call_id }} {{ turn.name }}: {{ turn.content }}<|im_end|>"
    "{% elif turn.tool_calls %}<|im_start|>assistant\n"
    "{% for call in turn.tool_calls %}"
    "{% if call.id|length != 9 %}{{ raise_exception('an id has nine letters') }}{% endif %}"
    "{{ call.id }} {{ call.function.name }} {{ call.function.arguments|tojson }}"
    "{% endfor %}<|im_end|>"
    "{% else %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Mistral's: it refuses calls and results without an id of nine letters."""


def test_a_template_gets_the_ids_of_calls_and_what_their_results_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_IDS
    call = {"id": "abc123xyz", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [
        *_turns(("user", "2 + 2?")),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="4", call_id="abc123xyz", name="add"),
        Message(role="tool", content="4", call_id="123456789", name="sum"),
        *_turns(("assistant", "4.")),
    ]
    text = tokenizer.decode(tokenize_conversation(tokenizer, turns).input_ids)
    assert 'abc123xyz add {"a": 2}<|im_end|><|im_start|>abc123xyz add: 4<|im_end|><|im_start|>123456789 sum: 4<' in text
    with pytest.raises(DataError, match="an id has nine letters"):
        tokenize_conversation(tokenizer, [*turns[:2], Message(role="tool", content="4"), turns[-1]])


@every_style
def test_whatever_a_row_says_stays_text(name: str) -> None:
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    for number in range(NUM_ROWS):
        messages, tools = _row(name, number, lambda: _hostile(rng))
        row = tokenize_conversation(tokenizer, messages, tools)
        harmless = tokenize_conversation(tokenizer, *_row(name, number, lambda: "x"))
        assert _control(tokenizer, row.input_ids) == _control(tokenizer, harmless.input_ids)
        assert _learned(tokenizer, row) == _answers(name, messages)
        text = tokenizer.decode(row.input_ids)
        assert all(message.content.strip() in text for message in messages if message.role != "tool")


@every_style
def test_a_prompt_and_its_answer_are_the_row(name: str) -> None:
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    hostile = [_turns(("user", _hostile(rng)), ("assistant", _hostile(rng))) for _ in range(NUM_ROWS)]
    for messages in (HI, CONVERSATIONS["an answer of one letter"], CONVERSATIONS["an answer of blanks"], *hostile):
        ids = prompt_ids(tokenizer, messages[:1]) + answer_ids(tokenizer, messages[:1], messages[1].content)
        assert ids == tokenize_conversation(tokenizer, messages).input_ids


@every_style
def test_plain_text_stays_text_between_bos_and_eos(name: str) -> None:
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    bos, eos = STYLES[name].bos, STYLES[name].eos
    frame = [tokenizer.convert_tokens_to_ids(token) for token in (bos, eos) if token]
    for text in (_hostile(rng) for _ in range(NUM_ROWS)):
        (tokenized_text,) = tokenized(tokenizer, TEXTS, [PlainText(text=text, where="x:1")], Limits(row=1000))
        (row,) = tokenized_text.rows
        assert row["labels"] == row["input_ids"]
        assert _control(tokenizer, row["input_ids"]) == frame
        assert tokenizer.decode(row["input_ids"]) == bos + text + eos

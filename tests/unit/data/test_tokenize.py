"""What is supervised, decoded and compared with the text that ought to be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import normalizers

from alignment.core.errors import DataError, ModelError
from alignment.data.records import PlainText
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.rendering import LAST_STAND_IN, render
from alignment.data.tokens.row_kinds import TEXTS, tokenized
from alignment.data.tokens.tokenize import (
    IGNORED,
    answer_ids,
    encode,
    end_ids,
    prompt_ids,
    tokenize_conversation,
    turn_end_id,
)
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.training.session import Preempted
from tests.tiny import tiny_tokenizer

SYSTEM = "<|im_start|>system\nYou are tiny.<|im_end|>\n"

CONVERSATIONS = {
    "one turn": [("user", "Hi there."), ("assistant", "Hello.")],
    "three turns": [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "When is it open?"),
        ("assistant", "From nine, except on Monday."),
        ("user", "Thanks"),
        ("assistant", "You are welcome."),
    ],
    "a system turn": [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")],
    "a user turn at the end": [("user", "Hi."), ("assistant", "Hello."), ("user", "Still there?")],
    "two user turns in a row": [("user", "Hi."), ("user", "Anyone?"), ("assistant", "Yes.")],
    "blanks and breaks": [("user", "  Hi.\n\n"), ("assistant", "\n Hello ,  you .\n\nBye ! ")],
    "other scripts": [("user", "Où est Łukasz? 東京"), ("assistant", "À 7 h, près du café – “chez Zoë” 🙂.")],
    "an answer of one letter": [("user", "Letter?"), ("assistant", "A")],
    "an answer that repeats the prompt": [("user", "assistant"), ("assistant", "assistant")],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML turns; pad == EOS."""
    return tiny_tokenizer()


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


def _segments(tokenizer: Any, ids: list[int], labels: list[int]) -> list[tuple[bool, str]]:
    """Runs of learned and unlearned tokens as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        learned = label != IGNORED
        assert not learned or label == token
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    return [(learned, tokenizer.decode(run)) for learned, run in runs]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_assistants_turns_and_their_ends_are_learned(tokenizer: Any, name: str) -> None:
    turns = CONVERSATIONS[name]
    row = tokenize_conversation(tokenizer, _messages(turns))
    learned = [text for learned, text in _segments(tokenizer, row.input_ids, row.labels) if learned]
    assert learned == [f"{content}<|im_end|>" for role, content in turns if role == "assistant"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_row_is_the_rendered_conversation_up_to_the_end_of_its_last_answer(tokenizer: Any, name: str) -> None:
    messages = _messages(CONVERSATIONS[name])
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    row = tokenize_conversation(tokenizer, messages)
    assert tokenizer.decode(row.input_ids) + "\n" == render(tokenizer, messages[: last + 1], answering=False)


def test_a_conversation_is_cut_into_what_is_read_and_what_is_learned(tokenizer: Any) -> None:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "See you.")]
    row = tokenize_conversation(tokenizer, _messages(turns))
    assert _segments(tokenizer, row.input_ids, row.labels) == [
        (False, SYSTEM + "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hello.<|im_end|>"),
        (False, "\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "See you.<|im_end|>"),
    ]


def test_the_line_break_after_a_turn_is_never_learned(tokenizer: Any) -> None:
    row = tokenize_conversation(tokenizer, _messages(CONVERSATIONS["three turns"]))
    assert row.labels[-1] == tokenizer.eos_token_id
    break_id = encode(tokenizer, "\n")[0]
    breaks = [
        position
        for position, token in enumerate(row.input_ids[1:], start=1)
        if token == break_id and row.input_ids[position - 1] == tokenizer.eos_token_id
    ]
    assert breaks
    assert {row.labels[position] for position in breaks} == {IGNORED}


def test_pad_equal_to_eos_hides_no_end_of_a_turn(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    turns = CONVERSATIONS["three turns"]
    row = tokenize_conversation(tokenizer, _messages(turns))
    ends = [label for token, label in zip(row.input_ids, row.labels, strict=True) if token == tokenizer.eos_token_id]
    assert len(ends) == 1 + len(turns)
    assert ends.count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_and_its_answer_give_the_same_tokens_as_the_conversation(tokenizer: Any, name: str) -> None:
    messages = _messages(CONVERSATIONS[name])
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    ids = prompt_ids(tokenizer, messages[:last]) + answer_ids(tokenizer, messages[:last], messages[last].content)
    assert ids == tokenize_conversation(tokenizer, messages).input_ids


def test_a_prompt_opens_the_assistants_turn_and_stops(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, _messages([("user", "Hi.")]))
    assert tokenizer.decode(ids) == SYSTEM + "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_turn_replaces_the_default_one(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, _messages([("system", "Be brief."), ("user", "Hi.")]))
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_nothing_is_added_around_rendered_text(tokenizer: Any) -> None:
    assert tokenizer.decode(encode(tokenizer, "plain")) == "plain"
    assert encode(tokenizer, "<|im_start|>").count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_normalises_text_is_served_as_well() -> None:
    """Qwen's composes accents, for one: decoded tokens are then not the text that was rendered."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    turns = [("user", "Caf\u0065\u0301?"), ("assistant", "Cafe\u0301."), ("user", "Bye."), ("assistant", "Zoe\u0308.")]
    row = tokenize_conversation(tokenizer, _messages(turns))
    learned = [text for learned, text in _segments(tokenizer, row.input_ids, row.labels) if learned]
    assert learned == ["Caf\u00e9.<|im_end|>", "Zo\u00eb.<|im_end|>"]


GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_generation_markers_of_a_template_say_the_same(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GENERATION
    messages = _messages(CONVERSATIONS[name])
    row = tokenize_conversation(tokenizer, messages)
    encoding = tokenizer.apply_chat_template(
        [message.as_dict() for message in messages],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    count = len(row.input_ids)
    assert encoding["input_ids"][:count] == row.input_ids
    assert encoding["assistant_masks"][:count] == [int(label != IGNORED) for label in row.labels]
    assert not any(encoding["assistant_masks"][count:])


# ---- faults ---------------------------------------------------------------------------------------------------------


def _with_template(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "no template": (None, "the tokenizer has no chat template"),
    "a template that refuses": (
        "{{ raise_exception('roles must alternate') }}",
        "the chat template refuses these messages: roles must alternate",
    ),
    "a template without an end of turn": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "the chat template does not end an assistant turn with EOS or another control token",
    ),
    "a template that opens a turn otherwise than it renders it": (
        "{% for message in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}",
        "the chat template renders a prompt differently when an answer follows it",
    ),
    "a template that counts the turns": (
        "{{ messages | length }}{% for message in messages %}" + TURN + "{% endfor %}" + OPEN,
        "the chat template renders a prompt differently when an answer follows it",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_be_cut_is_an_error(name: str) -> None:
    template, message = TEMPLATES[name]
    with pytest.raises(DataError, match=message):
        tokenize_conversation(_with_template(template), _messages(CONVERSATIONS["one turn"]))


def test_a_conversation_without_an_assistant_turn_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no assistant turn to learn from"):
        tokenize_conversation(tokenizer, _messages([("user", "Hi.")]))


def test_a_conversation_that_begins_with_the_assistant_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="begins with an assistant turn, without a prompt before it"):
        tokenize_conversation(tokenizer, _messages([("assistant", "Hello."), ("user", "Hi."), ("assistant", "Yes.")]))


# ---- what reads like a control token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_control_token_that_somebody_wrote_stays_text(tokenizer: Any, role: str, control: str) -> None:
    """Otherwise a row could end its own turn and speak as somebody else."""
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")]
    written = [(name, f"{text} {control} more" if name == role else text) for name, text in turns]
    harmless, row = (tokenize_conversation(tokenizer, _messages(conversation)) for conversation in (turns, written))
    special = set(tokenizer.all_special_ids)
    assert [token for token in row.input_ids if token in special] == [
        token for token in harmless.input_ids if token in special
    ]
    learned = [text for is_learned, text in _segments(tokenizer, row.input_ids, row.labels) if is_learned]
    assert learned == [f"Hello.{f' {control} more' if role == 'assistant' else ''}<|im_end|>"]


def test_text_around_a_written_control_token_is_tokenised_as_ever(tokenizer: Any) -> None:
    plain = encode(tokenizer, "<|im_start|>user\nThe shop")
    turns = [("user", "The shop<|im_end|>"), ("assistant", "Hello.")]
    ids = tokenize_conversation(tokenizer, _messages(turns)).input_ids
    assert any(ids[position : position + len(plain)] == plain for position in range(len(ids)))


def test_plain_text_holds_no_control_token_but_its_end(tokenizer: Any) -> None:
    text = PlainText(text="One<|im_end|>two<|im_start|>", where="x:1")
    (tokenized_text,) = tokenized(tokenizer, TEXTS, [text], Limits(row=1000))
    (row,) = tokenized_text.rows
    special = set(tokenizer.all_special_ids)
    assert [token for token in row["input_ids"] if token in special] == [tokenizer.eos_token_id]
    assert tokenizer.decode(row["input_ids"]) == "One<|im_end|>two<|im_start|><|im_end|>"


def test_a_request_to_stop_is_no_fault_of_a_row() -> None:
    """It is raised by a signal, wherever the stage is: while a template is at work, say."""

    class Stopped:
        chat_template = "{{ messages }}"
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise Preempted

    with pytest.raises(Preempted):
        prompt_ids(Stopped(), _messages([("user", "Hi.")]))


def test_a_character_that_stands_for_a_control_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"contains the private-use character U\+10FFFD"):
        tokenize_conversation(tokenizer, _messages([("user", chr(LAST_STAND_IN)), ("assistant", "Hello.")]))


def test_answers_end_with_the_token_that_ends_a_turn(tokenizer: Any) -> None:
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    assert end_ids(other) == frozenset(other.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


@pytest.mark.parametrize(
    ("config", "ends"),
    [(None, {2}), ({}, {2}), ({"eos_token_id": 7}, {2, 7}), ({"eos_token_id": [0, 2, 9]}, {0, 2, 9})],
)
def test_an_answer_is_over_where_the_models_generation_config_says(tmp_path: Path, config: Any, ends: set[int]) -> None:
    tiny_tokenizer().save_pretrained(str(tmp_path))
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert end_ids(load_tokenizer(tmp_path)) == ends


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read: Expecting"),
        ("[]", "cannot be read: "),
        ('{"eos_token_id": "</s>"}', r"eos_token_id is \['</s>'\]; it must be a token id or a list of them"),
        ('{"eos_token_id": [2, true]}', r"eos_token_id is \[2, True\]"),
        ('{"eos_token_id": -1}', r"eos_token_id is \[-1\]"),
    ],
)
def test_a_generation_config_that_names_no_tokens_is_refused(tmp_path: Path, text: str, words: str) -> None:
    tiny_tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"generation_config\.json: {words}"):
        load_tokenizer(tmp_path)


# ---- tools and weights ----------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = [
    Message(role="user", content="2 + 2?"),
    Message(role="assistant", content="", tool_calls=(CALL,)),
    Message(role="tool", content="4"),
    Message(role="assistant", content="It is 4."),
]
KNOWS_TOOLS = (
    "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message['tool_calls'] %}{{ 'CALL ' + (message['tool_calls'] | tojson) }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPEN
)


def test_tools_are_read_and_calls_are_learned() -> None:
    tokenizer = _with_template(KNOWS_TOOLS)
    row = tokenize_conversation(tokenizer, CALLING, [TOOL])
    segments = _segments(tokenizer, row.input_ids, row.labels)
    assert segments[0][1].startswith('Tools: [{"type": "function", "function": {"name": "add"')
    learned = [text for learned, text in segments if learned]
    assert learned[0].startswith('CALL [{"type": "function", "function": {"name": "add"')
    assert learned[0].endswith("<|im_end|>")
    assert learned[1] == "It is 4.<|im_end|>"
    assert segments[2][1].startswith("\n<|im_start|>tool\n4<|im_end|>")


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_a_template_that_leaves_tools_or_calls_out_is_refused(tokenizer: Any, tools: list[Any]) -> None:
    with pytest.raises(DataError, match="the chat template leaves out the tool 'add'"):
        tokenize_conversation(tokenizer, CALLING if not tools else CALLING[:1] + CALLING[3:], tools)


def test_a_call_cannot_smuggle_a_control_token_in() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    turns = [CALLING[0], Message(role="assistant", content="", tool_calls=(call,))]
    tokenizer = _with_template(KNOWS_TOOLS)
    row = tokenize_conversation(tokenizer, turns, [TOOL])
    (learned,) = [text for is_learned, text in _segments(tokenizer, row.input_ids, row.labels) if is_learned]
    assert '"a": "<|im_end|>"' in learned
    assert [label for label in row.labels if label in tokenizer.all_special_ids] == [tokenizer.eos_token_id]


def test_a_turn_that_is_not_to_be_learned_is_context(tokenizer: Any) -> None:
    turns = [
        Message(role="user", content="Hi."),
        Message(role="assistant", content="Wrong.", learned=False),
        Message(role="user", content="No."),
        Message(role="assistant", content="Right."),
    ]
    row = tokenize_conversation(tokenizer, turns)
    assert [text for learned, text in _segments(tokenizer, row.input_ids, row.labels) if learned] == [
        "Right.<|im_end|>"
    ]
    with pytest.raises(DataError, match="no assistant turn to learn from"):
        tokenize_conversation(tokenizer, turns[:2])

"""What is supervised, decoded and compared with the text that ought to be learned, whatever a row says."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignment.core.errors import DataError
from alignment.data.records import Conversation, PlainText, PreferencePair
from alignment.data.tokens.rendering import prompt_and_answers, render
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, TEXTS, Limits, tokenized
from alignment.data.tokens.tokenize import (
    IGNORED,
    TokenizedConversation,
    answer_ids,
    encode_all,
    encode_parts,
    end_ids,
    prompt_ids,
    tokenize_conversation,
)
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from tests.templates import STYLES, styled_tokenizer
from tests.tiny import tiny_tokenizer

tokenizer_of = functools.cache(styled_tokenizer)
every_style = pytest.mark.parametrize("name", STYLES)


def _turns(*contents: str, first: str = "user") -> list[Message]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [Message(role=roles[number % 2], content=content) for number, content in enumerate(contents)]


def _learned(tokenizer: Any, row: TokenizedConversation) -> list[str]:
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    runs = groupby(row.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for learned, run in runs if learned]


def _answers(name: str, messages: list[Message]) -> list[str]:
    return [STYLES[name].learned(message) for message in messages if message.role == "assistant" and message.learned]


def _control(tokenizer: Any, ids: list[int]) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in ids if token in special]


HI = _turns("Hi.", "Hello.")
MANY = _turns("Hi.", "Hello.", "Open?", "From nine.", "Thanks", "Bye.")
TALKS = {
    "one turn": HI,
    "many turns": MANY,
    "an answer of blanks": _turns("Hi.", "   "),
    "blanks around an answer": _turns(" Hi.\n\n", "\n Hello ,  you.\n\n"),
    "other scripts": _turns("Où est Łukasz? 東京", "À 7 h, près du café – “chez Zoë” 🙂."),
    "an answer that repeats the prompt": _turns("assistant", "assistant"),
    "a user turn at the end": [*MANY, *_turns("Still there?")],
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
@pytest.mark.parametrize("case", TALKS)
def test_exactly_the_answers_and_their_ends_are_learned(name: str, case: str) -> None:
    tokenizer, messages = tokenizer_of(name), TALKS[case]
    row = tokenize_conversation(tokenizer, messages)
    assert _learned(tokenizer, row) == _answers(name, messages)
    assert row.labels[-1] == tokenizer.convert_tokens_to_ids(STYLES[name].end)
    if messages[-1].role == "user":
        assert row == tokenize_conversation(tokenizer, messages[:-1]), "what follows the last answer is left out"
        messages = messages[:-1]
    assert render(tokenizer, messages, answering=False).startswith(tokenizer.decode(row.input_ids))
    if bos := STYLES[name].bos:
        assert [tokenizer.decode(row.input_ids[:1]), row.input_ids.count(tokenizer.bos_token_id)] == [bos, 1]


@every_style
def test_a_turn_that_is_not_to_be_learned_is_context(name: str) -> None:
    tokenizer = tokenizer_of(name)
    wrong = [HI[0], Message(role="assistant", content="Wrong.", learned=False)]
    row = tokenize_conversation(tokenizer, [*wrong, *HI])
    assert _learned(tokenizer, row) == _answers(name, HI)
    assert "Wrong." in tokenizer.decode(row.input_ids)
    for messages in (wrong, [], HI[:1]):
        with pytest.raises(DataError, match="no assistant turn to learn from"):
            tokenize_conversation(tokenizer, messages)


@every_style
def test_a_system_turn_is_read_or_refused(name: str) -> None:
    tokenizer, messages = tokenizer_of(name), [Message(role="system", content="Be brief."), *HI]
    if not STYLES[name].has_system:
        with pytest.raises(DataError, match="refuses these messages: there is no system role"):
            tokenize_conversation(tokenizer, messages)
        return
    row = tokenize_conversation(tokenizer, messages)
    text = tokenizer.decode(row.input_ids)
    assert (text.count("Be brief."), text.count("You are")) == (1, 0), "it replaces the template's own"
    assert _learned(tokenizer, row) == _answers(name, HI)


def _tool(description: str) -> dict[str, Any]:
    function = {"name": "add", "description": description, "parameters": {"type": "object"}}
    return {"type": "function", "function": function}


def _calling(text: str, result: str) -> list[Message]:
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


NUM_ROWS = 100
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
    calls = name in CALLS and number % 3 == 0
    messages = [Message(role="system", content=say())] if STYLES[name].has_system and number % 2 else []
    for _ in range(1 + number // 6 % 3):
        messages += _turns(say())
        messages += _calling(say(), say()) if calls else []
        messages += _turns(say(), first="assistant")
    return messages, [_tool(say())] if calls else []


@every_style
def test_whatever_a_row_says_stays_text(name: str) -> None:
    """Otherwise a row could end its own turn and speak as somebody else."""
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
def test_a_prompt_and_its_answer_are_the_row_and_plain_text_is_framed(name: str) -> None:
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    bos, eos = STYLES[name].bos, STYLES[name].eos
    frame = [tokenizer.convert_tokens_to_ids(token) for token in (bos, eos) if token]
    hostile = [_turns(_hostile(rng), _hostile(rng)) for _ in range(NUM_ROWS)]
    for messages in (*hostile, *(talk for talk in TALKS.values() if talk[-1].role == "assistant")):
        ids = prompt_ids(tokenizer, messages[:-1]) + answer_ids(tokenizer, messages[:-1], messages[-1].content)
        assert ids == tokenize_conversation(tokenizer, messages).input_ids
        text = messages[0].content
        (tokenized_text,) = tokenized(tokenizer, TEXTS, [PlainText(text=text, where="x:1")], Limits(row=1000))
        (row,) = tokenized_text.rows
        assert row["labels"] == row["input_ids"]
        assert _control(tokenizer, row["input_ids"]) == frame
        assert tokenizer.decode(row["input_ids"]) == bos + text + eos


TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
EACH = "{% for message in messages %}" + TURN + "{% endfor %}"
OPEN = "{{% if add_generation_prompt %}}{{{{ '{}' }}}}{{% endif %}}"
TEMPLATES = {
    "none": (None, "has no chat template"),
    "it refuses": ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    "no end of turn": (
        EACH.replace("<|im_end|>", "") + OPEN.format("<|im_start|>assistant\n"),
        "does not end an assistant turn",
    ),
    "it opens a turn otherwise than it renders it": (
        EACH + OPEN.format("<|im_start|>assistant\n<think>"),
        "renders a prompt differently when an answer follows it",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_be_cut_is_an_error(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, message = TEMPLATES[name]
    with pytest.raises(DataError, match=message):
        tokenize_conversation(tokenizer, HI)


@pytest.mark.parametrize(
    ("config", "ends"),
    [(None, {2}), ({}, {2}), ({"eos_token_id": 7}, {2, 7}), ({"eos_token_id": [0, 2, 9]}, {0, 2, 9})],
)
def test_an_answer_is_over_where_the_models_generation_config_says(tmp_path: Path, config: Any, ends: set[int]) -> None:
    tiny_tokenizer().save_pretrained(str(tmp_path))
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert end_ids(load_tokenizer(tmp_path)) == ends


class _Own(type(tiny_tokenizer())):  # type: ignore[misc]
    def _encode_plus(self, text: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([sequence.upper() for sequence in text], **kwargs)


@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_that_transformers_gives(splits: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = splits
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    texts = ["The shop is closed.", "", "<|im_start|>user\nHi.<|im_end|>\n", "\u00e9 \U0001f642"]
    ids = encode_all(tokenizer, texts)
    assert ids == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [len(of_text) > 2 for of_text in ids] == [True, False, True, True]
    assert encode_parts(tokenizer, texts) == ids
    own = _Own(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert encode_all(own, ["abc"]) == encode_all(tokenizer, ["ABC"])


SPACE = "\u2581"
SPOKEN = _turns("Open on Monday?", "From nine.", "Thanks", "Bye.")


@functools.cache
def _sentencepiece(style: str) -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    bpe.pre_tokenizer = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = sorted({*map(chr, range(33, 127)), "\n", SPACE})
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    text = "user assistant system Open on Monday? From nine. Thanks Bye. [INST] [/INST] Hello From the hall\n"
    bpe.train_from_iterator([text] * 8, trainer)
    end = STYLES[style].end
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=end, pad_token=end, unk_token="<unk>"
    )
    tokenizer.chat_template = STYLES[style].template
    return tokenizer


def _whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("style", ["chatml", "mistral"])
def test_no_space_is_put_into_the_middle_of_a_row(style: str) -> None:
    tokenizer, asked = _sentencepiece(style), SPOKEN[:-1]
    (conversation,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=tuple(SPOKEN))], Limits(row=500))
    (row,) = conversation.rows
    prompt, answer = prompt_and_answers(tokenizer, asked, SPOKEN[-1:])
    assert row["input_ids"] == _whole(tokenizer, prompt + answer)
    assert _whole(tokenizer, "Bye.") != _whole(tokenizer, "\nBye.")[-len(_whole(tokenizer, "Bye.")) :], "it has a space"
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    answers = [turn.content + tokenizer.eos_token for turn in SPOKEN if turn.role == "assistant"]
    assert tokenizer.decode(learned).replace(" ", "") == "".join(answers).replace(" ", "")
    assert prompt_ids(tokenizer, asked) + answer_ids(tokenizer, asked, "Bye.") == row["input_ids"]
    ids = prompt_ids(tokenizer, asked)
    first, second = (answer_ids(tokenizer, asked, text) for text in ("Bye.", "From nine."))
    pair = PreferencePair(messages=tuple(asked), chosen="Bye.", rejected="From nine.")
    (tokenized_pair,) = tokenized(tokenizer, PAIRS, [pair], Limits(row=500))
    assert tokenized_pair.rows == [{"prompt": ids, "chosen": first, "rejected": second}]


@pytest.mark.parametrize("name", sorted(STYLES.keys() - CALLS.keys()))
def test_a_family_without_tools_refuses_them_by_name(name: str) -> None:
    for messages, tools in ((WITH_A_CALL, []), (HI, [_tool("Adds numbers.")])):
        with pytest.raises(DataError, match="leaves out the tool 'add'"):
            tokenize_conversation(tokenizer_of(name), messages, tools)


def test_a_conversation_that_begins_with_the_assistant_is_an_error() -> None:
    with pytest.raises(DataError, match="begins with an assistant turn"):
        tokenize_conversation(tiny_tokenizer(), _turns("Hello.", "Hi.", "Yes.", first="assistant"))

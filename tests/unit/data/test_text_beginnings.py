"""Tokenizers that put a space before every text do not put one into the middle of a row."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignment.data.records import Conversation, PreferencePair
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.rendering import prompt_and_answers
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, tokenized
from alignment.data.tokens.tokenize import answer_ids, encode_parts, prompt_and_answer_ids, prompt_ids
from alignment.data.turns import Message
from tests.templates import STYLES
from tests.tiny import tiny_tokenizer

TURNS = [
    Message(role="user", content="Open on Monday?"),
    Message(role="assistant", content="From nine."),
    Message(role="user", content="Thanks"),
    Message(role="assistant", content="Bye."),
]
TEXT = "user assistant system Open on Monday? From nine. Thanks Bye. [INST] [/INST] Hello From the hall\n"
SPACE = "\u2581"


@functools.cache
def sentencepiece(style: str) -> PreTrainedTokenizerFast:
    """Like those of Llama 2 and Mistral 0.1: a space goes before each text, and after each special token."""
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    bpe.pre_tokenizer = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = sorted({*map(chr, range(33, 127)), "\n", SPACE})
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 8, trainer)
    end = STYLES[style].end
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=end, pad_token=end, unk_token="<unk>"
    )
    tokenizer.chat_template = STYLES[style].template
    return tokenizer


def whole(tokenizer: Any, text: str) -> list[int]:
    """As a tokenizer gives them for a text in one piece."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


every_style = pytest.mark.parametrize("style", ["chatml", "mistral"])


@every_style
def test_a_row_has_the_tokens_of_its_text_in_one_piece(style: str) -> None:
    tokenizer = sentencepiece(style)
    (row,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=tuple(TURNS))], Limits(row=500))
    (made,) = row.rows
    prompt, answer = prompt_and_answers(tokenizer, TURNS[:-1], TURNS[-1:])
    assert made["input_ids"] == whole(tokenizer, prompt + answer)
    assert whole(tokenizer, "Bye.") != whole(tokenizer, "\nBye.")[-len(whole(tokenizer, "Bye.")) :], "it has a space"
    learned = [token for token, label in zip(made["input_ids"], made["labels"], strict=True) if label != -100]
    answers = [turn.content + tokenizer.eos_token for turn in TURNS if turn.role == "assistant"]
    assert tokenizer.decode(learned).replace(" ", "") == "".join(answers).replace(" ", "")


@every_style
def test_a_prompt_and_its_answers_are_the_row(style: str) -> None:
    tokenizer = sentencepiece(style)
    prompt, answer = prompt_and_answers(tokenizer, TURNS[:-1], TURNS[-1:])
    joined = whole(tokenizer, prompt + answer)
    assert prompt_ids(tokenizer, TURNS[:-1]) + answer_ids(tokenizer, TURNS[:-1], "Bye.") == joined
    ids, (first, second) = prompt_and_answer_ids(tokenizer, TURNS[:-1], ["Bye.", "From nine."])
    assert ids + first == joined
    pair = PreferencePair(messages=tuple(TURNS[:-1]), chosen="Bye.", rejected="From nine.")
    (row,) = tokenized(tokenizer, PAIRS, [pair], Limits(row=500))
    assert row.rows == [{"prompt": ids, "chosen": first, "rejected": second}]


def test_texts_that_share_a_token_are_encoded_each_by_itself() -> None:
    """As where an answer begins with what the prompt's end merges with."""
    tokenizer = sentencepiece("chatml")
    assert len(whole(tokenizer, "Thanks")) < len([*whole(tokenizer, "Tha"), *whole(tokenizer, "nks")])
    assert encode_parts(tokenizer, ["Tha", "nks"]) == [whole(tokenizer, "Tha"), whole(tokenizer, "nks")]
    assert encode_parts(tokenizer, ["", "\nHello"]) == [whole(tokenizer, ""), whole(tokenizer, "\nHello")]


def test_other_tokenizers_encode_texts_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    parts = ["<|im_start|>assistant\n", "Hello<|im_end|>", "\n"]
    assert encode_parts(tokenizer, parts) == [whole(tokenizer, part) for part in parts]

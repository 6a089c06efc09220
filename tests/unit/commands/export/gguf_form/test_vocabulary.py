"""A tokenizer's metadata: how texts are cut, what tokens are, what begins and ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignment.commands.export.gguf_form.vocabulary import pre_tokenizer, vocabulary
from alignment.core.errors import ModelError
from alignment.data.tokens.tokenize import end_ids
from tests.templates import styled_tokenizer
from tests.tiny import pythia_tokenizer, tiny_tokenizer

_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _ENDS
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _ENDS
"""As the tokenizer.json of these families have them."""


def _bytes(*, use_regex: bool = True, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _split(rule: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), behavior), _bytes(use_regex=False)])


def _with(rule: Any, **changes: Any) -> PreTrainedTokenizerFast:
    """A tiny tokenizer that cuts by ``rule``; ``changes`` are of its tokenizer.json."""
    bpe = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    bpe.pre_tokenizer = rule
    described = json.loads(bpe.to_str())
    described["model"] |= changes
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def _rule(step: Any) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = step
    return pre_tokenizer(json.loads(bpe.to_str()))


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (_bytes(), "gpt-2"),
        (pre_tokenizers.Sequence([_bytes()]), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()]), "smollm"),
        (_split(LLAMA3), "llama-bpe"),
        (_split(QWEN2), "qwen2"),
    ],
)
def test_a_rule_has_llama_cpps_name(step: Any, name: str) -> None:
    assert _rule(step) == name


@pytest.mark.parametrize(
    "step",
    [
        _bytes(add_prefix_space=True),
        _bytes(use_regex=False),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), _bytes()]),
        _split(LLAMA3, "removed"),
        _split(LLAMA3.replace("{1,3}", "{1,2}")),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), _bytes()]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated", invert=True), _bytes(use_regex=False)]),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), _bytes()]),
    ],
)
def test_an_unknown_rule_is_refused(step: Any) -> None:
    with pytest.raises(
        ModelError, match=r"the tokenizer splits texts by .*these rules of llama.cpp: gpt-2, smollm, llama-bpe, qwen2"
    ):
        _rule(step)


def test_a_tokenizer_without_a_rule_is_refused() -> None:
    with pytest.raises(ModelError, match=r"splits texts by .*nothing"):
        pre_tokenizer({"pre_tokenizer": None})


def _spaces_stripped(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])


def _lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({"byte_fallback": True}, None, "byte_fallback is True"),
        ({"ignore_merges": True}, None, "ignore_merges is True with gpt-2"),
        ({"dropout": 0.1}, None, r"dropout is 0\.1"),
        ({}, _spaces_stripped, "the token '<x>' has rstrip"),
        ({}, _lower_case, "it normalises texts by .*Lowercase"),
    ],
)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(
    changes: dict[str, Any], change: Any, message: str
) -> None:
    tokenizer = _with(_bytes(), **changes)
    if change is not None:
        change(tokenizer)
    with pytest.raises(ModelError, match=f"llama.cpp would tokenize texts differently: {message}"):
        vocabulary(tokenizer, 400, [2])


def test_a_tokenizer_of_words_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer, words.decoder = _bytes(), decoders.ByteLevel()
    with pytest.raises(ModelError, match="it is WordLevel"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b"), 2, [1])


def test_llama3s_rule_takes_whole_words_before_merges() -> None:
    assert vocabulary(_with(_split(LLAMA3), ignore_merges=True), 400, [2]).metadata["tokenizer.ggml.pre"] == "llama-bpe"
    with pytest.raises(ModelError, match="ignore_merges is False with llama-bpe"):
        vocabulary(_with(_split(LLAMA3)), 400, [2])


def test_named_templates_are_written_as_llama_cpp_reads_them() -> None:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    assert vocabulary(tokenizer, 400, [2]).metadata["tokenizer.chat_template"] == template
    tokenizer.chat_template = {"default": template, "tool_use": "{{ tools }}" + template}
    metadata = vocabulary(tokenizer, 400, [2]).metadata
    assert metadata["tokenizer.chat_template"] == template
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}" + template


def test_a_normal_form_is_a_note() -> None:
    tokenizer = _with(_split(QWEN2))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert vocabulary(tokenizer, 400, [2]).notes == [
        "this tokenizer normalises texts (NFC) and llama.cpp does not, so send texts in NFC"
    ]


def test_more_tokens_than_embeddings_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ModelError, match=f"has the token {len(tokenizer) - 1}, and the model has 300 rows"):
        vocabulary(tokenizer, 300, [2])
    with pytest.raises(ModelError, match="has the token 9999, and the model has 400 rows"):
        vocabulary(tokenizer, 400, [2, 9999])


def test_types_tell_control_tokens_from_words_and_from_empty_rows() -> None:
    tokenizer = styled_tokenizer("qwen")
    words = vocabulary(tokenizer, len(tokenizer) + 2, [2])
    tokens, types = words.metadata["tokenizer.ggml.tokens"], words.metadata["tokenizer.ggml.token_type"]
    of = dict(zip(tokens, types, strict=True))
    assert {token: of[token] for token in ("<|im_start|>", "<tool_call>", "a", "Ġthe")} == {
        "<|im_start|>": 3,
        "<tool_call>": 4,
        "a": 1,
        "Ġthe": 1,
    }
    assert types[-2:] == [5, 5]
    assert len(set(tokens)) == len(tokens)


# ---- beginnings and ends --------------------------------------------------------------------------------------------


def _ids(words: Any) -> dict[str, int]:
    marks = ("tokenizer.ggml.", "_token_id")
    return {
        name[len(marks[0]) : -len(marks[1])]: value for name, value in words.metadata.items() if name.endswith(marks[1])
    }


def test_all_tokens_that_end_an_answer_are_written() -> None:
    """EOS, another token that ends the turn, and one that generation_config.json names."""
    tokenizer = styled_tokenizer("gemma")
    turn_end, eos = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert sorted(end_ids(tokenizer)) == [eos, turn_end]
    words = vocabulary(tokenizer, len(tokenizer), sorted({eos, turn_end, 0}))
    ids = _ids(words)
    assert (ids["eos"], ids["eot"], ids["eom"]) == (eos, turn_end, 0)
    assert words.stops == ["<pad>", "<eos>", "<end_of_turn>"]
    assert words.notes == []


def test_a_fourth_token_that_ends_an_answer_is_a_note() -> None:
    tokenizer = styled_tokenizer("gemma")
    turn_end, eos = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    words = vocabulary(tokenizer, len(tokenizer), sorted({eos, turn_end, 0, 3}))
    assert words.notes == ["GGUF has fields for only three tokens that end an answer; also stop at <unk> too"]
    assert "<unk>" in words.stops


def test_a_tokenizer_without_a_chat_template_ends_at_eos() -> None:
    tokenizer = pythia_tokenizer()
    words = vocabulary(tokenizer, len(tokenizer), [0])
    assert _ids(words) == {"bos": 0, "eos": 0, "unknown": 0}
    assert "tokenizer.chat_template" not in words.metadata
    assert not words.adds_bos


@pytest.mark.parametrize(
    ("style", "adds_bos"),
    [("llama3", True), ("gemma", True), ("chatml", False), ("smollm2", False)],
)
def test_bos_is_added_where_the_tokenizer_adds_it_and_the_template_writes_it(style: str, adds_bos: bool) -> None:
    tokenizer = styled_tokenizer(style)
    words = vocabulary(tokenizer, len(tokenizer), sorted(end_ids(tokenizer)))
    assert words.adds_bos is adds_bos
    assert words.metadata["tokenizer.ggml.add_bos_token"] is adds_bos
    assert words.metadata["tokenizer.ggml.add_eos_token"] is False


def test_bos_is_not_added_to_chats_that_were_trained_without_it() -> None:
    tokenizer = styled_tokenizer("llama3")
    tokenizer.chat_template = styled_tokenizer("chatml").chat_template.replace("<|im_end|>", "<|eot_id|>")
    assert not vocabulary(tokenizer, len(tokenizer), [5]).adds_bos


def test_two_tokens_in_front_of_texts_are_refused() -> None:
    tokenizer = styled_tokenizer("chatml")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|endoftext|> $A", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    with pytest.raises(ModelError, match=r"puts \['<\|im_start\|>', '<\|endoftext\|>'\] in front of texts"):
        vocabulary(tokenizer, len(tokenizer), [2])

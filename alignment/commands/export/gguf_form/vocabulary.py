"""A tokenizer as metadata of a GGUF file: byte-level BPE, as llama.cpp's tokenizer ``gpt2`` reads it.

llama.cpp has no field for a pre-tokenizer's rule; it has a list of names whose rules it knows. With
a rule that is none of these, texts would be cut into other tokens than in training, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from alignment.commands.export.gguf_form.gguf_file import Metadata
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenize import front, turn_end_id
from alignment.data.turns import Message

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3_RULE = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2_RULE = _WORDS + r"|\p{N}" + _REST
_BYTES = {"type": "ByteLevel"}
_RULES = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    **{
        name: [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated"}, {**_BYTES, "use_regex": False}]
        for name, rule in (("llama-bpe", _LLAMA3_RULE), ("qwen2", _QWEN2_RULE))
    },
}
"""llama.cpp's names of rules, and the steps in tokenizer.json that cut in the same way, without usual values."""

_UNKNOWN_REMEDY = "export it as a model (--as model)"
_PLAIN = {"lstrip", "rstrip", "single_word"}
"""Properties of an added token that llama.cpp does not apply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """``stops`` are the texts of the tokens that end an answer; ``adds_bos``: llama.cpp puts BOS in front of a text.

    ``notes`` are sentences about what a GGUF file cannot say.
    """

    metadata: Metadata
    stops: list[str]
    adds_bos: bool
    notes: list[str]


def vocabulary(tokenizer: Any, size: int, stops: Sequence[int]) -> Vocabulary:
    """The tokenizer's metadata for a model with ``size`` rows of embeddings that ends answers at ``stops``. Raises
    ModelError: llama.cpp would not cut texts into the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer does not come from the library tokenizers", remedy=_UNKNOWN_REMEDY)
    described = json.loads(backend.to_str())
    rule = pre_tokenizer(described)
    _refuse_other_forms(described)
    texts, types = _tokens(described, size, stops)
    ends, notes = _ends(tokenizer, stops)
    adds_bos = _adds_bos(tokenizer)
    merges = described["model"]["merges"]
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        **_named(bos=tokenizer.bos_token_id, unknown=tokenizer.unk_token_id, padding=tokenizer.pad_token_id),
        **ends,
        "tokenizer.ggml.add_bos_token": adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    if tokenizer.chat_template:
        own = tokenizer.chat_template  # of several, the one called ``default``, and the others by their names
        by_name = {"default": own} if isinstance(own, str) else dict(own)
        metadata |= {"tokenizer.chat_template": by_name.pop("default")} if "default" in by_name else {}
        metadata |= {"tokenizer.chat_templates": list(by_name)} if by_name else {}
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in by_name.items()}
    if described["normalizer"]:
        notes.append("this tokenizer normalises texts (NFC) and llama.cpp does not, so send texts in NFC")
    return Vocabulary(metadata=metadata, stops=[texts[token] for token in stops], adds_bos=adds_bos, notes=notes)


def pre_tokenizer(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule by which a tokenizer.json cuts texts into words. Raises ModelError: it has no name,
    as far as is known here."""
    outer = described["pre_tokenizer"] or {"type": "nothing"}
    steps = [_without_usual(step) for step in (outer["pretokenizers"] if outer["type"] == "Sequence" else [outer])]
    for name, rule in _RULES.items():
        if steps == rule:
            return name
    raise ModelError(
        f"the tokenizer splits texts by {json.dumps(outer, ensure_ascii=False)}; the export knows only these "
        f"rules of llama.cpp: {', '.join(_RULES)}",
        remedy=_UNKNOWN_REMEDY,
    )


def _without_usual(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what changes no token: offsets, and values that are off or usual."""
    usual = {"trim_offsets": step.get("trim_offsets"), "add_prefix_space": False, "use_regex": True, "invert": False}
    return {name: value for name, value in step.items() if name not in usual or value != usual[name]}


def _refuse_other_forms(described: Mapping[str, Any]) -> None:
    model, normalizer = described["model"], described["normalizer"]
    rule = pre_tokenizer(described)
    faults = [f"it is {model['type']}"] if model["type"] != "BPE" else []
    faults += [
        f"{name} is {model[name]!r}"
        for name in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if bool(model.get("ignore_merges")) != (rule == "llama-bpe"):
        faults.append(f"ignore_merges is {model.get('ignore_merges')} with {rule}")
    if normalizer and normalizer != {"type": "NFC"}:
        faults.append(f"it normalises texts by {json.dumps(normalizer, ensure_ascii=False)}")
    faults += [
        f"the token {token['content']!r} has {name}"
        for token in described["added_tokens"]
        for name in sorted(_PLAIN)
        if token[name]
    ]
    if faults:
        raise ModelError(f"llama.cpp would tokenize texts differently: {faults[0]}", remedy=_UNKNOWN_REMEDY)


def _tokens(described: Mapping[str, Any], size: int, stops: Sequence[int]) -> tuple[list[str], list[int]]:
    """Texts and types by id; rows of embeddings beyond the tokenizer's have types that nothing is cut into."""
    texts = {number: text for text, number in described["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in described["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    beyond = [number for number in (*texts, *stops) if number >= size]
    if beyond:
        raise ModelError(
            f"the tokenizer or generation_config.json has the token {max(beyond)}, and the model has {size} rows of "
            "embeddings"
        )
    return (
        [texts.get(number, f"[unused {number}]") for number in range(size)],
        [int(types.get(number, gguf.TokenType.UNUSED)) for number in range(size)],
    )


def _ends(tokenizer: Any, stops: Sequence[int]) -> tuple[Metadata, list[str]]:
    """The fields of the tokens that end an answer. GGUF has three: EOS, the end of a turn, the end of a message."""
    turn_end = turn_end_id(tokenizer) if tokenizer.chat_template else None
    others = [token for token in stops if token not in (tokenizer.eos_token_id, turn_end)]
    ends = _named(eos=tokenizer.eos_token_id, eot=turn_end, eom=others[0] if others else None)
    if not others[1:]:
        return ends, []
    beyond = ", ".join(tokenizer.convert_ids_to_tokens(others[1:]))
    return ends, [f"GGUF has fields for only three tokens that end an answer; also stop at {beyond} too"]


def _named(**ids: int | None) -> Metadata:
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}


def _adds_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp should put BOS in front of texts.

    Chats were trained as the template writes them. If it writes BOS itself, llama.cpp's server and the Modelfile leave
    that one out, so there is always exactly one. If it writes none, there must be none.
    """
    ids = front(tokenizer)
    if ids not in ((), (tokenizer.bos_token_id,)):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ModelError(f"the tokenizer puts {tokens} in front of texts; llama.cpp can put only BOS there, or nothing")
    if not ids or not tokenizer.chat_template:
        return bool(ids)
    return prompt_text(tokenizer, [Message(role="user", content="Hi.")]).startswith(tokenizer.bos_token)

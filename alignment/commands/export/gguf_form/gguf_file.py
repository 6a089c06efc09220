"""Writes weights, a tokenizer and metadata as one GGUF file, one tensor at a time.

The tokenizer is byte-level BPE, as llama.cpp's tokenizer ``gpt2`` reads it. llama.cpp has no field for a
pre-tokenizer's rule; it has a list of names whose rules it knows. With a rule that is none of these, texts would be cut
into other tokens than in training, so it is refused."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignment.commands.export.export_options import GGUF_TYPES
from alignment.commands.export.exported import gap_between, logprobs, refuse_differences
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenize import front, turn_end_id
from alignment.data.turns import Message

Metadata = dict[str, Any]
"""Keys and values of a GGUF file; a whole number is written as uint32, any other number as float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A ``model_type`` of transformers in GGUF. llama.cpp rotates the pairs of elements (2i, 2i + 1) of a head in the
    architecture ``llama``, where transformers rotates (i, i + half). ``interleaved``: rows of Q and K are therefore put
    in that order. Other architectures are rotated as in transformers."""

    arch: gguf.MODEL_ARCH
    interleaved: bool
    without: tuple[str, ...] = ()
    """Settings that must be off, because the weights or layers that they bring were not tested."""
    head_dim_when_read: Callable[[PreTrainedConfig], int] | None = None
    """The only width of a head with which transformers can read the file, where it ignores the file's own."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(arch=gguf.MODEL_ARCH.LLAMA, interleaved=True, without=("attention_bias", "mlp_bias")),
    "qwen2": Architecture(
        arch=gguf.MODEL_ARCH.QWEN2,
        interleaved=False,
        without=("use_sliding_window",),
        head_dim_when_read=lambda config: config.hidden_size // config.num_attention_heads,
    ),
    "qwen3": Architecture(
        arch=gguf.MODEL_ARCH.QWEN3,
        interleaved=False,
        without=("attention_bias", "use_sliding_window"),
        head_dim_when_read=lambda _: 128,
    ),
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """How models with this configuration are written. Raises ModelError."""
    works = f"GGUF export supports {', '.join(ARCHITECTURES)}"
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(f"the architecture {config.model_type} cannot be exported as GGUF; {works}", remedy=_ELSEWHERE)
    rope = config.rope_parameters
    faults = [f"{name}: {getattr(config, name)}" for name in architecture.without if getattr(config, name, False)]
    faults += [f"hidden_act: {config.hidden_act}"] if config.hidden_act != "silu" else []
    faults += [f"rope_type: {rope['rope_type']}"] if rope.get("rope_type", "default") != "default" else []
    faults += ["partial_rotary_factor"] if rope.get("partial_rotary_factor", 1.0) != 1.0 else []
    readable = architecture.head_dim_when_read
    faults += [f"head_dim: {head_dim(config)}"] if readable and head_dim(config) != readable(config) else []
    if faults:
        raise ModelError(
            f"{config.model_type} with {', '.join(faults)} cannot be exported as GGUF; {works} without these settings",
            remedy=_ELSEWHERE,
        )
    return architecture


_ELSEWHERE = "export it as a model (--as model), and convert that folder with llama.cpp's own converter"


def model_metadata(config: PreTrainedConfig) -> Metadata:
    """Sizes and constants of the model; ``config`` is of an architecture that can be written."""
    name = gguf.MODEL_ARCH_NAMES[architecture_of(config).arch]
    head = head_dim(config)
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in values.items()}}


def head_dim(config: PreTrainedConfig) -> int:
    """The width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names in GGUF, in its arrangement; tied embeddings once. Raises ModelError."""
    config = model.config
    architecture = architecture_of(config)
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        in_gguf = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if in_gguf is None:
            raise ModelError(f"GGUF has no name for the weight {name}", remedy=_ELSEWHERE)
        projection = name.split(".")[-2]
        if architecture.interleaved and projection in heads:
            weight = interleaved(weight, heads[projection])
        yield in_gguf, weight


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """``[heads * dim, width]`` whose rows i and i + dim/2 of each head become its rows 2i and 2i + 1."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


_VALUE_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}

TYPES = {dtype: gguf.GGMLQuantizationType[dtype.upper()] for dtype in GGUF_TYPES}
_LARGEST_F16 = float(np.finfo(np.float16).max)


def file_metadata(dtype: str) -> Metadata:
    """What the file says of its weights' type."""
    file_type = gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"]
    return {"general.file_type": int(file_type), "general.quantization_version": gguf.GGML_QUANT_VERSION}


def write_file(file: Path, model: PreTrainedModel, metadata: Metadata, dtype: str) -> list[str]:
    """Writes the file; returns a note if some weights could not have the type. Raises ModelError."""
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has it already
            writer.add_key_value(key, value, gguf.GGUFValueType[_VALUE_TYPES[type(value)]])
    weights = dict(tensors(model))
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[dtype]]  # norms and biases stay float32; rows are whole blocks
    matrix_types = (gguf.GGMLQuantizationType.F16, TYPES[dtype])
    types = {
        name: gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else matrix_types[weight.shape[-1] % block == 0]
        for name, weight in weights.items()
    }
    for name, weight in weights.items():
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tuple(weight.shape), types[name])))
        writer.add_tensor_info(name, tuple(weight.shape), np.dtype(np.float32), size, raw_dtype=types[name])
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            writer.write_tensor_data(_quantized(name, weight, types[name]))
    finally:
        writer.close()
    others = sum(weight.dim() > 1 and types[name] != TYPES[dtype] for name, weight in weights.items())
    return [f"{others} weights are f16, because their rows do not divide into blocks of {dtype}"] if others else []


def _quantized(name: str, weight: Tensor, wanted: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = weight.detach().float().contiguous().numpy()
    largest = float(np.abs(values).max())
    if wanted == gguf.GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        remedy = "add --dtype bf16"
        raise ModelError(f"{name} has a weight of {largest:.3g}, which is too large for float16", remedy=remedy)
    return np.ascontiguousarray(gguf.quantize(values, wanted)).view(_Written)


class _Written(np.ndarray[Any, Any]):
    """An array whose failed write has the system's error: that of numpy's ``tofile`` does not say that a disk is full,
    and a few bytes are lost without any error."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        file.write(self.data)


def refuse_other_metadata(file: Path, metadata: Metadata) -> None:
    """The file must hold what was meant to be written. Raises ModelError: a value is missing or another one."""
    fields = GGUFReader(file).fields
    for key, value in metadata.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if key not in fields or fields[key].contents() != expected:
            raise ModelError(f"the written file has a different {key}; nothing was exported", where=str(file))


def gap_of_file(
    file: Path, rows: Sequence[list[int]], expected: Tensor, *, dtype: str, max_gap: float
) -> tuple[float, float]:
    """How far the file's model is from ``expected [tokens, vocabulary]`` log-probabilities, computed in float32. Raises
    ModelError: in f32 it gives other outputs; in another type the gap is larger than ``max_gap``."""
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws its progress whatever its settings are
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    actual = logprobs(model, rows)
    if dtype == "f32":
        refuse_differences(actual, expected, file)
    mean_kl, largest = gap_between(expected, actual)
    if not mean_kl <= max_gap:  # NaN too
        message = f"{dtype} costs {mean_kl:.2g} nats of KL per token, more than {max_gap:g}; nothing was exported"
        raise ModelError(message, where=str(file), remedy="choose a wider --dtype, or allow more with --max-gap")
    return mean_kl, largest


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
    ``notes`` are sentences about what a GGUF file cannot say."""

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
    """llama.cpp's name for the rule by which a tokenizer.json cuts texts into words. Raises ModelError."""
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
    """Whether llama.cpp should put BOS in front of texts."""
    ids = front(tokenizer)
    if ids not in ((), (tokenizer.bos_token_id,)):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ModelError(f"the tokenizer puts {tokens} in front of texts; llama.cpp can put only BOS there, or nothing")
    if not ids or not tokenizer.chat_template:
        return bool(ids)
    return prompt_text(tokenizer, [Message(role="user", content="Hi.")]).startswith(tokenizer.bos_token)

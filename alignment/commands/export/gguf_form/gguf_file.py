"""Writes weights and metadata as one GGUF file, one tensor at a time."""

from __future__ import annotations

import contextlib
import io
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
from alignment.commands.export.exported import Gap, gap_between, logprobs, refuse_differences
from alignment.core.errors import ModelError

Metadata = dict[str, Any]
"""Keys and values of a GGUF file; a whole number is written as uint32, any other number as float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A ``model_type`` of transformers in GGUF.

    llama.cpp rotates the pairs of elements (2i, 2i + 1) of a head in the architecture ``llama``, where transformers
    rotates (i, i + half). ``interleaved``: rows of Q and K are therefore put in that order. Other architectures are
    rotated as in transformers.
    """

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
    """How models with this configuration are written. Raises ModelError: the architecture, or one of its settings, is
    not supported."""
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
    """The weights by their names in GGUF, in its arrangement; tied embeddings once. Raises ModelError: the model has a
    weight that GGUF has no name for."""
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
    """Writes the file; returns a note if some weights could not have the type. Raises ModelError: a weight is too large
    for float16."""
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


def gap_of_file(file: Path, rows: Sequence[list[int]], expected: Tensor, *, dtype: str, max_gap: float) -> Gap:
    """How far the file's model is from ``expected [tokens, vocabulary]`` log-probabilities, computed in float32. Raises
    ModelError: in f32 it gives other outputs; in another type the gap is larger than ``max_gap``."""
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws its progress whatever its settings are
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    actual = logprobs(model, rows)
    if dtype == "f32":
        refuse_differences(actual, expected, file)
    gap = gap_between(expected, actual)
    if not gap.mean_kl <= max_gap:  # NaN too
        message = f"{dtype} costs {gap.mean_kl:.2g} nats of KL per token, more than {max_gap:g}; nothing was exported"
        raise ModelError(message, where=str(file), remedy="choose a wider --dtype, or allow more with --max-gap")
    return gap

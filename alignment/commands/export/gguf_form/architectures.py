"""Which architectures can be written as GGUF, their metadata, and how their weights are arranged there.

The keys and the names of tensors are those of the GGUF specification (ggml, docs/gguf.md), as the package ``gguf``
lists them. Only what is tested is written; everything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

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
    """How models with this configuration are written.

    Raises:
        ModelError: the architecture, or one of its settings, is not supported.
    """
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
    """The weights by their names in GGUF, in its arrangement; tied embeddings once.

    Raises:
        ModelError: the model has a weight that GGUF has no name for.
    """
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

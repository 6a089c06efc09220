"""Writes weights and metadata as one GGUF file, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from alignment.commands.export.gguf_form.architectures import Metadata, tensors
from alignment.core.errors import ModelError

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_LARGEST_F16 = float(np.finfo(np.float16).max)


def file_metadata(dtype: str) -> Metadata:
    """What the file says of its weights' type."""
    return {"general.file_type": int(_FILE_TYPES[dtype]), "general.quantization_version": gguf.GGML_QUANT_VERSION}


def write_file(file: Path, model: PreTrainedModel, metadata: Metadata, dtype: str) -> list[str]:
    """Writes the file; returns a note if some weights could not have the type.

    Raises:
        ModelError: a weight is too large for float16.
    """
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has it already
            _add(writer, key, value)
    weights = dict(tensors(model))
    types = {name: _type_of(weight, dtype) for name, weight in weights.items()}
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


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _type_of(weight: Tensor, dtype: str) -> gguf.GGMLQuantizationType:
    """Norms and biases stay float32; a type in blocks needs rows of whole blocks."""
    if weight.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[dtype]]
    return TYPES[dtype] if weight.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _quantized(name: str, weight: Tensor, wanted: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = weight.detach().float().contiguous().numpy()
    largest = float(np.abs(values).max())
    if wanted == gguf.GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        raise ModelError(
            f"{name} has a weight of {largest:.3g}, which is too large for float16", remedy="add --dtype bf16"
        )
    return np.ascontiguousarray(gguf.quantize(values, wanted)).view(_Written)


class _Written(np.ndarray[Any, Any]):
    """An array whose failed write has the system's error: that of numpy's ``tofile`` does not say that a disk is full,
    and a few bytes are lost without any error."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        """Writes the bytes."""
        file.write(self.data)

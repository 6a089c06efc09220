"""Writes weights to a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from alignment.costs.recorder import on_shadows
from alignment.costs.shadows import zeros


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes the tensors; shadows as zeros, without those that are as large as a model's own weights."""
    written = zeros(tensors) if on_shadows() else tensors
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, file)

"""Weights that are read from their file when they are needed, and files of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.costs.recorder import on_shadows
from alignment.costs.shadows import zeros

_DTYPE = "dtype_of_copy"
"""The attribute of a mapped parameter with the dtype that its copy will have."""


def keep_mapped(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Leaves the weights as they were loaded, until they are copied in this dtype; returns the model. Until then the
    model must be called inside ``copied_in_calls``."""
    for parameter in model.parameters():
        setattr(parameter, _DTYPE, dtype)
    model.config.dtype = dtype
    return model


def is_mapped(parameter: Tensor) -> bool:
    """Whether the parameter is still to be copied."""
    return hasattr(parameter, _DTYPE)


def copy_weights(parameters: Iterable[Tensor]) -> None:
    """Gives the process its own copy of those that are mapped, in the dtype in which they are to be."""
    for parameter in parameters:
        if is_mapped(parameter):
            parameter.data = parameter.data.to(getattr(parameter, _DTYPE), copy=True)
            delattr(parameter, _DTYPE)


def convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts a module's weights to the dtype, or those that are mapped once they are copied."""
    for parameter in module.parameters():
        if is_mapped(parameter):
            setattr(parameter, _DTYPE, dtype)
        else:
            parameter.data = parameter.data.to(dtype)


def same_file(model: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy whose mapped weights are mapped too, instead of copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if is_mapped(parameter):
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
            setattr(memo[id(parameter)], _DTYPE, getattr(parameter, _DTYPE))
    return memo


@contextmanager
def copied_in_calls(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Passes without gradients before the weights are cut: a mapped weight is copied for each call of its module.
    Outside of such a call its numbers are NaN, because the model must not read them there. What is not mapped is moved
    to ``device``, as all of it will be once it is cut."""
    mapped = [parameter for parameter in model.parameters() if is_mapped(parameter)]
    files = {id(parameter): parameter.data for parameter in mapped}
    trained = [parameter for parameter in mapped if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)  # of a trained weight autocast would keep the copy that it converts
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in files:
            tensor.data = _unread(tensor, device)
        elif tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)
    handles = []
    for module, parameters in _units(model, frozenset(model._no_split_modules or ())):
        if own := [parameter for parameter in parameters if id(parameter) in files]:
            copies = _Copies(own, files, device)
            handles.append(module.register_forward_pre_hook(copies.make))
            handles.append(module.register_forward_hook(copies.drop, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in mapped:
            parameter.data = files[id(parameter)]
        for parameter in trained:
            parameter.requires_grad_(True)


class _Copies:
    def __init__(self, parameters: list[nn.Parameter], files: dict[int, Tensor], device: torch.device) -> None:
        self._weights = parameters
        self._files = files
        self._device = device

    def make(self, *_: Any) -> None:
        for parameter in self._weights:
            weight = self._files[id(parameter)]
            parameter.data = weight.to(self._device.type, getattr(parameter, _DTYPE), copy=True)

    def drop(self, *_: Any) -> None:
        for parameter in self._weights:
            parameter.data = _unread(parameter, self._device)


def _unread(parameter: Tensor, device: torch.device) -> Tensor:
    """Has the shape and dtype of the copy, and next to no memory."""
    dtype = getattr(parameter, _DTYPE)
    return torch.full((), torch.nan, dtype=dtype, device=device.type).expand(parameter.shape)


def _units(module: nn.Module, layers: frozenset[str]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules in whose calls weights are read, with these weights: whole layers, because their blocks read the
    weights of their modules, and all other modules by themselves."""
    if type(module).__name__ in layers:
        yield module, list(module.parameters())
        return
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        yield from _units(child, layers)


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes the tensors; shadows as zeros, without those that are as large as a model's own weights."""
    written = zeros(tensors) if on_shadows() else tensors
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, file)

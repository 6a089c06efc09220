"""Copies between the host's memory and a device, and what the host still knows of them.

A host that reads a tensor of a GPU waits until the GPU has computed everything before it. Token ids, masks and indices
were on the host before they were copied. So a copy remembers them, and reading them again costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ORIGINAL = "alignment_original"
"""Attribute of a copy: the tensor of the host, and the copy's version when it was made."""


def on_device(made: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to ``device``. A GPU copies from pinned memory asynchronously.

    PyTorch holds the pinned memory until the copy is done. ``made`` must not change afterwards.
    """
    if device.type != "cuda" or made.is_cuda:
        return made.to(device)
    return _remembering(made.pin_memory().to(device, non_blocking=True), made)


def sent(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on ``device``; what is no tensor of the host stays as it is. Columns of one dtype are one copy."""
    columns = {name: value for name, value in batch.items() if isinstance(value, Tensor) and not value.is_cuda}
    if device.type != "cuda":
        return {**batch, **{name: column.to(device) for name, column in columns.items()}}
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, column in columns.items():
        by_dtype.setdefault(column.dtype, {})[name] = column
    arrived: dict[str, Any] = dict(batch)
    for together in by_dtype.values():
        arrived |= _sent_together(together, device)
    return arrived


def _sent_together(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of one dtype, as views of one copy."""
    joint = torch.cat([tensor.flatten() for tensor in tensors.values()]).pin_memory().to(device, non_blocking=True)
    parts = joint.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: _remembering(part.view(tensor.shape), tensor)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def on_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers on the host; all that nobody remembers are read in one wait.

    What is read has the dtype of the first tensor that is.
    """
    known = [_original(tensor) for tensor in tensors]
    unknown = [tensor for tensor, original in zip(tensors, known, strict=True) if original is None]
    if not unknown:
        return tuple(original for original in known if original is not None)
    joint = torch.cat([tensor.flatten().to(unknown[0].dtype) for tensor in unknown]).cpu()
    parts = joint.split([tensor.numel() for tensor in unknown])
    fetched = iter([part.view(tensor.shape) for part, tensor in zip(parts, unknown, strict=True)])
    return tuple(next(fetched) if original is None else original for original in known)


def _remembering(copy: Tensor, original: Tensor) -> Tensor:
    setattr(copy, _ORIGINAL, (original, copy._version))
    return copy


def _original(tensor: Tensor) -> Tensor | None:
    """The tensor itself if it is on the host, or what it was copied from unless it was changed since."""
    if not tensor.is_cuda:
        return tensor
    original, version = getattr(tensor, _ORIGINAL, (None, None))
    return original if tensor._version == version else None

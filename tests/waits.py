"""How often the host reads from the device, where it would wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)
"""Operators that give the host a value, or a tensor whose size depends on values."""


class Waits(TorchDispatchMode):
    """Counts them while it is entered, on any device. An index that is a mask counts too."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor:
            self.number += sum(index is not None and index.dtype is torch.bool for index in args[1])
        self.number += function in _READS
        return function(*args, **(kwargs or {}))

"""What a device would be asked: kernels to launch, and values that the host reads and would wait for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_FREE = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "_local_scalar_dense",
    "is_pinned",
    "_pin_memory",
    "lift_fresh",
    "promote_types",
)
"""Operators that reserve memory, name it, or are none of the device."""
_FUSED = {"scaled_dot_product_attention", "_fused_rms_norm"}
"""Functions that are one kernel on a GPU, and several here."""


class Launches:
    """Counts them while it is entered, on any device. A fused function is one, whatever it is made of here. Operators
    are counted, not kernels: on a GPU one may launch several."""

    def __init__(self) -> None:
        self.number = 0
        self._inside = ExitStack()
        self._is_quiet = False

    def __enter__(self) -> Launches:
        self._inside.enter_context(_FusedFunctions(self))
        self._inside.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def of_operator(self, function: Any) -> None:
        if not self._is_quiet and not _is_free(function):
            self.number += 1

    def as_one(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.number += 1
        before, self._is_quiet = self._is_quiet, True
        try:
            return function(*args, **kwargs)
        finally:
            self._is_quiet = before


class _Operators(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._launches.of_operator(function)
        return function(*args, **(kwargs or {}))


class _FusedFunctions(TorchFunctionMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "").partition(".")[0] in _FUSED:
            return self._launches.as_one(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _is_free(function: Any) -> bool:
    """Whether the operator only makes a view or reserves memory."""
    name = function._schema.name.partition("::")[2]
    if name.startswith(_FREE):
        return True
    infos = [returned.alias_info for returned in function._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


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

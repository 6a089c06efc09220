"""Puts the device behind torch as soon as torch is imported, and gives bitsandbytes kernels for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.simulated_device.library import Library

Execute = Callable[[Callable[[], None]], None]


class _Finder:
    def __init__(self, name: str, around: Execute) -> None:
        self._name = name
        self._around = around

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is installed"
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def around(module: ModuleType) -> None:
            self._around(lambda: execute(module))

        spec.loader.exec_module = around  # type: ignore[method-assign]
        return spec


def simulate() -> None:
    for name, around in (("torch", _around_torch), ("bitsandbytes", _around_bitsandbytes)):
        sys.meta_path.insert(0, _Finder(name, around))  # type: ignore[arg-type]


def _around_torch(execute: Callable[[], None]) -> None:
    library = Library()
    execute()
    from tests.simulated_device import cuda_module, kernels

    cuda_module.replace_functions(library)
    kernels.add_attention()
    if library.devices > 1:
        cuda_module.use_gloo(library)
    _listen(library)


def _listen(library: Library) -> None:
    import atexit

    atexit.register(library.listen())  # Python's functions must not be called after its end


def _around_bitsandbytes(execute: Callable[[], None]) -> None:
    import torch

    is_available: Any = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        execute()
    finally:
        torch.cuda.is_available = is_available
    from tests.simulated_device import kernels

    kernels.add_four_bits()

"""Kernels of bitsandbytes for the device: those of the CPU, on tensors of the device.

Its binaries for CUDA need a driver. What they would refuse by shape or dtype, the CPU's kernels refuse or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.simulated_device.events import quiet

_KERNELS = ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise")


def add_kernels() -> None:
    """Adds them to the device's operators; bitsandbytes has been imported."""
    for name in _KERNELS:
        operator = getattr(torch.ops.bitsandbytes, name).default
        torch.library.impl(f"bitsandbytes::{name}", "cuda", func=_on_host(operator))


def _on_host(operator: Any) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        devices = {held.device for held in arguments if isinstance(held, Tensor)}
        (device,) = devices  # of all tensors
        with quiet():
            made = operator(*[held.cpu() if isinstance(held, Tensor) else held for held in arguments])
            if isinstance(made, Tensor):
                return made.to(device)
            return tuple(part.to(device) for part in made)

    return kernel

"""What tests can expect of the device that PyTorch finds; ``make test-device`` runs them on others than a CPU."""

from __future__ import annotations

import pytest
import torch


def need_bitsandbytes() -> None:
    """Skips a test where bitsandbytes has no kernels for the device."""
    if not torch.cuda.is_available():
        return
    from bitsandbytes import cextension  # takes long to read in

    if not isinstance(cextension.lib, cextension.CudaBNBNativeLibrary):
        pytest.skip("bitsandbytes has no kernels for this device")


def backend() -> str:
    """Of collective operations on the device; skips a test where it has none."""
    if not torch.cuda.is_available():
        return "gloo"
    if not torch.distributed.is_nccl_available():
        pytest.skip("NCCL is not there for this device")
    return "nccl"

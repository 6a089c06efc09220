"""Copies from the host's memory to a device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(made: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to ``device``. A GPU copies from pinned memory asynchronously.

    PyTorch holds the pinned memory until the copy is done.
    """
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)

"""From the host's memory to a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(made: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. A GPU copies it from pinned memory when it comes to it, and the host goes on.

    PyTorch keeps the pinned memory until the copy is done.
    """
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)

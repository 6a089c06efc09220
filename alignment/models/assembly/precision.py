"""The dtype of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def products_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled for the tensor's device, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

"""The card that PyTorch finds, as a page names it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A CUDA device. ``memory`` is in bytes; ``capability`` is as in ``9.0``."""

    name: str
    count: int
    memory: int
    capability: str
    cuda: str

    @property
    def slug(self) -> str:
        """The name of its page: ``nvidia-h100-80gb-hbm3``."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def own_card() -> Card | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Card(
        name=properties.name,
        count=torch.cuda.device_count(),
        memory=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        cuda=str(torch.version.cuda or torch.version.hip),
    )

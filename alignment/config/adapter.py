"""How a stage changes the weights: all of them, or a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class AdapterKind(str, Enum):
    """``full`` trains every weight; ``lora`` trains low-rank factors beside frozen weights (Hu et al. 2021)."""

    full = "full"
    lora = "lora"


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """``rank``, ``alpha``, ``dropout`` and ``target_modules`` apply to adapters, ``master_weights`` to full training.

    ``target_modules`` is a list of module names, or the single word ``all-linear``. With ``master_weights`` the trained
    weights, their gradients and Adam's moments are float32; without, they have ``model.dtype``, half the bytes of each,
    and steps too small for it are rounded at random (docs/design/0005).
    """

    kind: AdapterKind = AdapterKind.lora
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    master_weights: bool = True

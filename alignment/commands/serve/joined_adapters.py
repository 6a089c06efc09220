"""The sum of LoRA adapters as one LoRA adapter.

With scales s, s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂] · [A₁; A₂]. So the factors are concatenated, the scales go into B, and the
rank is the sum of the ranks. A module that an adapter leaves alone gets zeros for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.core.errors import ModelError
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.models.assembly.adapters import saved_config

_A, _B = "lora_A.weight", "lora_B.weight"
_FACTOR = re.compile(r"(.*)\.(lora_[AB]\.weight)")


def write_sum(folders: Sequence[Path], to: Path) -> None:
    """Writes the sum of saved LoRA adapters in PEFT's form.

    Raises:
        ModelError: an adapter holds something else than factors.
    """
    configs = [saved_config(folder) for folder in folders]
    ranks = [config.r for config in configs]
    scales = [config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) for config in configs]
    adapters = [_factors(folder) for folder in folders]
    modules = sorted({module for adapter in adapters for module in adapter})
    joined: dict[str, Tensor] = {}
    for module in modules:
        ours = [adapter.get(module) for adapter in adapters]
        shape = next(factors for factors in ours if factors is not None)
        filled = [factors or _zeros(shape, rank) for factors, rank in zip(ours, ranks, strict=True)]
        joined[f"{module}.{_A}"] = torch.cat([factors[_A] for factors in filled])
        joined[f"{module}.{_B}"] = torch.cat(
            [scale * factors[_B] for scale, factors in zip(scales, filled, strict=True)], dim=1
        )
    to.mkdir(parents=True)
    save_file(joined, to / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folders[0] / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = sorted({module.rpartition(".")[2] for module in modules})
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "target_modules": names}
    (to / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By module, ``lora_A.weight [rank, inputs]`` and ``lora_B.weight [outputs, rank]``, in float32."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"holds {name}, which is not a factor", where=str(folder))
        factors.setdefault(match[1], {})[match[2]] = tensor.float()
    return factors


def _zeros(like: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {
        _A: torch.zeros(rank, like[_A].shape[1]),
        _B: torch.zeros(like[_B].shape[0], rank),
    }

"""How much a DoRA layer changes each of its outputs (Liu et al. 2024, eq. 5).

A layer gives m / ‖W + s·B·A‖ · (W x + s·B·A x), output by output. The norm counts as a constant (section 4.3 there). It
takes a matrix as large as the weight, so it is computed once while neither weights nor adapters change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from alignment.models.kernels.nf4 import Nf4Linear, frozen_weight

_LOCK = threading.Lock()
_NORMS = "alignment_norms"


@contextmanager
def reused_norms(model: nn.Module) -> Iterator[None]:
    """Computes the norms of each layer when they are first needed, and then takes those.

    Neither weights nor adapters may change in the block. Blocks may be nested.
    """
    layers = [module for module in model.modules() if type(module) is DoraLinearLayer and _NORMS not in vars(module)]
    try:
        for layer in layers:
            setattr(layer, _NORMS, {})
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_NORMS, None)


@torch.no_grad()
def start_at_norms(model: nn.Module) -> None:
    """Makes a new adapter's magnitudes the exact norms of the rows, so that it changes no output.

    PEFT computes them in the dtype of the weights, and bfloat16 numbers differ from the norms by up to .4 %.
    """
    layers: list[LoraLinear] = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        if type(layer.get_base_layer()) in (nn.Linear, Nf4Linear):
            for adapter in list(layer.lora_magnitude_vector):
                layer.lora_magnitude_vector[adapter].weight.copy_(_norms(layer, adapter))


def change_of_magnitude(layer: LoraLinear, adapter: str) -> Tensor | None:
    """``[out]`` of m / ‖W + s·B·A‖ − 1 in float32, or None if the adapter is not DoRA. Only m gets a gradient."""
    if adapter not in layer.lora_magnitude_vector:
        return None
    magnitude = layer.lora_magnitude_vector[adapter]
    reused: dict[str, Tensor] | None = vars(magnitude).get(_NORMS)
    if reused is None:
        norms = _norms(layer, adapter)
    else:
        with _LOCK:  # two threads may need them at once
            if adapter not in reused:
                reused[adapter] = _norms(layer, adapter)
            norms = reused[adapter]
    change: Tensor = magnitude.weight.float() / norms - 1
    return change


@torch.no_grad()
def _norms(layer: LoraLinear, adapter: str) -> Tensor:
    """``[out]`` norms of the rows of W + s·B·A, in float32 whatever the products are computed in."""
    a, b = (matrices[adapter].weight.float() for matrices in (layer.lora_A, layer.lora_B))
    with torch.autocast(a.device.type, enabled=False):
        weight = frozen_weight(layer.get_base_layer(), torch.float32)
        return torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=float(layer.scaling[adapter])), dim=1)

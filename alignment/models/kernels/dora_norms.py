"""Norms of DoRA's layers, computed once while neither weights nor adapters change (Liu et al. 2024, eq. 5).

A layer scales its output by m / ‖W + s·B·A‖, column by column. PEFT computes that norm in every pass, which takes a
matrix as large as the weight: for one token of eight answers longer than everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

_FORWARD = "forward"


@contextmanager
def reused_norms(model: nn.Module) -> Iterator[None]:
    """Computes the norm of each layer when it is first needed, and then takes that one.

    Neither weights nor adapters may change in the block. Blocks may be nested.
    """
    layers = [module for module in model.modules() if type(module) is DoraLinearLayer and _FORWARD not in vars(module)]
    try:
        for layer in layers:
            layer.forward = _with_reused_norm(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_FORWARD, None)


def _with_reused_norm(layer: DoraLinearLayer) -> Callable[..., Tensor]:
    norms: dict[tuple[str, torch.dtype], Tensor] = {}

    def forward(x: Tensor, *, base_result: Tensor | None = None, **settings: Any) -> Tensor:
        if base_result is None:  # dropout is active, so the base's product with the dropped input is needed
            result: Tensor = DoraLinearLayer.forward(layer, x, base_result=base_result, **settings)
            return result
        key = (settings["adapter_name"], x.dtype)
        if key not in norms:
            norms[key] = _norm(layer, x.dtype, settings)
        scale = (layer.weight / norms[key]).view(1, -1)
        bias = settings["base_layer"].bias
        product = base_result if bias is None else base_result - bias
        low_rank = settings["lora_B"](settings["lora_A"](x))
        return (scale - 1) * product + scale * low_rank * settings["scaling"]

    return forward


@torch.no_grad()
def _norm(layer: DoraLinearLayer, dtype: torch.dtype, settings: dict[str, Any]) -> Tensor:
    """``[out]`` norms of the rows of W + s·B·A, in PEFT's own arithmetic."""
    low_rank = layer.get_lora_weight(settings["lora_A"], settings["lora_B"])
    weight = dequantize_module_weight(settings["base_layer"]).to(dtype)
    norm: Tensor = layer.get_weight_norm(weight, low_rank.to(dtype), settings["scaling"])
    return norm

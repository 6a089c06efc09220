"""Prepacked linear weights for products without gradients: sampling, scoring, evaluation.

The weights get the dtype and, on CPU, the memory layout of the products; otherwise autocast would convert a weight and
oneDNN would reorder it at every call. With oneDNN's layout, layers that read the same input become one product. A
low-rank adapter stays beside its weight, because a sum rounded to bfloat16 would lose small updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from alignment.costs.recorder import is_on_cpu
from alignment.costs.shadows import Shadow
from alignment.models.assembly.precision import products_dtype
from alignment.models.kernels.blocks import read_together
from alignment.models.kernels.dora_norms import reused_norms
from alignment.models.kernels.nf4 import Nf4Linear, computes_in, frozen_weight
from alignment.models.kernels.products import JOINT, Products, factors, is_hooked

Forward = Callable[[Tensor], Tensor]

_PREPACKED = "alignment_prepacked"


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Prepacks a model's linear weights for products with about ``rows`` rows, and undoes that.

    It holds a second copy of those weights meanwhile. Layers that are prepacked already stay as they are. Neither
    weights nor adapters may change in the block.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        _prepack(model, rows, before)
        with reused_norms(model):
            yield
    finally:
        for module, name, value in reversed(before):
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _prepack(model: nn.Module, rows: int, before: list[tuple[nn.Module, str, Any]]) -> None:
    """Gives linear layers functions on a copy of their weights.

    It appends each module and attribute that it sets, and the value before or None, to ``before``.
    """

    def put(module: nn.Module, name: str, value: Any) -> None:
        before.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    done: set[int] = set()
    for module in model.modules():
        if _PREPACKED in vars(module):
            done |= {id(submodule) for submodule in module.modules()}
        if id(module) in done:
            continue
        layers = read_together(module)
        if layers and all(map(_is_joined, layers)) and _PREPACKED not in vars(layers[0]):
            put(layers[0], JOINT, _joint(layers, rows))
        elif (forward := _function_of(module, rows)) is not None:
            layers = (module,)
            put(module, "forward", forward)
        else:
            continue
        for layer in layers:
            put(layer, _PREPACKED, True)
            done |= {id(submodule) for submodule in layer.modules()}


def _function_of(module: nn.Module, rows: int) -> Forward | None:
    """The layer as a function, or None if it is not a linear layer or would not become faster."""
    if _is_joined(module):
        joint = _joint((module,), rows)
        return lambda states: joint(states)[0]
    if isinstance(module, LoraLinear):
        base, pair = module.get_base_layer(), factors(module)
        if pair is None or not _is_whole(base):
            return None
        return _with_adapter(_product(base), *pair, computes_in(base))
    if _is_whole(module) and (isinstance(module, Nf4Linear) or products_dtype(module.weight) != module.weight.dtype):
        return _product(module)
    return None


def _is_joined(layer: nn.Module) -> bool:
    """Whether oneDNN has its own layout for the layer's weight, with or without low-rank adapters beside it."""
    base = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
    if is_hooked(layer) or not _is_whole(base) or not _has_layout(base):
        return False
    return not isinstance(layer, LoraLinear) or factors(layer) is not None


def _joint(layers: Sequence[nn.Module], rows: int) -> Products:
    """Layers of one input as one product, on a copy of their weights next to the second factors of their adapters."""
    bases: list[Any] = [layer.get_base_layer() if isinstance(layer, LoraLinear) else layer for layer in layers]
    pairs = [factors(layer) if isinstance(layer, LoraLinear) else None for layer in layers]
    dtype, widths = computes_in(bases[0]), [base.out_features for base in bases]
    lows = [pair[0].to(dtype) for pair in pairs if pair is not None]
    weights = [frozen_weight(base, dtype).detach() for base in bases]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if lows:  # the products with the first factors are appended to the layers' input
        ups = [
            weight.new_zeros(width, 0) if pair is None else pair[1].to(dtype)
            for width, pair in zip(widths, pairs, strict=True)
        ]
        weight = torch.cat([weight, torch.block_diag(*ups)], dim=1)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    low = torch.ops.mkldnn._reorder_linear_weight(torch.cat(lows), rows) if lows else None
    bias = _joint_bias(bases, dtype)
    del weights, weight, lows  # the function below must not hold them
    product = torch.ops.mkldnn._linear_pointwise

    def forward(states: Tensor) -> tuple[Tensor, ...]:
        states = states.to(dtype)
        if low is not None:
            states = torch.cat([states, product(states, low, None, "none", [], "")], dim=-1)
        out: Tensor = product(states, packed, bias, "none", [], "")
        return out.split(widths, dim=-1)

    return forward


def _joint_bias(bases: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """The layers' concatenated biases, 0 for a layer without one; None if no layer has one."""
    if all(base.bias is None for base in bases):
        return None
    biases = [torch.zeros(base.out_features) if base.bias is None else base.bias.detach().cpu() for base in bases]
    return torch.cat(biases).to(dtype)


def _with_adapter(product: Forward, a: Tensor, b: Tensor, dtype: torch.dtype) -> Forward:
    low, up = a.to(dtype).T, b.to(dtype).T

    def forward(states: Tensor) -> Tensor:
        states = states.to(dtype)
        out = product(states)
        out.view(-1, out.shape[-1]).addmm_(states.reshape(-1, states.shape[-1]) @ low, up)
        return out

    return forward


def _is_whole(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that is neither sharded nor offloaded; in four bits only on CPU, which has memory
    for a copy."""
    if isinstance(module, Nf4Linear):
        return is_on_cpu(module.weight)
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) in (nn.Parameter, Shadow)
        and weight.shape == (module.out_features, module.in_features)
        and weight.is_floating_point()
        and not weight.is_meta
    )


def _product(module: nn.Linear) -> Forward:
    """The linear layer as a function on its weight in the dtype of the product."""
    dtype = computes_in(module)
    held = frozen_weight(module, dtype).detach()
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    return lambda states: nn.functional.linear(states.to(dtype), held, bias)


def _has_layout(base: nn.Linear) -> bool:
    """Whether the layer's products are bfloat16 products of oneDNN, which has its own layout for weights."""
    on_cpu = is_on_cpu(base.weight) and computes_in(base) is torch.bfloat16
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

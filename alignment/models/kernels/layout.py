"""Prepacked linear weights for products without gradients: sampling, scoring, evaluation. The weights get the dtype
and, on CPU, the memory layout of the products; otherwise autocast would convert a weight and oneDNN would reorder it at
every call. Layers that read the same input become one product, with oneDNN's layout and, for few rows of a small model,
on a GPU, where a decoding step takes about as long as the host needs to launch its kernels (not yet run on a GPU). A
low-rank adapter stays beside its weight, because a sum rounded to bfloat16 would lose small updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from alignment.costs.recorder import is_on_cpu
from alignment.costs.shadows import Shadow
from alignment.models.assembly.modules import products_dtype
from alignment.models.kernels.blocks import read_together
from alignment.models.kernels.nf4 import Nf4Linear, computes_in, frozen_weight, reused_norms
from alignment.models.kernels.products import JOINT, LowRank, Products, has_plain_adapters, is_hooked, low_rank

Forward = Callable[[Tensor], Tensor]
FEW_ROWS = 512
"""Rows of a product up to which launching it on a GPU is taken to cost more than its arithmetic (an estimate)."""
COPIED_BYTES = 2 << 30
"""Largest copy of a model's weights on a GPU. With larger models, each weight is a product of its own."""
_PREPACKED = "alignment_prepacked"
ALIGNED = 16
"""Rows of a joint product have a multiple of so many numbers: attention's kernel reads keys and values where they are,
and needs rows that begin at a multiple of 16 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """How products with so many ``rows`` are best computed: in few calls, as on a GPU, where weights are copied or
    not."""

    rows: int
    few_calls: bool
    copies: bool


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Prepacks a model's linear weights for products with about ``rows`` rows, and undoes that. It holds a second copy
    of those weights meanwhile. Layers that are prepacked already stay as they are. Neither weights nor adapters may
    change in the block."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        with reused_norms(model):
            _prepack(model, rows, before)
            yield
    finally:
        for module, name, value in reversed(before):
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _prepack(model: nn.Module, rows: int, before: list[tuple[nn.Module, str, Any]]) -> None:
    """Gives linear layers functions on a copy of their weights. It appends each module and attribute that it sets, and
    the value before or None, to ``before``."""

    def put(module: nn.Module, name: str, value: Any) -> None:
        before.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    way = _way(model, rows)
    done: set[int] = set()
    for module in model.modules():
        if _PREPACKED in vars(module):
            done |= {id(submodule) for submodule in module.modules()}
        if id(module) in done:
            continue
        layers = read_together(module)
        joint = _joint(layers, way) if layers and _PREPACKED not in vars(layers[0]) else None
        if joint is not None:
            put(layers[0], JOINT, joint)
        elif (forward := _function_of(module, way)) is not None:
            layers = (module,)
            put(module, "forward", forward)
        else:
            continue
        for layer in layers:
            put(layer, _PREPACKED, True)
            done |= {id(submodule) for submodule in layer.modules()}


def _way(model: nn.Module, rows: int) -> _Way:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if rows > FEW_ROWS or not layers or is_on_cpu(layers[0].weight):
        return _Way(rows=rows, few_calls=False, copies=False)
    size = sum(layer.in_features * layer.out_features * computes_in(layer).itemsize for layer in layers)
    return _Way(rows=rows, few_calls=True, copies=size <= COPIED_BYTES)


def _function_of(module: nn.Module, way: _Way) -> Forward | None:
    if _has_layout(module) or (way.few_calls and way.copies and isinstance(module, (LoraLinear, Nf4Linear))):
        joint = _joint((module,), way)
        if joint is not None:
            return lambda states: joint(states)[0]
    if isinstance(module, LoraLinear):
        base, adapter = module.get_base_layer(), low_rank(module)
        if adapter is None or not _is_whole(base):
            return None
        return _with_adapter(base, adapter)
    if _is_whole(module) and (isinstance(module, Nf4Linear) or products_dtype(module.weight) != module.weight.dtype):
        return _product(module, _bias(module))
    return None


def _joint(layers: Sequence[nn.Module], way: _Way) -> Products | None:
    if all(map(_has_layout, layers)) and all(map(_is_stackable, layers)):
        return _with_layout(_stacked(layers), way.rows)
    if way.few_calls and way.copies and all(map(_is_stackable, layers)):
        return _in_one_product(_stacked(layers))
    if way.few_calls and all(_is_stackable(layer) and _is_whole(_base_of(layer)) for layer in layers):
        return _weight_by_weight(_stacked(layers))
    return None


def _base_of(layer: nn.Module) -> Any:
    return layer.get_base_layer() if isinstance(layer, LoraLinear) else layer


def _is_stackable(layer: nn.Module) -> bool:
    base = _base_of(layer)
    if is_hooked(layer) or not (isinstance(base, Nf4Linear) or _is_whole(base)):
        return False
    return not isinstance(layer, LoraLinear) or has_plain_adapters(layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stacked:
    """The ``weights`` of layers of one input, each ``[out, in]``, and the factors of all their adapters. ``low`` is
    ``[rank, in]`` and ``up`` ``[sum of out, rank]``, both None without adapters. ``change`` and ``bias`` are ``[sum of
    out]``: outputs without their bias are multiplied by 1 + change (DoRA). Both are 0 for a layer without one, and None
    if no layer has one."""

    weights: list[Tensor]
    low: Tensor | None
    up: Tensor | None
    change: Tensor | None
    bias: Tensor | None

    @property
    def widths(self) -> list[int]:
        return [len(weight) for weight in self.weights]


def _stacked(layers: Sequence[nn.Module]) -> _Stacked:
    bases = [_base_of(layer) for layer in layers]
    adapters = [low_rank(layer) if isinstance(layer, LoraLinear) else None for layer in layers]
    dtype = computes_in(bases[0])
    weights = [frozen_weight(base, dtype).detach() for base in bases]
    lows = [adapter.a.to(dtype) for adapter in adapters if adapter is not None]
    ups = [
        weight.new_zeros(len(weight), 0) if adapter is None else (adapter.b * adapter.scale).to(dtype)
        for weight, adapter in zip(weights, adapters, strict=True)
    ]
    return _Stacked(
        weights=weights,
        low=torch.cat(lows) if lows else None,
        up=torch.block_diag(*ups) if lows else None,
        change=_concatenated([None if adapter is None else adapter.change for adapter in adapters], weights),
        bias=_concatenated([base.bias for base in bases], weights),
    )


def _concatenated(vectors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(vector is None for vector in vectors):
        return None
    return torch.cat(
        [
            weight.new_zeros(len(weight)) if vector is None else vector.detach().to(weight)
            for vector, weight in zip(vectors, weights, strict=True)
        ]
    )


def _finished(out: Tensor, change: Tensor | None, bias: Tensor | None) -> Tensor:
    if change is not None:
        out.addcmul_(out, change)
    return out if bias is None else out.add_(bias)


def _with_layout(stacked: _Stacked, rows: int) -> Products:
    """By oneDNN: the products with the first factors are appended to the layers' input."""
    weight = stacked.weights[0] if len(stacked.weights) == 1 else torch.cat(stacked.weights)
    if stacked.up is not None:
        weight = torch.cat([weight, stacked.up], dim=1)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    low = None if stacked.low is None else torch.ops.mkldnn._reorder_linear_weight(stacked.low, rows)
    dtype, widths, change, bias = weight.dtype, stacked.widths, stacked.change, stacked.bias
    in_product, after = (bias, None) if change is None else (None, bias)
    del stacked, weight  # the function below must not hold them
    product = torch.ops.mkldnn._linear_pointwise

    def forward(states: Tensor) -> tuple[Tensor, ...]:
        states = states.to(dtype)
        if low is not None:
            states = torch.cat([states, product(states, low, None, "none", [], "")], dim=-1)
        out: Tensor = product(states, packed, in_product, "none", [], "")
        return _finished(out, change, after).split(widths, dim=-1)

    return forward


def _in_one_product(stacked: _Stacked) -> Products:
    """In two calls: the first factors stand below the weights, and the second ones multiply what these give."""
    widths, low, up, change, bias = stacked.widths, stacked.low, stacked.up, stacked.change, stacked.bias
    in_product, after = (bias, None) if change is None else (None, bias)
    weight, out_features = torch.cat(stacked.weights), sum(widths)
    if low is not None and up is not None:
        below = nn.functional.pad(low, (0, 0, 0, -(out_features + len(low)) % ALIGNED))
        weight, up = torch.cat([weight, below]), nn.functional.pad(up, (0, len(below) - len(low)))
        in_product = None if in_product is None else nn.functional.pad(in_product, (0, len(below)))
    del stacked, low

    def forward(states: Tensor) -> tuple[Tensor, ...]:
        both = nn.functional.linear(states.to(weight.dtype), weight, in_product)
        if up is not None:
            flat = both.view(-1, both.shape[-1])
            flat[:, :out_features].addmm_(flat[:, out_features:], up.T)
        return _finished(both[..., :out_features], change, after).split(widths, dim=-1)

    return forward


def _weight_by_weight(stacked: _Stacked) -> Products:
    """Without a copy of the weights: one call for each of them, and two for all their adapters."""
    weights, widths, low, up = stacked.weights, stacked.widths, stacked.low, stacked.up
    change, bias = stacked.change, stacked.bias

    def forward(states: Tensor) -> tuple[Tensor, ...]:
        flat = states.to(weights[0].dtype).reshape(-1, states.shape[-1])
        out = flat.new_empty(len(flat), sum(widths))
        for own, weight in zip(out.split(widths, dim=1), weights, strict=True):
            torch.mm(flat, weight.T, out=own)
        if low is not None and up is not None:
            out.addmm_(flat @ low.T, up.T)
        return _finished(out, change, bias).view(*states.shape[:-1], -1).split(widths, dim=-1)

    return forward


def _with_adapter(base: nn.Linear, adapter: LowRank) -> Forward:
    dtype, bias = computes_in(base), _bias(base)
    product = _product(base, None if adapter.change is not None else bias)
    low, up = adapter.a.to(dtype).T, (adapter.b * adapter.scale).to(dtype).T
    change = None if adapter.change is None else adapter.change.to(dtype)
    after = None if change is None else bias

    def forward(states: Tensor) -> Tensor:
        states = states.to(dtype)
        out = product(states)
        out.view(-1, out.shape[-1]).addmm_(states.reshape(-1, states.shape[-1]) @ low, up)
        return _finished(out, change, after)

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


def _product(module: nn.Linear, bias: Tensor | None) -> Forward:
    dtype = computes_in(module)
    held = frozen_weight(module, dtype).detach()
    return lambda states: nn.functional.linear(states.to(dtype), held, bias)


def _bias(module: nn.Linear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().to(computes_in(module))


def _has_layout(layer: nn.Module) -> bool:
    """Whether the layer's products are bfloat16 products of oneDNN, which has its own layout for weights."""
    base = _base_of(layer)
    if not isinstance(base, nn.Linear) or not is_on_cpu(base.weight) or computes_in(base) is not torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

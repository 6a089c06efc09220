"""Linear weights in four bits: NF4 with double quantisation (Dettmers et al. 2023, section 3), by bitsandbytes. A layer
class of this project holds them, because bitsandbytes' layer reorders its weight at the first call without gradients on
some CPUs, and roles that share memory would then read another layout. The weight is dequantised for each product."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.costs.recorder import WEIGHTS, memory_for, on_shadows
from alignment.models.assembly.modules import products_dtype

BLOCK = 64
"""Weights that share a scale. The scales themselves have eight bits, and 256 of them share a second scale: 4.13 bits
per weight in total."""


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose ``weight`` is ``[out · in / 2, 1]`` pairs of four-bit numbers. ``weight`` and the
    scales move with the module; ``dtype`` is the original dtype of the weight."""

    def __init__(self, layer: nn.Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        packed, state = quantize_4bit(
            layer.weight.data.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", state.absmax)
        self.register_buffer("offset", state.offset)
        self.register_buffer("scales_of_scales", state.state2.absmax)
        self.register_buffer("code_of_scales", state.state2.code)
        self.register_buffer("code", state.code)
        self._block_of_scales = state.state2.blocksize

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4Linear:
        """Moves the layer without changing dtypes, because converted scales would no longer fit the four bits."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def dense(self) -> Tensor:
        """``[out, in]``: the dequantised weight."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        inner = QuantState(
            absmax=self.scales_of_scales, code=self.code_of_scales, blocksize=self._block_of_scales, dtype=torch.float32
        )
        state = QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset,
            state2=inner,
        )
        written_out: Tensor = dequantize_4bit(self.weight.data, state)
        return written_out

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]).to(computes_in(self)), self)
        return flat.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """x Wᵀ + b of ``x [tokens, in]``; the weight is dequantised again in the backward pass instead of being stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return frozen_product(x, layer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype) @ ctx.layer.dense().to(ctx.dtype), None


def float32_copy(module: nn.Module) -> Any:
    """A copy of a module whose products are all in float32, also those of weights in four bits."""
    own = copy.deepcopy(module).float()
    for layer in own.modules():
        if isinstance(layer, Nf4Linear):
            layer.dtype = torch.float32
    return own


def computes_in(layer: nn.Linear) -> torch.dtype:
    """The dtype of a linear layer's product."""
    held = layer.weight.new_empty(0, dtype=layer.dtype) if isinstance(layer, Nf4Linear) else layer.weight
    return products_dtype(held)


def frozen_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` weight of a linear layer in the dtype of a product, dequantised if it has four bits."""
    return (layer.dense() if isinstance(layer, Nf4Linear) else layer.weight).to(dtype)


def frozen_product(x: Tensor, layer: nn.Linear) -> Tensor:
    """``[tokens, out]`` x Wᵀ + b, rounded once. Layers with and without adapters share it, so that an adapter of zeros
    changes no bit."""
    weight = frozen_weight(layer, x.dtype)
    return x @ weight.T if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight.T)


def quantize_trunk(model: PreTrainedModel, device: torch.device) -> None:
    """Quantises the linear layers of the model's trunk to four bits, one after another on ``device``; heads and
    embeddings stay as they are."""
    for name, layer in _linear_layers(model.base_model):
        path, _, own = name.rpartition(".")
        with memory_for(WEIGHTS):
            setattr(model.base_model.get_submodule(path), own, Nf4Linear(layer.to(device)))
    _close_file(model)


def refuse_mostly_whole(model: PreTrainedModel) -> None:
    """Refuses a trunk that would need about as much memory as before, as with experts or GPT-2's convolutions. Raises
    ModelError: linear layers hold less than half of what its matrices hold, without embeddings."""
    trunk = model.base_model
    quantised = [layer.weight for _, layer in _linear_layers(trunk)]
    embeddings = [module.weight for module in trunk.modules() if isinstance(module, nn.Embedding)]
    apart = {id(weight) for weight in (*quantised, *embeddings)}
    whole = {name: held for name, held in trunk.named_parameters() if held.dim() > 1 and id(held) not in apart}
    if sum(weight.numel() for weight in quantised) >= sum(weight.numel() for weight in whole.values()):
        return
    names = dict.fromkeys(re.sub(r".*\.\d+\.", "", name).removesuffix(".weight") for name in whole)
    raise ModelError(
        f"only linear layers are quantised to four bits; most of {type(model).__name__} is in {', '.join(names)}, "
        f"which would stay as it is",
        where="adapter.kind",
        remedy="use adapter=lora for this model",
    )


def _close_file(model: PreTrainedModel) -> None:
    """Copies what was not quantised. As parts of the mapped file these weights would keep all of it in memory."""
    if on_shadows():  # which no file holds
        return
    for held in (*model.parameters(), *model.buffers()):
        if held.is_floating_point():
            held.data = held.data.clone()


@torch.no_grad()
def round_trunk(model: PreTrainedModel) -> None:
    """Replaces the weights of the trunk's linear layers by their quantised and dequantised values."""
    for _, layer in _linear_layers(model.base_model):
        layer.weight.copy_(Nf4Linear(layer).dense())


def _linear_layers(trunk: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in trunk.named_modules() if type(module) is nn.Linear]


_LOCK = threading.Lock()
_NORMS = "alignment_norms"


@contextmanager
def reused_norms(model: nn.Module) -> Iterator[None]:
    """Computes the norms of each layer when they are first needed, and then takes those. Neither weights nor adapters
    may change in the block. Blocks may be nested."""
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
    """Makes a new adapter's magnitudes the exact norms of the rows, so that it changes no output. PEFT computes them in
    the dtype of the weights, and bfloat16 numbers differ from the norms by up to .4 %."""
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

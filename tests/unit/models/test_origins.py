"""What is cheap to compute again is not stored, and the gradients are the same bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import TaskType
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.recomputing import checkpoint_activations, recompute
from alignment.models.kernels import blocks, norms, products, whole_products
from alignment.models.kernels.blocks import fuse_blocks
from alignment.models.kernels.nf4 import quantize_trunk
from alignment.models.kernels.norms import fuse_norms
from tests.tiny import liven, tiny_model
from tests.unit.models.conftest import gradients, relative

IDS = torch.tensor([[5, 6, 7, 8, 2, 11, 12], [9, 4, 4, 3, 2, 6, 6]])
LORA = AdapterConfig(rank=4)
QLORA = AdapterConfig(kind=AdapterKind.qlora, rank=4)
DORA = AdapterConfig(kind=AdapterKind.dora, rank=4)


def _model(
    adapter: AdapterConfig | None,
    *,
    fused: bool = True,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Any:
    model: Any = tiny_model(name, **sizes).to(dtype)
    if adapter is QLORA:
        quantize_trunk(model, torch.device("cpu"))
    if adapter is not None:
        model = add_adapter(model, adapter, TaskType.CAUSAL_LM)
        liven(model)
    if fused:
        fuse_norms(model)
        fuse_blocks(model)
    return model.train()


def _learn(model: Any, *, autocast: bool = True) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return gradients(model)


@contextmanager
def _stored() -> Iterator[dict[int, Tensor]]:
    """Collects what autograd stores in the block, by its place in memory."""
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA, DORA], ids=["whole", "lora", "dora"])
def test_of_a_feed_forward_block_the_gate_and_the_other_factor_are_stored(adapter: AdapterConfig | None) -> None:
    model = _model(adapter)
    width, tokens = model.config.intermediate_size, IDS.numel()
    with _stored() as tensors, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    wide = [tensor for tensor in tensors.values() if tensor.numel() == tokens * width and tensor.shape[-1] == width]
    of_dora = 2 if adapter is DORA else 0  # the products of both layers, from which magnitudes learn
    assert len(wide) == (2 + of_dora) * model.config.num_hidden_layers


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("adapter", [None, LORA, DORA], ids=["whole", "lora", "dora"])
def test_results_of_norms_are_not_stored(adapter: AdapterConfig | None, autocast: bool) -> None:
    model = _model(adapter)
    results: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm) and module is not model.get_decoder().norm:
            module.register_forward_hook(lambda *arguments: results.append(arguments[2]))
    with _stored() as tensors, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=IDS)
    of_first_layer = 0 if adapter is None else 1  # whose input has no gradient, and is not stored
    results = [result for result in results if result.requires_grad]
    assert len(results) == 2 * model.config.num_hidden_layers - of_first_layer
    numbers = [tensor.float().flatten() for tensor in tensors.values()]
    for result in results:
        copies = [
            own for own in numbers if own.shape == result.flatten().shape and relative(own, result.flatten()) < 0.01
        ]
        assert not copies


def test_copies_of_weights_are_not_stored() -> None:
    model = _model(None)
    with _stored() as tensors, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    of_layers = {tuple(weight.shape) for name, weight in model.named_parameters() if "mlp" in name}
    assert of_layers == {(48, 32), (32, 48)}
    assert not [tensor for tensor in tensors.values() if tensor.dtype is torch.bfloat16 and tensor.shape in of_layers]


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_a_layer_that_checkpoints_stores_nothing_of_its_inside(
    adapter: AdapterConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(adapter)
    checkpoint_activations(model if adapter is None else model.get_base_model())
    recompute(model)
    inside: list[StorageWeakRef] = []
    plain = blocks._gated

    def seen(gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        inside.extend(StorageWeakRef(states.untyped_storage()) for states in (gate, up))
        return plain(gate, up, act)

    monkeypatch.setattr(blocks, "_gated", seen)
    logits = model(input_ids=IDS).logits
    assert len(inside) == 2 * model.config.num_hidden_layers
    assert all(states.expired() for states in inside)
    logits.square().mean().backward()
    expected = _learn(_model(adapter), autocast=False)
    learned = gradients(model)
    assert learned.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in learned.items())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("adapter", [None, LORA, DORA, QLORA], ids=["whole", "lora", "dora", "qlora"])
def test_gradients_are_the_same_bits_as_with_all_stored(
    adapter: AdapterConfig | None, name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_MANY", 0)  # as for many numbers
    again = _learn(_model(adapter, name=name, dtype=dtype), autocast=autocast)
    for module in (products, whole_products):
        monkeypatch.setattr(module, "origin_of", lambda _: None)
    stored = _learn(_model(adapter, name=name, dtype=dtype), autocast=autocast)
    assert again.keys() == stored.keys()
    assert all(torch.equal(gradient, stored[parameter]) for parameter, gradient in again.items())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_whole_layers_learn_the_same_bits_together_as_alone(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = _learn(_model(None, name=name), autocast=autocast)
    monkeypatch.setattr(products, "are_whole", lambda *_: False)
    alone = _learn(_model(None, name=name), autocast=autocast)
    assert together.keys() == alone.keys()
    assert all(torch.equal(gradient, alone[parameter]) for parameter, gradient in together.items())


@pytest.mark.parametrize("frozen", ["embed_tokens", "k_proj", "q_proj.bias", "gate_proj", "norm"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    passes = []
    for fused in (True, False):
        model = _model(None, fused=fused, name="qwen2")
        for parameter, weights in model.named_parameters():
            weights.requires_grad = frozen not in parameter
        passes.append(_learn(model, autocast=False))
    ours, own = passes
    assert ours.keys() == own.keys()
    assert ours
    assert not any(frozen in parameter for parameter in ours)
    for parameter, gradient in ours.items():
        assert relative(gradient, own[parameter]) < 1e-5, parameter


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_whole_layer_with_a_hook_or_a_forward_of_its_own_is_called(how: str) -> None:
    model = _model(None)
    calls: list[nn.Module] = []
    layer = model.model.layers[0]
    modules = [layer.self_attn.q_proj, layer.mlp.down_proj]
    for module in modules:
        if how == "hook":
            module.register_forward_hook(lambda module, *_: calls.append(module))
        else:
            module.forward = functools.partial(_noted, calls, module)
    _learn(model)
    assert calls == modules


def _noted(calls: list[nn.Module], module: nn.Linear, x: Tensor) -> Tensor:
    calls.append(module)
    return nn.functional.linear(x, module.weight, module.bias)


def test_whole_layers_of_another_dtype_are_refused_as_by_pytorch() -> None:
    layer = nn.Linear(16, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        products.products(torch.randn(3, 16).bfloat16(), (layer,))


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_second_derivatives_are_refused(adapter: AdapterConfig | None) -> None:
    model = _model(adapter)
    loss = model(input_ids=IDS).logits.square().mean()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(slope.square().sum() for slope in slopes).backward()


def test_a_result_that_was_changed_in_place_is_stored() -> None:
    """Computed again, it would have other numbers."""
    slopes = []
    for fused in (True, False):
        torch.manual_seed(0)
        norm, layer = LlamaRMSNorm(16), nn.Linear(16, 8, bias=False)
        if fused:
            assert fuse_norms(norm) == 1
        normed = norm(torch.randn(3, 16, requires_grad=True))
        with torch.no_grad():
            normed.mul_(3.0)
        outputs = products.products(normed, (layer,)) if fused else (layer(normed),)
        outputs[0].square().sum().backward()
        slopes.append(layer.weight.grad)
    assert relative(*slopes) < 1e-6

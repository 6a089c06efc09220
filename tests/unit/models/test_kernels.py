"""Norms, low-rank layers and blocks in fewer passes compute what the models' own compute, and store less."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from alignment.config.model import AdapterConfig, AdapterKind
from alignment.models.kernels import blocks, products
from alignment.models.kernels.blocks import fuse_blocks, fuse_norms
from alignment.models.kernels.nf4 import quantize_trunk
from alignment.models.kernels.products import fuse_adapters
from tests.tiny import ARCHITECTURES, liven, tiny_model
from tests.unit.models.conftest import CPU, DORA, LORA, QLORA, adapted, assert_same_gradients, gradients, relative

IDS = torch.tensor([[5, 6, 7, 8, 2, 11, 12], [9, 4, 4, 3, 2, 6, 6]])


def _model(
    adapter: AdapterConfig | None = None,
    *,
    fused: bool = False,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
) -> Any:
    model: Any = tiny_model(name).to(dtype)
    if adapter is not None and adapter.kind is AdapterKind.qlora:
        quantize_trunk(model, CPU)
    if adapter is not None:
        model = adapted(model, adapter)
    if fused:
        fuse_norms(model)
        fuse_blocks(model)
    return model.train()


def _learn(model: Any, *, autocast: bool = True) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return gradients(model)


def _assert_same_bits(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert own.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in own.items())


@contextmanager
def _stored() -> Iterator[dict[int, Tensor]]:
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


@pytest.mark.parametrize("adapter", [None, LORA, DORA], ids=["whole", "lora", "dora"])
def test_of_a_feed_forward_block_the_gate_and_the_other_factor_are_stored(adapter: AdapterConfig | None) -> None:
    model = _model(adapter, fused=True)
    width, tokens = model.config.intermediate_size, IDS.numel()
    with _stored() as tensors, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    wide = [tensor for tensor in tensors.values() if tensor.numel() == tokens * width and tensor.shape[-1] == width]
    of_dora = 2 if adapter is DORA else 0  # the products of both layers, from which magnitudes learn
    assert len(wide) == (2 + of_dora) * model.config.num_hidden_layers


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("adapter", [None, LORA, DORA, QLORA], ids=["whole", "lora", "dora", "qlora"])
def test_gradients_are_the_same_bits_as_with_all_stored(
    adapter: AdapterConfig | None, name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of whole layers also if each layer is computed alone."""
    monkeypatch.setattr(blocks, "_MANY", 0)  # as for many numbers
    again = _learn(_model(adapter, name=name, dtype=dtype, fused=True), autocast=autocast)
    monkeypatch.setattr(products, "origin_of", lambda _: None)
    _assert_same_bits(again, _learn(_model(adapter, name=name, dtype=dtype, fused=True), autocast=autocast))
    if adapter is None:
        monkeypatch.setattr(products, "are_whole", lambda *_: False)
        _assert_same_bits(again, _learn(_model(name=name, dtype=dtype, fused=True), autocast=autocast))


@pytest.mark.parametrize("frozen", ["embed_tokens", "k_proj", "q_proj.bias", "gate_proj", "norm"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    models = [_model(fused=fused, name="qwen2") for fused in (True, False)]
    for model in models:
        for parameter, weights in model.named_parameters():
            weights.requires_grad = frozen not in parameter
        assert not any(frozen in parameter for parameter in _learn(model, autocast=False))
    assert_same_gradients(*models)


def _grads(module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(upstream)
    return out.detach(), x.grad, module.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", [(5,), (2, 600)], ids=["few numbers", "many numbers"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, Qwen3RMSNorm])
def test_a_fused_norm_rounds_as_the_models_own(kind: Any, weights: torch.dtype, tokens: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    own = kind(64, eps=1e-3)
    own.weight.data = torch.randn(64, generator=rng).to(weights)
    fused = copy.deepcopy(own)
    assert fuse_norms(fused) == 1
    x, upstream = (torch.randn(*tokens, 64, generator=rng).bfloat16() for _ in range(2))
    (output, slope, _), (expected, own_slope, _) = (_grads(norm, x * 7, upstream) for norm in (fused, own))
    assert output.dtype == expected.dtype
    assert relative(slope, own_slope) < 1e-2
    assert relative(output, expected) < 1e-3
    assert float((output != expected).float().mean()) < 0.02, "another order of summing may round a few otherwise"


def test_a_norm_that_computes_something_else_under_a_familiar_name_is_left_alone() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 2

    assert fuse_norms(OddRMSNorm(16)) == 0


def test_rows_with_adapters_of_their_own_count_as_in_peft() -> None:
    """PEFT tells each layer which row has which adapter by a hook on its call, which a block must not leave out."""
    outputs = []
    for fused in (True, False):
        model = _lora()().eval()
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        if fused:
            assert fuse_blocks(model) == 4
        outputs.append(model(input_ids=IDS, adapter_names=["default", "other"]).logits)
    assert relative(*outputs) < 1e-6
    both = _lora()().eval()(input_ids=IDS).logits
    assert relative(outputs[0][0], both[0]) < 1e-6
    assert relative(outputs[0][1], both[1]) > 1e-2


def test_an_adapter_that_is_off_merged_or_one_of_two_counts_as_in_peft() -> None:
    models = [_lora()() for _ in range(2)]
    fuse_adapters(models[0])
    for change in ("off", "two", "merged"):
        outputs = []
        for model in models:
            if change == "two":
                torch.manual_seed(1)
                model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
                model.base_model.set_adapter(["default", "second"])
            if change == "merged":
                model.merge_adapter()
            with model.disable_adapter() if change == "off" else nullcontext():
                outputs.append(model(input_ids=IDS).logits)
        assert relative(*outputs) < 1e-5, change


class OddMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def _lora(**changes: Any) -> Callable[[], Any]:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM, **changes}

    def make() -> Any:
        model = get_peft_model(tiny_model("qwen2", attention_bias=True), LoraConfig(**settings))
        liven(model)
        return model

    return make


def _with_biases() -> Any:
    torch.manual_seed(0)
    model = tiny_model("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_()
    return model


def _of_other_blocks() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.__class__ = OddMLP
    return model


@pytest.mark.parametrize(
    ("make", "fuse", "fused"),
    [
        *((functools.partial(tiny_model, name), fuse_blocks, 4) for name in ARCHITECTURES),
        *((functools.partial(_model, LORA, name=name), fuse_blocks, 4) for name in ARCHITECTURES),
        (functools.partial(_model, replace(LORA, dropout=0.5)), fuse_blocks, 4),
        (functools.partial(_model, QLORA), fuse_blocks, 4),
        (_with_biases, fuse_blocks, 4),
        (_of_other_blocks, fuse_blocks, 2),  # attention alone
        (_lora(), fuse_adapters, None),
        (_lora(lora_dropout=0.5), fuse_adapters, None),
        (_lora(lora_bias=True, target_modules=["q_proj"]), fuse_adapters, None),
    ],
)
def test_fused_blocks_and_layers_equal_the_models_and_pefts_own(
    make: Callable[[], Any], fuse: Callable[[Any], int | None], fused: int | None
) -> None:
    """What the functions do not serve (dropout at work, biases that are learned) goes the model's or PEFT's way."""
    models = [make(), make()]
    number = fuse(models[0])
    assert fused is None or number == fused
    outputs = []
    for model in models:
        torch.manual_seed(0)
        logits = model.train()(input_ids=IDS).logits
        logits.square().sum().backward()
        outputs.append(logits)
    assert relative(*outputs) < 1e-6
    assert_same_gradients(*models)


OddMLP.__name__ = "LlamaMLP"

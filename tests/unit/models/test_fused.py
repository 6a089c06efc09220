"""Norms and low-rank layers as one function compute what transformers' and PEFT's own layers compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from alignment.models.kernels.blocks import fuse_blocks
from alignment.models.kernels.norms import fuse_norms
from alignment.models.kernels.products import fuse_adapters
from tests.tiny import liven, tiny_model
from tests.unit.models.conftest import gradients, relative


def _grads(module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(upstream)
    return out.detach(), x.grad, module.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, Qwen3RMSNorm])
def test_a_fused_norm_equals_the_models_own(kind: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    own = kind(16, eps=1e-3)
    own.weight.data = torch.randn(16, generator=rng)
    fused = copy.deepcopy(own)
    assert fuse_norms(fused) == 1
    x, upstream = torch.randn(2, 3, 16, generator=rng), torch.randn(2, 3, 16, generator=rng)
    for tensor, expected in zip(_grads(fused, x, upstream), _grads(own, x, upstream), strict=True):
        assert relative(tensor, expected) < 1e-6


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


class OddRMSNorm(LlamaRMSNorm):
    """Computes something else under a familiar name."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 2


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    assert fuse_norms(OddRMSNorm(16)) == 0


def test_a_norm_is_fused_once() -> None:
    model = tiny_model()
    assert fuse_norms(model) == 5
    assert fuse_norms(model) == 0


# ---- low-rank layers -------------------------------------------------------------------------------------------------


def _with_lora(*, fused: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": TaskType.CAUSAL_LM,
    }
    model = get_peft_model(tiny_model("qwen2", attention_bias=True).to(dtype), LoraConfig(**settings | changes))
    liven(model)
    if fused:
        fuse_adapters(model)
    return model


IDS = torch.tensor([[5, 9, 2, 7, 11, 12, 2]])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"bias": "all"},
    ],
)
def test_a_fused_layer_equals_pefts(changes: dict[str, Any]) -> None:
    """What the function does not serve (dropout at work, biases that are learned) goes PEFT's way."""
    outputs, grads = [], []
    for fused in (True, False):
        model = _with_lora(fused=fused, **changes).train()
        torch.manual_seed(0)
        logits = model(input_ids=IDS).logits
        logits.square().sum().backward()
        outputs.append(logits)
        grads.append(gradients(model))
    assert relative(*outputs) < 1e-6
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert relative(gradient, grads[1][name]) < 1e-5, name


def test_rows_with_adapters_of_their_own_count_as_in_peft() -> None:
    """PEFT tells each layer which row has which adapter by a hook on its call, which a block must not leave out."""
    outputs = []
    for fused in (True, False):
        model = _with_lora(fused=fused).eval()
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        if fused:
            assert fuse_blocks(model) == 4
        outputs.append(model(input_ids=IDS.repeat(2, 1), adapter_names=["default", "other"]).logits)
    assert relative(*outputs) < 1e-6
    assert relative(outputs[0][0], outputs[0][1]) > 1e-2


def test_under_autocast_a_fused_layer_stays_close_to_pefts() -> None:
    outputs = []
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(_with_lora(fused=fused, dtype=torch.bfloat16)(input_ids=IDS).logits.float())
    assert relative(*outputs) < 0.02


def test_an_adapter_that_is_off_merged_or_one_of_two_counts_as_in_peft() -> None:
    models = [_with_lora(fused=fused) for fused in (True, False)]
    for change in ("off", "two", "merged"):
        outputs = []
        for model in models:
            if change == "two":
                torch.manual_seed(1)
                model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
                model.base_model.set_adapter(["default", "second"])
            if change == "merged":
                model.merge_adapter()
            if change == "off":
                with model.disable_adapter():
                    outputs.append(model(input_ids=IDS).logits)
            else:
                outputs.append(model(input_ids=IDS).logits)
        assert relative(*outputs) < 1e-5, change

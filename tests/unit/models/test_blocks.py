"""Attention and feed-forward blocks in fewer passes compute what the models' own compute, with the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import TaskType
from transformers.models.llama.modeling_llama import LlamaMLP

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.kernels.blocks import fuse_blocks
from alignment.models.kernels.nf4 import quantize_trunk
from tests.tiny import ARCHITECTURES, liven, tiny_model
from tests.unit.models.conftest import gradients, relative

IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 4, 3, 2]])


def _learned(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    logits.square().sum().backward()
    return logits, gradients(model)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4), AdapterConfig(rank=4, dropout=0.5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_equal_the_models_own(architecture: str, adapter: AdapterConfig | None) -> None:
    passes = []
    for fused in (True, False):
        model = tiny_model(architecture)
        if adapter is not None:
            model = add_adapter(model, adapter, TaskType.CAUSAL_LM)
            liven(model)
        if fused:
            assert fuse_blocks(model) == 2 * model.config.num_hidden_layers
        torch.manual_seed(0)
        passes.append(_learned(model.train()))
    assert relative(passes[0][0], passes[1][0]) < 1e-6
    assert passes[0][1].keys() == passes[1][1].keys()
    for name, gradient in passes[0][1].items():
        assert relative(gradient, passes[1][1][name]) < 1e-5, name


def test_layers_of_one_input_have_biases_too() -> None:
    """Qwen's queries, keys and values have some."""
    torch.manual_seed(0)  # what is drawn below, whatever ran before
    model = tiny_model("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_()
    plain = copy.deepcopy(model)
    fuse_blocks(model)
    assert relative(model(IDS).logits, plain(IDS).logits) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_blocks_stay_close(architecture: str) -> None:
    logits = []
    for fused in (True, False):
        model = add_adapter(tiny_model(architecture).to(torch.bfloat16), AdapterConfig(rank=4), TaskType.CAUSAL_LM)
        liven(model)
        if fused:
            fuse_blocks(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(input_ids=IDS).logits.float())
    assert relative(*logits) < 0.02


class OddMLP(LlamaMLP):
    """Computes something else under the name of a block that is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


OddMLP.__name__ = "LlamaMLP"


def test_a_block_that_computes_something_else_is_left_alone() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.__class__ = OddMLP
    before = model(IDS).logits
    assert fuse_blocks(model) == model.config.num_hidden_layers, "attention alone"
    assert relative(model(IDS).logits, before) < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_a_cache_blocks_equal_the_models_own(implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    expected = copy.deepcopy(model).generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=2)
    fuse_blocks(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_on_four_bits_are_understood_and_compute_the_same(dtype: torch.dtype) -> None:
    logits = []
    for fused in (True, False):
        model = tiny_model().to(dtype)
        quantize_trunk(model, torch.device("cpu"))
        model = add_adapter(model, AdapterConfig(kind=AdapterKind.qlora, rank=4), TaskType.CAUSAL_LM)
        liven(model)
        if fused:
            assert fuse_blocks(model) == 2 * model.config.num_hidden_layers
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits.append(model(input_ids=IDS).logits.detach())
    assert relative(*logits) < (1e-6 if dtype is torch.float32 else 2e-2)

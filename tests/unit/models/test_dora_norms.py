"""DoRA's layers: what PEFT's compute, and norms that are computed once while nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.forward.generate import generate
from alignment.models.kernels import dora_norms
from alignment.models.kernels.dora_norms import reused_norms
from alignment.models.kernels.layout import prepacked
from alignment.models.kernels.products import fuse_adapters
from tests.chained import DORA, Chained, config_of
from tests.tiny import liven, tiny_model
from tests.unit.models.conftest import gradients, relative

PASSES = [torch.tensor([[5, 9, 2, 7, 11, 12, 2]]), torch.tensor([[3, 4, 8], [6, 7, 2]])]


def with_dora(*, fused: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
    torch.manual_seed(0)
    base = tiny_model("qwen2", attention_bias=True).to(dtype)
    model = get_peft_model(base, LoraConfig(use_dora=True, **settings | changes))
    liven(model)
    if fused:
        fuse_adapters(model)
    return model


def layers_of(model: nn.Module) -> int:
    return sum(isinstance(module, DoraLinearLayer) for module in model.modules())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers whose norms were computed, one entry each time."""
    layers: list[Any] = []
    own: Callable[..., Tensor] = dora_norms._norms

    def counted(layer: Any, adapter: str) -> Tensor:
        layers.append(layer)
        return own(layer, adapter)

    monkeypatch.setattr(dora_norms, "_norms", counted)
    return layers


@pytest.mark.parametrize("changes", [{}, {"bias": "all"}, {"lora_dropout": 0.5}, {"lora_alpha": 3}])
def test_outputs_and_gradients_are_pefts(changes: dict[str, Any]) -> None:
    outputs, grads = [], []
    for fused in (True, False):
        model = with_dora(fused=fused, **changes).train()
        torch.manual_seed(1)
        with reused_norms(model):
            logits = [model(input_ids=ids).logits for ids in PASSES]
            sum(part.square().sum() for part in logits).backward()  # type: ignore[union-attr]
        outputs.append(logits)
        grads.append(gradients(model))
    assert max(relative(*pair) for pair in zip(*outputs, strict=True)) < 1e-5
    assert grads[0].keys() == grads[1].keys()
    assert any("magnitude" in name for name in grads[0])
    for name, gradient in grads[0].items():
        assert relative(gradient, grads[1][name]) < 1e-4, name


@pytest.mark.parametrize("rows", [2, 600], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_give_the_same(dtype: torch.dtype, rows: int) -> None:
    model = with_dora(dtype=dtype).eval()
    ids = PASSES[0].repeat(rows, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        plain = model(input_ids=ids).logits.float()
        with prepacked(model, rows):
            packed = model(input_ids=ids).logits.float()
        with model.disable_adapter():
            base = model(input_ids=ids).logits.float()
    assert relative(packed, plain) < (1e-5 if dtype is torch.float32 else 2e-2)
    assert relative(base, plain) > 0.1


def test_magnitudes_that_are_learned_count_in_bfloat16() -> None:
    """Factors of 1.020 and 1.025 are one number if they are rounded to bfloat16."""
    model = with_dora(dtype=torch.bfloat16)
    layer = next(module for module in model.modules() if hasattr(module, "lora_magnitude_vector"))
    magnitude = layer.lora_magnitude_vector["default"].weight
    states = torch.randn(4000, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.base_layer.bias.zero_()
        for factor in (1.02, 1.025):
            magnitude.copy_(dora_norms._norms(layer, "default") * factor)
            lengths.append(layer(states).double().norm(dim=0))
    expected = torch.full_like(lengths[0], 1.025 / 1.02)
    torch.testing.assert_close(lengths[1] / lengths[0], expected, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(dtype: torch.dtype) -> None:
    """PEFT rounds the first magnitudes to the dtype of the weights."""
    base = tiny_model("qwen2", attention_bias=True).to(dtype)
    with torch.no_grad():
        expected = base(input_ids=PASSES[0]).logits
        model = add_adapter(base, AdapterConfig(kind=AdapterKind.dora, rank=4), TaskType.CAUSAL_LM).eval()
        assert torch.equal(model(input_ids=PASSES[0]).logits, expected)


def test_each_norm_is_computed_once_in_a_block(computed: list[Any]) -> None:
    model = with_dora().eval()
    computed.clear()
    with reused_norms(model), reused_norms(model):
        for ids in PASSES:
            model(input_ids=ids)
        assert len(computed) == layers_of(model)
    model(input_ids=PASSES[0])
    assert len(computed) == 2 * layers_of(model)


def test_a_later_block_sees_what_changed_in_between() -> None:
    model = with_dora().eval()
    with torch.no_grad():
        with reused_norms(model):
            before = model(input_ids=PASSES[0]).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
        expected = model(input_ids=PASSES[0]).logits
        with reused_norms(model):
            changed = model(input_ids=PASSES[0]).logits
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, before)


def test_answers_are_sampled_with_one_norm_a_layer(computed: list[Any]) -> None:
    model = with_dora().eval()
    computed.clear()
    generate(model, [[5, 9, 2], [3, 4]], max_new_tokens=4, end_ids=[], batch_size=1)
    assert len(computed) == layers_of(model), "two batches of one prompt, four tokens each"


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_more_micro_batches_compute_no_more_norms(tmp_path: Path, computed: list[Any], kind: str) -> None:
    counts = []
    for tokens in (1 << 16, 1):
        config: Any = config_of(kind, DORA)
        config = replace(config, optim=replace(config.optim, micro_batch_tokens=tokens))
        chained = Chained(tmp_path / str(tokens))
        if kind == "ppo":
            chained.run("reward", DORA)
        computed.clear()
        chained.run(kind, DORA, config=config)
        counts.append(len(computed))
    assert counts[0] == counts[1] > 0

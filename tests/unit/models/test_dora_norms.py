"""DoRA's norms, computed once while nothing changes: the same numbers as PEFT's, which computes them in every pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from alignment.models.forward.generate import generate
from alignment.models.kernels.dora_norms import reused_norms
from tests.chained import DORA, Chained, config_of
from tests.tiny import liven, tiny_model
from tests.unit.models.conftest import gradients

PASSES = [torch.tensor([[5, 9, 2, 7, 11, 12, 2]]), torch.tensor([[3, 4, 8], [6, 7, 2]])]


def with_dora(**changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("qwen2", attention_bias=True), LoraConfig(use_dora=True, **settings | changes))
    liven(model)
    return model


def layers_of(model: nn.Module) -> int:
    return sum(isinstance(module, DoraLinearLayer) for module in model.modules())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[DoraLinearLayer]:
    """The layers whose norms were computed, one entry each time."""
    layers: list[DoraLinearLayer] = []
    own: Callable[..., Tensor] = DoraLinearLayer.get_weight_norm

    def counted(layer: DoraLinearLayer, *arguments: Any, **settings: Any) -> Tensor:
        layers.append(layer)
        return own(layer, *arguments, **settings)

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", counted)
    return layers


@pytest.mark.parametrize(
    ("changes", "in_bfloat16"),
    [({}, False), ({}, True), ({"bias": "all"}, False), ({"lora_dropout": 0.5}, False), ({"lora_alpha": 3}, False)],
)
def test_outputs_and_gradients_are_pefts_to_the_bit(changes: dict[str, Any], in_bfloat16: bool) -> None:
    outputs, grads = [], []
    for block in (reused_norms, lambda _: nullcontext()):
        model = with_dora(**changes).train()
        torch.manual_seed(1)
        with block(model), torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            logits = [model(input_ids=ids).logits for ids in PASSES]
            sum(part.float().square().sum() for part in logits).backward()  # type: ignore[union-attr]
        outputs.append(logits)
        grads.append(gradients(model))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert grads[0].keys() == grads[1].keys()
    assert any("magnitude" in name for name in grads[0])
    for name, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][name]), name


def test_each_norm_is_computed_once_in_a_block(computed: list[DoraLinearLayer]) -> None:
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


def test_answers_are_sampled_with_one_norm_a_layer(computed: list[DoraLinearLayer]) -> None:
    model = with_dora().eval()
    computed.clear()
    generate(model, [[5, 9, 2], [3, 4]], max_new_tokens=4, end_ids=[], batch_size=1)
    assert len(computed) == layers_of(model), "two batches of one prompt, four tokens each"


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_more_micro_batches_compute_no_more_norms(tmp_path: Path, computed: list[DoraLinearLayer], kind: str) -> None:
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

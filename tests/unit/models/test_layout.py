"""Weights laid out for products give the same products, adapters and biases included, and leave nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.kernels import layout
from alignment.models.kernels.blocks import fuse_blocks
from alignment.models.kernels.layout import prepacked
from alignment.models.kernels.nf4 import Nf4Linear, quantize_trunk
from alignment.models.kernels.products import JOINT
from tests.tiny import ARCHITECTURES, liven, tiny_model
from tests.unit.models.conftest import relative


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_prepacked_weights_give_the_same_products(bias: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed by oneDNN where the processor has bfloat16 products, and converted once where it has none."""
    if not packed:
        monkeypatch.setattr(layout, "_has_layout", lambda _: False)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 40, bias=bias))
    states = torch.randn(3, 2, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(states)
        with prepacked(layer, 6):
            assert "forward" in vars(layer[0])
            output = layer(states)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected.float(), rtol=2**-7, atol=2**-7)


def test_layers_that_have_a_forward_or_weights_of_another_kind_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    patched, sharded = nn.Linear(4, 4), nn.Linear(4, 4)
    patched.forward = lambda states: states  # type: ignore[method-assign]
    sharded.weight = nn.Parameter(torch.empty(0))
    layers = nn.Sequential(patched, sharded, Special(4, 4), nn.Linear(4, 4, device="meta")).to(torch.bfloat16)
    assert _changed(layers) == []


def test_float32_products_need_no_copy() -> None:
    assert _changed(tiny_model()) == []


def _changed(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    before: list[tuple[nn.Module, str, Any]] = []
    layout._prepack(model, 2, before)
    return before


def test_an_adapter_counts_while_weights_are_prepacked() -> None:
    model = add_adapter(tiny_model().to(torch.bfloat16), AdapterConfig(rank=4), TaskType.CAUSAL_LM).eval()
    liven(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits.float()
        with prepacked(model.get_base_model(), 1):
            logits = model(ids).logits.float()
        with model.disable_adapter():
            without = model(ids).logits.float()
    assert (logits - expected).abs().max() < 0.1 * (without - expected).abs().max()


def _adapted(architecture: str, adapter: AdapterConfig | None) -> Any:
    torch.manual_seed(0)  # biases and adapters are drawn below, whatever ran before
    model = tiny_model(architecture).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_()
    if adapter is not None:
        model = add_adapter(model, adapter, TaskType.CAUSAL_LM).eval()
        liven(model)
    fuse_blocks(model)
    return model


@pytest.mark.parametrize("way", ["on a host", "on a device", "on a device without a copy"])
@pytest.mark.parametrize(
    "adapter",
    [
        None,
        *(
            AdapterConfig(kind=kind, rank=4, target_modules=targets)
            for kind in (AdapterKind.lora, AdapterKind.dora)
            for targets in (["all-linear"], ["q_proj", "v_proj", "up_proj"])
        ),
    ],
    ids=lambda adapter: "bare" if adapter is None else f"{adapter.kind.value} {adapter.target_modules[0]}",
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_one_input_are_one_product_and_give_the_same(
    architecture: str, adapter: AdapterConfig | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them with an adapter, some without, and Qwen's with biases."""
    on_device = way != "on a host"
    if on_device:  # where oneDNN is not
        monkeypatch.setattr(layout, "is_on_cpu", lambda _: False)
    if way == "on a device without a copy":
        monkeypatch.setattr(layout, "COPIED_BYTES", 0)
    model = _adapted(architecture, adapter)
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 4, 3]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits.float()
        with prepacked(model, 8):
            logits = model(ids).logits.float()
            for part in (model, model.base_model):  # as evaluation does around sampling and scoring
                with prepacked(part, 8):
                    assert torch.equal(model(ids).logits.float(), logits)
            joined = [name for name, module in model.named_modules() if JOINT in vars(module)]
            assert len(joined) == 2 * model.config.num_hidden_layers or not (on_device or _has_own_layout())
            assert torch.equal(model(ids).logits.float(), logits)
        exact = copy.deepcopy(model).float()
        with torch.autocast("cpu", enabled=False):
            truth = exact(ids).logits
    bound = 0.03 if adapter is not None and adapter.kind is AdapterKind.dora else 0.02  # it rounds once more
    assert relative(logits, truth) < bound
    assert relative(expected, truth) < bound


def test_on_a_device_only_small_models_and_few_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "is_on_cpu", lambda _: False)
    model = _adapted("llama", AdapterConfig(rank=4))
    numbers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    for most, rows, copied, joined in (
        (2 * numbers, layout.FEW_ROWS, True, True),
        (2 * numbers - 1, layout.FEW_ROWS, False, True),
        (2 * numbers, layout.FEW_ROWS + 1, False, False),
    ):
        monkeypatch.setattr(layout, "COPIED_BYTES", most)
        with torch.autocast("cpu", dtype=torch.bfloat16), prepacked(model, rows):
            functions = [vars(module)[JOINT].__qualname__ for module in model.modules() if JOINT in vars(module)]
        assert bool(functions) is joined
        assert any("_in_one_product" in name for name in functions) is copied


@pytest.mark.parametrize("active", [["default"], ["default", "second"]])
def test_adapters_of_unlike_ranks_and_scales_count_while_weights_are_prepacked(active: list[str]) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", rank_pattern={"k_proj": 7, "up_proj": 1}, use_rslora=True)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model().to(torch.bfloat16), config)
    model.add_adapter("second", LoraConfig(r=5, lora_alpha=20, target_modules=["v_proj", "up_proj", "o_proj"]))
    model.base_model.set_adapter(active)
    liven(model)
    fuse_blocks(model)
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 4, 3]])
    with torch.no_grad():
        truth = copy.deepcopy(model).float()(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16), prepacked(model.get_base_model(), 8):
            logits = model(ids).logits.float()
        model.base_model.set_adapter("default" if len(active) == 2 else "second")
        other = model(ids).logits.float()
    assert relative(logits, truth) < 0.02 < 0.1 < relative(other, truth)


def _has_own_layout() -> bool:
    """Whether this machine's oneDNN has bfloat16 products."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_four_bits_are_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(torch.bfloat16)
    quantize_trunk(model, torch.device("cpu"))
    model = add_adapter(model, AdapterConfig(kind=AdapterKind.qlora, rank=4), TaskType.CAUSAL_LM).eval()
    liven(model)
    fuse_blocks(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits.float()
        with prepacked(model, 4):
            monkeypatch.setattr(Nf4Linear, "dense", None)  # from here on nobody may ask
            assert relative(model(ids).logits.float(), expected) < 0.02


def test_a_layout_that_is_interrupted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(torch.bfloat16)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    function_of = layout._function_of

    def interrupted(module: nn.Module, *settings: Any) -> Any:
        if module is model.lm_head:
            raise KeyboardInterrupt
        return function_of(module, *settings)

    monkeypatch.setattr(layout, "_function_of", interrupted)
    with pytest.raises(KeyboardInterrupt), prepacked(model, 4):
        pass
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_what_was_prepacked_is_gone_afterwards() -> None:
    model = _adapted("llama", AdapterConfig(rank=4))

    def held() -> dict[str, dict[str, Any]]:
        return {name: dict(vars(module)) for name, module in model.named_modules()}

    def fail() -> None:
        with prepacked(model, 4):
            assert held() != before
            raise KeyboardInterrupt

    before = held()
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert held() == before

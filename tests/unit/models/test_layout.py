"""Weights laid out for products, in four bits or with DoRA's norms: the same products, and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alignment.config.model import AdapterConfig, AdapterKind
from alignment.core.errors import ModelError
from alignment.models.kernels import layout, nf4
from alignment.models.kernels.blocks import fuse_blocks
from alignment.models.kernels.layout import prepacked
from alignment.models.kernels.nf4 import Nf4Linear, quantize_trunk, refuse_mostly_whole, reused_norms, round_trunk
from alignment.models.kernels.products import JOINT, fuse_adapters
from tests.oracles.close import close
from tests.tiny import ARCHITECTURES, liven, tiny_model
from tests.unit.models.conftest import CPU, LORA, adapted, assert_same_gradients, gradients, relative

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 4, 3]])


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


def _held(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def _fused(architecture: str, adapter: AdapterConfig | None) -> Any:
    torch.manual_seed(0)  # biases and adapters are drawn below, whatever ran before
    model = tiny_model(architecture).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_()
    if adapter is not None:
        model = adapted(model, adapter).eval()
    fuse_blocks(model)
    return model


@pytest.mark.parametrize("way", ["on a host", "on a device"])
@pytest.mark.parametrize(
    "adapter",
    [
        None,
        *(
            AdapterConfig(kind=kind, rank=4, target_modules=targets)
            for kind, targets in (
                (AdapterKind.dora, ["all-linear"]),
                (AdapterKind.lora, ["q_proj", "v_proj", "up_proj"]),
            )
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
    has_own_layout = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = _fused(architecture, adapter)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(IDS).logits.float()
        with prepacked(model, 8):
            logits = model(IDS).logits.float()
            for part in (model, model.base_model):  # as evaluation does around sampling and scoring
                with prepacked(part, 8):
                    assert torch.equal(model(IDS).logits.float(), logits)
            joined = [name for name, module in model.named_modules() if JOINT in vars(module)]
            assert len(joined) == 2 * model.config.num_hidden_layers or not (on_device or has_own_layout)
            assert torch.equal(model(IDS).logits.float(), logits)
        with torch.autocast("cpu", enabled=False):
            truth = copy.deepcopy(model).float()(IDS).logits
    bound = 0.03 if adapter is not None and adapter.kind is AdapterKind.dora else 0.02  # it rounds once more
    assert relative(logits, truth) < bound
    assert relative(expected, truth) < bound


@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_was_prepacked_is_gone_after_an_interruption(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _fused("llama", LORA)
    before, function_of = _held(model), layout._function_of

    def interrupted(module: nn.Module, *settings: Any) -> Any:
        if module is model.get_base_model().lm_head and when == "before":
            raise KeyboardInterrupt
        return function_of(module, *settings)

    monkeypatch.setattr(layout, "_function_of", interrupted)
    entered = False
    with suppress(KeyboardInterrupt), prepacked(model, 4):
        entered = True
        assert _held(model) != before
        raise KeyboardInterrupt
    assert entered is (when == "inside")
    assert _held(model) == before


MAPS = Path("/proc/self/maps")
LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


def _layer(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 96, bias=bias, dtype=dtype)


def test_a_weight_becomes_the_nearest_level_times_the_scale_of_its_block() -> None:
    """Scales are themselves rounded to eight bits, to within a few thousandths; all takes little more than 4 bits."""
    layer = _layer()
    dense = Nf4Linear(layer).dense()
    blocks = layer.weight.detach().view(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)
    assert relative(dense, (levels[nearest] * scale).view_as(dense)) < 0.01
    large = nn.Linear(1024, 1024, bias=False)
    held = Nf4Linear(large)
    size = sum(tensor.nbytes for tensor in [*held.parameters(), *held.buffers()])
    assert 4.0 < 8 * size / large.weight.numel() < 4.2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_weight_written_out(dtype: torch.dtype, bias: bool) -> None:
    held = Nf4Linear(_layer(dtype, bias=bias))
    plain = _layer(dtype, bias=bias)
    plain.weight.data.copy_(held.dense())
    passes = []
    for layer in (held, plain):
        inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        passes.append((out, inputs.grad))
    for own, expected in zip(*passes, strict=True):
        assert relative(own.float(), expected.float()) < (1e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_trunk_in_four_bits_says_what_its_rounded_weights_say(architecture: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    model = tiny_model(architecture, hidden_size=64, intermediate_size=128, head_dim=16)
    quantized, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantize_trunk(quantized, CPU)
    round_trunk(rounded)
    assert sum(isinstance(module, Nf4Linear) for module in quantized.modules()) == 7 * model.config.num_hidden_layers
    assert type(quantized.get_output_embeddings()) is nn.Linear, "the head stays as it is"
    close(quantized(ids).logits, rounded(ids).logits, rtol=1e-5, atol=1e-5)
    assert relative(rounded(ids).logits, model(ids).logits) > 1e-3, "rounding should be visible"


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gpt2", "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"),
        ("mixtral", "mlp.gate, mlp.experts.gate_up_proj, mlp.experts.down_proj"),
    ],
)
def test_a_trunk_that_would_mostly_stay_whole_is_refused(architecture: str, names: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(ModelError, match=rf"^adapter\.kind: .* most of \w+ is in {names}, which would stay") as caught:
        refuse_mostly_whole(model)
    assert caught.value.remedy == "use adapter=lora for this model"
    refuse_mostly_whole(tiny_model("llama"))


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists the files that a process has mapped")
def test_the_file_of_a_trunk_in_four_bits_does_not_stay_in_memory(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    expected = model.get_input_embeddings().weight.clone()
    assert str(tmp_path) in MAPS.read_text()
    quantize_trunk(model, CPU)
    assert str(tmp_path) not in MAPS.read_text()
    assert torch.equal(model.get_input_embeddings().weight, expected)


PASSES = [torch.tensor([[5, 9, 2, 7, 11, 12, 2]]), torch.tensor([[3, 4, 8], [6, 7, 2]])]


def _with_dora(*, fused: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
    torch.manual_seed(0)
    base = tiny_model("qwen2", attention_bias=True).to(dtype)
    model = get_peft_model(base, LoraConfig(use_dora=True, **settings | changes))
    liven(model)
    if fused:
        fuse_adapters(model)
    return model


def _dora_layers(model: nn.Module) -> int:
    return sum(isinstance(module, DoraLinearLayer) for module in model.modules())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    layers: list[Any] = []
    own: Callable[..., Tensor] = nf4._norms

    def counted(layer: Any, adapter: str) -> Tensor:
        layers.append(layer)
        return own(layer, adapter)

    monkeypatch.setattr(nf4, "_norms", counted)
    return layers


@pytest.mark.parametrize("changes", [{}, {"bias": "all"}, {"lora_dropout": 0.5}, {"lora_alpha": 3}])
def test_outputs_and_gradients_of_dora_are_pefts(changes: dict[str, Any]) -> None:
    models = [_with_dora(fused=fused, **changes).train() for fused in (True, False)]
    outputs = []
    for model in models:
        torch.manual_seed(1)
        with reused_norms(model):
            logits = [model(input_ids=ids).logits for ids in PASSES]
            sum(part.square().sum() for part in logits).backward()  # type: ignore[union-attr]
        outputs.append(logits)
    assert max(relative(*pair) for pair in zip(*outputs, strict=True)) < 1e-5
    assert any("magnitude" in name for name in gradients(models[0]))
    assert_same_gradients(*models, tolerance=1e-4)


def test_magnitudes_that_are_learned_count_in_bfloat16() -> None:
    """Factors of 1.020 and 1.025 are one number if they are rounded to bfloat16."""
    model = _with_dora(dtype=torch.bfloat16)
    layer = next(module for module in model.modules() if hasattr(module, "lora_magnitude_vector"))
    magnitude = layer.lora_magnitude_vector["default"].weight
    states = torch.randn(4000, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.base_layer.bias.zero_()
        for factor in (1.02, 1.025):
            magnitude.copy_(nf4._norms(layer, "default") * factor)
            lengths.append(layer(states).double().norm(dim=0))
    expected = torch.full_like(lengths[0], 1.025 / 1.02)
    torch.testing.assert_close(lengths[1] / lengths[0], expected, atol=1e-3, rtol=0.0)


def test_each_norm_is_computed_once_in_a_block_and_a_later_one_sees_what_changed(computed: list[Any]) -> None:
    model = _with_dora().eval()
    computed.clear()
    with torch.no_grad():
        with reused_norms(model), reused_norms(model):
            before, _ = (model(input_ids=ids).logits for ids in PASSES)
        assert len(computed) == _dora_layers(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
        expected = model(input_ids=PASSES[0]).logits
        assert len(computed) == 2 * _dora_layers(model)
        with reused_norms(model):
            changed = model(input_ids=PASSES[0]).logits
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, before)

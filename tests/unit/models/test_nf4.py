"""Four-bit weights: what they stand for, what they weigh, and that products with them have the right gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignment.core.errors import ModelError
from alignment.models.kernels.nf4 import Nf4Linear, quantize_trunk, refuse_mostly_whole, round_trunk
from tests.oracles.close import close
from tests.tiny import tiny_model
from tests.unit.models.conftest import relative

CPU = torch.device("cpu")
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
    """Scales are themselves rounded to eight bits, to within a few thousandths."""
    layer = _layer()
    dense = Nf4Linear(layer).dense()
    blocks = layer.weight.detach().view(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)
    assert relative(dense, (levels[nearest] * scale).view_as(dense)) < 0.01


def test_a_weight_takes_little_more_than_four_bits() -> None:
    layer = nn.Linear(1024, 1024, bias=False)
    held = Nf4Linear(layer)
    size = sum(tensor.nbytes for tensor in [*held.parameters(), *held.buffers()])
    assert 4.0 < 8 * size / layer.weight.numel() < 4.2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_weight_written_out(dtype: torch.dtype, bias: bool) -> None:
    held = Nf4Linear(_layer(dtype, bias=bias))
    plain = _layer(dtype, bias=bias)
    plain.weight.data.copy_(held.dense())
    x = torch.randn(5, 128, dtype=dtype)
    passes = []
    for layer in (held, plain):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        passes.append((out, inputs.grad))
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert relative(passes[0][0].float(), passes[1][0].float()) < tolerance
    assert relative(passes[0][1].float(), passes[1][1].float()) < tolerance


def test_under_autocast_products_are_made_in_its_format() -> None:
    held = Nf4Linear(_layer())
    with torch.autocast("cpu", torch.bfloat16):
        assert held(torch.randn(3, 128)).dtype is torch.bfloat16
    assert held(torch.randn(3, 128)).dtype is torch.float32


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


def test_copies_and_moves_keep_what_the_bits_stand_for() -> None:
    held = Nf4Linear(_layer())
    for other in (copy.deepcopy(held), held.to(CPU), held.to(torch.bfloat16)):
        assert torch.equal(other.dense(), held.dense())
    assert held.weight.dtype is torch.uint8

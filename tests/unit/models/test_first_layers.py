"""A model of the first layers says what the whole model's states after these layers say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.core.errors import ModelError
from alignment.models.assembly.first_layers import keep_first_layers
from tests.oracles.close import close
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 2]])
NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_has_the_states_after_these_layers_under_the_same_norm_and_head(
    tmp_path: Path, architecture: str, layers: int
) -> None:
    """Also after it was saved and loaded by transformers."""
    whole = tiny_model(architecture, num_hidden_layers=4)
    with torch.no_grad():
        states = whole(IDS, output_hidden_states=True).hidden_states[layers]
        norm = getattr(whole.base_model, NORMS.get(architecture, "norm"))
        expected = whole.get_output_embeddings()(norm(states))
    keep_first_layers(whole, layers).save_pretrained(str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert saved.config.num_hidden_layers == layers
    with torch.no_grad():
        close(saved(IDS).logits, expected, atol=1e-5)
        close(whole(IDS).logits, expected, atol=1e-5)


def test_what_a_configuration_lists_for_each_layer_is_cut_too() -> None:
    model = tiny_model("qwen2", num_hidden_layers=4)
    assert keep_first_layers(model, 3).config.layer_types == ["full_attention"] * 3


def test_a_model_whose_layers_are_not_one_list_is_refused() -> None:
    model = tiny_model()
    model.base_model.layers = torch.nn.ModuleDict({str(i): layer for i, layer in enumerate(model.base_model.layers)})
    with pytest.raises(ModelError, match="LlamaForCausalLM does not keep its 2 layers in one list"):
        keep_first_layers(model, 1)

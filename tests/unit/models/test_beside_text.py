"""Models with parts that only images or sounds pass through: these parts are not trained, as rows are text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from torch import nn
from transformers import (
    Gemma3Config,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Phi4MultimodalConfig,
    PreTrainedModel,
)

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.beside_text import parts_beside_text
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import label_statistics
from alignment.models.forward.rows import stream
from alignment.stages.reward.config import RewardConfig
from tests.tiny import tiny_model, tiny_reward, tiny_spec, tiny_tokenizer
from tests.unit.models.conftest import PROMPTS, SIZES, random_model

CPU = torch.device("cpu")
FULL = AdapterConfig(kind=AdapterKind.full)
LORA, ALL_LINEAR = AdapterConfig(rank=4), AdapterConfig(rank=4, target_modules=["all-linear"])
TOKENS = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def saved(folder: Path, model: PreTrainedModel) -> Lineage:
    """The model as a base in a folder, with a tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(str(folder))
    return Lineage(source="path:images", base=folder, adapters=())


def gemma3(folder: Path) -> Lineage:
    """As it is from 4B on: the text model is a part of its own."""
    text = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **TOKENS)
    return saved(folder, random_model(config))


def phi4_multimodal(folder: Path) -> Lineage:
    """The text model holds the encoders."""
    sound = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
    channels = ("nemo_conv_channels", "ext_pw_out_channel", "depthwise_separable_out_channel")
    config = Phi4MultimodalConfig(
        **SIZES, vision_config={**VISION, "crop_size": 28}, audio_config={**sound, **dict.fromkeys(channels, 16)}
    )
    return saved(folder, random_model(config))


def mllama(folder: Path) -> Lineage:
    """Llama 3.2 Vision: only its text model is loaded, some of whose layers read only images."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**SIZES, "cross_attention_layers": [1], "rope_parameters": rope}
    vision = {
        **VISION,
        "attention_heads": 2,
        "num_global_layers": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return saved(folder, MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)))


def trained_without_gradient(model: nn.Module) -> list[str]:
    """Names of trained weights that a backward pass has not reached; distributed training would wait for these."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("layers.0." in name for name in trained)
    return [name for name, parameter in trained.items() if parameter.grad is None]


@pytest.mark.parametrize("adapter", [FULL, LORA, ALL_LINEAR], ids=["full", "lora", "all linear modules"])
@pytest.mark.parametrize("base", [gemma3, mllama, phi4_multimodal])
def test_all_that_is_trained_of_a_model_with_images_gets_gradients(
    tmp_path: Path, base: Callable[[Path], Lineage], adapter: AdapterConfig
) -> None:
    model = load_policy(base(tmp_path / "base"), torch.float32)
    use_flat_attention(model)
    adapted = add_adapter(model, adapter, TaskType.CAUSAL_LM)
    states = trunk_states(unwrapped(adapted).base_model, stream(PROMPTS, CPU))
    label_statistics(unwrapped(adapted), states, torch.tensor([3] * len(states))).logprobs.sum().backward()
    assert trained_without_gradient(adapted) == []


def test_all_that_is_trained_of_a_full_critic_gets_gradients(tmp_path: Path) -> None:
    reward = tiny_reward(tmp_path, FULL, start=gemma3(tmp_path / "base"))
    spec = tiny_spec(tmp_path, RewardConfig(adapter=FULL))
    critic = load_reward_model(spec, reward, device=CPU, trained=torch.float32)
    critic.score(trunk_states(critic.base_model, stream(PROMPTS, CPU))).sum().backward()
    assert trained_without_gradient(critic) == []


def test_nothing_is_left_out_of_a_model_of_text_alone() -> None:
    assert parts_beside_text(tiny_model()) == []

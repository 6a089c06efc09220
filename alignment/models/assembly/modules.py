"""Parts of a model: those beside its language model, layers, dtypes of products, and weights that no stage uses."""

from __future__ import annotations

import gc
import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from alignment.core.errors import ModelError


def parts_beside_text(model: PreTrainedModel) -> list[str]:
    """Paths of the modules that text does not pass through; none in models of text alone."""
    names = [*_beside_text_model(model), *_within_text_model(model)]
    return [f"{model.base_model_prefix}.{name}" for name in names]


def _beside_text_model(model: PreTrainedModel) -> list[str]:
    if model.config.get_text_config() is model.config:
        return []
    text = model.base_model.get_decoder()
    return [
        name for name, part in model.base_model.named_children() if all(module is not text for module in part.modules())
    ]


def _within_text_model(model: PreTrainedModel) -> list[str]:
    """The modules in a text model itself: layers that text skips (Llama 3.2 Vision), encoders (Phi-4-multimodal)."""
    skipped = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    names = {"embed_tokens_extend", *(f"layers.{number}" for number in skipped)}
    return [name for name, _ in model.base_model.named_modules() if name in names]


def freeze_beside_text(model: PreTrainedModel) -> None:
    """Excludes these parts from training."""
    for path in parts_beside_text(model):
        model.get_submodule(path).requires_grad_(False)


def pattern_beside_text(model: PreTrainedModel) -> str | None:
    """A regular expression of the paths inside these parts, as PEFT's ``exclude_modules`` takes it."""
    paths = parts_beside_text(model)
    return rf"(?:{'|'.join(map(re.escape, paths))})(?:\..*)?" if paths else None


def refuse_without_scores(model_type: str, *, where: str) -> None:
    """Checks that an architecture has a model with a scalar head, as reward models and separate critics need it. Raises
    ModelError: it has none."""
    if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return
    raise ModelError(
        f"transformers has no model with a score for the architecture {model_type!r}, which a reward model or a "
        "separate critic needs",
        where=where,
        remedy="use a base of another family, such as Llama, Qwen, Mistral or Gemma; or do without: PPO has "
        "critic=shared or none and other scorers, and DPO and KTO need no reward model",
    )


def free_unused() -> None:
    """Frees models and trainers that only refer to themselves, and on a GPU also returns PyTorch's cached memory. A
    layer whose ``forward`` was replaced holds itself, and a trainer and its callbacks hold each other. Python frees
    such objects only in a collection, which may be long after the last use: without this call, two models would be in
    memory where a stage loads one at a time."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


_OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in configurations with an entry for each layer."""


def keep_first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Removes all decoder layers after the first ``layers`` from a causal language model; returns the model. Raises
    ModelError: its layers are not one list of modules, as in all architectures of decoders."""
    config = model.config.get_text_config()
    name, available = _decoder_layers(model)
    setattr(model.base_model, name, nn.ModuleList(list(available)[:layers]))
    for field in _OF_LAYERS:
        if getattr(config, field, None) is not None:
            setattr(config, field, getattr(config, field)[:layers])
    config.num_hidden_layers = layers
    return model


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    number = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.base_model.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if len(lists) != 1:
        raise ModelError(
            f"{type(model).__name__} does not keep its {number} layers in one list, so its first layers cannot be "
            f"extracted"
        )
    return lists[0]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes every layer store only its input, and compute again in the backward pass; ``model`` has no wrapper."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def recompute(model: nn.Module) -> None:
    """Makes checkpointed layers count as in training, but nothing inside them, so that dropout stays off. Call it after
    each change to evaluation mode. Passes without gradients are as they were."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def products_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled for the tensor's device, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

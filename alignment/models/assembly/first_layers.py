"""A smaller model that consists of the first layers of another one, with its embeddings, last norm and head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from alignment.core.errors import ModelError

_OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in configurations with an entry for each layer."""


def keep_first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Removes all decoder layers after the first ``layers`` from a causal language model; returns the model.

    Raises:
        ModelError: its layers are not one list of modules, as in all architectures of decoders.
    """
    config = model.config.get_text_config()
    name, available = _decoder_layers(model)
    setattr(model.base_model, name, nn.ModuleList(list(available)[:layers]))
    for field in _OF_LAYERS:
        if getattr(config, field, None) is not None:
            setattr(config, field, getattr(config, field)[:layers])
    config.num_hidden_layers = layers
    return model


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The attribute of the trunk that holds the decoder layers, and the list."""
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

"""Activation checkpointing (Chen et al. 2016) of models in evaluation mode, in which transformers leaves it out."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes every layer store only its input, and compute again in the backward pass; ``model`` has no wrapper."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def recompute(model: nn.Module) -> None:
    """Makes checkpointed layers count as in training, but nothing inside them, so that dropout stays off.

    Call it after each change to evaluation mode. Passes without gradients are as they were.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True

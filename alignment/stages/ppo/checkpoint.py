"""The trained weights in a checkpoint. Frozen weights are the base's and are not copied."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "actor_critic.safetensors"


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes the trained weights, as this process holds them."""
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / FILE)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads the weights that ``save_weights`` wrote into the model."""
    saved = load_file(folder / FILE)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name])

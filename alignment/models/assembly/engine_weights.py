"""Writes a policy's weights for an engine: the folder that it starts from, and what follows after an update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.adapter import CONTINUE, AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import OWN, put_in_order
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.kernels.nf4 import round_trunk


def write_base(start: Lineage, adapter: AdapterConfig, dtype: torch.dtype, folder: Path) -> Path:
    """The folder of the weights below the adapter that a stage trains, merged; for full training, of the start.

    It is that of the base if nothing has to be merged, else ``folder``, which is written.
    """
    if adapter.kind is AdapterKind.full:
        model = load_policy(start, dtype)
        return write_model(model, dict(model.named_parameters(remove_duplicate=False)), dtype, folder)
    below = replace(start, adapters=start.adapters[:-1]) if adapter.chain is CONTINUE else start
    if not below.adapters and adapter.kind is not AdapterKind.qlora:
        return below.base
    model = load_policy(below, dtype)
    if adapter.kind is AdapterKind.qlora:
        round_trunk(model)
    model.save_pretrained(str(folder))
    return folder


def write_model(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> Path:
    """Writes all weights of ``state``, by their names in ``model``.

    The head is written apart from the embeddings even if both are one matrix: vLLM would replace only one of them.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.dtype = dtype
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in state.items()}
    addresses: set[int] = set()
    for name, weight in weights.items():
        if weight.data_ptr() in addresses:
            weights[name] = weight.clone()
        addresses.add(weight.data_ptr())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(policy: PeftModel, state: dict[str, Tensor] | None, folder: Path) -> Path:
    """Writes the adapter that the policy trains; ``state`` holds its weights if they are sharded."""
    policy.save_pretrained(str(folder), selected_adapters=[OWN], state_dict=state)
    put_in_order(folder)
    return folder

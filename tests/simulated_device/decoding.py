"""Answers of a tiny policy on the device and on the host, and what a token of them launches."""

from __future__ import annotations

from typing import Any

import torch
from peft import TaskType

from alignment.config.model import AdapterConfig, Dtype
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import products_in
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.kernels import layout
from tests.launches import Launches
from tests.tiny import liven, tiny_model

PROMPTS = ([5, 6, 7, 8, 9], [4, 3], [11, 12, 13])


def _policy(device: str, layers: int, *, has_adapter: bool, dtype: torch.dtype) -> Any:
    model: Any = tiny_model("llama", num_hidden_layers=layers).to(dtype)
    if has_adapter:
        model = add_adapter(model, AdapterConfig(rank=4), TaskType.CAUSAL_LM)
        liven(model)
    model = model.to(device).eval()
    use_flat_attention(unwrapped(model))
    return model


def _launches(layers: int, tokens: int, *, has_adapter: bool) -> int:
    policy = _policy("cuda", layers, has_adapter=has_adapter, dtype=torch.bfloat16)
    with products_in(Dtype.bfloat16, torch.device("cuda")), Launches() as launches:
        generate(policy, PROMPTS, max_new_tokens=tokens, end_ids=[], batch_size=3)
    return launches.number


def launches_of_a_token(*, has_adapter: bool, copies: bool = True) -> tuple[int, int]:
    layout.COPIED_BYTES *= copies
    _launches(2, 3, has_adapter=has_adapter)  # the first call makes what others find
    two, three = (
        _launches(layers, 4, has_adapter=has_adapter) - _launches(layers, 3, has_adapter=has_adapter)
        for layers in (2, 3)
    )
    return three - two, two - 2 * (three - two)


def greedy_answers(device: str, *, has_adapter: bool) -> list[list[int]]:
    policy = _policy(device, 2, has_adapter=has_adapter, dtype=torch.float32)
    return generate(policy, PROMPTS, max_new_tokens=12, end_ids=[], batch_size=3)

"""Prefix tuning (Li and Liang 2021): in every layer, keys and values of virtual tokens precede every row. PEFT holds
them as one embedding and passes them to a model as a cache. Here the trunk has its prefix as an attribute, and
attention puts it before a row's own keys (alignment/models/forward/attention.py), so rows stay one stream. As in PEFT,
the positions of a row's own tokens begin after the prefix."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from alignment.core.model_files import BEFORE_LONGER, before_longer_frequencies, row_too_long

_NAME = "alignment_prefix"
_NO_LIMIT = 1 << 30


class Prefix:
    """The prefix of one model; ``tokens`` is its length. It remembers its initial value."""

    def __init__(self, model: PeftModel) -> None:
        config = model.active_peft_config
        self.tokens = int(config.num_virtual_tokens)
        self._shape = (self.tokens, 2 * config.num_layers, config.num_attention_heads, -1)
        self._encoder = model.prompt_encoder[model.active_adapter]
        self._start = self._encoder.embedding.weight.detach().clone()
        self._is_at_start = False

    def states(self) -> Tensor:
        """``[2 · layers, key heads, tokens, width]``: the keys of each layer, then its values."""
        embedding = self._encoder.embedding
        device = embedding.weight.device
        if self._is_at_start:
            states = self._start = self._start.to(device)  # the model has moved since; else every layer would copy it
        else:  # in a call, around which a sharded weight is gathered
            states = embedding(torch.arange(self.tokens, device=device))
        return states.view(self._shape).permute(1, 2, 0, 3)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Uses the initial value for the duration of a ``with`` block."""
        self._is_at_start = True
        try:
            yield
        finally:
            self._is_at_start = False


def put_prefix(model: PeftModel) -> PeftModel:
    """Attaches the prefix that PEFT holds to the model's trunk, and routes calls of the model to the base model."""
    base = model.get_base_model()
    setattr(base.base_model, _NAME, Prefix(model))
    model.forward = types.MethodType(_forward, model)
    model.get_prompt_embedding_to_save = types.MethodType(_to_save, model)
    return model


def prefix_of(trunk: PreTrainedModel) -> Prefix | None:
    """The prefix of a model without its head, if it has one."""
    prefix: Prefix | None = getattr(trunk, _NAME, None)
    return prefix


def positions_of(trunk: PreTrainedModel) -> int:
    """The maximum number of tokens in a row: the model's positions minus those of its prefix. With LongRoPE (Ding et
    al. 2024) they are those of the first training. A single longer row would change the frequencies of positions for
    all rows of its pass, so that results would depend on how rows are put together. Without a limit it is more than any
    row has."""
    prefix = prefix_of(trunk)
    config = trunk.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    limit = min([_NO_LIMIT if positions is None else positions, *_before_longer(config)])
    return limit - (0 if prefix is None else prefix.tokens)


def _before_longer(config: PreTrainedConfig) -> list[int]:
    return before_longer_frequencies([{"rope_parameters": getattr(config, "rope_parameters", None)}])


def refuse_too_long(trunk: PreTrainedModel, tokens: int, *, where: str = "") -> None:
    """Checks that a row of ``tokens`` tokens, which is ``where``, fits the model's positions. Raises ModelError: it
    does not."""
    if tokens > (positions := positions_of(trunk)):
        reason = BEFORE_LONGER if _before_longer(trunk.config.get_text_config()) else ""
        raise row_too_long(tokens, positions, reason, where=where)


def _forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    return self.get_base_model()(*args, **kwargs)


def _to_save(self: PeftModel, adapter: str) -> Tensor:
    """The prefix, or this process's shard. PEFT would call the encoder, whose weight is sharded outside a training
    step."""
    weight: Tensor = self.prompt_encoder[adapter].embedding.weight
    return weight.detach()

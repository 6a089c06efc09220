"""Prefix tuning (Li and Liang 2021): in every layer, keys and values of virtual tokens stand in front of every row.

PEFT holds them as one embedding and hands them to a model as a cache. Here a trunk knows its prefix, and attention puts
it before a row's own keys (alignment/models/forward/attention.py), so that rows stay one stream. As in PEFT, the
positions of a row's own tokens begin behind it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.core.errors import ModelError

_NAME = "alignment_prefix"
_NO_LIMIT = 1 << 30


class Prefix:
    """The prefix of one model; ``tokens`` is its length. It knows what it was when it was put there."""

    def __init__(self, model: PeftModel) -> None:
        config = model.active_peft_config
        self.tokens = int(config.num_virtual_tokens)
        self._shape = (self.tokens, 2 * config.num_layers, config.num_attention_heads, -1)
        self._encoder = model.prompt_encoder[model.active_adapter]
        self._start = self._encoder.embedding.weight.detach().clone()
        self._is_at_start = False

    def states(self) -> Tensor:
        """``[2 · layers, key heads, tokens, width]``: a layer's keys, then its values."""
        weight = self._start if self._is_at_start else self._encoder.embedding.weight
        return weight.view(self._shape).permute(1, 2, 0, 3)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """As it was when it was put there, for the duration of a ``with`` block."""
        self._is_at_start = True
        try:
            yield
        finally:
            self._is_at_start = False


def put_prefix(model: PeftModel) -> PeftModel:
    """Lets the trunk of a PEFT model know the prefix that PEFT holds, and calls of the model go there."""
    base = model.get_base_model()
    setattr(base.base_model, _NAME, Prefix(model))
    model.forward = types.MethodType(_forward, model)
    return model


def prefix_of(trunk: PreTrainedModel) -> Prefix | None:
    """The prefix of a model without its head, if it has one."""
    found: Prefix | None = getattr(trunk, _NAME, None)
    return found


def positions_of(trunk: PreTrainedModel) -> int:
    """Tokens that a row may have: as many as positions that the model was made for, less those of its prefix; where it
    has no limit, more than any row has."""
    prefix = prefix_of(trunk)
    positions = getattr(trunk.config.get_text_config(), "max_position_embeddings", None)
    return (_NO_LIMIT if positions is None else positions) - (0 if prefix is None else prefix.tokens)


def refuse_too_long(trunk: PreTrainedModel, tokens: int) -> None:
    """Refuses a row of so many tokens where the model has fewer positions.

    Raises:
        ModelError: it has.
    """
    if tokens > (positions := positions_of(trunk)):
        raise ModelError(
            f"a row of {tokens} tokens is longer than the model's {positions} positions",
            remedy="lower max_length (or max_prompt_length and max_new_tokens)",
        )


def _forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    return self.get_base_model()(*args, **kwargs)

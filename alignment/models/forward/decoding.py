"""Prepares a model for decoding, with attention that reads the cache in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from alignment.models.forward.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.kernels.kv_cache import ATTENTION, ROOM
from alignment.models.kernels.sdpa_order import without_cudnn


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[int]:
    """Prepares the model for steps of one token per row, and undoes that; yields the ``room`` for its ``RowsCache``."""
    implementation = model.config._attn_implementation
    ours = implementation in ("sdpa", FLAT_ATTENTION)
    try:
        if ours:
            model.set_attn_implementation(ATTENTION)
        with without_cudnn():
            # Other attention functions may mistake allocated columns for filled ones.
            yield ROOM if ours or implementation == "eager" else 0
    finally:
        if ours:
            model.set_attn_implementation(implementation)

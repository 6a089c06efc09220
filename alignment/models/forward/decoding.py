"""Prepares a model for decoding, with attention that reads the cache in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from alignment.models.forward.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.kernels.kv_cache import ATTENTION, ROOM


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[int]:
    """Prepares the model for steps of one token per row, and undoes that; yields the ``room`` for its ``RowsCache``."""
    implementation = model.config._attn_implementation
    ours = implementation in ("sdpa", FLAT_ATTENTION)
    try:
        if ours:
            model.set_attn_implementation(ATTENTION)
        with _without_cudnn():
            # Other attention functions may mistake allocated columns for filled ones.
            yield ROOM if ours or implementation == "eager" else 0
    finally:
        if ours:
            model.set_attn_implementation(implementation)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keeps PyTorch from using cuDNN's attention kernel on CUDA.

    Wrong output was reported for cuDNN's kernel with grouped queries, and it plans again for each length of the cache,
    which grows while a batch is decoded. Outside CUDA the setting has no effect.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

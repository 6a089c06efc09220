"""Frees the models that nothing uses any more, before another one takes memory."""

from __future__ import annotations

import gc

import torch


def free_unused() -> None:
    """Frees models and trainers that only refer to themselves, and on a GPU also returns PyTorch's cached memory.

    A layer whose ``forward`` was replaced holds itself, and a trainer and its callbacks hold each other. Python frees
    such objects only in a collection, which may be long after the last use: without this call, two models would be in
    memory where a stage loads one at a time.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

"""What stays in memory, where nothing but the code under test frees anything."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from alignment.models.assembly import load


@contextmanager
def without_collections() -> Iterator[None]:
    """Python frees no cycles by itself, which it does sooner or later."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def others_at_each_load(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of the policies that were loaded before are in memory whenever another one is read from its folder."""
    weights: list[weakref.ref[torch.Tensor]] = []
    others: list[int] = []

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(*args: Any) -> Any:
            others.append(sum(weight() is not None for weight in weights))
            model = read(*args)
            weights.append(weakref.ref(model.model.layers[0].self_attn.q_proj.weight))
            return model

        return load_model

    for name in ("_from_folder", "_mapped_from_folder"):
        monkeypatch.setattr(load, name, counted(getattr(load, name)))
    return others

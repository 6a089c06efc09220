"""Other settings of a stage, as overrides: ones that need less memory, and every way of training it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alignment.config.adapter import AdapterKind
from alignment.config.micro_batch import expected_tokens

WAYS = {
    "full": "full",
    "full without masters": "full_without_masters",
    "lora": "lora",
    "dora": "dora",
    "qlora": "qlora",
    "prefix": "prefix",
}
"""Ways of training, by the name of their group in conf/adapter."""
SMALLEST_MICRO_BATCH = 512
"""Tokens of the smallest micro-batch that is proposed."""

Overrides = tuple[str, ...]


def cheaper(name: str, config: Any) -> Iterator[Overrides]:
    """Settings of the stage ``name`` that need less and less memory: first those that change no result, then one that
    takes time, then those that train other weights. A plan may refuse some of them."""
    optim, kind = config.optim, config.adapter.kind
    stage = f"stages.{name}"
    beside: Overrides = ()
    tokens = expected_tokens(optim.micro_batch_tokens) // 2
    while tokens >= SMALLEST_MICRO_BATCH:
        beside = (f"{stage}.optim.micro_batch_tokens={tokens}",)
        yield beside
        tokens //= 2
    if not optim.activation_checkpointing:
        beside = (*beside, f"{stage}.optim.activation_checkpointing=true")
        yield beside
    if kind is AdapterKind.full and config.adapter.master_weights:
        yield (*beside, f"{stage}.adapter.master_weights=false")
    if kind is AdapterKind.full:
        yield (*beside, way_of_training(name, "lora"))
    if kind in (AdapterKind.full, AdapterKind.lora, AdapterKind.dora):
        yield (*beside, way_of_training(name, "qlora"))


def way_of_training(name: str, way: str) -> str:
    """The override that trains the stage ``name`` in one of ``WAYS``."""
    return f"adapter@stages.{name}.adapter={WAYS[way]}"

"""Other settings of a stage: those that need less memory, and every way of training it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.micro_batch import expected_tokens
from alignment.costs.remedies import Choice

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


def choices(config: Any, *, divides_weights: bool) -> Iterator[Choice]:
    """Settings of a stage with which it needs less memory and trains the same weights, those that cost least first. A
    plan may refuse some of them. ``divides_weights``: its processes hold a share of the weights each."""
    halved = expected_tokens(config.optim.micro_batch_tokens) // 2
    sizes = tuple(size for times in range(halved.bit_length()) if (size := halved >> times) >= SMALLEST_MICRO_BATCH)
    if sizes:
        yield Choice(field="optim.micro_batch_tokens", values=sizes)
    if not getattr(config.optim, "activation_checkpointing", True):
        yield Choice(field="optim.activation_checkpointing", values=(True,))
    # An adapter's reference is its own base, and a policy in shares would be whole while it is its own reference.
    has_copy = config.adapter.kind is AdapterKind.full and not divides_weights
    if has_copy and not getattr(config, "precompute_reference", True):
        yield Choice(field="precompute_reference", values=(True,), drops_copy=True)


def ways_with_less(name: str, config: Any) -> Iterator[Overrides]:
    """Ways of training the stage ``name`` that need less and less memory, beginning with its own. A plan may refuse
    some of them."""
    kind = config.adapter.kind
    yield ()
    if kind is AdapterKind.full and config.adapter.master_weights:
        yield (f"stages.{name}.adapter.master_weights=false",)
    if kind is AdapterKind.full:
        yield (way_of_training(name, "lora"),)
    if kind in (AdapterKind.full, AdapterKind.lora, AdapterKind.dora):
        yield (way_of_training(name, "qlora"),)


def way_of_training(name: str, way: str) -> str:
    """The override that trains the stage ``name`` in one of ``WAYS``."""
    return f"adapter@stages.{name}.adapter={WAYS[way]}"


def way_of(adapter: AdapterConfig) -> str:
    """The one of ``WAYS`` that an adapter is."""
    bare = adapter.kind is AdapterKind.full and not adapter.master_weights
    return "full without masters" if bare else adapter.kind.value

"""Other settings of a stage: ones that need less memory, and every way of training it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.optim import Moments, OptimConfig

SMALLEST_MICRO_BATCH = 512
"""Tokens of the smallest micro-batch that is proposed."""


class Variant(NamedTuple):
    """Overrides, as they stand after ``stages.NAME.``, and the stage's settings with them."""

    overrides: tuple[str, ...]
    config: Any


def cheaper(config: Any) -> Iterator[Variant]:
    """Settings that need less and less memory: first those that change no result, then those that take time, then
    those that train other weights."""
    variant = Variant((), config)
    tokens = config.optim.micro_batch_tokens // 2
    while tokens >= SMALLEST_MICRO_BATCH:
        yield (variant := _with_optim(variant, micro_batch_tokens=tokens, replaced="micro_batch_tokens"))
        tokens //= 2
    if not config.optim.activation_checkpointing:
        yield (variant := _with_optim(variant, activation_checkpointing=True))
    if config.adapter.kind is AdapterKind.full:
        if config.adapter.master_weights:
            yield (variant := _with_adapter(variant, master_weights=False))
        variant = _with_adapter(variant, kind=AdapterKind.lora, master_weights=True)
        yield variant
    if config.adapter.kind in (AdapterKind.full, AdapterKind.lora, AdapterKind.dora):
        yield _with_adapter(variant, kind=AdapterKind.qlora)


def ways_of_training(config: Any) -> Iterator[tuple[str, Variant]]:
    """Each kind of adapter by name, beside full training with and without float32 masters."""
    start = Variant((), config)
    adapter = AdapterConfig() if config.adapter.kind is AdapterKind.full else config.adapter
    plain = replace(adapter, modules_to_save=[], master_weights=True)
    base = Variant((), replace(start.config, adapter=plain, optim=_plain_moments(config.optim)))
    yield "full", _with_adapter(base, kind=AdapterKind.full)
    yield "full without masters", _with_adapter(base, kind=AdapterKind.full, master_weights=False)
    for kind in (AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora, AdapterKind.prefix):
        yield kind.value, _with_adapter(base, kind=kind)


def _plain_moments(optim: OptimConfig) -> OptimConfig:
    """Moments in float32, because full training without masters takes no others."""
    return replace(optim, moments=Moments.full)


def _with_optim(variant: Variant, *, replaced: str = "", **settings: Any) -> Variant:
    texts = tuple(f"optim.{name}={_text(value)}" for name, value in settings.items())
    others = tuple(text for text in variant.overrides if not replaced or f"optim.{replaced}=" not in text)
    config = variant.config
    return Variant((*others, *texts), replace(config, optim=replace(config.optim, **settings)))


def _with_adapter(variant: Variant, **settings: Any) -> Variant:
    names = [text.partition("=")[0] for text in variant.overrides]
    texts = {f"adapter.{name}": f"adapter.{name}={_text(value)}" for name, value in settings.items()}
    others = tuple(text for text, name in zip(variant.overrides, names, strict=True) if name not in texts)
    config = variant.config
    return Variant((*others, *texts.values()), replace(config, adapter=replace(config.adapter, **settings)))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))

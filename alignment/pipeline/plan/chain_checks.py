"""Refuses adapters that cannot be combined with those of earlier stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from alignment.config.faults import Fault
from alignment.config.model import CONTINUE, PREFIX_SHAPE, SHAPE, AdapterConfig, AdapterKind, Chain
from alignment.config.run import RunConfig
from alignment.config.stage import TrainedConfig
from alignment.core.files import parse_json
from alignment.stages.registry import as_trained


def num_layers(folder: Path) -> int | None:
    """The number of layers of the policy in a folder, a model's own or an artifact's; None if no file has it."""
    own = folder / "model"  # of an artifact that holds a whole model
    try:
        config = parse_json(((own if own.is_dir() else folder) / "config.json").read_text(encoding="utf-8"))
        layers = config.get("text_config", config).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None


def faults(stage: TrainedConfig, config: RunConfig, where: str) -> list[Fault]:
    """Faults in ``chain``, and conflicts with the stage that this one starts from, if the run has it."""
    before = _stage_before(stage, config)
    conflicts = _conflicts(stage, None if before is None else before.adapter, _dora_beside(stage, config))
    return [Fault(where=f"{where}{field}", message=message) for field, message in conflicts]


def outside_faults(stage: TrainedConfig, outside: AdapterConfig, where: str) -> list[Fault]:
    """Conflicts with the adapter from outside that the stage starts from; its modules are compared when it starts."""
    is_beside = stage.adapter.chain is not Chain.merge and outside.kind is AdapterKind.dora
    outside = replace(outside, target_modules=stage.adapter.target_modules)
    conflicts = _conflicts(stage, outside, stage.init if is_beside else "")
    return [Fault(where=f"{where}{field}", message=message) for field, message in conflicts]


def _conflicts(stage: TrainedConfig, before: AdapterConfig | None, dora: str) -> Iterator[tuple[str, str]]:
    """Fields and what is wrong with them. ``before`` is the adapter that the stage starts from, if it is known;
    ``dora`` names what left a DoRA adapter beside the weights."""
    adapter, kind, init = stage.adapter, stage.adapter.kind, stage.init
    kind_before = AdapterKind.full if before is None else before.kind
    if kind_before is AdapterKind.prefix and not (kind is AdapterKind.prefix and adapter.chain is CONTINUE):
        yield "", f"{init} trained a prefix, which cannot be merged; continue it, or train a low-rank adapter there"
    if kind is AdapterKind.full or adapter.chain is Chain.merge:
        return
    if adapter.modules_to_save:
        yield ".chain", f"modules_to_save needs chain 'merge', not {adapter.chain.value!r}"
    if before is not None and kind_before is not AdapterKind.full and before.modules_to_save:
        yield ".chain", f"{init} trains modules_to_save, which can only be merged; use 'merge'"
    if kind is AdapterKind.prefix and adapter.chain is Chain.stack:
        yield ".chain", "a prefix cannot be stacked on other adapters; use chain 'merge', or 'continue' for a prefix"
    if kind is AdapterKind.dora and adapter.chain is Chain.stack:
        rescales = "DoRA rescales the weights that it adapts and cannot be stacked on other adapters"
        yield ".chain", f"{rescales}; use chain 'merge'"
    if kind is not AdapterKind.qlora and kind_before is AdapterKind.qlora:
        yield ".chain", f"{init} trained on weights in four bits, which only qlora keeps; use qlora, or 'merge'"
    if kind is AdapterKind.qlora and dora:
        yield ".chain", f"{dora} trained DoRA, which needs weights that are not in four bits; use chain 'merge'"
    if adapter.chain is not CONTINUE:
        return
    if init == "base" or (before is not None and kind_before is AdapterKind.full):
        yield ".chain", f"{init} has no adapter to continue; set it to merge"
        return
    for name in () if before is None else PREFIX_SHAPE if kind is AdapterKind.prefix else SHAPE:
        wanted, has = getattr(adapter, name), getattr(before, name)
        if wanted != has:
            yield f".{name}", f"{wanted!r} cannot continue an adapter with {has!r}; use the value of {init}"
    special = (AdapterKind.dora, AdapterKind.prefix)
    if before is not None and kind is not kind_before and (kind in special or kind_before in special):
        yield ".kind", f"{kind.value} cannot continue what {init} trained with {kind_before.value}"


def _stage_before(stage: TrainedConfig, config: RunConfig) -> TrainedConfig | None:
    named = config.stages.get(stage.init.removeprefix("stage:"))
    return None if named is None else as_trained(named)


def _dora_beside(stage: TrainedConfig, config: RunConfig) -> str:
    """The reference of the stage whose DoRA adapter stays beside the weights of this one; empty without one."""
    passed: set[str] = set()  # stages that start from each other are refused elsewhere
    while stage.adapter.chain is not Chain.merge and stage.init not in passed:
        passed.add(stage.init)
        before = _stage_before(stage, config)
        if before is None or before.adapter.kind is AdapterKind.full:
            return ""
        if before.adapter.kind is AdapterKind.dora:
            return stage.init
        stage = before
    return ""

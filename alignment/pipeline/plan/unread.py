"""Settings that nothing reads beside the others, or that leave nothing to learn: they would promise something, and
change a fingerprint for nothing.

A setting at its default promises nothing and is let pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from alignment.config.adapter import LOW_RANK, READ_BY, AdapterConfig
from alignment.config.evaluation import JudgeConfig, JudgeKind
from alignment.config.faults import Fault
from alignment.config.run import RunConfig
from alignment.config.stage import (
    CptConfig,
    EvaluateConfig,
    KlConfig,
    KlControl,
    PpoConfig,
    SftConfig,
    StageConfig,
    Trained,
)
from alignment.config.too_long import TooLong, TooLongConfig


def faults(config: RunConfig) -> list[Fault]:
    """Everything in a run that is set and read by nothing."""
    return [fault for name, stage in config.stages.items() for fault in _stage_faults(stage, f"stages.{name}")]


def _stage_faults(stage: StageConfig, where: str) -> Iterator[Fault]:
    if isinstance(stage, Trained):
        yield from _adapter_faults(stage.adapter, f"{where}.adapter")
        drops = stage.adapter.kind in LOW_RANK and stage.adapter.dropout > 0.0
        if drops and not isinstance(stage, (CptConfig, SftConfig)):
            message = (
                f"{stage.adapter.dropout:g} is read by nothing: {stage.kind} compares passes of one model, of which "
                "none may drop anything; take 0"
            )
            yield Fault(where=f"{where}.adapter.dropout", message=message)
    if isinstance(stage, PpoConfig):
        yield from _ppo_faults(stage, where)
    if isinstance(stage, EvaluateConfig) and stage.judge.kind is JudgeKind.none:
        yield from _unread(
            stage.judge, JudgeConfig(), ("max_prompts", "max_invalid"), f"{where}.judge", "only a judge (judge.kind)"
        )
    too_long = getattr(stage, "too_long", None)
    if isinstance(too_long, TooLongConfig) and too_long.do is not TooLong.cut:
        yield from _unread(too_long, TooLongConfig(), ("side",), f"{where}.too_long", "only too_long.do 'cut'")


def _ppo_faults(stage: PpoConfig, where: str) -> Iterator[Fault]:
    if stage.kl.control is not KlControl.adaptive:
        yield from _unread(stage.kl, KlConfig(), ("target", "horizon"), f"{where}.kl", "only kl.control 'adaptive'")
    steps = stage.ppo_epochs * stage.num_minibatches
    if stage.max_approxkl is not None and steps < 3:
        message = (
            f"{stage.max_approxkl:g} ends nothing: the first minibatch sees no change, the second is held against it, "
            f"and an update of ppo_epochs * num_minibatches = {steps} has none after that; take 3 or more, or null"
        )
        yield Fault(where=f"{where}.max_approxkl", message=message)
    if stage.critic_warmup >= stage.updates:
        message = (
            f"{stage.critic_warmup} of {stage.updates} updates are the critic's alone, so the policy learns nothing; "
            "choose less than updates"
        )
        yield Fault(where=f"{where}.critic_warmup", message=message)


def _adapter_faults(adapter: AdapterConfig, where: str) -> Iterator[Fault]:
    for field in fields(adapter):
        readers = READ_BY.get(field.name)
        if readers is not None and adapter.kind not in readers:
            kinds = ", ".join(f"'{kind.value}'" for kind in readers)
            reader = f"only adapter.kind {kinds}, and it is '{adapter.kind.value}',"
            yield from _unread(adapter, AdapterConfig(), (field.name,), where, reader)


def _unread(group: Any, default: Any, names: tuple[str, ...], where: str, reader: str) -> Iterator[Fault]:
    """A fault for each of the fields that is not at its default."""
    for name in names:
        value, usual = getattr(group, name), getattr(default, name)
        if value != usual:
            message = f"{_shown(value)} is read by nothing; {reader} reads it; leave it at {_shown(usual)}"
            yield Fault(where=f"{where}.{name}", message=message)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))

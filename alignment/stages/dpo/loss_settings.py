"""Which settings a loss takes, and combinations that cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from alignment.config.faults import Fault, unread_notes
from alignment.stages.dpo.config import DpoConfig, DpoLoss

_TAKEN_BY: dict[str, tuple[DpoLoss, ...]] = {
    "beta": tuple(loss for loss in DpoLoss if loss is not DpoLoss.orpo),
    "label_smoothing": (DpoLoss.sigmoid, DpoLoss.sigmoid_norm, DpoLoss.robust),
    "nll_weight": tuple(loss for loss in DpoLoss if loss is not DpoLoss.orpo),
    "margin": (DpoLoss.sigmoid,),
    "target_margin": (DpoLoss.simpo,),
    "odds_weight": (DpoLoss.orpo,),
}
_WHY_NOT = {
    ("nll_weight", DpoLoss.orpo): "orpo already has this term",
}


def loss_faults(config: DpoConfig, where: str) -> Iterator[Fault]:
    """Settings that the loss does not use, lacks, or cannot combine."""
    defaults: dict[str, Any] = {entry.name: entry.default for entry in fields(DpoConfig)}
    for name, losses in _TAKEN_BY.items():
        value = getattr(config, name)
        if value != defaults[name] and config.loss not in losses:
            why = _WHY_NOT.get((name, config.loss), f"the loss {config.loss.value} does not use it")
            takers = ", ".join(loss.value for loss in losses)
            message = f"{value!r} has no effect: {why}; remove the setting, or choose a loss that uses it: {takers}"
            yield Fault(where=f"{where}.{name}", message=message)
    if not config.loss.needs_reference:
        reader = "only a loss with a reference"
        yield from unread_notes(config, DpoConfig(), ("precompute_reference",), where, reader)
    if config.loss is DpoLoss.simpo and config.target_margin is None:
        message = (
            "is missing, and simpo needs it; Meng et al. (2024) use 0.3 to 1.6 with a beta of 2 to 2.5, and 0 means "
            "no margin"
        )
        yield Fault(where=f"{where}.target_margin", message=message)
    if config.loss is DpoLoss.robust and not config.label_smoothing:
        message = "with 0, robust is the same as sigmoid; set the share of flipped labels, such as 0.1, or loss=sigmoid"
        yield Fault(where=f"{where}.label_smoothing", message=message)
    if config.margin and config.label_smoothing and config.loss is DpoLoss.sigmoid:
        message = (
            f"{config.margin:g} cannot be combined with label_smoothing={config.label_smoothing:g}: the margin of a "
            "flipped pair is unknown; set one of them to 0"
        )
        yield Fault(where=f"{where}.margin", message=message)

"""The stage kind ``dpo``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from alignment.config.adapter import AdapterKind
from alignment.config.launch import LaunchConfig
from alignment.core.artifacts import POLICY
from alignment.data.records import PreferencePair
from alignment.data.tokens.row_kinds import PAIRS
from alignment.stages.base import LOSS, Curve, DataSlot, LaunchShape, Learning, Outcome, Refusal, Reported, StageKind
from alignment.stages.dpo.config import DpoConfig, DpoLoss
from alignment.stages.shared.kind_answers import (
    ROW_COUNTS,
    and_held_out,
    beside_held_out,
    curve,
    handed_on,
    held_out_slot,
    limits_of_parts,
    why_not_validated,
)


def _data(config: DpoConfig) -> list[DataSlot]:
    own = DataSlot(field="data", data=config.data, record=PreferencePair, rows=PAIRS)
    return [own, held_out_slot(config.validation, own)]


def _refusals(config: DpoConfig, _: LaunchConfig) -> Iterator[Refusal]:
    if config.adapter.kind is AdapterKind.prefix:
        why = "TRL's DPO trainer copies adapters in a way that PEFT supports for low-rank adapters only"
        yield Refusal(field="adapter.kind", why=why, instead="adapter=lora")


def _reported(config: DpoConfig) -> Reported:
    own = Reported(training=("loss", "rewards/accuracies", "rewards/margins"), counts=ROW_COUNTS)
    return and_held_out(own, config.validation)


def _curves(settings: Mapping[str, Any]) -> list[Curve]:
    """Only the sigmoid loss starts at ln 2, so the other losses get no guide line."""
    sigmoid = settings.get("loss", DpoLoss.sigmoid.value) == DpoLoss.sigmoid.value
    charts = [
        curve("Loss", "dotted: ln 2, where training starts", "loss", math.log(2)) if sigmoid else LOSS,
        curve("Accuracy", "share of pairs; dotted: chance", "rewards/accuracies", 0.5),
        curve("Margin", "implicit reward, chosen − rejected", "rewards/margins", 0.0),
        Curve(
            title="Log-probability of the answers",
            unit="nats",
            keys=("logps/chosen", "logps/rejected"),
            labels=("chosen", "rejected"),
        ),
    ]
    return beside_held_out(charts, settings, loss="loss", accuracy="rewards/accuracies")


def _against_forgetting(name: str) -> str:
    return f"raise stages.{name}.beta, lower its optim.lr or train fewer epochs; add replay only to the SFT before it"


KIND = StageKind(
    name="dpo",
    summary="direct preference optimisation on the same pairs",
    config=DpoConfig,
    revision=4,
    produces=POLICY,
    run="alignment.stages.dpo.run:run",
    data=_data,
    curves=_curves,
    launch=LaunchShape(refusals=_refusals),
    learning=Learning(limits=limits_of_parts, from_preferences=True),
    outcome=Outcome(
        metrics=_reported, why_missing=why_not_validated, lines=handed_on, against_forgetting=_against_forgetting
    ),
)

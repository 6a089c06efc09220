"""The stage kind ``dpo``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.core.artifacts import POLICY
from alignment.records.training import ACCURACY
from alignment.stages.base import LOSS, Curve, DataSlot, Learning, LearnsFrom, Outcome, Reported, StageKind
from alignment.stages.dpo.config import DpoConfig, DpoLoss
from alignment.stages.dpo.loss_settings import loss_faults
from alignment.stages.dpo.proposal import PROPOSALS
from alignment.stages.shared.kind_answers import (
    ROW_COUNTS,
    and_held_out,
    beside_held_out,
    curve,
    handed_on,
    held_out_slot,
    hold_nearer_to_the_start,
    limits_of_parts,
    pair_slot,
    why_not_validated,
)

CHANGES = ("logps/chosen_change", "logps/rejected_change")
"""By how many nats log p of an answer changed in training, on average."""
HALVED = math.log(2)


def _data(config: DpoConfig) -> list[DataSlot]:
    own = pair_slot(config.data, config.margin)
    return [own, held_out_slot(config.validation, own)]


def _reported(config: DpoConfig) -> Reported:
    own = Reported(
        training=("loss", "rewards/accuracies", "rewards/margins", *CHANGES),
        counts=ROW_COUNTS,
        half_by_chance=("rewards/accuracies", ACCURACY),
    )
    return and_held_out(own, config.validation)


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    chosen, rejected = (metrics.get(name, 0.0) for name in CHANGES)
    if max(chosen, rejected) >= -HALVED:
        return []
    return [
        "chosen and rejected answers both became less than half as likely: on the first batch, log p fell by "
        f"{-chosen:.3g} nats for chosen and {-rejected:.3g} for rejected ones, so the policy now gives other "
        f"answers; a smaller optim.lr may keep chosen answers likely, and so may nll_weight=1 (Pang et al. 2024) or "
        f"a larger beta, if the loss has these settings"
    ]


def _curves(settings: Mapping[str, Any]) -> list[Curve]:
    """Charts of an older result too, whose settings lack the newer ones."""
    unit = "log odds" if settings.get("loss") == DpoLoss.orpo.value else "implicit reward"
    charts = [
        curve("Loss", "dotted: ln 2, where training starts", "loss", math.log(2)) if _from_ln2(settings) else LOSS,
        curve("Accuracy", "share of pairs; dotted: chance", "rewards/accuracies", 0.5),
        curve("Margin", f"{unit}, chosen − rejected", "rewards/margins", 0.0),
        Curve(
            title="Log-probability of the answers",
            unit="nats",
            keys=("logps/chosen", "logps/rejected"),
            labels=("chosen", "rejected"),
        ),
    ]
    return beside_held_out(charts, settings, loss="loss", accuracy="rewards/accuracies")


def _from_ln2(settings: Mapping[str, Any]) -> bool:
    """Whether the loss starts at ln 2 whatever the rows are."""
    own_terms = any(settings.get(name) for name in ("nll_weight", "margin"))
    return settings.get("loss", DpoLoss.sigmoid.value) in _FROM_LN2 and not own_terms


_FROM_LN2 = (DpoLoss.sigmoid.value, DpoLoss.sigmoid_norm.value, DpoLoss.robust.value)

KIND = StageKind(
    name="dpo",
    summary="direct preference optimisation on preference pairs",
    config=DpoConfig,
    revision=11,
    produces=POLICY,
    run="alignment.stages.dpo.run:run",
    data=_data,
    curves=_curves,
    headline="rewards/accuracies",
    faults=lambda config, _, where: loss_faults(config, where),
    learning=Learning(limits=limits_of_parts, learns_from=LearnsFrom.preferences),
    outcome=Outcome(
        metrics=_reported,
        why_missing=why_not_validated,
        doubts=_doubts,
        lines=handed_on,
        against_forgetting=hold_nearer_to_the_start,
    ),
    proposals=PROPOSALS,
)

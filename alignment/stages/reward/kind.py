"""The stage kind ``reward``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from alignment.config.faults import Fault
from alignment.core.artifacts import REWARD_MODEL
from alignment.records.training import ACCURACY
from alignment.stages.base import LOSS, Curve, DataSlot, Learning, Outcome, Reported, StageKind
from alignment.stages.reward.config import RewardConfig
from alignment.stages.reward.proposal import PROPOSALS
from alignment.stages.shared.kind_answers import (
    ROW_COUNTS,
    and_held_out,
    beside_held_out,
    curve,
    handed_on,
    held_out_fault,
    held_out_slot,
    limits_of_parts,
    pair_slot,
    why_not_validated,
)

_CHANCE = 0.5


def _data(config: RewardConfig) -> list[DataSlot]:
    own = pair_slot(config.data, config.margin)
    return [own, held_out_slot(config.validation, own)]


def _too_few_prompts(config: RewardConfig, num_prompts: int, where: str) -> Iterator[Fault]:
    yield from held_out_fault(config.eval_fraction, num_prompts, "pairs", where)


def _reported(config: RewardConfig) -> Reported:
    held_out = ("eval_accuracy", "eval_loss", "eval_margin", "eval_length_rule_accuracy")
    counts = (*ROW_COUNTS, "score_offset")
    if not config.eval_fraction:
        return and_held_out(Reported(counts=counts, half_by_chance=(ACCURACY,)), config.validation)
    own = Reported(held_out=held_out, counts=(*counts, "eval_rows"), half_by_chance=("eval_accuracy", ACCURACY))
    return and_held_out(own, config.validation)


def _why_missing(config: RewardConfig, metric: str, stage: str) -> str:
    if config.eval_fraction or not metric.startswith("eval_"):
        return why_not_validated(config, metric, stage)
    return f"stage {stage!r} reports no {metric!r} without held-out pairs; set stages.{stage}.eval_fraction above 0"


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    accuracy, pairs = metrics.get("eval_accuracy"), metrics.get("eval_rows")
    if accuracy is None or accuracy > _CHANCE:
        return []
    held_out = "held-out pairs" if pairs is None else f"{pairs:.0f} held-out pairs"
    return [
        f"right on {accuracy:.0%} of {held_out}, no better than chance ({_CHANCE:.0%}): a policy trained on its "
        f"scores will not learn the preferences"
    ]


def _curves(settings: Mapping[str, Any]) -> list[Curve]:
    plain = not any(settings.get(name) for name in ("margin", "center_coefficient"))
    charts = [
        curve("Loss", "Bradley–Terry; dotted: chance, ln 2", "loss", math.log(2)) if plain else LOSS,
        curve("Accuracy", "share of pairs; dotted: chance", "accuracy", _CHANCE),
        curve("Margin", "score of chosen − rejected", "margin", 0.0),
    ]
    return beside_held_out(charts, settings, loss="loss", accuracy="accuracy")


KIND = StageKind(
    name="reward",
    summary="reward model from preference pairs",
    config=RewardConfig,
    revision=11,
    produces=REWARD_MODEL,
    run="alignment.stages.reward.run:run",
    rehearse="alignment.stages.shared.base_check:refuse_base_without_scores",
    data=_data,
    curves=_curves,
    headline="accuracy",
    learning=Learning(limits=limits_of_parts, faults=_too_few_prompts),
    outcome=Outcome(metrics=_reported, why_missing=_why_missing, doubts=_doubts, lines=handed_on),
    proposals=PROPOSALS,
)

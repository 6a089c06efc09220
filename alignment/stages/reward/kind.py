"""The stage kind ``reward``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.new_recipe import BY_REWARD_MODEL, FROM_PAIRS, Circumstances, NewStage, Question, Reasoned
from alignment.config.optim import OptimConfig
from alignment.config.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import REWARD_MODEL
from alignment.core.fingerprint import IF_SET
from alignment.data.records import PreferencePair
from alignment.records.training import ACCURACY
from alignment.stages.base import LOSS, Curve, DataSlot, Display, Learning, Proposals, Reported, StageKind
from alignment.stages.shared import kind_answers as parts
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """A Bradley-Terry reward model: a scalar score at the last token of an answer (Stiennon et al. 2020, eq. 1).

    ``margin`` times the difference of a pair's scores is subtracted from the difference of its rewards in the loss
    (Touvron et al. 2023, eq. 2); rows then need scores.

    ``center_coefficient`` weighs (r_chosen + r_rejected)² in the loss (Eisenstein et al. 2023). ``eval_fraction`` of
    the prompts is held out for the accuracy, and for the offset that makes chosen answers score 0 on average."""

    kind: str = "reward"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, adam_eps=1e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    margin: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    center_coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    eval_fraction: Annotated[float, BELOW_ONE] = 0.1
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


_FEW_PROMPTS = 20


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if PreferencePair in circumstances.rows:
        yield FROM_PAIRS


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PreferencePair)
    if rows is None or circumstances.answer(FROM_PAIRS) not in BY_REWARD_MODEL:
        return None
    share = 0.1 if rows.prompts >= _FEW_PROMPTS else 0.0
    why = f"of {rows.prompts:,} different prompts, for its accuracy" if share else "too few prompts to hold any out"
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        **optimiser(
            rows, lr=adapter_rate(1e-4, "chosen, not tuned"), epochs=Reasoned(value=1, why="Stiennon et al. 2020")
        ),
        **row_limit(rows, circumstances),
        "eval_fraction": Reasoned(value=share, why=why),
    }
    return NewStage(why="Learns to score answers from the pairs.", settings=settings, reads=rows)


_CHANCE = 0.5


def _data(config: RewardConfig) -> list[DataSlot]:
    own = parts.pair_slot(config.data, config.margin)
    return [own, parts.held_out_slot(config.validation, own)]


def _reported(config: RewardConfig) -> Reported:
    held_out = ("eval_accuracy", "eval_loss", "eval_margin", "eval_length_rule_accuracy")
    counts = (*parts.ROW_COUNTS, "score_offset")
    if not config.eval_fraction:
        absent = {"eval_": ("held-out pairs", "eval_fraction above 0")}
        return parts.and_held_out(Reported(counts=counts, half_by_chance=(ACCURACY,), absent=absent), config.validation)
    own = Reported(held_out=held_out, counts=(*counts, "eval_rows"), half_by_chance=("eval_accuracy", ACCURACY))
    return parts.and_held_out(own, config.validation)


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
        parts.curve("Loss", "Bradley–Terry; dotted: chance, ln 2", "loss", math.log(2)) if plain else LOSS,
        parts.curve("Accuracy", "share of pairs; dotted: chance", "accuracy", _CHANCE, live=True),
        parts.curve("Margin", "score of chosen − rejected", "margin", 0.0),
    ]
    return parts.beside_held_out(charts, settings, loss="loss", accuracy="accuracy")


KIND = StageKind(
    name="reward",
    summary="reward model from preference pairs",
    config=RewardConfig,
    revision=11,
    produces=REWARD_MODEL,
    run="alignment.stages.reward.run:run",
    rehearse="alignment.stages.shared.base_check:refuse_base_without_scores",
    data=_data,
    metrics=_reported,
    learning=Learning(
        limits=parts.limits_of_parts,
        faults=lambda config, prompts, _, where: parts.held_out_fault(config.eval_fraction, prompts, "pairs", where),
    ),
    display=Display(curves=_curves, doubts=_doubts, lines=parts.handed_on),
    proposals=Proposals(questions=_questions, stage=_stage),
)

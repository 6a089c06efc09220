"""The stage kind ``dpo``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Annotated, Any

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.faults import Fault, unread_notes
from alignment.config.model import AdapterConfig
from alignment.config.new_recipe import DIRECTLY, FROM_PAIRS, Circumstances, NewStage, Question, Reasoned
from alignment.config.optim import OptimConfig
from alignment.config.rules import BELOW_HALF, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY
from alignment.core.fingerprint import IF_SET
from alignment.data.records import PreferencePair
from alignment.records.training import ACCURACY
from alignment.stages.base import LOSS, Curve, DataSlot, Display, Learning, LearnsFrom, Proposals, Reported, StageKind
from alignment.stages.shared import kind_answers as parts
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit, validation


class DpoLoss(str, Enum):
    """Losses for a pair. Δ is the chosen answer's log-ratio to the reference minus the rejected answer's; h is β Δ.

    ``sigmoid``: −log σ(h), with log-ratios summed over an answer's tokens (Rafailov et al. 2023). ``sigmoid_norm``: the
    same with means over the tokens (Lambert et al. 2024); use a larger beta. ``hinge``: max(0, 1 − h) (Zhao et al.
    2023). ``ipo``: (Δ − 1/(2 β))² with means (Azar et al. 2023). ``robust``: ``sigmoid``, unbiased although a share
    ``label_smoothing`` of the labels is flipped (Chowdhury et al. 2024). ``apo_zero``: raises chosen answers and
    lowers rejected ones, each against the reference; ``apo_down``: lowers both, rejected ones more (D'Oosterlinck et
    al. 2024, eqs. 7 and 8).

    Two take no reference. ``simpo``: −log σ(β (m_c − m_r) − ``target_margin``), with the means m of log p over an
    answer's tokens (Meng et al. 2024, eq. 6). ``orpo``: −m_c − ``odds_weight`` log σ(log odds of chosen over rejected),
    where an answer's probability is exp(m) (Hong et al. 2024, eq. 6); it does not need a policy that SFT trained."""

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    simpo = "simpo"
    orpo = "orpo"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with its start."""
        return self not in (DpoLoss.simpo, DpoLoss.orpo)


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023). The reference is the policy at the start of the stage.

    With ``precompute_reference`` its log-probabilities are computed once and cached next to the artifacts, which pays
    off over several epochs, or several stages on the same pairs. Otherwise they are computed in every step. A loss
    without a reference computes none.

    ``label_smoothing`` is the share of labels that are flipped. With ``sigmoid`` and ``sigmoid_norm`` it gives the
    conservative loss (Mitchell 2023), and ``robust`` needs it. ``nll_weight`` adds the negative log-likelihood of the
    chosen answer, divided by its tokens (α of Pang et al. 2024). ``margin`` times the difference of a pair's scores is
    subtracted from h (Amini et al. 2024, with their f the identity); rows then need scores. ``target_margin`` is γ of
    ``simpo``, which needs it. ``odds_weight`` is λ of ``orpo``; its default is the value of Hong et al. for Mistral 7B.
    """

    kind: str = "dpo"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: Annotated[float, POSITIVE] = 0.1
    loss: DpoLoss = DpoLoss.sigmoid
    label_smoothing: Annotated[float, BELOW_HALF] = field(default=0.0, metadata=IF_SET)
    nll_weight: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    margin: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    target_margin: Annotated[float | None, NOT_NEGATIVE] = field(default=None, metadata=IF_SET)
    odds_weight: Annotated[float, POSITIVE] = field(default=0.1, metadata=IF_SET)
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


_TAKEN_BY: dict[str, tuple[DpoLoss, ...]] = {
    "beta": tuple(loss for loss in DpoLoss if loss is not DpoLoss.orpo),
    "label_smoothing": (DpoLoss.sigmoid, DpoLoss.sigmoid_norm, DpoLoss.robust),
    "nll_weight": tuple(loss for loss in DpoLoss if loss is not DpoLoss.orpo),
    "margin": (DpoLoss.sigmoid,),
    "target_margin": (DpoLoss.simpo,),
    "odds_weight": (DpoLoss.orpo,),
}
_WHY_NOT = {("nll_weight", DpoLoss.orpo): "orpo already has this term"}


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
        smoothed = f"label_smoothing={config.label_smoothing:g}"
        message = f"{config.margin:g} with {smoothed}: a flipped pair has no known margin; set one of them to 0"
        yield Fault(where=f"{where}.margin", message=message)


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if PreferencePair in circumstances.rows:
        yield FROM_PAIRS


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PreferencePair)
    if rows is None or circumstances.answer(FROM_PAIRS) not in DIRECTLY:
        return None
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        "beta": Reasoned(
            value=0.1, why="Rafailov et al. 2023, appendix B; a smaller value lets the policy move further"
        ),
        **optimiser(
            rows,
            lr=adapter_rate(5e-5, "chosen, not tuned"),
            epochs=Reasoned(value=1, why="chosen, not tuned: pairs are soon memorised"),
        ),
        **row_limit(rows, circumstances),
        **validation(rows, epochs=1),
    }
    return NewStage(why="Learns to prefer the better answer of each pair.", settings=settings, reads=rows)


CHANGES = ("logps/chosen_change", "logps/rejected_change")
"""By how many nats log p of an answer changed in training, on average."""
HALVED = math.log(2)


def _data(config: DpoConfig) -> list[DataSlot]:
    own = parts.pair_slot(config.data, config.margin)
    return [own, parts.held_out_slot(config.validation, own)]


def _reported(config: DpoConfig) -> Reported:
    own = Reported(
        training=("loss", "rewards/accuracies", "rewards/margins", *CHANGES),
        counts=parts.ROW_COUNTS,
        half_by_chance=("rewards/accuracies", ACCURACY),
    )
    return parts.and_held_out(own, config.validation)


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
    own_terms = any(settings.get(name) for name in ("nll_weight", "margin"))
    from_ln2 = settings.get("loss", DpoLoss.sigmoid.value) in _FROM_LN2 and not own_terms
    unit = "log odds" if settings.get("loss") == DpoLoss.orpo.value else "implicit reward"
    charts = [
        parts.curve("Loss", "dotted: ln 2, where training starts", "loss", math.log(2)) if from_ln2 else LOSS,
        parts.curve("Accuracy", "share of pairs; dotted: chance", "rewards/accuracies", 0.5, live=True),
        parts.curve("Margin", f"{unit}, chosen − rejected", "rewards/margins", 0.0),
        parts.curve(
            "Log-probability of the answers", "nats", ("logps/chosen", "logps/rejected"), labels=("chosen", "rejected")
        ),
    ]
    return parts.beside_held_out(charts, settings, loss="loss", accuracy="rewards/accuracies")


_FROM_LN2 = (DpoLoss.sigmoid.value, DpoLoss.sigmoid_norm.value, DpoLoss.robust.value)

KIND = StageKind(
    name="dpo",
    summary="direct preference optimisation on preference pairs",
    config=DpoConfig,
    revision=11,
    produces=POLICY,
    run="alignment.stages.dpo.run:run",
    data=_data,
    faults=lambda config, _, where: loss_faults(config, where),
    learning=Learning(limits=parts.limits_of_parts, learns_from=LearnsFrom.preferences),
    metrics=_reported,
    display=Display(
        curves=_curves, doubts=_doubts, lines=parts.handed_on, against_forgetting=parts.hold_nearer_to_the_start
    ),
    proposals=Proposals(questions=_questions, stage=_stage),
)

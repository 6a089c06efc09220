"""The stage kind ``kto``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from alignment.algos.sampling import GREATEST_RATIO, LEAST_RATIO, label_weights
from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.faults import Fault
from alignment.config.model import AdapterConfig
from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.run import RunConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY
from alignment.data.records import LabelledAnswer
from alignment.data.tokens.row_kinds import DESIRABLE, LABELLED_ANSWERS, UNDESIRABLE
from alignment.stages import base
from alignment.stages.shared.kind_answers import ROW_COUNTS, curve, hold_nearer_to_the_start, limits_of_parts
from alignment.stages.shared.new_settings import adapter_rate, data_of, from_start, optimiser, row_limit


class KtoLoss(str, Enum):
    """The losses of TRL's KTO trainer.

    h is an answer's log-ratio to the reference, and w the weight of its label. ``kto``: w (1 − σ(β (h − z))) for a
    desirable answer and w (1 − σ(β (z − h))) for an undesirable one, where z ≥ 0 estimates the KL divergence from the
    reference (Ethayarajh et al. 2024, eq. 7). ``apo_zero_unpaired``: the same with z = 0, for answers that are better
    than those of the policy (D'Oosterlinck et al. 2024)."""

    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss needs the KL divergence, which is estimated from other answers of the same batch."""
        return self is KtoLoss.kto


@dataclass(kw_only=True, slots=True)
class KtoConfig:
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024). The reference is the policy at the start of the stage.

    A weight of null is chosen from the numbers of desirable and undesirable rows, such that the ratio of
    desirable_weight × desirable rows to undesirable_weight × undesirable rows lies in [1, 4/3] (eq. 8); the weight of
    the label that has enough rows stays at 1. Rows are shuffled once, and every epoch goes through them in that order.
    With ``precompute_reference`` the reference's log-probabilities are computed once and cached next to the artifacts,
    which pays off over several epochs."""

    kind: str = "kto"
    init: str = reference_to("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: Annotated[float, POSITIVE] = 0.1
    loss: KtoLoss = KtoLoss.kto
    desirable_weight: Annotated[float | None, POSITIVE] = None
    undesirable_weight: Annotated[float | None, POSITIVE] = None
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(LabelledAnswer)
    if rows is None:
        return None
    settings = {
        **from_start(circumstances, "stage:sft"),
        **data_of(rows),
        "beta": Reasoned(value=0.1, why="Ethayarajh et al. 2024, section 4.2"),
        **optimiser(
            rows, lr=adapter_rate(5e-5, "chosen, not tuned"), epochs=Reasoned(value=1, why="chosen, not tuned")
        ),
        **row_limit(rows, circumstances),
    }
    return NewStage(why="Learns from answers that are labelled good or bad.", settings=settings, reads=rows)


FIGURES = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
COUNTS = ("desirable_rows", "undesirable_rows", "desirable_weight", "undesirable_weight")
ONE_LABEL_REMEDY = (
    "add such rows, or use a stage that learns from only one kind; if the rows come from a sample stage, change its "
    "threshold"
)
_LABELS = ("desirable", "undesirable")


def label_of(record: LabelledAnswer) -> str:
    """The label's name."""
    return DESIRABLE if record.desirable else UNDESIRABLE


def one_label(labels: Mapping[str, int]) -> str:
    """Why rows with these numbers of labels cannot be learned from; empty if they can."""
    missing = next((label for label in (DESIRABLE, UNDESIRABLE) if not labels.get(label)), None)
    if missing is None:
        return ""
    return f"none of the {sum(labels.values())} rows is {missing}, but KTO learns from the difference between both"


def _data(config: KtoConfig) -> list[base.DataSlot]:
    return [base.DataSlot(field="data", data=config.data, record=LabelledAnswer, rows=LABELLED_ANSWERS, label=label_of)]


def _faults(config: KtoConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    if config.loss.estimates_kl and config.optim.batch_size < 2:
        needed = "the KL divergence is estimated from other answers; use 2 or more, or loss=apo_zero_unpaired"
        message = f"{config.optim.batch_size}, but {needed}"
        yield Fault(where=f"{where}.optim.batch_size", message=message)


def _size_faults(config: KtoConfig, processes: int, where: str) -> Iterator[Fault]:
    size = config.optim.batch_size
    if config.loss.estimates_kl and processes > 1 and size % processes == 0 and size // processes < 2:
        message = f"{size} leaves one row for each of {processes} processes, and TRL needs two; use {2 * processes}"
        yield Fault(where=f"{where}.optim.batch_size", message=message)


def _label_faults(_: KtoConfig, __: int, labels: Mapping[str, int], where: str) -> Iterator[Fault]:
    if labels and (why := one_label(labels)):
        yield Fault(where=f"{where}.data", message=f"{why}; {ONE_LABEL_REMEDY}")


def _notes(config: KtoConfig, planned: base.Planned) -> Iterator[str]:
    labels = planned.labels
    if one_label(labels):
        return
    counts = labels[DESIRABLE], labels[UNDESIRABLE]
    weights = label_weights(*counts, desirable=config.desirable_weight, undesirable=config.undesirable_weight)
    ratio = weights.ratio(*counts)
    note = (
        f"{counts[0]} desirable and {counts[1]} undesirable rows, with weights of {weights.desirable:.4g} and "
        f"{weights.undesirable:.4g}: in total, the desirable ones count {ratio:.3g} times as much"
    )
    if not LEAST_RATIO - 1e-9 <= ratio <= GREATEST_RATIO + 1e-9:
        yield f"{note}, but the paper recommends 1 to 4/3; set one of the weights to null"
    elif config.desirable_weight is None or config.undesirable_weight is None:
        yield note


def _curves(_: Mapping[str, Any]) -> list[base.Curve]:
    return [
        base.LOSS,
        curve("Implicit reward", "β log π/ref", ("rewards/chosen", "rewards/rejected"), 0.0, labels=_LABELS),
        curve("Margin", "implicit reward, desirable − undesirable", "rewards/margins", 0.0, live=True),
        curve("KL divergence from the reference", "nats, estimated from mismatched answers", "kl", 0.0),
        curve("Log-probability of the answers", "nats", ("logps/chosen", "logps/rejected"), labels=_LABELS),
    ]


KIND = base.StageKind(
    name="kto",
    summary="Kahneman–Tversky optimisation on single answers, labelled good or bad",
    config=KtoConfig,
    revision=8,
    produces=POLICY,
    run="alignment.stages.kto.run:run",
    data=_data,
    faults=_faults,
    metrics=lambda _: base.Reported(training=FIGURES, counts=(*ROW_COUNTS, *COUNTS)),
    notes=_notes,
    launch=base.LaunchShape(size_faults=_size_faults),
    learning=base.Learning(
        limits=limits_of_parts,
        faults=_label_faults,
        learns_from=base.LearnsFrom.preferences,
    ),
    display=base.Display(curves=_curves, against_forgetting=hold_nearer_to_the_start),
    proposals=base.Proposals(stage=_stage),
)

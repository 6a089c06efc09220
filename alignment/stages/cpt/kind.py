"""The stage kind ``cpt``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault
from alignment.config.run import RunConfig
from alignment.core.artifacts import POLICY
from alignment.data.records import PlainText
from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import DataSlot, Learning, Outcome, Reported, StageKind
from alignment.stages.cpt.config import CptConfig
from alignment.stages.cpt.proposal import PROPOSALS
from alignment.stages.shared.kind_answers import (
    and_held_out,
    handed_on,
    held_out_slot,
    next_token_curves,
    replay_advice,
    why_not_validated,
)


def _data(config: CptConfig) -> list[DataSlot]:
    own = DataSlot(field="data", data=config.data, record=PlainText, rows=TEXTS)
    return [own, held_out_slot(config.validation, own)]


def _faults(config: CptConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    if config.validation.share is not None:
        message = "a text becomes several rows, so a share would hold out parts of training texts; use validation.data"
        yield Fault(where=f"{where}.validation.share", message=message)


def _reported(config: CptConfig) -> Reported:
    """No text is too long or cut short, because it becomes several rows."""
    return and_held_out(Reported(training=("loss",), counts=("rows",)), config.validation)


KIND = StageKind(
    name="cpt",
    summary="continued pretraining on plain text",
    config=CptConfig,
    revision=10,
    produces=POLICY,
    run="alignment.stages.cpt.run:run",
    data=_data,
    faults=_faults,
    curves=next_token_curves,
    learning=Learning(
        one_row_a_record=lambda _: False,  # a text becomes as many rows as its tokens fill
        batches_of_rows=False,
        rehearsed=False,
        may_drop=True,
    ),
    outcome=Outcome(
        metrics=_reported, why_missing=why_not_validated, lines=handed_on, against_forgetting=replay_advice
    ),
    proposals=PROPOSALS,
)

"""The stage kind ``sft``, as the rest of the package sees it."""

from __future__ import annotations

from alignment.core.artifacts import POLICY
from alignment.data.records import Conversation
from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.stages.base import DataSlot, Learning, LearnsFrom, Outcome, StageKind
from alignment.stages.sft.config import SftConfig
from alignment.stages.sft.proposal import PROPOSALS
from alignment.stages.shared.kind_answers import (
    handed_on,
    held_out_slot,
    limits_of_parts,
    next_token_curves,
    next_token_metrics,
    replay_advice,
    why_not_validated,
)


def _data(config: SftConfig) -> list[DataSlot]:
    own = DataSlot(field="data", data=config.data, record=Conversation, rows=CONVERSATIONS)
    return [own, held_out_slot(config.validation, own)]


KIND = StageKind(
    name="sft",
    summary="instruction tuning on conversations",
    config=SftConfig,
    revision=11,
    produces=POLICY,
    run="alignment.stages.sft.run:run",
    data=_data,
    curves=next_token_curves,
    learning=Learning(
        limits=limits_of_parts,
        one_row_a_record=lambda config: not config.packing,
        may_drop=True,
        learns_from=LearnsFrom.demonstrations,
    ),
    outcome=Outcome(
        metrics=next_token_metrics, why_missing=why_not_validated, lines=handed_on, against_forgetting=replay_advice
    ),
    proposals=PROPOSALS,
)

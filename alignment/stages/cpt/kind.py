"""The stage kind ``cpt``, as the rest of the package sees it."""

from __future__ import annotations

from alignment.core.artifacts import POLICY
from alignment.data.records import PlainText
from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import DataSlot, Learning, Outcome, StageKind
from alignment.stages.cpt.config import CptConfig
from alignment.stages.shared.kind_answers import next_token_curves, next_token_metrics, replay_advice


def _data(config: CptConfig) -> list[DataSlot]:
    return [DataSlot(field="data", data=config.data, record=PlainText, rows=TEXTS)]


KIND = StageKind(
    name="cpt",
    summary="continued pretraining on plain text",
    config=CptConfig,
    revision=3,
    produces=POLICY,
    run="alignment.stages.cpt.run:run",
    data=_data,
    curves=next_token_curves,
    learning=Learning(
        one_row_a_record=lambda _: False,  # a text becomes as many rows as its tokens fill
        batches_of_rows=False,
        rehearsed=False,
        may_drop=True,
    ),
    outcome=Outcome(metrics=next_token_metrics, against_forgetting=replay_advice),
)

"""The stage kind ``cpt``, as the rest of the package sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.faults import Fault
from alignment.config.model import AdapterConfig
from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.run import RunConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY
from alignment.core.fingerprint import IF_SET
from alignment.data.records import PlainText
from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import DataSlot, Display, Learning, Proposals, Reported, StageKind
from alignment.stages.shared import kind_answers as parts
from alignment.stages.shared.new_settings import adapter_rate, batch_size, data_of


@dataclass(kw_only=True, slots=True)
class CptConfig:
    """Continued pretraining on plain texts: every token is learned, and each text is split into rows of ``max_length``.

    ``packing`` joins short rows, which do not attend to one another."""

    kind: str = "cpt"
    init: str = reference_to("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    max_length: Annotated[int, POSITIVE] = 1024
    packing: bool = True
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


_LONGEST = 1024


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(PlainText)
    if rows is None:
        return None
    length = min(_LONGEST, circumstances.positions)
    counted = rows.lengths.rows
    tokens = sum(counted) / max(1, len(counted)) * rows.number
    packed = max(1, math.ceil(tokens / length))
    why = f"about {tokens:,.0f} tokens make {packed:,} rows (chosen, not tuned)"
    optim = {
        "lr": adapter_rate(1e-4, "chosen, not tuned"),
        "batch_size": Reasoned(value=batch_size(packed), why=why),
        "epochs": Reasoned(value=1, why="chosen, not tuned: text that is seen too often is memorised"),
    }
    limit = Reasoned(value=length, why="texts are split into rows of this many tokens, and short ones are joined")
    settings = {**data_of(rows), "optim": optim, "max_length": limit}
    return NewStage(why="First, the model learns to continue plain text.", settings=settings, reads=rows)


def _data(config: CptConfig) -> list[DataSlot]:
    own = DataSlot(field="data", data=config.data, record=PlainText, rows=TEXTS, counted=False)
    return [own, parts.held_out_slot(config.validation, own)]


def _faults(config: CptConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    if config.validation.share is not None:
        message = "a text becomes several rows, so a share would hold out parts of training texts; use validation.data"
        yield Fault(where=f"{where}.validation.share", message=message)


def _reported(config: CptConfig) -> Reported:
    """No text is too long or cut short, because it becomes several rows."""
    return parts.and_held_out(Reported(training=("loss",), counts=("rows",)), config.validation)


KIND = StageKind(
    name="cpt",
    summary="continued pretraining on plain text",
    config=CptConfig,
    revision=10,
    produces=POLICY,
    run="alignment.stages.shared.language_model:learn_texts",
    data=_data,
    faults=_faults,
    metrics=_reported,
    learning=Learning(may_drop=True),
    display=Display(curves=parts.next_token_curves, lines=parts.handed_on, against_forgetting=parts.replay_advice),
    proposals=Proposals(stage=_stage),
)

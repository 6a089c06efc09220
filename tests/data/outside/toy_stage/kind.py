"""A stage that learns plain texts backwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY, read_manifest
from alignment.data.records import PlainText
from alignment.data.tokens.row_kinds import TEXTS
from alignment.stages.base import Curve, DataSlot, Display, Learning, Reported, StageKind


@dataclass(kw_only=True, slots=True)
class ToyConfig:
    kind: str = "toy"
    init: str = reference_to("base", POLICY)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))
    max_length: Annotated[int, POSITIVE] = 64
    packing: bool = False  # read by `learn`, like the next two
    log_every: int = not_identity(1)  # changes no result, so it is not part of the fingerprint
    save_every: int = not_identity(1)


def loss_line(artifact: Path) -> list[str]:
    manifest = read_manifest(artifact)
    return [] if manifest is None else [f"toy loss {manifest.metrics['loss']:.3f}"]


KIND = StageKind(
    name="toy",
    summary="plain texts backwards",
    config=ToyConfig,
    revision=7,
    produces=POLICY,
    run="toy_stage.run:run",
    data=lambda config: [DataSlot(field="data", data=config.data, record=PlainText, rows=TEXTS, counted=False)],
    metrics=lambda _: Reported(training=("loss",)),
    learning=Learning(may_drop=True),
    display=Display(
        curves=lambda _: [Curve(title="Backward loss", unit="nats", keys=("loss",))],
        lines=loss_line,
    ),
    smoke={"optim": {"max_steps": 1, "warmup_ratio": 0.0}},
)

"""What stages would need, as ``python -m alignment.estimate`` writes it for the plan and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alignment.core import typed_json

FILE = "cost.json"
ASKED = "asked.json"
"""In the folder that ``python -m alignment.estimate`` gets: stage files, and those of their variants."""
PROGRESS = "progress.txt"
"""Lines for the user, which it writes to that folder while it works."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """A phase of a stage: the largest sum of its tensors in bytes with its terms (``weights``, ``activations`` …), the
    bytes that the allocator holds for them at the end of the phase, and FLOP of products and seconds of all of it."""

    peak: int
    held: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    flop: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """A stage on one process.

    ``fixed`` are the bytes of the libraries, or of a GPU's context. On a GPU the phases before training are those of
    the host, which needs ``host`` bytes then, or for what a launch offloads. ``result`` bytes stay on the disk, and
    ``checkpoints`` are there until the stage ends. ``trained`` and ``weights`` count numbers. Where it is not known how
    many rows there are, FLOP and seconds are those of the ``first_rows``. ``assumed_tokens`` is the size of micro-
    batches where the stage will choose one itself, else 0. ``remedy`` are the overrides with which it fits and needs
    ``remedy_peak`` bytes, if it does not fit by itself; in a trade, those that make this way of training. ``error``
    says why there are no phases."""

    stage: str
    kind: str
    adapter: str = ""
    phases: dict[str, PhaseCost] = field(default_factory=dict)
    fixed: int = 0
    host: int = 0
    result: int = 0
    checkpoints: int = 0
    steps: int = 0
    tokens: float = 0.0
    trained: int = 0
    weights: int = 0
    first_rows: int = 0
    assumed_tokens: int = 0
    remedy: list[str] = field(default_factory=list)
    remedy_peak: int = 0
    error: str = ""

    @property
    def peak(self) -> int:
        """Bytes of the process, or of its GPU, in the phase that needs most."""
        return self.fixed + max((max(phase.peak, phase.held) for phase in self.phases.values()), default=0)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def flop(self) -> float:
        return sum(phase.flop for phase in self.phases.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """The stages of a run on a device with ``memory`` bytes, and each in every way of training it (``trades``).

    ``startup`` are the seconds in which a run imports the libraries, once for all stages on one process."""

    device: str
    memory: float = 0.0
    startup: float = 0.0
    stages: list[StageCost] = field(default_factory=list)
    trades: list[StageCost] = field(default_factory=list)
    version: int = 1

    def write(self, path: Path) -> None:
        typed_json.write(path, self)

    @property
    def disk(self) -> int:
        """Bytes of all results, and of the largest checkpoints."""
        results = sum(stage.result for stage in self.stages)
        return results + max((stage.checkpoints for stage in self.stages), default=0)

    @staticmethod
    def read(path: Path) -> RunCost:
        """Reads the file. Raises ArtifactError: it is damaged."""
        return typed_json.read(path, RunCost, remedy="plan again")

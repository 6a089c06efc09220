"""What a running stage has around it: its folders, its place among the processes, its randomness, its progress line."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alignment.config.adapter import AdapterConfig
from alignment.core.files import disk_error
from alignment.job import StageSpec
from alignment.records.worker import Progress
from alignment.training.device import own_device
from alignment.training.heartbeat import Pulse
from alignment.training.trackers.all_trackers import Trackers


@dataclass(kw_only=True, slots=True)
class Clock:
    """Seconds that a stage has taken, those of earlier attempts included once they are told."""

    earlier: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """All attempts together, as far as they led to what is there now."""
        return self.earlier + time.monotonic() - self.started


@dataclass(frozen=True, kw_only=True, slots=True)
class StageContext:
    """Handed to a stage by the worker."""

    spec: StageSpec
    rank: int
    world_size: int
    clock: Clock = field(default_factory=Clock)
    pulse: Pulse = field(default_factory=Pulse)
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def content(self) -> Path:
        """What becomes the artifact."""
        return self.spec.work / "content"

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted stage goes on from."""
        return self.spec.work / "checkpoints"

    @property
    def device(self) -> torch.device:
        """This process's device: its own GPU, or the CPU."""
        return own_device()

    @property
    def adapter(self) -> AdapterConfig:
        """How the stage changes the weights."""
        adapter = self.spec.adapter
        assert adapter is not None, "only a stage that trains has an adapter"
        return adapter

    def seed(self, name: str, *numbers: int) -> int:
        """A seed derived by name, so that a stage resumed anywhere draws the same numbers."""
        return _seed(self.spec.seed, self.spec.stage, name, *numbers)

    def generator(self, name: str, *numbers: int) -> torch.Generator:
        """A generator on the CPU, seeded by name."""
        return torch.Generator().manual_seed(self.seed(name, *numbers))

    def run_generator(self, name: str) -> torch.Generator:
        """A generator on the CPU, seeded by name, that gives every stage of the run the same numbers."""
        return torch.Generator().manual_seed(_seed(self.spec.seed, name))

    def progress(self, phase: str, step: int = 0, total: int | None = None, **figures: float) -> None:
        """Tells the driver how far the stage is; cheap, and a full disk may swallow it: what matters says so itself."""
        self.pulse.phase = phase
        self.pulse.told += 1
        if not self.is_main:
            return
        try:
            Progress(phase=phase, step=step, total=total, figures=figures).write(self.spec.work)
        except OSError as error:
            if disk_error(error, folder=self.spec.work) is None:
                raise


def _seed(*parts: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")

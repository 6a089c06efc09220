"""The context of a running stage: its folders, its rank among the processes, its randomness, its progress line."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignment.config.launch import DEVICE
from alignment.config.model import AdapterConfig
from alignment.core.errors import ConfigError
from alignment.core.files import disk_error
from alignment.core.hardware import resident_peak
from alignment.costs.recorder import recorder
from alignment.job import StageSpec
from alignment.records.worker import Progress
from alignment.training.heartbeat import HeartbeatWriter
from alignment.training.trackers.all_trackers import Trackers

if TYPE_CHECKING:
    from alignment.training.size_search import SizeSearch


def own_device() -> torch.device:
    """This process's own GPU, or the CPU. Raises ConfigError: the launcher and PyTorch disagree about the device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = os.environ.get(DEVICE, "cuda" if count else "cpu")
    if kind == "cpu" and count:
        raise ConfigError(
            f"PyTorch finds {_gpus(count)}, but the launcher found none",
            where="device",
            remedy="set CUDA_VISIBLE_DEVICES=0 to use a GPU, or CUDA_VISIBLE_DEVICES= (empty) to use the CPU",
        )
    if kind == "cuda" and count <= rank:
        raise ConfigError(
            f"the launcher found a GPU for process {rank} of this machine, but PyTorch {torch.__version__} finds "
            + (_gpus(count) if count else "none that it can use"),
            where="device",
            remedy="install the PyTorch build that fits the GPU's driver; set CUDA_VISIBLE_DEVICES= (empty) to use "
            "the CPU",
        )
    return torch.device("cuda", rank) if count else torch.device("cpu")


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PhasePeaks:
    """Peaks by phase, in bytes: resident memory on Linux, and allocated memory of a GPU where there is one. Memory that
    a phase leaves to the allocator counts in later phases too. ``engine`` is the peak of an engine that the stage
    started, of all its processes together; None without one."""

    def __init__(self) -> None:
        self.resident: dict[str, float] = {}
        self.allocated: dict[str, float] = {}
        self.engine: float | None = None
        self._name = "starting"

    @property
    def name(self) -> str:
        """The phase that runs."""
        return self._name

    def begin(self, name: str) -> None:
        """Ends the phase that runs and begins another, which may have run before."""
        if name != self._name:
            self.end()
            self._name = name

    def end(self) -> None:
        """Ends the phase that runs."""
        if self._name:
            self._raise(self.resident, resident_peak())
            if torch.cuda.is_initialized():
                self._raise(self.allocated, float(torch.cuda.max_memory_allocated()))
        with suppress(OSError):
            _CLEAR.write_text(_RESET_PEAK)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._name = ""

    def of_engine(self, peak: float) -> None:
        """Takes the peak of an engine's processes; a stage may start several engines, one after another."""
        self.engine = max(peak, self.engine or 0.0)

    def _raise(self, peaks: dict[str, float], value: float | None) -> None:
        if value is not None:
            peaks[self._name] = max(value, peaks.get(self._name, 0.0))


@dataclass(kw_only=True, slots=True)
class Clock:
    """Seconds that a stage has taken; ``earlier`` holds those of earlier attempts once they are known."""

    earlier: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds of all attempts, as far as their steps count."""
        return self.earlier + time.monotonic() - self.started


@dataclass(frozen=True, kw_only=True, slots=True)
class StageContext:
    """Passed to a stage by the worker. ``notes`` are sentences for the user, shown when the stage has ended. With a
    ``search`` the stage only gets ready to train; its models are thrown away then, and nothing that it computes may be
    stored for later. ``chosen_tokens`` is the size of micro-batches if the stage chose it."""

    spec: StageSpec
    rank: int
    world_size: int
    clock: Clock = field(default_factory=Clock)
    heartbeat: HeartbeatWriter = field(default_factory=HeartbeatWriter)
    trackers: Trackers = field(default_factory=Trackers)
    peaks: PhasePeaks = field(default_factory=PhasePeaks)
    notes: list[str] = field(default_factory=list)
    search: SizeSearch | None = None
    chosen_tokens: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def content(self) -> Path:
        """The folder that becomes the artifact."""
        return self.spec.work / "content"

    @property
    def checkpoints(self) -> Path:
        """The folder from which an interrupted stage continues."""
        return self.spec.work / "checkpoints"

    @property
    def device(self) -> torch.device:
        """This process's device: its own GPU, or the CPU."""
        return own_device()

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter that the stage trains."""
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
        """A generator on the CPU, seeded by name, with the same numbers in every stage of the run."""
        return torch.Generator().manual_seed(_seed(self.spec.seed, name))

    def phase(self, name: str) -> None:
        """Measures the memory of what follows as that of the phase ``name``."""
        self.peaks.begin(name)
        if (estimate := recorder()) is not None:
            estimate.phase(name)

    def progress(self, phase: str, step: int = 0, total: int | None = None, **metrics: float) -> None:
        """Reports to the driver how far the stage is. It is cheap, and a full disk is ignored: other writes will report
        it."""
        self.phase(phase)
        self.heartbeat.phase = phase
        self.heartbeat.reports += 1
        if not self.is_main:
            return
        try:
            Progress(phase=phase, step=step, total=total, figures=metrics).write(self.spec.work)
        except OSError as error:
            if disk_error(error, folder=self.spec.work) is None:
                raise


def _seed(*names: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:7], "big")

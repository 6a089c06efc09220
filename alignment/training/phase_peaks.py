"""The largest memory of a process in each phase of a stage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from alignment.core.hardware import resident_peak

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PhasePeaks:
    """Peaks by phase, in bytes: resident memory on Linux, and allocated memory of a GPU where there is one.

    Memory that a phase leaves to the allocator counts in later phases too. ``engine`` is the peak of an engine that the
    stage started, of all its processes together; None without one.
    """

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

"""What every contestant does around its own work: peak of the hardware before, memory and versions after.

Runs in every environment: torch and the standard library only.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import versions

Memory = tuple[int, str]
"""Bytes, and how they were counted."""
_SIDE = 2048
_TRIES = 8


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Waits for the device, so that a clock tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_peak(dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of the best of several 2048³ matrix products on this device, now."""
    left, right = (torch.randn(_SIDE, _SIDE, device=device()).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_TRIES + 2):
        synchronise()
        started = time.perf_counter()
        left @ right
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best


def compiled_graphs() -> int:
    """Graphs that ``torch.compile`` has compiled in this process; 0 where it was switched off."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def peak_memory() -> Memory:
    """This process's at the highest so far."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), "max_memory_allocated"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "max_rss"


class Steps:
    """Seconds and losses of steps. The first ``warm_up`` steps have a loss and no seconds.

    Without a warm-up ``begin`` says when the first step begins.
    """

    def __init__(self, warm_up: int = 1) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._warm_up = warm_up
        self._last: float | None = None

    def begin(self) -> None:
        """Training begins now."""
        if not self._warm_up:
            self._last = time.perf_counter()

    def ended(self, loss: float) -> None:
        """A step is done; its loss has been read, so the device has finished too."""
        synchronise()
        now = time.perf_counter()
        if self._last is not None and len(self.losses) >= self._warm_up:
            self.seconds.append(now - self._last)
        self._last = now
        self.losses.append(loss)


def write_result(
    path: Path, *, peak: float, seconds: list[float], memory: Memory | None = None, **figures: Any
) -> None:
    """``seconds`` of each measured step; ``peak`` is what ``matmul_peak`` said before. ``memory`` is this process's if
    not given, and ``versions`` in ``figures`` replaces those of this environment."""
    size, kind = memory or peak_memory()
    result = {
        "seconds": seconds,
        "peak_memory": size,
        "memory_kind": kind,
        "matmul_peak": peak,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "compiled_graphs": compiled_graphs(),
        "versions": versions(),
        **figures,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(path)

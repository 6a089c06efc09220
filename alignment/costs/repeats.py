"""From the stage that is estimated to the whole one: how often it repeats what was estimated, what the processes of a
launch divide among them and keep in the host's memory, and how long its files take to store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.launch import Offload, Sharding
from alignment.config.optim import OptimConfig
from alignment.core.fingerprint import file_sha256
from alignment.costs.recorder import GRADIENTS, OPTIMIZER, WEIGHTS, Recorder
from alignment.records.cost import PhaseCost

STEP_ROWS = 8
"""Rows of a step that is taken; a larger one repeats what a small one does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How many times as much as the estimated stage the whole one does, unless that ``is_unknown``. ``steps``: of its
    steps, and ``learning`` times as often in the phase that learns. ``rows``: of what it does with each row, and
    ``held_out`` with each that is held out. ``of_steps``: by how much the number of its steps is larger."""

    steps: float = 1.0
    learning: float = 1.0
    rows: float = 1.0
    held_out: float = 1.0
    of_steps: float = 1.0
    is_unknown: bool = False


def repeats_of(config: Any, times: float | None) -> Repeats:
    """For a stage with these settings that was estimated on a part of its rows, of which it reads so many ``times`` as
    many; None if that is not known (data/reading.py)."""
    rows, is_unknown = (1.0, True) if times is None else (times, False)
    optim = getattr(config, "optim", None)
    if not isinstance(optim, OptimConfig):
        epochs = float(getattr(config, "ppo_epochs", 1))
        without = optim is None  # it does the same with every row
        return Repeats(
            learning=epochs, rows=rows if without else 1.0, of_steps=epochs, is_unknown=without and is_unknown
        )
    larger = optim.batch_size / min(optim.batch_size, STEP_ROWS)
    validation = getattr(config, "validation", None)
    held_out = rows if validation is not None and validation.share is not None else 1.0  # a part of the rows
    if optim.max_steps is not None:
        return Repeats(steps=larger, rows=rows, held_out=held_out)
    return Repeats(steps=rows, rows=rows, held_out=held_out, of_steps=rows / larger, is_unknown=is_unknown)


BEFORE = ("starting", "loading", "tokenising")
"""Phases in which files are read, and whose tensors are on the host."""
DIVIDED: dict[Sharding, tuple[str, ...]] = {
    Sharding.none: (),
    Sharding.zero1: (OPTIMIZER,),
    Sharding.zero2: (OPTIMIZER, GRADIENTS),
    Sharding.zero3: (OPTIMIZER, GRADIENTS, WEIGHTS),
    Sharding.fsdp: (OPTIMIZER, GRADIENTS, WEIGHTS),
}
"""What the processes of a launch divide (Rajbhandari et al. 2020)."""
OFFLOADED: dict[Offload, tuple[str, ...]] = {
    Offload.none: (),
    Offload.optimizer: (OPTIMIZER, GRADIENTS),
    Offload.weights: (OPTIMIZER, GRADIENTS, WEIGHTS),
}
"""What a launch keeps in the host's memory instead of a GPU's, of what it divides (Ren et al. 2021)."""
DDP = "DDP"
DEEPSPEED = "DeepSpeed"
BUCKETS = 4 * 4 * 10_000_000
"""Bytes of four buckets of launch/deepspeed/: two that fill in turn, and their copies that are sent."""
MOST_LIVE = 1_000_000_000
"""Gathered weights that ZeRO-3 keeps for the next use (``stage3_max_live_parameters``)."""


def divided(name: str, phase: PhaseCost, recorder: Recorder, sharding: Sharding, processes: int) -> PhaseCost:
    """A phase in one of several processes that divide some of what it holds, with what dividing takes by itself."""
    in_shares, apart = DIVIDED[sharding], 0
    parts = {part: size // processes if part in in_shares else size for part, size in phase.parts.items()}
    if sharding is Sharding.none and processes > 1 and name not in BEFORE:
        parts[DDP] = recorder.trained_bytes  # gradients on the way to other processes, beside those of the weights
    if sharding.by_deepspeed and name not in BEFORE:
        parts[DEEPSPEED] = _of_deepspeed(phase.parts.get(WEIGHTS, 0), recorder, sharding, processes)
        if not (recorder.for_gpu or sharding.of_weights):
            apart = recorder.moments // processes  # no hole that activations leave in the heap is as large as a share
    change = sum(parts.values()) - sum(phase.parts.values())
    return replace(phase, parts=parts, peak=phase.peak + change, held=phase.held + change + apart)


def without(moved: Sequence[str], phase: PhaseCost) -> PhaseCost:
    """A phase on a GPU without the parts that are in the host's memory."""
    size = sum(phase.parts.get(part, 0) for part in moved)
    parts = {part: bytes_ for part, bytes_ in phase.parts.items() if part not in moved}
    return replace(phase, parts=parts, peak=phase.peak - size, held=phase.held - size)


def _of_deepspeed(weights: int, recorder: Recorder, sharding: Sharding, processes: int) -> int:
    """Bytes of DeepSpeed's own: a share of the trained weights and of their gradients in one piece each, buckets on the
    way to other processes, and in ZeRO-3 weights that are gathered."""
    gathered = min(weights, int(MOST_LIVE * weights / max(1, recorder.weights))) if sharding.of_weights else 0
    return 2 * recorder.trained_bytes // processes + min(BUCKETS, 4 * recorder.trained_bytes) + gathered


PIECE_BYTES, PIECES = 64 << 20, 4
"""What is written to measure the rate. A disk that takes 64 MB at once is often slower from then on."""


def seconds_a_byte(folder: Path) -> float:
    """Seconds for a byte in a file of ``folder``: it is written, and read again for the file's hash."""
    path = folder / "written"
    content = os.urandom(PIECE_BYTES)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(PIECES):
                file.write(content)
            os.fsync(file.fileno())
        file_sha256(path)
        return (time.perf_counter() - began) / (PIECE_BYTES * PIECES)
    finally:
        path.unlink(missing_ok=True)

"""What the processes of a launch divide among them, and what they keep in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignment.config.launch import Offload, Sharding
from alignment.costs.recorder import GRADIENTS, OPTIMIZER, WEIGHTS, Recorder
from alignment.job import StageSpec
from alignment.records.cost import PhaseCost

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


def divided(name: str, phase: PhaseCost, recorder: Recorder, spec: StageSpec, processes: int) -> PhaseCost:
    """A phase in one of several processes that divide some of what it holds, with what dividing takes by itself."""
    divided, apart = DIVIDED[spec.sharding], 0
    parts = {part: size // processes if part in divided else size for part, size in phase.parts.items()}
    if spec.sharding is Sharding.none and processes > 1 and name not in BEFORE:
        parts[DDP] = recorder.trained_bytes  # gradients on the way to other processes, beside those of the weights
    if spec.sharding.by_deepspeed and name not in BEFORE:
        parts[DEEPSPEED] = _of_deepspeed(phase.parts.get(WEIGHTS, 0), recorder, spec.sharding, processes)
        if not (recorder.for_gpu or spec.sharding.of_weights):
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

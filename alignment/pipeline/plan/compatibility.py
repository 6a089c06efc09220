"""Refuses stages, adapters and launches that do not work together, before anything starts.

``make matrix`` (tests/matrix) writes the table of tested combinations, docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault, unread_notes
from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.model import Dtype
from alignment.config.optim import Moments
from alignment.config.run import RunConfig
from alignment.config.stage import TrainedConfig
from alignment.stages.base import Refusal
from alignment.stages.registry import as_trained, kind_of


def faults(config: RunConfig) -> list[Fault]:
    """A fault for every combination in a run that does not work."""
    every_fault = list(_launch_faults(config.launch))
    for name, stage in config.stages.items():
        refusals = [*kind_of(stage).launch.refusals(stage, config.launch)]
        trained = as_trained(stage)
        refusals += [] if trained is None else _adapter_refusals(trained, config.launch, config.model.dtype)
        every_fault += [Fault(where=f"stages.{name}.{r.field}", message=_message(config.launch, r)) for r in refusals]
    return every_fault


def _message(launch: LaunchConfig, refusal: Refusal) -> str:
    named = "any launch" if launch.sharding is Sharding.none else f"launch={launch.sharding.value}"
    return f"does not work with {named}: {refusal.why}; use {refusal.instead}"


def _launch_faults(launch: LaunchConfig) -> Iterator[Fault]:
    if launch.offload is Offload.optimizer and not launch.sharding.by_deepspeed:
        reader = "for the optimizer, only launch.sharding 'zero1', 'zero2' or 'zero3'"
        yield from unread_notes(launch, LaunchConfig(), ("offload",), "launch", reader)
    if launch.offload is Offload.weights and not launch.sharding.of_weights:
        reader = "for weights, only launch.sharding 'zero3' or 'fsdp'"
        yield from unread_notes(launch, LaunchConfig(), ("offload",), "launch", reader)
    rank, machines = launch.backend.machine_rank, launch.backend.num_machines
    if rank >= machines:
        message = f"{rank} is not a valid rank for {machines} machines; ranks start at 0"
        yield Fault(where="launch.backend.machine_rank", message=message)
    if rank and getattr(launch.backend, "submit", False):
        message = f"{rank}, but Slurm assigns ranks to machines; leave it out"
        yield Fault(where="launch.backend.machine_rank", message=message)


def _adapter_refusals(stage: TrainedConfig, launch: LaunchConfig, dtype: Dtype) -> Iterator[Refusal]:
    """Settings that no kind of stage supports under this launch."""
    rounding = "stochastic rounding would depend on how the weights are sharded"
    if launch.sharding is not Sharding.none and not stage.adapter.master_weights:
        instead = "adapter=full: the master weights are sharded too"
        yield Refusal(field="adapter.master_weights", why=rounding, instead=instead)
    if launch.sharding is not Sharding.none and stage.adapter.trains_modules and dtype is Dtype.bfloat16:
        instead = "model.dtype=float32, in which nothing is rounded, or adapter=full"
        yield Refusal(field="adapter.modules_to_save", why=rounding, instead=instead)
    if launch.sharding is not Sharding.none and stage.optim.moments is not Moments.full:
        why = "eight-bit moments are stored in blocks, which sharding would split"
        yield Refusal(field="optim.moments", why=why, instead="optim.moments=full: they are sharded")

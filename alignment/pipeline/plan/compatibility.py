"""Which stage, adapter and launch go together; what does not is refused before anything starts.

The table of what was tried, docs/compatibility.md, is written by ``make matrix`` (tests/matrix).
"""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.adapter import AdapterKind
from alignment.config.faults import Fault
from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.optim import Moments
from alignment.config.run import RunConfig
from alignment.config.stage import TrainedConfig
from alignment.stages.base import Refusal
from alignment.stages.registry import as_trained, kind_of


def faults(config: RunConfig) -> list[Fault]:
    """Everything in a run that does not go together."""
    every_fault = list(_launch_faults(config.launch))
    for name, stage in config.stages.items():
        refusals = [*kind_of(stage).launch.refusals(stage, config.launch)]
        trained = as_trained(stage)
        refusals += [] if trained is None else _adapter_refusals(trained, config.launch)
        every_fault += [Fault(where=f"stages.{name}.{r.field}", message=_refused(config.launch, r)) for r in refusals]
    return every_fault


def _refused(launch: LaunchConfig, refusal: Refusal) -> str:
    named = "any launch" if launch.sharding is Sharding.none else f"launch={launch.sharding.value}"
    return f"does not work with {named}: {refusal.why}; take {refusal.instead}"


def _launch_faults(launch: LaunchConfig) -> Iterator[Fault]:
    if launch.offload is Offload.optimizer and not launch.sharding.by_deepspeed:
        message = f"'optimizer' is read by nothing under launch.sharding={launch.sharding.value}; take zero1 to zero3"
        yield Fault(where="launch.offload", message=message)
    if launch.offload is Offload.weights and launch.sharding not in (Sharding.zero3, Sharding.fsdp):
        message = f"'weights' is read by nothing under launch.sharding={launch.sharding.value}; take zero3 or fsdp"
        yield Fault(where="launch.offload", message=message)
    rank, machines = launch.backend.machine_rank, launch.backend.num_machines
    if rank >= machines:
        message = f"{rank} is no rank among {machines} machines; the first is 0"
        yield Fault(where="launch.backend.machine_rank", message=message)


def _adapter_refusals(stage: TrainedConfig, launch: LaunchConfig) -> Iterator[Refusal]:
    """What no kind of stage can do under a launch."""
    kind = stage.adapter.kind
    if launch.sharding in (Sharding.zero3, Sharding.fsdp):
        if kind is AdapterKind.qlora:
            why = "weights in four bits cannot be cut into shares"
            yield Refusal(field="adapter.kind", why=why, instead="launch=zero2, or adapter=lora")
        if kind is AdapterKind.prefix:
            why = "a prefix is read by every layer, and gathered for none"
            yield Refusal(field="adapter.kind", why=why, instead="launch=zero2, or adapter=lora")
    if launch.sharding is not Sharding.none and not stage.adapter.master_weights:
        why = "what is rounded at random would depend on how weights are cut"
        instead = "adapter=full: the masters are shared out too"
        yield Refusal(field="adapter.master_weights", why=why, instead=instead)
    if launch.sharding is not Sharding.none and stage.optim.moments is not Moments.full:
        why = "moments in eight bits have blocks, which shares would cut"
        yield Refusal(field="optim.moments", why=why, instead="optim.moments=full: they are shared out")

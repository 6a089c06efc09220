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
from alignment.config.stage import DpoConfig, PpoConfig, Trained


def faults(config: RunConfig) -> list[Fault]:
    """Everything in a run that does not go together."""
    found = list(_launch_faults(config.launch))
    for name, stage in config.stages.items():
        if isinstance(stage, Trained):
            found += [
                Fault(where=f"stages.{name}.{field}", message=_refused(config.launch, why, instead))
                for field, why, instead in _stage_faults(stage, config.launch)
            ]
    return found


def _refused(launch: LaunchConfig, why: str, instead: str) -> str:
    told = "any launch" if launch.sharding is Sharding.none else f"launch={launch.sharding.value}"
    return f"does not work with {told}: {why}; take {instead}"


def _launch_faults(launch: LaunchConfig) -> Iterator[Fault]:
    if launch.offload is Offload.optimizer and not launch.sharding.by_deepspeed:
        message = f"'optimizer' is read by nothing under launch.sharding={launch.sharding.value}; take zero1 to zero3"
        yield Fault(where="launch.offload", message=message)
    if launch.offload is Offload.weights and launch.sharding not in (Sharding.zero3, Sharding.fsdp):
        message = f"'weights' is read by nothing under launch.sharding={launch.sharding.value}; take zero3 or fsdp"
        yield Fault(where="launch.offload", message=message)
    if launch.machine_rank >= launch.num_machines:
        message = f"{launch.machine_rank} is no rank among {launch.num_machines} machines; the first is 0"
        yield Fault(where="launch.machine_rank", message=message)


def _stage_faults(stage: Trained, launch: LaunchConfig) -> Iterator[tuple[str, str, str]]:
    """Field, why it cannot be, and the nearest that can."""
    kind = stage.adapter.kind
    if isinstance(stage, DpoConfig) and kind is AdapterKind.prefix:
        why = "TRL's DPO trainer copies adapters in a way that PEFT has for factors only"
        yield "adapter.kind", why, "adapter=lora"
    if launch.sharding in (Sharding.zero3, Sharding.fsdp):
        if kind is AdapterKind.qlora:
            yield "adapter.kind", "weights in four bits cannot be cut into shares", "launch=zero2, or adapter=lora"
        if kind is AdapterKind.prefix:
            why = "a prefix is read by every layer, and gathered for none"
            yield "adapter.kind", why, "launch=zero2, or adapter=lora"
    if launch.sharding is not Sharding.none and not stage.adapter.master_weights:
        why = "what is rounded at random would depend on how weights are cut"
        yield "adapter.master_weights", why, "adapter=full: the masters are shared out too"
    if launch.sharding is not Sharding.none and stage.optim.moments is not Moments.full:
        why = "moments in eight bits have blocks, which shares would cut"
        yield "optim.moments", why, "optim.moments=full: they are shared out"
    if isinstance(stage, PpoConfig):
        yield from _ppo_faults(stage, launch)


def _ppo_faults(stage: PpoConfig, launch: LaunchConfig) -> Iterator[tuple[str, str, str]]:
    if launch.sharding is Sharding.fsdp:
        yield "kind", "its four roles share weights, which fully_shard takes to be one model's", "launch=zero3"
    if launch.sharding.by_deepspeed and stage.critic_warmup:
        why = "DeepSpeed takes its step on all weights, the policy's too"
        yield "critic_warmup", why, "critic_warmup=0, or launch=ddp"
    if launch.sharding is Sharding.zero3 and stage.ptx.coefficient:
        yield "ptx.coefficient", "its passes do not go through DeepSpeed's engine", "launch=zero2"

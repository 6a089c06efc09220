"""What does not go together is said before anything starts: where, why, and the nearest that does."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.backend import MachinesBackend
from alignment.config.launch import LaunchConfig, Sharding
from alignment.config.model import Dtype, ModelConfig
from alignment.config.optim import Moments, OptimConfig
from alignment.config.replay import PtxConfig
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.pipeline.plan.compatibility import faults
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.kto.config import KtoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.config import SftConfig


def fault_messages(stage: StageConfig, **launch: Any) -> list[str]:
    return [str(fault) for fault in faults(RunConfig(name="r", stages={"s": stage}, launch=LaunchConfig(**launch)))]


def adapter(kind: str, **more: Any) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind(kind), **more)


@pytest.mark.parametrize(
    ("stage", "launch", "where", "why"),
    [
        (
            SftConfig(adapter=adapter("full", master_weights=False)),
            "zero1",
            "adapter.master_weights",
            "stochastic rounding",
        ),
        (
            SftConfig(adapter=adapter("dora", modules_to_save=["embed_tokens"])),
            "fsdp",
            "adapter.modules_to_save",
            "stochastic rounding",
        ),
        (
            SftConfig(optim=OptimConfig(lr=1e-4, moments=Moments.eight_bit)),
            "zero2",
            "optim.moments",
            "eight-bit moments",
        ),
        (PpoConfig(critic_warmup=2), "zero2", "critic_warmup", "DeepSpeed updates all weights"),
        (PpoConfig(critic_warmup=2), "fsdp", "critic_warmup", "PyTorch's sharded checkpoints need moments"),
        (PpoConfig(drop_ties=True), "fsdp", "drop_ties", "PyTorch's sharded checkpoints need moments"),
        (PpoConfig(ptx=PtxConfig(coefficient=0.1)), "zero3", "ptx.coefficient", "its forward passes bypass"),
        (PpoConfig(ptx=PtxConfig(coefficient=0.1)), "fsdp", "ptx.coefficient", "its forward passes bypass"),
    ],
)
def test_a_stage_that_cannot_be_launched_so_is_refused(stage: StageConfig, launch: str, where: str, why: str) -> None:
    messages = fault_messages(stage, sharding=Sharding(launch))
    assert len(messages) == 1
    assert messages[0].startswith(f"stages.s.{where}: does not work with launch={launch}: {why}")
    assert "; use " in messages[0]
    assert fault_messages(stage) == []


def test_modules_trained_whole_are_sharded_in_float32() -> None:
    stage = SftConfig(adapter=adapter("lora", modules_to_save=["embed_tokens"]))
    model, launch = ModelConfig(dtype=Dtype.float32), LaunchConfig(sharding=Sharding.zero2)
    assert faults(RunConfig(name="r", model=model, stages={"s": stage}, launch=launch)) == []


@pytest.mark.parametrize("kind", list(AdapterKind))
@pytest.mark.parametrize("sharding", list(Sharding))
def test_every_adapter_is_launched_in_every_way(kind: AdapterKind, sharding: Sharding) -> None:
    for stage in (SftConfig, DpoConfig, KtoConfig, PpoConfig):
        assert fault_messages(stage(adapter=AdapterConfig(kind=kind)), sharding=sharding) == []


def test_a_machine_that_is_not_among_them_is_refused() -> None:
    assert fault_messages(SftConfig(), backend=MachinesBackend(machine_rank=1)) == []
    assert fault_messages(SftConfig(), backend=MachinesBackend(machine_rank=2)) == [
        "launch.backend.machine_rank: 2 is not a valid rank for 2 machines; ranks start at 0"
    ]

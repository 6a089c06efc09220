"""What a launch cannot do on this machine is said before anything starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from alignment.config.backend import MachinesBackend, SlurmBackend
from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.optim import Moments, OptimConfig
from alignment.core.errors import ConfigError
from alignment.pipeline.backends import feasibility
from alignment.pipeline.plan.actions import Action
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.forgetting.config import ForgettingConfig
from alignment.stages.report.config import ReportConfig
from alignment.stages.reward_card.config import RewardCardConfig
from alignment.stages.sample.config import SampleConfig
from alignment.stages.sft.config import SftConfig


def stage(config: Any, action: Action = Action.run) -> Any:
    return SimpleNamespace(name="it", config=config, has_to_run=action is not Action.reuse, seen={})


def refuse(*stages: Any, num_devices: int = 0, **launch: Any) -> None:
    feasibility.refuse_what_cannot_start(LaunchConfig(**launch), stages, num_devices=num_devices)


PAGED = SftConfig(optim=OptimConfig(lr=1e-4, moments=Moments.paged_eight_bit))
JUDGED = EvaluateConfig(arms=["base"])


def test_pages_are_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"stages\.it\.optim\.moments: paging needs a GPU.*use eight_bit"):
        refuse(stage(PAGED))
    refuse(stage(PAGED), num_devices=1)
    refuse(stage(PAGED, Action.reuse))


def test_a_batch_is_split_over_all_machines() -> None:
    fits, does_not = (SftConfig(optim=OptimConfig(lr=1e-4, batch_size=size)) for size in (8, 6))
    refuse(stage(fits), num_processes=2, backend=MachinesBackend())
    with pytest.raises(ConfigError, match=r"stages\.it\.optim\.batch_size: 6 is not divisible by 4 processes"):
        refuse(stage(fits), stage(does_not), num_processes=2, backend=MachinesBackend())


def test_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility.importlib.util, "find_spec", lambda name: None if name in ("trl", "peft") else name)
    with pytest.raises(ConfigError, match=r"launch: stages need trl, peft, which are not installed for .*/python"):
        refuse(stage(SftConfig()))


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else name)
    with pytest.raises(ConfigError, match="zero2 needs DeepSpeed, which is not installed") as caught:
        refuse(stage(SftConfig()), sharding=Sharding.zero2)
    assert "pip install 'deepspeed" in caught.value.remedy
    refuse(stage(SftConfig()), num_processes=2)
    refuse(stage(JUDGED), sharding=Sharding.zero2)


def test_a_stage_that_measures_runs_on_all_processes_without_sharding() -> None:
    backend = MachinesBackend()
    launch = LaunchConfig(num_processes=0, backend=backend, sharding=Sharding.zero3, offload=Offload.weights, threads=3)
    expected = LaunchConfig(num_processes=4, backend=backend, threads=3)
    for config in (JUDGED, RewardCardConfig(), ForgettingConfig(arms=["stage:sft"]), SampleConfig(policy="base")):
        assert feasibility.of_stage(launch, config, num_devices=4) == expected
    trained = feasibility.of_stage(launch, SftConfig(), num_devices=4)
    assert (trained.num_processes, trained.sharding, trained.offload) == (4, Sharding.zero3, Offload.weights)
    for config in (JUDGED, SftConfig()):
        with pytest.raises(ConfigError, match="2 processes, but this machine has 1 GPU"):
            refuse(stage(config), num_processes=2, num_devices=1)
        with pytest.raises(ConfigError, match="this machine has no GPU"):
            refuse(stage(config), num_processes=0)


def test_a_benchmark_and_a_report_want_one_process_or_none() -> None:
    launch = LaunchConfig(
        num_processes=0, backend=MachinesBackend(), sharding=Sharding.zero3, offload=Offload.weights, threads=3
    )
    benchmark = BenchmarkConfig(arms=["base"])
    assert feasibility.of_stage(launch, benchmark, num_devices=1) == LaunchConfig(threads=3)
    refuse(stage(benchmark), num_processes=2, num_devices=1)
    refuse(stage(ReportConfig()), num_processes=0)


def test_a_job_finds_the_gpus_that_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility.hardware, "count_devices", lambda: 1)
    for backend, devices in (
        (SlurmBackend(gpus=8), 8),
        (SlurmBackend(gpus=8, submit=False), 1),
        (MachinesBackend(), 1),
    ):
        assert feasibility.devices_for(LaunchConfig(backend=backend)) == devices

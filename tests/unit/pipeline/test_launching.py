"""What a launch cannot do on this machine is said before anything starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.optim import Moments, OptimConfig
from alignment.config.stage import EvaluateConfig, SftConfig
from alignment.errors import ConfigError
from alignment.pipeline import launching
from alignment.pipeline.plan import Action


def plan(config: Any, action: Action = Action.run, launch: LaunchConfig | None = None) -> Any:
    stage = SimpleNamespace(name="sft", config=config, action=action)
    return SimpleNamespace(stages=(stage,), config=SimpleNamespace(launch=launch or LaunchConfig()))


PAGED = SftConfig(optim=OptimConfig(lr=1e-4, moments=Moments.paged_eight_bit))


def test_pages_are_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"stages\.sft\.optim\.moments: pages are a GPU's") as caught:
        launching.refuse_paging_without_gpu(plan(PAGED), num_devices=0)
    assert caught.value.remedy == "take eight_bit"
    launching.refuse_paging_without_gpu(plan(PAGED), num_devices=1)
    launching.refuse_paging_without_gpu(plan(PAGED, Action.reuse), num_devices=0)


def test_a_batch_is_split_over_all_machines() -> None:
    launch = LaunchConfig(num_processes=2, num_machines=2)
    fits, does_not = (SftConfig(optim=OptimConfig(lr=1e-4, batch_size=size)) for size in (8, 6))
    launching.refuse_uneven_batches(plan(fits), launch)
    with pytest.raises(ConfigError, match=r"stages\.sft\.optim\.batch_size: 6 does not divide by 4 processes"):
        launching.refuse_uneven_batches(plan(does_not), launch)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="zero2 is DeepSpeed's, which is not installed") as caught:
        launching.launch_of(plan(SftConfig(), launch=LaunchConfig(sharding=Sharding.zero2)))
    assert "pip install 'deepspeed" in caught.value.remedy
    assert launching.launch_of(plan(SftConfig(), launch=LaunchConfig(num_processes=2))).num_processes == 2


def test_an_evaluation_is_one_process_s_work() -> None:
    launch = LaunchConfig(num_processes=4, num_machines=2, sharding=Sharding.zero3, offload=Offload.weights, threads=3)
    assert launching.of_stage(launch, EvaluateConfig(arms=["base"])) == LaunchConfig(threads=3)
    assert launching.of_stage(launch, SftConfig()) is launch

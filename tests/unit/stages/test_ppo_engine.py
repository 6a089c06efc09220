"""Settings of an engine for PPO: what a plan refuses, what the stage reports, and what it doubts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.backend import MachinesBackend
from alignment.config.critic import Critic
from alignment.config.launch import LaunchConfig
from alignment.config.run import RunConfig
from alignment.config.sampling_engine import Engine, RolloutSamplingConfig
from alignment.core.errors import ConfigError
from alignment.core.fingerprint import canonical
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.stages.ppo.engine_checks import engine_doubts
from alignment.stages.ppo.kind import KIND
from alignment.stages.registry import curves
from tests.engine_server import interpreter_of

FIELD = "stages.ppo.sampling"
LEAVE = "leave it at"
DORA, PREFIX, FULL = (AdapterConfig(kind=kind) for kind in (AdapterKind.dora, AdapterKind.prefix, AdapterKind.full))


def config_of(*, adapter: AdapterConfig | None = None, engine: Engine = Engine.vllm, **sampling: Any) -> PpoConfig:
    return PpoConfig(adapter=adapter or AdapterConfig(), sampling=RolloutSamplingConfig(engine=engine, **sampling))


def faults_of(config: PpoConfig) -> list[str]:
    return [str(fault) for fault in KIND.faults(config, RunConfig(name="test"), "stages.ppo")]


def unread(name: str, value: str, usual: str, reader: str) -> str:
    return f"{FIELD}.{name}: {value} has no effect; {reader} uses it; {LEAVE} {usual}"


@pytest.mark.parametrize(
    ("name", "value", "shown", "usual"),
    [
        ("python", "/x", "/x", "None"),
        ("url", "http://localhost:1", "http://localhost:1", "None"),
        ("api_key_env", "KEY", "KEY", "None"),
        ("cache_gb", 2.0, "2", "1"),
        ("gpu_share", 0.5, "0.5", "0.3"),
        ("start_timeout", 9.0, "9", "600"),
        ("timeout", 9.0, "9", "600"),
        ("retries", 9, "9", "2"),
        ("concurrency", 9, "9", "64"),
        ("importance_cap", 2.0, "2", "None"),
        ("max_staleness", 1, "1", "0"),
        ("gap_bound", 0.5, "0.5", "0.1"),
    ],
)
def test_without_an_engine_its_settings_have_no_effect(name: str, value: Any, shown: str, usual: str) -> None:
    assert faults_of(config_of(engine=Engine.own, **{name: value})) == [
        unread(name, shown, usual, "only engine 'vllm'")
    ]


@pytest.mark.parametrize(
    ("name", "value", "shown", "usual"),
    [
        ("python", "/x", "/x", "None"),
        ("cache_gb", 2.0, "2", "1"),
        ("gpu_share", 0.5, "0.5", "0.3"),
        ("start_timeout", 9.0, "9", "600"),
    ],
)
def test_a_server_that_runs_already_is_not_started(name: str, value: Any, shown: str, usual: str) -> None:
    config = config_of(url="http://localhost:8000", **{name: value})
    assert faults_of(config) == [unread(name, shown, usual, "a server that the stage starts (no url)")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(), []),
        (config_of(url="http://localhost:8000", api_key_env="KEY"), []),
        (config_of(adapter=FULL, importance_cap=1.0, max_staleness=1, gap_bound=0.5), []),
        (config_of(adapter=AdapterConfig(rank=512)), []),
        (config_of(api_key_env="KEY"), [unread("api_key_env", "KEY", "None", "only a server at a url")]),
        (
            config_of(adapter=DORA),
            [
                f"{FIELD}.engine: 'vllm', but vLLM does not support DoRA; use adapter=lora or adapter=full, or "
                f"{FIELD}.engine=own"
            ],
        ),
        (
            config_of(adapter=PREFIX),
            [
                f"{FIELD}.engine: 'vllm', but vLLM does not support prefix adapters; use adapter=lora or "
                f"adapter=full, or {FIELD}.engine=own"
            ],
        ),
        (
            config_of(adapter=AdapterConfig(modules_to_save=["lm_head"])),
            [
                f"{FIELD}.engine: 'vllm', which does not support adapters with modules_to_save; leave that setting "
                f"out, or use "
                f"{FIELD}.engine=own"
            ],
        ),
        (
            config_of(adapter=AdapterConfig(rank=513)),
            [f"stages.ppo.adapter.rank: 513, but vLLM supports at most 512; lower it, or use {FIELD}.engine=own"],
        ),
        (
            config_of(max_staleness=1),
            [
                f"{FIELD}.max_staleness: 1, so answers come from an earlier policy, and nothing corrects for that; "
                f"set importance_cap, such as 2.0"
            ],
        ),
    ],
)
def test_what_vllm_does_not_take_is_refused(config: PpoConfig, expected: list[str]) -> None:
    assert faults_of(config) == expected


def test_adapters_that_vllm_does_not_take_are_fine_without_it() -> None:
    for adapter in (DORA, PREFIX, AdapterConfig(modules_to_save=["lm_head"]), AdapterConfig(rank=513)):
        assert faults_of(config_of(adapter=adapter, engine=Engine.own)) == []


def test_several_machines_are_refused() -> None:
    launch = LaunchConfig(backend=MachinesBackend(num_machines=2))
    (refusal,) = KIND.launch.refusals(config_of(), launch)
    assert (refusal.field, refusal.why, refusal.instead) == (
        "sampling.engine",
        "the server listens only on one machine",
        "sampling.engine=own",
    )
    assert list(KIND.launch.refusals(config_of(), LaunchConfig())) == []
    assert list(KIND.launch.refusals(config_of(engine=Engine.own), launch)) == []


def test_an_environment_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNMENT_ENGINE_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = tmp_path / "cache/alignment/engines/vllm/bin/python"
    with pytest.raises(ConfigError, match=f"{built} is not an interpreter that can be run") as raised:
        KIND.launch.check_machine(config_of(), "stages.ppo")
    assert raised.value.where == f"{FIELD}.python"
    assert "make engine" in raised.value.remedy
    KIND.launch.check_machine(config_of(engine=Engine.own), "stages.ppo")
    KIND.launch.check_machine(config_of(url="http://localhost:8000"), "stages.ppo")
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    monkeypatch.setenv("ALIGNMENT_ENGINE_PYTHON", str(without))
    with pytest.raises(ConfigError, match=f"{without} has no package vllm"):
        KIND.launch.check_machine(config_of(), "stages.ppo")
    KIND.launch.check_machine(config_of(python=str(interpreter_of(tmp_path / "engine"))), "stages.ppo")


# ---- what is reported -----------------------------------------------------------------------------------------------


def reported(config: PpoConfig) -> set[str]:
    return {name for name in KIND.outcome.metrics(config).training if name.startswith("engine/")}


def test_metrics_of_an_engine_are_reported_where_there_are_any() -> None:
    assert reported(config_of(engine=Engine.own)) == set()
    assert reported(config_of()) == {"engine/gap", "engine/gap_max", "engine/beyond"}
    assert reported(config_of(importance_cap=2.0)) == {
        "engine/gap",
        "engine/gap_max",
        "engine/beyond",
        "engine/importance",
        "engine/capped",
    }


@pytest.mark.parametrize(
    ("metrics", "doubted"),
    [
        ({}, False),
        ({"engine/gap": 0.05, "engine/beyond": 0.0}, False),
        ({"engine/gap": 0.051, "engine/beyond": 0.25}, True),
        ({"engine/gap": 0.4, "engine/beyond": 0.9, "engine/capped": 0.0}, False),
    ],
)
def test_a_gap_that_nothing_corrects_is_doubted(metrics: dict[str, float], doubted: bool) -> None:
    doubts = engine_doubts(metrics)
    assert (
        doubts
        == [
            "the engine that sampled gave log-probabilities that differ from the policy's by 0.051 nats per token (25% "
            "beyond the bound), and nothing corrected for that: the policy learned from another policy's answers; set "
            "sampling.importance_cap, or sampling.engine=own"
        ]
        * doubted
    )
    assert set(doubts) <= set(KIND.outcome.doubts({"eos_rate": 1.0, "objective/score_std": 1.0, **metrics}))


@pytest.mark.parametrize("critic", list(Critic))
def test_curves_of_an_engine_stand_beside_the_others(critic: Critic) -> None:
    """A chart without a figure in the log is not drawn (tests/unit/report/test_plots.py)."""
    drawn = {chart.title: chart.keys for chart in curves("ppo", {"critic": critic.value})}
    assert drawn["Gap to the engine"] == ("engine/gap", "engine/gap_max")
    assert drawn["Importance weights"] == ("engine/importance", "engine/capped")


# ---- what a plan says -----------------------------------------------------------------------------------------------


def test_a_cap_and_staleness_are_part_of_what_a_stage_is_and_addresses_are_not() -> None:
    plain = config_of()
    assert canonical(plain) != canonical(config_of(importance_cap=2.0)) != canonical(config_of(engine=Engine.own))
    assert canonical(plain) == canonical(config_of(url="http://localhost:1", retries=0, gap_bound=1.0))
    assert canonical(config_of(importance_cap=2.0)) != canonical(config_of(importance_cap=2.0, max_staleness=1))
    rloo = replace(plain, advantage=Advantage.rloo, critic=Critic.none)
    assert "sampling" in canonical(rloo)

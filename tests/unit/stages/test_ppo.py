"""What a plan refuses of a PPO stage's batches and engine, what it reports and doubts, and whom its guard asks."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from alignment import worker
from alignment.config.launch import Engine, LaunchConfig, MachinesBackend, RolloutSamplingConfig
from alignment.config.model import AdapterConfig, AdapterKind, Critic
from alignment.config.run import RunConfig
from alignment.config.scoring import GuardConfig, ScorerConfig
from alignment.core.errors import ConfigError
from alignment.core.fingerprint import canonical
from alignment.stages.ppo.checks import engine_doubts, size_faults
from alignment.stages.ppo.config import Advantage, PpoConfig, PpoOptimConfig
from alignment.stages.ppo.guard import Guard
from alignment.stages.ppo.kind import KIND
from alignment.stages.registry import curves
from alignment.training.context import StageContext
from tests.chained import LORA, Chained, config_of
from tests.engine_server import interpreter_of

FIELD = "stages.ppo.sampling"


DORA, PREFIX, FULL = (AdapterConfig(kind=kind) for kind in (AdapterKind.dora, AdapterKind.prefix, AdapterKind.full))


def ppo_config(*, adapter: AdapterConfig | None = None, engine: Engine = Engine.vllm, **sampling: Any) -> PpoConfig:
    return PpoConfig(adapter=adapter or AdapterConfig(), sampling=RolloutSamplingConfig(engine=engine, **sampling))


def faults_of(config: PpoConfig) -> list[str]:
    return [str(fault) for fault in KIND.faults(config, RunConfig(name="test"), "stages.ppo")]


def size_faults_of(processes: int, batch_size: int = 32, **fields: Any) -> list[str]:
    config = PpoConfig(optim=PpoOptimConfig(batch_size=batch_size), **fields)
    return [str(fault) for fault in size_faults(config, processes, "stages.p")]


GROUPS = "completions_per_prompt"
GRPO = {"critic": Critic.none}


@pytest.mark.parametrize(
    ("processes", "fields", "where", "remedy"),
    [
        (1, {"batch_size": 8, GROUPS: 3}, GROUPS, "a divisor of optim.batch_size"),
        (1, {"prompt_baseline": True}, "prompt_baseline", "completions_per_prompt to 2 or more"),
        (1, {"advantage": Advantage.rloo, **GRPO}, GROUPS, "choose 2 or more"),
        (3, {GROUPS: 4}, "optim.batch_size", "a multiple of 12"),
        (2, {"batch_size": 4, GROUPS: 2, "num_minibatches": 2}, "num_minibatches", "optim.batch_size=8 or more"),
        (4, {"guard": GuardConfig(every=1, prompts=3)}, "guard.prompts", "choose 4 or more"),
        (2, {"batch_size": 8, GROUPS: 2, "num_minibatches": 2}, None, ""),
        (4, {"guard": GuardConfig(every=1, prompts=4)}, None, ""),
        (4, {"guard": GuardConfig(every=0, prompts=1)}, None, ""),
    ],
)
def test_an_update_that_cannot_be_shared_out_is_refused_with_what_would_do(
    processes: int, fields: dict[str, Any], where: str | None, remedy: str
) -> None:
    faults = size_faults_of(processes, **fields)
    assert [fault.partition(": ")[0] for fault in faults] == ([] if where is None else [f"stages.p.{where}"])
    assert all(remedy in fault for fault in faults)


SETTINGS = {
    "python": "/x",
    "url": "http://localhost:1",
    "api_key_env": "KEY",
    "cache_gb": 2.0,
    "gpu_share": 0.5,
    "start_timeout": 9.0,
    "timeout": 9.0,
    "retries": 9,
    "concurrency": 9,
    "importance_cap": 2.0,
    "max_staleness": 1,
    "gap_bound": 0.5,
}
OF_A_START = ("python", "cache_gb", "gpu_share", "start_timeout")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_nothing_reads_is_refused(name: str) -> None:
    """None is read without an engine; what starts a server, and what may wait, is not read of one that runs already."""
    assert set(SETTINGS) | {"engine"} == {field.name for field in fields(RolloutSamplingConfig)}
    (fault,) = faults_of(ppo_config(engine=Engine.own, **{name: SETTINGS[name]}))
    usual = getattr(RolloutSamplingConfig(), name)
    assert fault.startswith(f"{FIELD}.{name}: ")
    assert fault.endswith(f"engine 'vllm' uses it; leave it at {usual if usual is None else format(usual, 'g')}")
    if name in OF_A_START:
        (fault,) = faults_of(ppo_config(**{"url": "http://localhost:8000", name: SETTINGS[name]}))
        assert fault.startswith(f"{FIELD}.{name}: ")
        assert "(no url)" in fault


@pytest.mark.parametrize(
    ("config", "where", "word"),
    [
        (ppo_config(), None, ""),
        (ppo_config(adapter=FULL, importance_cap=1.0, max_staleness=1, gap_bound=0.5), None, ""),
        (ppo_config(api_key_env="KEY"), "sampling.api_key_env", "only a server at a url"),
        (ppo_config(adapter=DORA), "sampling.engine", "DoRA"),
        (ppo_config(adapter=PREFIX), "sampling.engine", "prefix adapters"),
        (ppo_config(adapter=AdapterConfig(modules_to_save=["lm_head"])), "sampling.engine", "modules_to_save"),
        (ppo_config(adapter=AdapterConfig(rank=513)), "adapter.rank", "at most 512"),
        (ppo_config(max_staleness=1), "sampling.max_staleness", "importance_cap"),
    ],
)
def test_what_vllm_does_not_take_is_refused(config: PpoConfig, where: str | None, word: str) -> None:
    faults = faults_of(config)
    assert [fault.partition(": ")[0] for fault in faults] == ([] if where is None else [f"stages.ppo.{where}"])
    assert all(word in fault for fault in faults)
    if where in ("sampling.engine", "adapter.rank"):
        assert faults_of(ppo_config(adapter=config.adapter, engine=Engine.own)) == []


def test_several_machines_are_refused() -> None:
    launch = LaunchConfig(backend=MachinesBackend(num_machines=2))
    (refusal,) = KIND.launch.refusals(ppo_config(), launch)
    assert (refusal.field, refusal.why, refusal.instead) == (
        "sampling.engine",
        "the server listens only on one machine",
        "sampling.engine=own",
    )
    assert list(KIND.launch.refusals(ppo_config(), LaunchConfig())) == []
    assert list(KIND.launch.refusals(ppo_config(engine=Engine.own), launch)) == []


def test_an_environment_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNMENT_ENGINE_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = tmp_path / "cache/alignment/engines/vllm/bin/python"
    with pytest.raises(ConfigError, match=f"{built} is not an interpreter that can be run") as raised:
        KIND.launch.check_machine(ppo_config(), "stages.ppo")
    assert raised.value.where == f"{FIELD}.python"
    assert "make engine" in raised.value.remedy
    KIND.launch.check_machine(ppo_config(engine=Engine.own), "stages.ppo")
    KIND.launch.check_machine(ppo_config(url="http://localhost:8000"), "stages.ppo")
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    monkeypatch.setenv("ALIGNMENT_ENGINE_PYTHON", str(without))
    with pytest.raises(ConfigError, match=f"{without} has no package vllm"):
        KIND.launch.check_machine(ppo_config(), "stages.ppo")
    KIND.launch.check_machine(ppo_config(python=str(interpreter_of(tmp_path / "engine"))), "stages.ppo")


# ---- what a plan says -----------------------------------------------------------------------------------------------
def test_caps_and_engines_but_no_addresses_are_part_of_a_stage_and_of_its_metrics() -> None:
    plain = ppo_config()
    assert canonical(plain) != canonical(ppo_config(importance_cap=2.0)) != canonical(ppo_config(engine=Engine.own))
    assert canonical(plain) == canonical(ppo_config(url="http://localhost:1", retries=0, gap_bound=1.0))
    assert canonical(ppo_config(importance_cap=2.0)) != canonical(ppo_config(importance_cap=2.0, max_staleness=1))
    rloo = replace(plain, advantage=Advantage.rloo, critic=Critic.none)
    assert "sampling" in canonical(rloo)
    gap = {"engine/gap", "engine/gap_max", "engine/beyond"}
    configs = (ppo_config(engine=Engine.own), ppo_config(), ppo_config(importance_cap=2.0))
    for config, expected in zip(configs, (set(), gap, {*gap, "engine/importance", "engine/capped"}), strict=True):
        names = KIND.metrics(config).training
        assert {name for name in names if name.startswith("engine/")} == expected


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, []),
        ({"engine/gap": 0.05, "engine/beyond": 0.0}, []),
        ({"engine/gap": 0.051, "engine/beyond": 0.25}, ["by 0.051 nats per token (25% beyond the bound)"]),
        ({"engine/gap": 0.4, "engine/beyond": 0.9, "engine/capped": 0.0}, []),
    ],
)
def test_a_gap_that_nothing_corrects_is_doubted(metrics: dict[str, float], words: list[str]) -> None:
    doubts = engine_doubts(metrics)
    assert len(doubts) == len(words)
    assert all(text in doubt for text, doubt in zip(words, doubts, strict=True))
    assert set(doubts) <= set(KIND.display.doubts({"eos_rate": 1.0, "objective/score_std": 1.0, **metrics}))


@pytest.mark.parametrize("settings", [{}, *({"critic": critic.value} for critic in Critic)])
def test_curves_are_those_of_the_critic_or_of_groups_and_of_an_engine(settings: dict[str, Any]) -> None:
    """A stage of an earlier version, whose settings name no critic, has one."""
    drawn = {chart.title: chart.keys for chart in curves("ppo", settings)}
    keys = {key for of_chart in drawn.values() for key in of_chart}
    of_critic, of_groups = {"loss/value", "val/explained_variance"}, {"objective/tied_prompts"}
    if settings.get("critic") == Critic.none.value:
        assert of_groups <= keys
        assert not of_critic & keys
    else:
        assert of_critic <= keys
        assert not of_groups & keys
    assert drawn["Penalties"] == ("penalty/length", "penalty/overlong")
    assert drawn["Gap to the engine"] == ("engine/gap", "engine/gap_max")
    assert drawn["Importance weights"] == ("engine/importance", "engine/capped")


def guarded(folder: Path) -> Path:
    config = config_of(
        "ppo",
        LORA,
        reward=None,
        scorers=[ScorerConfig(source="length", target=3, weight=-2.0)],
        missing_eos_penalty=0.0,
        guard=GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="length", target=3)),
    )
    spec = Chained(folder).spec("ppo", LORA, config=config)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact


def test_the_guard_asks_its_own_scorer_and_the_stage_its_own(tmp_path: Path) -> None:
    looks = [json.loads(line) for line in (guarded(tmp_path) / "guard.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2]
    means = [look["guard/scorer"] for look in looks]
    assert max(means) > 0.0
    assert [look["guard/proxy"] for look in looks] == pytest.approx([-2.0 * mean for mean in means], abs=1e-5)


@pytest.mark.parametrize("best_update", [0.0, 2.0])
def test_a_critic_is_kept_beside_the_policy_that_it_learned_with_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_update: float
) -> None:
    monkeypatch.setattr(Guard, "finish", lambda *_: {"guard/kept_update": best_update})
    assert (guarded(tmp_path) / "critic.safetensors").is_file() is (best_update == 2.0)

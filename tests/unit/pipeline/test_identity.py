"""What counts in a fingerprint, field by field: every setting but those named here and those that nothing reads."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import pytest

from alignment.config.data import DataConfig, MixedConfig, PtxConfig, SourceConfig, TooLongConfig
from alignment.config.evaluating import (
    FEW_SHOT,
    PROMPTED,
    ChatEndpointConfig,
    EndpointConfig,
    JudgeConfig,
    ScorerEndpointConfig,
)
from alignment.config.launch import RolloutSamplingConfig, SamplingConfig
from alignment.config.optim import OptimConfig
from alignment.config.run import RunConfig
from alignment.config.scoring import ServerConfig
from alignment.config.stage import StageConfig
from alignment.config.typed import field_types, group_of, listed_dataclass
from alignment.core.fingerprint import digest
from alignment.pipeline.execute.notes import of_plan
from alignment.pipeline.plan import actions, references
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.stages import registry
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.ppo.config import PpoConfig, PpoOptimConfig
from alignment.stages.registry import config_classes
from alignment.stages.report.kind import ReportConfig
from tests.unit.pipeline.conftest import MakePlan, changed

STAGES = config_classes()

REACHED = {"api_key_env", "timeout", "retries", "concurrency"}
SERVED = REACHED | {"python", "url", "cache_gb", "gpu_share", "start_timeout"}
OUTSIDE: dict[type, set[str]] = {
    # What a reference points to counts by its content.
    **{STAGES[kind]: {"init"} for kind in ("cpt", "sft", "reward", "dpo", "kto")},
    PpoConfig: {"init", "reward", "save_every"},
    EvaluateConfig: {"arms", "reference", "reward", "batch_size", "gate"},
    STAGES["forgetting"]: {"arms"},
    STAGES["reward_card"]: {"reward", "micro_batch_tokens"},
    STAGES["sample"]: {"policy", "reward", "batch_size"},
    STAGES["distil"]: {"init", "teacher", "batch_size"},
    STAGES["benchmark"]: {"arms", "task_folders", "micro_batch_tokens", "batch_size"},
    ReportConfig: {"evaluation"},
    # What is read counts by its content, and how strictly it was read shapes nothing.
    **{cls: {"source", "on_error", "max_skipped"} for cls in (SourceConfig, DataConfig, MixedConfig)},
    TooLongConfig: {"max_share"},
    # Memory and time.
    OptimConfig: {"micro_batch_tokens", "activation_checkpointing"},
    PpoOptimConfig: {"micro_batch_tokens", "activation_checkpointing"},
    # How a judge or grader is reached, not who judges.
    **dict.fromkeys((ChatEndpointConfig, EndpointConfig), REACHED),
    # A scorer is its model, wherever that answers; a stage may go on at another address.
    ScorerEndpointConfig: REACHED | {"base_url"},
    ServerConfig: REACHED | {"base_url", "batch_size"},
    # How an engine is reached and how much memory it has; the bound only counts differences.
    SamplingConfig: SERVED,
    RolloutSamplingConfig: SERVED | {"gap_bound"},
    # Votes count by their content.
    JudgeConfig: {"votes"},
}
for _often in ("cpt", "sft", "reward", "dpo", "kto", "distil"):
    OUTSIDE[STAGES[_often]] |= {"log_every", "save_every"}
for _compared in ("dpo", "kto"):
    OUTSIDE[STAGES[_compared]] |= {"precompute_reference"}
"""Settings that change no result. A name is added here only with the reason why."""

STAGE: dict[str, StageConfig] = {
    **{kind: cls() for kind, cls in STAGES.items() if kind != "report"},
    "ppo": PpoConfig(ptx=PtxConfig(coefficient=1.0)),
    "evaluate": EvaluateConfig(arms=[FEW_SHOT, PROMPTED], judge=JudgeConfig()),
}
"""A stage of each kind with everything in use that can be switched off."""


def fingerprint(stage: StageConfig, *, seed: int = 0) -> str:
    run = RunConfig(name="test", stages={"it": stage}, seed=seed)
    base = ModelSource(source="base", identity="weights", folder=None, ready=True)
    return digest(references.of_stage(run, "it", base=base, data={"data": "rows"}, inputs={}, arms={}))


def changes(config: Any, path: str = "") -> Iterator[tuple[str, type, str, Any]]:
    for field in fields(config):
        value, where = getattr(config, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            for inner, cls, name, changed in changes(value, f"{where}."):
                yield inner, cls, name, replace(config, **{field.name: changed})
        elif not (field.name == "kind" and type(config) in STAGES.values()):
            other = another(value, field_types(type(config))[field.name])
            yield where, type(config), field.name, replace(config, **{field.name: other})


def another(value: Any, hint: Any) -> Any:
    inner = listed_dataclass(hint)
    if inner is not None:
        return [*value, inner()]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, (int, float)):
        return value / 2 + 1 / 8 if isinstance(value, float) else value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    if isinstance(value, dict):
        return {**value, "x": "y"}
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    assert value is None, f"{value!r}"
    assert kinds, hint
    kind = kinds[0]
    if typing.get_origin(kind) is dict:
        return {"x": "y"}
    if is_dataclass(kind):
        return kind(source="length") if "source" in field_types(kind) else kind()
    return next(iter(kind)) if issubclass(kind, Enum) else kind(1)


ALL = [(kind, *change) for kind, stage in STAGE.items() for change in changes(stage)]


@pytest.mark.parametrize("kind", STAGE)
def test_every_setting_counts_but_those_that_change_no_result(kind: str) -> None:
    before = fingerprint(STAGE[kind])
    wrong = [
        where
        for of_kind, where, cls, name, changed in ALL
        if of_kind == kind and (fingerprint(changed) != before) == (name in OUTSIDE.get(cls, set()))
    ]
    assert not wrong


def test_what_is_outside_is_marked_so_and_nothing_else_is() -> None:
    marked: dict[type, set[str]] = {}
    todo: list[Any] = list(STAGES.values())
    while todo:
        cls = todo.pop()
        marked[cls] = {f.name for f in fields(cls) if not f.metadata.get("identity", True)}
        hints = [listed_dataclass(hint) or group_of(hint) or hint for hint in field_types(cls).values()]
        todo += [hint for hint in hints if is_dataclass(hint) and hint not in marked]
    assert {cls: names for cls, names in marked.items() if names} == {
        cls: names for cls, names in OUTSIDE.items() if cls in marked
    }


def raise_revision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = registry.registered()
    kind = rows[name].kind
    assert kind is not None
    raised = replace(rows[name], kind=replace(kind, revision=kind.revision + 1))
    monkeypatch.setattr(registry, "registered", lambda: {**rows, name: raised})


@pytest.mark.parametrize("kind", STAGE)
def test_a_stages_revision_and_the_seed_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(STAGE[kind])
    assert fingerprint(STAGE[kind], seed=1) != before
    raise_revision(kind, monkeypatch)
    assert fingerprint(STAGE[kind]) != before


def test_which_evaluation_a_report_shows_counts() -> None:
    single, several = {"evaluate": EvaluateConfig()}, {"evaluate": EvaluateConfig(), "again": EvaluateConfig()}

    def of(evaluation: str | None, evaluations: dict[str, EvaluateConfig]) -> str:
        report = ReportConfig(evaluation=evaluation)
        run = RunConfig(name="test", stages={**evaluations, "report": report})
        return digest(references.of_report(run, "report", inputs={}))

    usual = RunConfig(name="test", stages={**single, "report": ReportConfig(evaluation="stage:evaluate")})
    described = references.of_report(usual, "report", inputs={})
    assert "shown" not in described, "reports of before this key stay valid"
    assert of(None, single) != of("stage:evaluate", single)
    assert len({of(evaluation, several) for evaluation in (None, "stage:evaluate", "stage:again")}) == 3
    (reason,) = actions._differences({"shown": {"evaluation": "nothing"}}, {"shown": {"evaluation": "stage:again"}}, {})
    assert reason == "evaluation nothing → stage:again"


DPO, PPO = "stages.dpo", "stages.ppo"
WITHOUT = (f"{PPO}.advantage=grpo", f"{PPO}.critic=none")
"""The quickstart's PPO without a critic."""
EVALUATE, METRIC = "stages.evaluate", "{name: m, source: length, target: 9}"
SERVER = "source: server, server: {base_url: 'http://localhost:1/v1', model: rm, api: vllm_pooling}"


@pytest.mark.parametrize(
    ("others", "setting"),
    [
        ((f"{DPO}.adapter.kind=full",), f"{DPO}.adapter.rank=8"),
        ((), f"{DPO}.adapter.master_weights=false"),
        (("model.dtype=float32", f"{DPO}.adapter.kind=full"), f"{DPO}.adapter.master_weights=false"),
        ((f"{PPO}.ppo_epochs=1", f"{PPO}.num_minibatches=2"), f"{PPO}.max_approxkl=0.1"),
        (WITHOUT, f"{PPO}.gae_lambda=1.0"),
        ((), f"{PPO}.sampling.cache_gb=2"),
        ((f"{PPO}.scorers=[{{{SERVER}}}]", f"{PPO}.reward=null"), f"{PPO}.scorers.0.server.batch_size=4"),
        ((), f"{DPO}.too_long.side=right"),
        ((), f"{DPO}.validation.data.source=path:own.jsonl"),
        ((f"{DPO}.loss=orpo",), f"{DPO}.precompute_reference=true"),
        ((), f"{EVALUATE}.judge.max_prompts=9"),
        ((f"{EVALUATE}.metrics=[{METRIC}]", f"{EVALUATE}.primary=m"), f"{EVALUATE}.metrics.0.passing_score=0.5"),
        ((), "launch.offload=optimizer"),
    ],
)
def test_a_setting_without_effect_changes_nothing(plan: MakePlan, others: tuple[str, ...], setting: str) -> None:
    key, (number, item) = setting.partition("=")[0], (".0.", "[0].")
    planned, without = plan(*others, setting), plan(*others)
    assert key.replace(number, item) in {noted.where for noted in planned.unread_settings}
    assert planned.config == without.config
    assert changed(without, planned) == []


def test_a_loss_that_is_switched_off_has_no_settings_in_a_fingerprint(plan: MakePlan) -> None:
    source = f"{PPO}.ptx.data.source='bundled:quickstart/conversations'"
    size, on = f"{PPO}.ptx.batch_size=2", f"{PPO}.ptx.coefficient=1"
    assert changed(plan(source), plan(source, size)) == []
    assert changed(plan(source, on), plan(source, on, size)) == ["ppo", "evaluate", "report"]


def test_settings_with_the_same_reader_are_named_in_one_line(plan: MakePlan) -> None:
    (line,) = [note for note in of_plan(plan(*WITHOUT, f"{PPO}.gamma=0.9")) if "gamma" in note]
    assert all(f"{PPO}.{name}" in line for name in ("value_clip", "gae_lambda", "optim.critic_lr"))

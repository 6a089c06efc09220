"""What a plan makes of an adapter that PEFT saved: its base model, and whether a stage can start from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.core.errors import ConfigError, ModelError
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.pipeline.execute import notes, stored_results
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.sources import hub
from tests.chained import Chained
from tests.tiny import save_tiny_model

Replan = Callable[..., Plan]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return Chained(tmp_path).adapter_from_outside(target_modules=["q_proj", "v_proj"])


@pytest.fixture
def replan(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> Replan:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, {stage@stages.dpo: dpo}, _self_]\n"
        'stages: {dpo: {data: {source: "bundled:quickstart/preferences"}}}\n'
    )
    fixed = [f"stages.dpo.init=path:{outside}", f"output={tmp_path / 'out'}"]
    return lambda *overrides: make_plan(str(tmp_path / "mine.yaml"), [*fixed, *overrides])


def _change(outside: Path, **settings: Any) -> None:
    file = outside / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def _named(folder: Path) -> str:
    return f"model.source=path:{folder}"


def test_the_base_is_the_one_that_the_adapter_names(tmp_path: Path, replan: Replan) -> None:
    plan = replan()
    assert plan.base.folder == tmp_path / "base"
    assert plan.config.model.source == f"path:{tmp_path / 'base'}"
    (note,) = [note for note in notes.of_plan(plan) if "adapter" in note]
    assert "shapes" not in note
    named = replan(_named(tmp_path / "base"))
    assert named.stages[0].fingerprint == plan.stages[0].fingerprint
    save_tiny_model(tmp_path / "copy")
    assert replan(_named(tmp_path / "copy")).stages[0].fingerprint == plan.stages[0].fingerprint


@pytest.mark.parametrize("name", ["/gone/base", None], ids=["not here", "none"])
def test_a_base_that_is_not_here_has_to_fit(tmp_path: Path, outside: Path, replan: Replan, name: str | None) -> None:
    _change(outside, base_model_name_or_path=name)
    plan = replan(_named(tmp_path / "base"))
    assert any("shapes" in note for note in notes.of_plan(plan))
    for misfit, change in (("wide", {"hidden_size": 64}), ("other", {"architecture": "gpt2"})):
        save_tiny_model(tmp_path / misfit, **change)
        with pytest.raises(ModelError, match=r"stages\.dpo\.init: .* does not fit .*\n.*model\.source"):
            replan(_named(tmp_path / misfit))


@pytest.mark.parametrize(
    ("settings", "source", "fits"),
    [
        ({}, "hub:org/name", True),
        ({"revision": "a" * 40}, f"hub:org/name@{'a' * 40}", True),
        ({}, "hub:org/other", False),
        ({}, "path:copy", True),  # which may be a copy
    ],
)
def test_a_base_of_a_hub_is_compared_by_its_name(
    tmp_path: Path,
    outside: Path,
    replan: Replan,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    source: str,
    fits: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "copy")
    _change(outside, base_model_name_or_path="org/name", **settings)
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: None)
    assert replan().base.source == "@".join(["hub:org/name", *settings.values()])
    if fits:
        assert replan(f"model.source={source}").base.source == source
        return
    with pytest.raises(ModelError, match=r"\n.*model\.source=hub:org/name"):
        replan(f"model.source={source}")


def test_an_adapter_of_a_hub_is_fetched_and_then_its_base(
    tmp_path: Path, outside: Path, replan: Replan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(outside, base_model_name_or_path="org/base")
    folders = {"org/adapter": outside, "org/base": tmp_path / "base"}
    here: set[str] = set()

    def snapshot(asked: hub.Repository, *, patterns: list[str], download: bool, failure: object) -> Path | None:
        here.update([asked.id] if download else [])
        return folders[asked.id] if asked.id in here else None

    monkeypatch.setattr(hub, "snapshot", snapshot)
    monkeypatch.setattr(hub, "is_listed", lambda _: True)
    monkeypatch.setattr("alignment.pipeline.sources.bundled_model.is_ready", lambda _: True)
    monkeypatch.setattr("alignment.pipeline.sources.bundled_model.ensure", lambda *_, **__: tmp_path)
    plan = replan("stages.dpo.init=hub:org/adapter")
    complete = stored_results.with_models(plan, lambda _: None, stages=plan.stages)
    assert complete.base.folder == tmp_path / "base"
    assert complete.stages[0].inputs["init"].path == outside


def test_other_slots_take_an_adapter_too_but_not_all(tmp_path: Path, outside: Path, replan: Replan) -> None:
    ref = f"path:{outside}"
    settings = {
        "arms": f"[base,{ref}]",
        "reference": ref,
        "reward": "null",
        "metrics": "[{source: key_facts, name: facts}]",
    }
    settings["data.source"] = "bundled:quickstart/heldout"
    named = [f"stages.evaluate.{key}={value}" for key, value in settings.items()]
    evaluated = replan("+stage@stages.evaluate=evaluate_house_style", *named)
    assert evaluated.stages[1].arms[ref].path == evaluated.stages[1].inputs["reference"].path == outside
    with pytest.raises(ModelError, match=r"model\.source: .* adapter"):
        replan(_named(outside))
    scorer = [f"stages.ppo.{key}={value}" for key, value in {"init": "base", "reward": ref}.items()]
    with pytest.raises(ModelError, match=r"stages\.ppo\.reward: .* adapter"):
        replan("+stage@stages.ppo=ppo", "stages.ppo.data.source=bundled:quickstart/preferences", *scorer)


def _without_weights(outside: Path) -> None:
    (outside / ADAPTER_WEIGHTS).rename(outside / "adapter_model.bin")


def _with_weight(name: str) -> Callable[[Path], None]:
    def change(outside: Path) -> None:
        weights = load_file(outside / ADAPTER_WEIGHTS)
        save_file({**weights, f"base_model.model.{name}": torch.zeros(2, 32)}, outside / ADAPTER_WEIGHTS)

    return change


def _with(**settings: Any) -> Callable[[Path], None]:
    return lambda outside: _change(outside, **settings)


@pytest.mark.parametrize(
    "damage",
    [
        _without_weights,
        lambda outside: (outside / ADAPTER_CONFIG).write_text("[" * 100_000),
        _with(peft_type="IA3"),
        _with(trainable_token_indices=[3]),
        _with(bias="all"),
        _with(rank_pattern={"q_proj": 8}),
        _with(init_lora_weights="pissa"),
        _with(r=None),
        _with_weight("model.embed_tokens.weight"),
        _with_weight("lm_head.lora_A.weight"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(outside: Path, replan: Replan, damage: Callable[[Path], None]) -> None:
    damage(outside)
    with pytest.raises(ModelError, match=r"stages\.dpo\.init"):
        replan()


@pytest.mark.parametrize(
    ("settings", "overrides", "faults"),
    [
        ({}, ["stages.dpo.adapter.chain=stack"], []),
        ({"rank_pattern": {"up": 8}, "target_parameters": ["up"]}, [], []),  # as PEFT writes it for experts
        ({}, ["stages.dpo.adapter.chain=continue"], ["rank", "alpha"]),
        ({"modules_to_save": ["lm_head"]}, ["stages.dpo.adapter.chain=stack"], ["chain"]),
        ({"use_dora": True}, ["adapter=qlora"], ["chain"]),
    ],
)
def test_a_chain_that_the_adapter_does_not_allow_is_refused(
    outside: Path, replan: Replan, settings: dict[str, Any], overrides: list[str], faults: list[str]
) -> None:
    _change(outside, **settings)
    if not faults:
        assert replan(*overrides).stages[0].has_to_run
        return
    with pytest.raises(ConfigError) as refused:
        replan(*overrides)
    for setting in faults:
        assert f"stages.dpo.adapter.{setting}: " in str(refused.value)

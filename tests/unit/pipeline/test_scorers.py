"""What scores PPO's answers: functions of the user's, reward models, servers and ensembles, as a plan sees them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.core.errors import ConfigError, ModelError
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute.notes import cautions
from alignment.rewards.rules import rule_kind
from tests.hub import weights_file
from tests.unit.pipeline.conftest import MakePlan, changed, leave_all, printed_by_run, screened, stage_of
from tests.unit.pipeline.test_run import fake

STYLE = "source: 'bundled:quickstart/house_style.py:style'"
WATCHED = f"stages.ppo.guard={{every: 1, scorer: {{{STYLE}}}}}"
OF_PPO = ["ppo", "evaluate", "report"]


@pytest.fixture
def function(tmp_path: Path) -> Path:
    file = tmp_path / "score.py"
    trace = tmp_path / "imported"
    file.write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "CONSTANT = 1\n"
        "def brevity(prompts, completions, rows):\n    return [-len(text) for text in completions]\n"
        "def two(prompts, completions): ...\n"
        "def keyword(prompts, completions, rows, *, more): ...\n"
        "def any_number(*given): ...\n"
        "def defaults(prompts, completions, rows, scale=1, *, more=2): ...\n"
        "async def later(prompts, completions, rows): ...\n"
        "@staticmethod\ndef wrapped(x): ...\n"
        "class Scorer: ...\n"
    )
    return file


def scorers(*given: str) -> str:
    return f"stages.ppo.scorers=[{', '.join('{' + scorer + '}' for scorer in given)}]"


def second(scorer: str) -> str:
    return scorers("source: reward", scorer)


def fault(plan: MakePlan, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    return caught.value


@pytest.fixture
def ppo(plan: MakePlan) -> Any:
    return lambda *overrides: stage_of(plan(*overrides), "ppo")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brevty", "'brevty'; did you mean 'brevity'?"),
        ("CONSTANT", "'CONSTANT'; "),
        ("later", "'later' is async"),
        *((name, f"called as {name}(prompts, completions, rows)") for name in ("two", "keyword")),
        *((name, "") for name in ("brevity", "any_number", "defaults", "wrapped")),
    ],
)
def test_a_function_is_checked_and_not_imported(plan: MakePlan, function: Path, name: str, words: str) -> None:
    override = second(f"source: '{function}:{name}'")
    if words:
        refusal = fault(plan, override)
        assert (refusal.where, words in refusal.message) == ("stages.ppo.scorers[1].source", True)
    else:
        assert stage_of(plan(override), "ppo").code == (f"{function}:{name}",)
    assert not (function.parent / "imported").exists()


def test_a_file_that_is_not_python_is_named(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    override = second(f"source: '{file}:f'")
    file.write_text("x = 1\ndef f(:\n")
    assert f"{file} is not Python: line 2: " in fault(plan, override).message
    file.write_bytes(b"def f(a, b, c): return '\xff'\n")
    assert f"{file} is not Python: " in fault(plan, override).message
    file.unlink()
    file.mkdir()
    assert f"{file} cannot be read: Is a directory" in fault(plan, override).message


def test_a_function_s_content_counts_and_its_place_does_not(plan: MakePlan, function: Path, tmp_path: Path) -> None:
    first = plan(second(f"source: '{function}:brevity'"))
    moved = tmp_path / "elsewhere.py"
    moved.write_bytes(function.read_bytes())
    assert changed(first, plan(second(f"source: '{moved}:brevity'"))) == []
    leave_all(first)
    function.write_text(function.read_text().replace("-len", "-2 * len"))
    after = plan(second(f"source: '{function}:brevity'"))
    assert changed(first, after) == OF_PPO
    nearest = f"(nearest: {stage_of(first, 'ppo').artifact.name})"
    assert stage_of(after, "ppo").reason == f"the scoring code changed {nearest}"
    other = stage_of(plan(second(f"source: '{moved}:brevity', weight: 0.5")), "ppo")
    assert other.reason == f"scorers[1].weight 1 → 0.5 {nearest}"


def test_a_plan_says_plainly_whose_code_runs(plan: MakePlan, function: Path) -> None:
    override = second(f"source: '{function}:brevity'")

    def announced(*overrides: str) -> list[str]:
        return [line for line in screened(plan(*overrides), width=60) if "your code" in line]

    assert announced() == announced(second(STYLE)) == [], "it is part of the package"
    assert announced(override) == [f"ppo runs your code: {function}:brevity"]
    leave_all(plan(override))
    assert announced(override) == [], "what is reused runs nothing"


def test_the_worker_gets_absolute_paths(overrides: list[str], function: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = function.parent
    monkeypatch.chdir(folder)
    os.mkdir("below")
    more = [second("source: below/../score.py:brevity"), "stages.ppo.ptx.coefficient=1"]
    more.append("stages.ppo.ptx.data.source=path:conversations.jsonl")
    more += ["~stages.dpo", "~stages.evaluate", "~stages.report"]
    given = [override for override in overrides if not override.startswith(("stages.dpo", "stages.evaluate"))]
    printed = printed_by_run([*given, *more], command_for=fake)
    spec = yaml.safe_load((folder / "out/runs/quickstart/ppo/stage.yaml").read_text())
    source = spec["config"]["scorers"][1]["source"]
    assert (Path(source).is_absolute(), source.partition(":")[2]) == (True, "brevity")
    assert os.path.samefile(source.partition(":")[0], function)
    assert spec["extra_data"] == {"ptx.data": str(folder / "conversations.jsonl")}
    assert list(spec["identity"]["code"]) == ["scorers[1].source"]
    assert f"ppo runs your code: {source}" in printed
    assert not (folder / "imported").exists()


def judge(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    model_config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, **config}
    (folder / "config.json").write_text(json.dumps(model_config))
    (folder / "model.safetensors").write_bytes(weights_file())
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"id2label": None, "num_labels": 1}, ""),
        ({"architectures": ["LlamaForCausalLM"]}, "contains a LlamaForCausalLM"),
        ({"id2label": None}, "2 labels"),
    ],
)
def test_a_folder_has_to_give_a_score(plan: MakePlan, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    folder = judge(tmp_path / "judge", **config)
    for slot in ("stages.ppo.reward", "stages.ppo.guard.scorer.source"):
        if not words:
            plan(WATCHED, f"{slot}=path:{folder}")
            continue
        with pytest.raises(ModelError) as caught:
            plan(WATCHED, f"{slot}=path:{folder}")
        assert (caught.value.where, words in caught.value.message) == (slot, True)
        assert "stage:reward" in caught.value.remedy


def test_a_reward_model_of_a_hub_is_planned_by_its_name_and_fetched_with_the_others(plan: MakePlan) -> None:
    planned = plan("stages.ppo.reward='hub:org/judge@v1'")
    assert planned.sources["hub:org/judge@v1"].ready is False
    assert stage_of(planned, "ppo").input_fingerprints["reward"] == "hub:org/judge@v1"
    assert stage_of(planned, "ppo").inputs["reward"].path is None


URL = "base_url: 'http://localhost:8000'"
SERVER = f"source: server, server: {{{URL}, model: rm}}"
GRADE = f"source: grade, grader: {{endpoint: {{{URL}, model: m}}}}"
MEMBERS = "members: [{source: 'stage:reward'}, {source: length, target: 9}]"


def ensemble(settings: str, more: str = "weight: 1") -> str:
    return f"source: ensemble, {more}, ensemble: {{{settings}}}"


def test_rubric_scale_api_label_and_members_count(ppo: Any) -> None:
    graders = ["rubric: x", "highest: 5", "lowest: 0", "show_reference: true", "ungraded: 1"]
    servers = ("api: vllm_classify", "api: vllm_classify, label: '1'", "api: vllm_score")
    deviations = f"{MEMBERS}, combine: mean_minus_std"
    others = ["members: [{source: 'stage:reward'}, {source: length, target: 8}]"]
    others += [MEMBERS, f"{MEMBERS}, combine: min", deviations, f"{deviations}, std_weight: 2"]
    variants = [
        GRADE,
        *(GRADE.replace("grader: {", f"grader: {{{more}, ") for more in graders),
        SERVER,
        *(SERVER.replace("model: rm", f"model: rm, {more}") for more in servers),
        *(ensemble(settings) for settings in others),
        ensemble(MEMBERS, "normalize: true"),
    ]
    planned = [ppo(second(variant)) for variant in variants]
    assert len({stage.fingerprint for stage in planned}) == len(variants)
    assert "scorers[1].ensemble.members[0].source" in planned[-1].inputs


@pytest.mark.parametrize(
    ("scorer", "where"),
    [
        (SERVER, "server"),
        (GRADE, "grader.endpoint"),
        (ensemble(f"members: [{{source: reward}}, {{{SERVER}}}]"), "ensemble.members[1].server"),
    ],
)
def test_a_missing_key_or_client_is_named(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, scorer: str, where: str
) -> None:
    monkeypatch.delenv("SCORER_KEY", raising=False)
    planned = plan(second(scorer.replace("model", "api_key_env: SCORER_KEY, model")))
    key = f"stages.ppo.scorers[1].{where}.api_key_env: the environment variable SCORER_KEY is not set"
    assert key in why_not_here(planned)
    monkeypatch.setenv("SCORER_KEY", "sk-canary")
    assert why_not_here(planned) == ""
    assert "canary" not in repr(planned)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find_spec(name))
    with pytest.raises(ConfigError, match="needs the package openai"):
        plan(second(scorer))


def test_a_rule_without_its_library_says_how_to_install_it(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_kind, "find_spec", lambda name: None if name == "langdetect" else object())
    refusal = fault(plan, second("source: instructions_strict"))
    command = "'lm_eval>=0.4.13,<0.4.14' langdetect immutabledict 'nltk>=3.9.1'"
    assert (refusal.where, command in refusal.message) == ("stages.ppo.scorers[1].source", True)


@pytest.mark.parametrize(("model", "is_noted"), [("m", True), ("another", False)])
def test_an_evaluation_by_the_grader_of_ppo_is_pointed_out(plan: MakePlan, model: str, is_noted: bool) -> None:
    planned = plan(
        second(GRADE),
        "stages.evaluate.metrics=[{name: helpful, source: grade}]",
        "stages.evaluate.primary=helpful",
        f"stages.evaluate.grader.endpoint={{{URL}, model: {model}}}",
    )
    noted = [note for note in cautions(planned) if "judges by helpful, which ppo optimises (scorers[1])" in note]
    assert bool(noted) is is_noted

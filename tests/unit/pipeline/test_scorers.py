"""What may score PPO's answers: checked before anything starts, and part of what defines the stage."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from alignment.core.errors import ArtifactError, ConfigError, DataError, ModelError, RewardError
from alignment.core.fingerprint import file_sha256
from alignment.core.resources import shipped
from alignment.pipeline.execute.plan_table import show_plan
from alignment.pipeline.execute.run import run
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.rewards.rules import rule_kind
from alignment.stages.ppo.config import PpoConfig
from tests.unit.pipeline.conftest import MakePlan, leave_artifact
from tests.unit.pipeline.test_run import fake
from tests.weights_files import weights_file

SEPARATE = "stages.ppo.critic=separate"
NO_REWARD = "stages.ppo.reward=null"
STYLE = "source: 'bundled:quickstart/house_style.py:style'"


@pytest.fixture
def function(tmp_path: Path) -> Path:
    """A file of the user's that would leave a trace if it were imported."""
    file = tmp_path / "score.py"
    trace = tmp_path / "imported"
    file.write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "CONSTANT = 1\n"
        "def brevity(prompts, completions, rows):\n    return [-len(text) for text in completions]\n"
        "def two(prompts, completions): ...\n"
        "def one_more(prompts, completions, rows, more): ...\n"
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


def ppo(plan: Plan) -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == "ppo")


def fault(plan: MakePlan, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    return str(caught.value)


# ---- faults ---------------------------------------------------------------------------------------------------------

WATCHED = "stages.ppo.guard={every: 1, scorer: {source: 'bundled:quickstart/house_style.py:style'}}"
ALLOWED = (
    "allowed: reward, a reward model (stage:NAME, path:FOLDER), FILE.py:FUNCTION, bundled:NAME.py:FUNCTION, or one of: "
    "server, grade, ensemble, exact_answer, regex, length, key_facts, refusal, json_schema, rouge_l, chrf, "
    "instructions_strict, instructions_loose"
)
FAULTS = [
    ((NO_REWARD,), "scorers[0].source: 'reward' needs the model in stages.ppo.reward, which is null; name a model, "
    "or remove this scorer"),
    ((scorers("source: lenght"),), f"scorers[0].source: 'lenght' is not a scorer; did you mean 'length'? {ALLOWED}"),
    ((scorers("source: xyz"),), f"scorers[0].source: 'xyz' is not a scorer; {ALLOWED}"),
    ((scorers("source: base"),), f"scorers[0].source: 'base' is not a scorer; {ALLOWED}"),
    ((scorers("source: score.py"),), "scorers[0].source: 'score.py' does not name a function; write score.py:FUNCTION"),
    ((scorers("source: reward", "source: regex"),), "scorers[1].pattern: missing; 'regex' needs it"),
    ((scorers("source: reward", "source: length"),), "scorers[1].target: missing; 'length' needs it"),
    ((scorers("source: reward, pattern: x"),), "scorers[0].pattern: 'x' has no effect; only 'regex' uses it"),
    ((scorers("source: reward", "source: regex, pattern: x, target: 3"),),
     "scorers[1].target: 3 has no effect; only 'length' uses it"),
    ((scorers("source: reward", "source: regex, pattern: '('"),),
     "scorers[1].pattern: '(' is not allowed; a regular expression in Python syntax"),
    ((scorers("source: reward", "source: choice"),), "scorers[1].source: 'choice' scores a policy rather than "
    "answers, so it can only be a metric of an evaluation"),
    ((scorers("source: reward", "source: json_schema, schema: {type: text}"),), "scorers[1].schema: is not a JSON "
     "schema: 'text' is not valid under any of the given schemas"),
    ((scorers("source: reward", "source: json_schema, schema: text"),), "scorers[1].schema: 'text' is not allowed; "
     "it takes a group"),
    ((scorers(STYLE),), "reward: 'stage:reward' is unused: no scorer is 'reward', and a "
     "shared critic starts at 0; write null, or add the scorer"),
    ((scorers(),), "scorers: [] is not allowed; at least one entry"),
    (("stages.ppo.guard.every=1",), f"guard.scorer.source: missing; {ALLOWED}"),
    ((scorers("source: reward", "source: 'bundled:quickstart/hose_style.py:style'"),), "scorers[1].source: no bundled "
     "file 'quickstart/hose_style.py'; did you mean 'quickstart/house_style.py'?"),
    ((scorers("source: reward", "source: 'bundled:../../setup.py:style'"),), "scorers[1].source: no bundled "
     "file '../../setup.py'; one of: quickstart/house_style.py"),
    ((WATCHED, "stages.ppo.guard.scorer.normalize=true"),
     "guard.scorer.normalize: true, but a running normalisation cannot compare policies; set it to false"),
    ((WATCHED, "stages.ppo.guard.scorer.weight=0"),
     "guard.scorer.weight: 0, so all policies would score the same; choose another weight"),
    (("stages.ppo.guard.every=1", "stages.ppo.guard.scorer.source=length"),
     "guard.scorer.target: missing; 'length' needs it"),
    (("stages.ppo.guard.every=1", "stages.ppo.guard.scorer.source='stage:sft'"),
     "guard.scorer.source: 'stage:sft' is a policy; this slot takes a reward model. Use 'stage:reward'."),
    ((scorers("source: reward", "source: 'stage:rewrad'"),),
     "scorers[1].source: no stage 'rewrad' in this run; did you mean 'reward'?"),
    (("stages.ppo.reward=base",), "reward: 'base' is a language model; this slot takes a reward model. "
     "Use 'stage:reward'."),
    (("stages.ppo.reward='bundled:smollm2-135m'",), "reward: 'bundled:smollm2-135m' is a language model; this slot "
     "takes a reward model. Use 'stage:reward'."),
    (("stages.ppo.reward='stage:rewrad'",), "reward: no stage 'rewrad' in this run; did you mean 'reward'? Otherwise "
     "write null."),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_a_scorer_that_cannot_be_is_named_exactly(plan: MakePlan, overrides: tuple[str, ...], message: str) -> None:
    assert fault(plan, *overrides).split("\n")[0] == f"stages.ppo.{message}"


@pytest.mark.parametrize(
    ("source", "module", "command"),
    [
        ("rouge_l", "rouge_score", "pip install 'rouge-score>=0.1.2,<0.2'"),
        (
            "instructions_strict",
            "langdetect",
            "pip install 'lm_eval>=0.4.13,<0.4.14' langdetect immutabledict 'nltk>=3.9.1'",
        ),
    ],
)
def test_a_rule_whose_library_is_missing_says_how_to_install_it(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, source: str, module: str, command: str
) -> None:
    monkeypatch.setattr(rule_kind, "find_spec", lambda name: None if name == module else object())
    expected = f"stages.ppo.scorers[1].source: '{source}' needs {module}, not installed here; {command}"
    assert fault(plan, scorers("source: reward", f"source: {source}")) == expected


def test_without_a_reward_model_in_the_run_the_advice_is_what_fits_from_outside(plan: MakePlan) -> None:
    refusal = fault(plan, "~stages.reward", "stages.evaluate.reward=null", "stages.ppo.reward='stage:sft'")
    assert refusal == (
        "stages.ppo.reward: 'stage:sft' is a policy; this slot takes a reward model. No stage of this run makes one. "
        "A model from elsewhere, by path: or hub:, must be a …ForSequenceClassification with one label."
    )


def test_all_faults_are_reported_together(plan: MakePlan) -> None:
    refusal = fault(plan, NO_REWARD, scorers("source: reward", "source: regex", "source: nowhere.py:f", "weigth: 2"))
    lines = [line.strip().partition(": ")[0] for line in refusal.splitlines()[1:]]
    fields = ["0].source", "1].pattern", "2].source", "3].source", "3].weigth"]
    assert sorted(lines) == [f"stages.ppo.scorers[{field}" for field in fields]


FUNCTIONS = [
    ("brevty", "{file} defines no function 'brevty'; did you mean 'brevity'?"),
    ("Scorer", "{file} defines no function 'Scorer'; one of: "),
    ("CONSTANT", "{file} defines no function 'CONSTANT'; "),
    ("later", "'later' is async, but it must be an ordinary function"),
    ("two", "'two' cannot be called as two(prompts, completions, rows)"),
    ("one_more", "'one_more' cannot be called as one_more(prompts, completions, rows)"),
    ("keyword", "'keyword' cannot be called as keyword(prompts, completions, rows)"),
]


@pytest.mark.parametrize(("name", "message"), FUNCTIONS)
def test_a_function_that_cannot_be_called_is_named_without_importing_its_file(
    plan: MakePlan, function: Path, name: str, message: str
) -> None:
    refusal = fault(plan, scorers("source: reward", f"source: '{function}:{name}'"))
    assert refusal.startswith(f"stages.ppo.scorers[1].source: {message.format(file=function)}")
    assert not (function.parent / "imported").exists()


@pytest.mark.parametrize("name", ["brevity", "any_number", "defaults", "wrapped"])
def test_a_function_that_can_be_called_is_planned_without_importing_its_file(
    plan: MakePlan, function: Path, name: str
) -> None:
    assert ppo(plan(scorers("source: reward", f"source: '{function}:{name}'"))).code == (f"{function}:{name}",)
    assert not (function.parent / "imported").exists()


def test_a_file_that_is_missing_or_not_python_is_named(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    override = scorers("source: reward", f"source: '{file}:f'")
    where = "stages.ppo.scorers[1].source: "
    assert fault(plan, override) == f"{where}no file {file}"
    file.write_text("x = 1\ndef f(:\n")
    assert fault(plan, override).startswith(f"{where}{file} is not Python: line 2: ")
    file.write_bytes(b"def f(a, b, c): return '\xff'\n")
    assert fault(plan, override).startswith(f"{where}{file} is not Python: ")
    file.unlink()
    file.mkdir()
    assert fault(plan, override) == f"{where}{file} cannot be read: Is a directory"


def test_a_guard_that_is_off_asks_for_nothing(plan: MakePlan) -> None:
    planned = ppo(plan("stages.ppo.guard.scorer.source='nowhere.py:f'"))
    assert planned.code == ()
    assert "code" not in planned.identity


# ---- reward models --------------------------------------------------------------------------------------------------


def judge(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    model_config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, **config}
    (folder / "config.json").write_text(json.dumps(model_config))
    (folder / "model.safetensors").write_bytes(weights_file())
    return folder


def test_a_reward_model_from_outside_fits_and_its_content_counts(plan: MakePlan, tmp_path: Path) -> None:
    folder = judge(tmp_path / "judge")
    first = ppo(plan(f"stages.ppo.reward=path:{folder}"))
    assert first.inputs["reward"].path == folder
    folder.rename(tmp_path / "moved")
    moved = ppo(plan(f"stages.ppo.reward=path:{tmp_path / 'moved'}"))
    assert moved.fingerprint == first.fingerprint
    (tmp_path / "moved/model.safetensors").write_bytes(weights_file(b"others"))
    assert ppo(plan(f"stages.ppo.reward=path:{tmp_path / 'moved'}")).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "config", [{"id2label": None, "num_labels": 1}, {"architectures": ["Qwen2ForSequenceClassification"]}]
)
def test_one_label_may_be_said_in_two_ways(plan: MakePlan, tmp_path: Path, config: dict[str, Any]) -> None:
    plan(f"stages.ppo.reward=path:{judge(tmp_path / 'judge', **config)}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "contains a LlamaForCausalLM, which does not give scores"),
        ({"architectures": None}, "contains a model of an unknown architecture, which does not give scores"),
        ({"id2label": {"0": "a", "1": "b"}}, "contains a classifier with 2 labels; a reward model has one"),
        ({"id2label": None}, "contains a classifier with 2 labels; a reward model has one"),
    ],
)
def test_a_folder_that_gives_no_score_is_refused_with_what_would_fit(
    plan: MakePlan, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = judge(tmp_path / "judge", **config)
    for slot in ("stages.ppo.reward", "stages.ppo.guard.scorer.source"):
        with pytest.raises(ModelError) as caught:
            plan(WATCHED, f"{slot}=path:{folder}")
        assert str(caught.value) == (
            f"{slot}: {folder} {message}\n  → this slot takes a reward model. Use 'stage:reward'."
        )


def test_an_artifact_of_a_policy_is_refused_with_what_would_fit(plan: MakePlan) -> None:
    first = plan()
    for stage in first.stages:
        leave_artifact(stage)
    artifacts = {stage.name: stage.artifact for stage in first.stages}
    with pytest.raises(ModelError) as caught:
        plan(f"stages.ppo.reward=path:{artifacts['sft']}")
    assert str(caught.value) == (
        f"stages.ppo.reward: {artifacts['sft']} contains an artifact of kind policy\n"
        "  → this slot takes a reward model. Use 'stage:reward'."
    )
    again = ppo(plan(f"stages.ppo.reward=path:{artifacts['reward']}"))
    assert again.fingerprint == ppo(first).fingerprint


def test_an_evaluation_takes_reward_models_of_ours_only(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"stages\.evaluate\.reward: no artifact in .*\n  → this slot takes a reward"):
        plan(f"stages.evaluate.reward=path:{judge(tmp_path / 'judge')}")
    assert "stages.evaluate.reward: 'hub:org/judge' is a language model" in fault(
        plan, "stages.evaluate.reward='hub:org/judge'"
    )


def test_a_reward_model_of_a_hub_is_planned_by_its_name_and_fetched_with_the_others(plan: MakePlan) -> None:
    planned = plan("stages.ppo.reward='hub:org/judge@v1'")
    assert planned.sources["hub:org/judge@v1"].ready is False
    assert ppo(planned).input_fingerprints["reward"] == "hub:org/judge@v1"
    assert ppo(planned).inputs["reward"].path is None


def test_a_critic_starts_from_a_reward_model_of_ours_alone(plan: MakePlan, tmp_path: Path) -> None:
    plan(SEPARATE, scorers(STYLE))  # the critic reads it
    for ref in ("hub:org/judge", f"path:{judge(tmp_path / 'judge')}"):
        refusal = fault(plan, SEPARATE, scorers(STYLE), f"stages.ppo.reward='{ref}'")
        assert refusal.startswith(f"stages.ppo.reward: '{ref}' is unused: no scorer is 'reward', and a critic ")


def test_without_a_critic_only_a_scorer_reads_the_reward_model(plan: MakePlan) -> None:
    settings = ("prompt_baseline=false", "gae_lambda=0.95", "value_clip=0.2", "optim.critic_lr=null", "advantage=rloo")
    without = ("stages.ppo.critic=none", *(f"stages.ppo.{each}" for each in settings))
    plan(*without)
    assert fault(plan, *without, scorers(STYLE)) == (
        "stages.ppo.reward: 'stage:reward' is unused: no scorer is 'reward', and there is no critic that could start "
        "from it; write null, or add the scorer"
    )
    assert set(ppo(plan(*without, NO_REWARD, scorers(STYLE))).inputs) == {"init"}


def test_without_a_reward_model_the_stage_waits_for_none(plan: MakePlan) -> None:
    planned = plan(NO_REWARD, scorers("source: length, target: 20"))
    assert set(ppo(planned).inputs) == {"init"}
    assert set(ppo(planned).identity["inputs"]) == {"init"}
    alone = plan(NO_REWARD, scorers("source: length, target: 20"), "~stages.reward", "stages.evaluate.reward=null")
    assert ppo(alone).fingerprint == ppo(planned).fingerprint


def test_a_second_opinion_may_be_a_reward_model_of_its_own(plan: MakePlan, tmp_path: Path) -> None:
    guard = ("+stage@stages.judge=reward", "stages.ppo.guard.every=2", "stages.judge.optim.epochs=2")
    source = f"stages.judge.data.source=path:{tmp_path / 'preferences.jsonl'}"
    planned = plan(*guard, source, "stages.ppo.guard.scorer.source='stage:judge'")
    names = [stage.name for stage in planned.stages]
    assert names.index("judge") < names.index("ppo")
    made = {stage.name: stage for stage in planned.stages}
    assert ppo(planned).inputs["guard.scorer.source"].path == made["judge"].artifact
    changed = plan(*guard, source, "stages.ppo.guard.scorer.source='stage:judge'", "stages.judge.optim.epochs=3")
    assert ppo(changed).fingerprint != ppo(planned).fingerprint


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_the_content_of_a_function_s_file_counts_and_its_place_does_not(
    plan: MakePlan, function: Path, tmp_path: Path
) -> None:
    def planned(file: Path) -> Plan:
        return plan(scorers("source: reward", f"source: '{file}:brevity', weight: 0.5"))

    first = planned(function)
    moved = tmp_path / "elsewhere.py"
    moved.write_bytes(function.read_bytes())
    assert ppo(planned(moved)).fingerprint == ppo(first).fingerprint
    for stage in first.stages:
        leave_artifact(stage)
    function.write_text(function.read_text().replace("-len", "-2 * len"))
    after = planned(function)
    assert ppo(after).fingerprint != ppo(first).fingerprint
    assert ppo(after).reason == f"the scoring code changed (nearest: {ppo(first).artifact.name})"
    assert {stage.name for stage, other in zip(after.stages, first.stages, strict=True)
            if stage.fingerprint != other.fingerprint} == {"ppo", "evaluate", "report"}  # fmt: skip


def test_a_reason_names_the_scorer_s_setting_that_differs(plan: MakePlan) -> None:
    def planned(weight: float) -> Plan:
        return plan(scorers("source: reward", f"source: length, target: 20, weight: {weight}"))

    first = planned(1.0)
    for stage in first.stages:
        leave_artifact(stage)
    assert ppo(planned(0.5)).reason == f"scorers[1].weight 1 → 0.5 (nearest: {ppo(first).artifact.name})"


def test_a_function_that_ships_with_the_project_is_one_like_the_user_s(plan: MakePlan) -> None:
    """The worker resolves it where it is installed itself; a copy of the user's is the same stage."""
    planned = ppo(plan(scorers("source: reward", STYLE)))
    file = shipped("data") / "quickstart/house_style.py"
    assert planned.identity["code"] == {"scorers[1].source": file_sha256(file)}
    assert isinstance(planned.config, PpoConfig)
    assert planned.config.scorers[1].source == "bundled:quickstart/house_style.py:style"
    copied = ppo(plan(scorers("source: reward", f"source: '{file}:style'")))
    assert copied.fingerprint == planned.fingerprint
    assert ppo(plan(WATCHED)).identity["code"] == {"guard.scorer.source": file_sha256(file)}


def test_pretraining_text_counts_only_where_it_is_learned(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "ptx.jsonl"
    row = json.loads((tmp_path / "conversations.jsonl").read_text())
    file.write_text(json.dumps(row) + "\n")
    source = f"stages.ppo.ptx.data.source=path:{file}"
    on = "stages.ppo.ptx.coefficient=0.5"
    assert ppo(plan(source)).extra_data == {}
    first = ppo(plan(source, on))
    assert first.extra_data == {"ptx.data": file}
    assert set(first.identity["extra_data"]) == {"ptx.data"}
    off = ppo(plan(source)).fingerprint
    file.write_text(json.dumps({**row, "id": "other"}) + "\n")
    assert ppo(plan(source, on)).fingerprint != first.fingerprint
    assert ppo(plan(source)).fingerprint == off
    file.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"ptx\.jsonl:1: 'messages' must be a list"):
        plan(source, on)
    file.unlink()
    with pytest.raises(DataError, match=r"stages\.ppo\.ptx\.data\.source: no file"):
        plan(source, on)
    plan(source)


def test_results_of_stages_without_any_of_this_are_found_again(plan: MakePlan) -> None:
    for stage in plan("stages.evaluate.metrics=[]").stages:
        assert not {"code", "extra_data"} & set(stage.identity)


def test_rows_are_held_against_what_the_rules_look_at_before_anything_starts(plan: MakePlan, tmp_path: Path) -> None:
    override = scorers("source: reward", "source: exact_answer")
    file = tmp_path / "preferences.jsonl"
    with pytest.raises(DataError, match=rf"{file}:1: 'answer' is missing"):
        plan(override)
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps({**row, "answer": "#### 21"}) + "\n" + json.dumps({**row, "answer": "soon"}) + "\n")
    plan()
    plan(override, "stages.ppo.data.limit=1")
    with pytest.raises(DataError, match=rf"{file}:2: 'answer' contains no number"):
        plan(override)


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_a_plan_says_plainly_whose_code_runs(plan: MakePlan, function: Path) -> None:
    def shown(*overrides: str) -> str:
        screen = StringIO()
        show_plan(Console(file=screen, width=60), plan(*overrides))
        return screen.getvalue()

    assert "your code" not in shown()
    assert "your code" not in shown(scorers("source: reward", STYLE)), "it is part of the package"
    override = scorers("source: reward", f"source: '{function}:brevity'")
    assert f"ppo runs your code: {function}:brevity\n" in shown(override)
    for stage in plan(override).stages:
        leave_artifact(stage)
    assert "your code" not in shown(override), "what is reused runs nothing"


def test_the_worker_is_told_where_code_and_text_lie_wherever_it_runs(
    overrides: list[str], function: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(function.parent)
    os.mkdir("below")
    screen = StringIO()
    more = [scorers("source: reward", "source: below/../score.py:brevity"), "stages.ppo.ptx.coefficient=1"]
    more.append("stages.ppo.ptx.data.source=path:conversations.jsonl")
    code = run("quickstart", [*overrides, *more], console=Console(file=screen, width=200), command_for=fake)
    assert code == 0
    spec = yaml.safe_load((function.parent / "out/runs/quickstart/ppo/stage.yaml").read_text())
    source = spec["config"]["scorers"][1]["source"]
    assert source.endswith("score.py:brevity")
    assert os.path.samefile(source.rpartition(":")[0], function)
    assert Path(source).is_absolute()
    assert spec["extra_data"] == {"ptx.data": str(function.parent / "conversations.jsonl")}
    assert list(spec["identity"]["code"]) == ["scorers[1].source"]
    assert f"ppo runs your code: {source}" in screen.getvalue()
    assert not (function.parent / "imported").exists()


def test_a_scorer_s_failure_reaches_the_user_with_a_code_of_its_own(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "ppo:reward")
    with pytest.raises(RewardError, match=r"stage ppo: score\.py:brevity: gave nan") as caught:
        run("quickstart", overrides, console=Console(file=StringIO()), command_for=fake)
    assert caught.value.exit_code == 9


def test_a_damaged_reward_model_of_ours_is_not_built_on(plan: MakePlan) -> None:
    first = plan()
    leave_artifact(first.stages[1])
    (first.stages[1].artifact / "metrics.jsonl").unlink()
    with pytest.raises(ArtifactError, match="missing or cut short"):
        plan(f"stages.ppo.reward=path:{first.stages[1].artifact}")

"""What runs, what is reused, and why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from rich.console import Console

from alignment.config.model import NEW_TOKENS
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, DataError, ModelError
from alignment.job import memory_key
from alignment.pipeline.execute.notes import frozen_rows
from alignment.pipeline.execute.summary import show_plan
from alignment.pipeline.execute.worker_protocol import write_stage_file
from alignment.pipeline.plan import references
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.remote.remote_checkpoints import CHECKPOINT_MANIFEST
from alignment.records.chosen_sizes import ChosenSize, cache_file, remember
from alignment.stages.registry import kinds
from alignment.stages.stage_file import read_spec
from tests.hub import COMMIT
from tests.unit.pipeline.conftest import NUM_PAIRS, MakePlan, leave_artifact
from tests.weights_files import weights_file

SKIP = ("on_error=skip", "max_skipped=0.5")


def prints(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in plan.stages}


def changed(before: Plan, after: Plan) -> set[str]:
    return {name for name, value in prints(after).items() if prints(before)[name] != value}


def outcome(plan: Plan) -> dict[str, str]:
    return {stage.name: f"{stage.action.value}  {stage.reason}" for stage in plan.stages}


def leave_all(plan: Plan) -> None:
    for stage in plan.stages:
        leave_artifact(stage)


def test_stages_come_after_their_inputs(plan: MakePlan) -> None:
    assert [stage.name for stage in plan().stages] == ["sft", "reward", "dpo", "ppo", "evaluate", "report"]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.dpo.beta=0.3", {"dpo", "evaluate", "report"}),
        ("stages.ppo.updates=3", {"ppo", "evaluate", "report"}),
        ("stages.reward.optim.epochs=2", {"reward", "ppo", "evaluate", "report"}),
        ("stages.report.num_samples=3", {"report"}),
        ("seed=1", {"sft", "reward", "dpo", "ppo", "evaluate", "report"}),
        ("model.dtype=float32", {"sft", "reward", "dpo", "ppo", "evaluate", "report"}),
        ("stages.sft.data.limit=1", {"sft", "reward", "dpo", "ppo", "evaluate", "report"}),
        ("stages.sft.data.fraction=0.5", {"sft", "reward", "dpo", "ppo", "evaluate", "report"}),
        ("model.chat_template=chatml", {"sft", "reward", "dpo", "ppo", "evaluate", "report"}),
        ("stages.dpo.max_answer_length=9", {"dpo", "evaluate", "report"}),
        ("stages.dpo.too_long.do=cut", {"dpo", "evaluate", "report"}),
        ("stages.dpo.too_long.max_share=0.5", set()),
        ("stages.evaluate.few_shot.count=5", set()),  # the quickstart has no such arm
        ("launch.num_processes=2", set()),
        ("launch.threads=3", set()),
        ("tracking=wandb", set()),
        ("stages.sft.log_every=7", set()),
        ("stages.sft.save_every=7", set()),
        ("stages.sft.optim.micro_batch_tokens=1", set()),
        ("stages.sft.optim.micro_batch_tokens=auto", set()),
        ("stages.evaluate.batch_size=1", set()),
    ],
)
def test_a_change_re_runs_what_it_changes_and_nothing_else(plan: MakePlan, override: str, stages: set[str]) -> None:
    assert changed(plan(), plan(override)) == stages


def test_the_content_of_data_counts_and_its_place_does_not(plan: MakePlan, tmp_path: Path) -> None:
    before = plan()
    file = tmp_path / "preferences.jsonl"
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(file.read_bytes())
    assert changed(before, plan(f"stages.dpo.data.source=path:{moved}")) == set()
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps({**row, "chosen": "It is on 21 March."}) + "\n")
    assert changed(before, plan()) == {"reward", "dpo", "ppo", "evaluate", "report"}


def test_a_template_counts_by_its_content_and_the_worker_is_told_its_whole_path(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    monkeypatch.chdir(tmp_path)
    before = plan("model.chat_template=path:mine.jinja")
    spec = yaml.safe_load(write_stage_file(before, before.stages[0], before.config.launch, git_commit="").read_text())
    assert spec["model"]["chat_template"] == f"path:{file}"
    assert changed(before, plan(f"model.chat_template=path:{file}")) == set()
    file.write_text("{{ messages[1]['content'] }}")
    assert "sft" in changed(before, plan("model.chat_template=path:mine.jinja"))


@pytest.mark.parametrize("source", ["path:nowhere.jinja", "llama3"])
def test_a_template_that_is_none_is_a_fault_of_the_configuration(plan: MakePlan, source: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template: .*write chatml, or path:FILE"):
        plan(f"model.chat_template={source}")


CALM = "model.template_options.mood=calm"


def _with_template(tmp_path: Path, text: str = "{{ messages[0]['content'] }}{{ mood }}") -> str:
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    return f"model.chat_template=path:{file}"


def test_options_of_a_template_count_and_the_worker_gets_them(plan: MakePlan, tmp_path: Path) -> None:
    template = _with_template(tmp_path)
    bare, with_option = plan(template), plan(template, CALM)
    assert changed(bare, with_option) == changed(bare, plan(template, "model.template_options.mood=tense"))
    assert {"sft", "dpo", "ppo", "evaluate"} <= changed(bare, with_option)
    file = write_stage_file(with_option, with_option.stages[0], with_option.config.launch, git_commit="")
    assert read_spec(file).model.template.options == {"mood": "calm"}
    leave_all(bare)
    assert outcome(plan(template, CALM))["sft"].startswith("run  template_options.mood unset → calm (nearest: sft-")


@pytest.mark.parametrize("template", ["{{ messages }}{{ mood }}", "chatml", None])
def test_an_option_that_the_template_never_reads_is_a_fault_of_the_configuration(
    plan: MakePlan, tmp_path: Path, template: str | None
) -> None:
    """The base's own template is looked at where no other is named."""
    chosen = [] if template is None else ["model.chat_template=chatml"]
    if template not in (None, "chatml"):
        chosen = [_with_template(tmp_path, template)]
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    hint = "did you mean 'mood'?" if template not in (None, "chatml") else "the template has no options"
    message = f"model.template_options.moo: the chat template has no option of this name; {hint}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(*chosen, "model.template_options.moo=calm")


def test_a_template_of_trl_counts_by_its_content(plan: MakePlan) -> None:
    assert "sft" in changed(plan(), plan("model.chat_template=trl:qwen3_training"))
    with pytest.raises(ConfigError, match="TRL ships no chat template 'qwen33'; did you mean trl:qwen3"):
        plan("model.chat_template=trl:qwen33")


def test_the_content_of_the_base_model_counts_and_its_place_does_not(plan: MakePlan, tmp_path: Path) -> None:
    before = plan()
    (tmp_path / "model").rename(tmp_path / "moved")
    assert changed(before, plan(f"model.source=path:{tmp_path / 'moved'}")) == set()
    moved = f"model.source=path:{tmp_path / 'moved'}"
    leave_artifact(before.stages[0])
    from_elsewhere = f"stages.dpo.init=path:{before.stages[0].artifact}"
    dpo = plan(moved, from_elsewhere)
    (tmp_path / "moved/model.safetensors").write_bytes(weights_file(b"others"))
    assert "sft" in changed(before, plan(moved))
    assert "dpo" in changed(dpo, plan(moved, from_elsewhere)), "its adapter would stand on another base"


@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "merges.txt"]
)
def test_every_file_that_a_model_is_read_from_counts(plan: MakePlan, tmp_path: Path, name: str) -> None:
    (tmp_path / "model" / name).write_text("{}")
    before = plan()
    (tmp_path / "model" / name).write_text("{ }")
    assert "sft" in changed(before, plan())


def test_everything_is_reused_once_it_is_made_and_the_run_s_name_is_only_the_report_s(plan: MakePlan) -> None:
    leave_all(plan())
    assert {stage.action for stage in plan().stages} == {Action.reuse}
    assert outcome(plan())["dpo"] == f"reuse  dpo-{prints(plan())['dpo'][:8]}"
    renamed = {stage.name: stage.action for stage in plan("name=again").stages}
    assert [name for name, action in renamed.items() if action is Action.run] == ["report"]


def test_a_reason_says_what_differs_from_the_nearest_result(plan: MakePlan) -> None:
    first = plan()
    assert set(outcome(first).values()) == {"run  no result yet"}
    leave_all(first)
    near = {name: value[:8] for name, value in prints(first).items()}
    after = outcome(plan("stages.dpo.beta=0.3"))
    assert after["sft"] == f"reuse  sft-{near['sft']}"
    assert after["dpo"] == f"run  beta 0.1 → 0.3 (nearest: dpo-{near['dpo']})"
    assert after["evaluate"] == f"run  input dpo changed (nearest: evaluate-{near['evaluate']})"


@pytest.mark.parametrize("text", ["{", '{"added_by_a_newer_version": 1}'])
def test_a_result_that_the_plan_does_not_need_may_be_unreadable(plan: MakePlan, text: str) -> None:
    """It may be another user's, or that of a newer version, in a folder that several share."""
    first = plan()
    leave_all(first)
    folder = first.output / "artifacts" / "sft-00000000"
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    assert "run  beta 0.1 → 0.3 (nearest: dpo-" in outcome(plan("stages.dpo.beta=0.3"))["dpo"]


def test_a_reason_names_data_seed_arms_and_inputs(plan: MakePlan, tmp_path: Path) -> None:
    leave_all(plan())
    assert "data changed" in outcome(_with_other_data(plan, tmp_path))["sft"]
    assert "seed 42 → 1" in outcome(plan("seed=1"))["sft"]
    assert "input sft changed" in outcome(plan("stages.sft.packing=true"))["dpo"]
    assert (
        "arm ppo removed"
        in outcome(plan("stages.evaluate.arms=[base,base+prompt,'stage:sft','stage:dpo']"))["evaluate"]
    )


def test_a_reason_names_the_chat_template(plan: MakePlan) -> None:
    leave_all(plan())
    reason = outcome(plan("model.chat_template=chatml"))["sft"]
    assert re.fullmatch(r"run  chat template the tokenizer's own → [0-9a-f]{8} \(nearest: sft-[0-9a-f]{8}\)", reason)
    reason = outcome(plan("model.dtype=float32", "model.chat_template=chatml"))["sft"]
    assert re.search(r"run  chat template .* → [0-9a-f]{8}, dtype bfloat16 → float32 \(nearest", reason)


def _with_other_data(plan: MakePlan, tmp_path: Path) -> Plan:
    file = tmp_path / "conversations.jsonl"
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text() * 2)
    return plan(f"stages.sft.data.source=path:{other}")


def test_the_nearest_result_is_the_one_with_fewest_differences(plan: MakePlan) -> None:
    leave_all(plan("stages.dpo.beta=0.2", "stages.dpo.loss=ipo"))
    close = plan("stages.dpo.beta=0.2")
    leave_artifact(next(stage for stage in close.stages if stage.name == "dpo"))
    assert "beta 0.2 → 0.3 (nearest: dpo-" + prints(close)["dpo"][:8] in outcome(plan("stages.dpo.beta=0.3"))["dpo"]


def test_a_result_of_this_run_comes_before_a_nearer_one_of_another(plan: MakePlan) -> None:
    own, other = plan("stages.dpo.beta=0.2", "stages.dpo.loss=ipo"), plan("stages.dpo.beta=0.2")
    for planned in (own, other):
        leave_artifact(next(stage for stage in planned.stages if stage.name == "dpo"))
    own.run_folder.mkdir(parents=True)
    record = {"stages": {stage.name: {"artifact": str(stage.artifact)} for stage in own.stages}}
    (own.run_folder / "run.json").write_text(json.dumps(record))
    reason = outcome(plan("stages.dpo.beta=0.3"))["dpo"]
    assert reason == f"run  beta 0.2 → 0.3, loss ipo → sigmoid (nearest: dpo-{prints(own)['dpo'][:8]})"


def test_a_result_that_differs_in_much_is_no_reason(plan: MakePlan) -> None:
    smoke = plan("stages.sft.data.limit=8", "stages.sft.max_length=96", "stages.sft.optim.lr=1", "seed=7")
    leave_artifact(next(stage for stage in smoke.stages if stage.name == "sft"))
    assert outcome(plan())["sft"] == "run  no result yet with similar settings"


def test_a_fault_in_a_file_of_the_user_s_names_the_file(tmp_path: Path, overrides: list[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [base, stage@stages.dpo: dpo, _self_]\nstages: {dpo: {bata: 0.1, beta: -1}}\n")
    with pytest.raises(ConfigError) as caught:
        make_plan(str(recipe), [overrides[0], "stages.dpo.losss=ipo", "stages.dpo.beta=0"])
    message = str(caught.value)
    assert f"{recipe}: stages.dpo.bata: unknown key; did you mean 'beta'?" in message
    assert "\n  stages.dpo.losss: unknown key" in message, "this one was given on the command line"
    assert "\n  stages.dpo.beta: " in message, "and this one over the file's"


def test_frozen_rows_of_new_tokens_are_said_once(plan: MakePlan, tmp_path: Path) -> None:
    assert frozen_rows(plan()) is None
    (tmp_path / "model" / NEW_TOKENS).write_text('["<|think|>"]')
    note = frozen_rows(plan())
    assert note is not None
    assert note.startswith("sft does not train the rows of the new tokens <|think|>")
    assert "stages.sft.adapter.modules_to_save=[embed_tokens]" in note
    console = Console(width=200)
    with console.capture() as captured:
        show_plan(console, plan())
    assert captured.get().count("<|think|>") == 1
    assert frozen_rows(plan("adapter=full")) is None
    assert frozen_rows(plan("stages.sft.adapter.modules_to_save=[embed_tokens]")) is None
    leave_all(plan())
    assert frozen_rows(plan()) is None, "nothing starts from them any more"


def test_an_interrupted_stage_goes_on_from_its_last_complete_checkpoint(plan: MakePlan) -> None:
    work = plan().stages[0].work
    for step, complete in ((5, True), (20, True), (100, False)):
        folder = work / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        if complete:
            (folder / CHECKPOINT_MANIFEST).write_text("{}")
    assert outcome(plan())["sft"] == "resume  from checkpoint-20"


def test_the_worker_names_its_checkpoint_manifest_as_the_plan_expects() -> None:
    source = (Path(__file__).parents[3] / "alignment/training/checkpoints.py").read_text()
    assert f'MANIFEST = "{CHECKPOINT_MANIFEST}"' in source


@pytest.mark.parametrize(
    ("content", "verified", "problem"),
    [("", False, "missing or cut short"), ('{"step": 2}\n', True, "content differs from its manifest")],
)
def test_a_damaged_result_is_made_again_and_the_plan_says_why(
    overrides: list[str], content: str, problem: str, *, verified: bool
) -> None:
    first = make_plan("quickstart", overrides)
    leave_all(first)
    artifact = first.stages[0].artifact
    (artifact / "metrics.jsonl").write_text(content)
    (outcome_of_sft, *others) = outcome(make_plan("quickstart", overrides, verified=verified)).values()
    name = artifact.name
    assert outcome_of_sft == f"run  {name} is damaged: metrics.jsonl: {problem}; a run moves it to {name}.damaged"
    assert all(words.startswith("reuse") for words in others)
    elsewhere = [*overrides, f"output={artifact.parents[2]}/other", f"stages.dpo.init=path:{artifact}"]
    with pytest.raises(ArtifactError, match=problem):
        make_plan("quickstart", elsewhere, verified=verified)


def test_a_result_whose_fingerprint_only_begins_alike_is_not_reused(plan: MakePlan) -> None:
    sft = plan().stages[0]
    leave_artifact(replace(sft, fingerprint=sft.fingerprint[:8] + "0" * 56))
    with pytest.raises(
        ArtifactError, match="contains another result whose fingerprint starts with the same characters"
    ):
        plan()


def test_another_run_s_artifact_fits_a_slot_of_its_kind(plan: MakePlan) -> None:
    first = plan()
    leave_all(first)
    sft, reward = first.stages[0].artifact, first.stages[1].artifact
    later = plan(f"stages.dpo.init=path:{sft}")
    assert changed(first, later) == set()
    assert later.stages[2].inputs["init"].path == sft
    with pytest.raises(ModelError, match="contains an artifact of kind reward"):
        plan(f"stages.dpo.init=path:{reward}")


def test_a_model_folder_fits_where_a_policy_is_taken(plan: MakePlan, tmp_path: Path) -> None:
    planned = plan(f"stages.dpo.init=path:{tmp_path / 'model'}").stages
    assert {s.name: s for s in planned}["dpo"].inputs["init"].path == tmp_path / "model"
    with pytest.raises(ModelError, match=r"stages\.evaluate\.reward: no artifact in"):
        plan(f"stages.evaluate.reward=path:{tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "stages.ppo.reward=stage:sft",
            ConfigError,
            "stages.ppo.reward: 'stage:sft' is a policy; this slot takes a reward model. Use 'stage:reward'.",
        ),
        ("stages.dpo.init=stage:stf", ConfigError, "stages.dpo.init: no stage 'stf' in this run; did you mean 'sft'?"),
        (
            "~stages.ppo",
            ConfigError,
            "stages.evaluate.arms[4]: no stage 'ppo' in this run; did you mean 'dpo'? Otherwise remove this arm.",
        ),
        ("stages.evaluate.arms=[]", ConfigError, "stages.evaluate.arms: [] is not allowed; at least one entry"),
        (
            "stages.evaluate.arms=[base+fewshot]",
            ConfigError,
            "stages.evaluate.arms[0]: 'base+fewshot' is not a reference; did you mean 'base+few-shot'? Otherwise "
            "write base, stage:NAME, path:FOLDER or hub:ORG/NAME@REVISION",
        ),
        (
            "stages.evaluate.arms=['stage:zzzzzz']",
            ConfigError,
            "stages.evaluate.arms[0]: no stage 'zzzzzz' in this run; one of: sft, reward, dpo, ppo, evaluate, report. "
            "Otherwise remove this arm.",
        ),
        ("stages.sft.init=stage:dpo", ConfigError, "stages.sft: depends on itself: sft → dpo → sft"),
        (
            "stages.dpo.init=sft",
            ConfigError,
            "stages.dpo.init: 'sft' is not a reference; write stage:sft",
        ),
        ("stages.evaluate.arms=[base,base]", ConfigError, "stages.evaluate.arms[1]: 'base' is listed twice"),
        ("stages.dpo.init=path:/nowhere", ModelError, "stages.dpo.init: no folder /nowhere"),
        ("model.source=path:/nowhere", ModelError, "model.source: no folder /nowhere"),
        ("model.source=bundled:smollm", ModelError, "model.source: no bundled model 'smollm'"),
        ("model.source=gpt2", ModelError, "model.source: 'gpt2' is not a valid model source"),
        ("stages.sft.data.source=path:/nowhere", DataError, "stages.sft.data.source: no file /nowhere"),
        ("stages.sft.data.source=x", DataError, "stages.sft.data.source: 'x' is not a valid data source"),
        (
            "stages.sft.data.source=bundled:quickstart/conversation",
            DataError,
            "stages.sft.data.source: no bundled data 'quickstart/conversation'\n"
            "  → did you mean 'quickstart/conversations'?",
        ),
    ],
)
def test_a_reference_that_cannot_be_is_named(
    plan: MakePlan, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        plan(override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "corrected"),
    [
        ("org/name", "hub:org/name"),
        ("org/name@main", "hub:org/name@main"),
        ("hf:org/name", "hub:org/name"),
        ("https://hub.example/org/name/", "hub:org/name"),
        ("./mine", "path:./mine"),
        ("/nowhere/mine", "path:/nowhere/mine"),
        ("here", "path:here"),
        ("here/inside", "path:here/inside"),
    ],
)
@pytest.mark.parametrize(
    "setting",
    [
        "model.source",
        "stages.dpo.init",
        "stages.evaluate.arms",
        "stages.evaluate.reward",
        "stages.sft.data.source",
        "stages.ppo.scorers",
    ],
)
def test_a_source_without_its_scheme_is_answered_with_the_right_one(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, source: str, corrected: str
) -> None:
    (tmp_path / "here/inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    forms = {"stages.evaluate.arms": f"[base,'{source}']", "stages.ppo.scorers": f"[{{source: '{source}'}}]"}
    with pytest.raises(AlignmentError, match=rf"{setting}\W(.|\n)*write {re.escape(corrected)}( |$)"):
        plan(f"{setting}={forms.get(setting, repr(source))}")


TAKES_A_POLICY = [
    ("reward", "init"),
    ("dpo", "init"),
    ("kto", "init"),
    ("ppo", "init"),
    ("distil", "teacher"),
    ("sample", "policy"),
    ("evaluate", "reference"),
]
"""Kinds, and their setting that names the stage ``sft`` by default."""


def test_every_setting_that_names_a_stage_by_default_is_tested() -> None:
    named = [
        (kind.name, slot.field)
        for kind in kinds().values()
        for slot in references.slots(kind.config())
        if slot.ref == "stage:sft" and not references.is_arm(slot)
    ]
    assert sorted(named) == sorted(TAKES_A_POLICY)


@pytest.mark.parametrize(("kind", "field"), TAKES_A_POLICY)
def test_a_default_that_names_an_absent_stage_says_that_the_base_may_take_its_place(kind: str, field: str) -> None:
    config = kinds()[kind].config
    where = f"stages.mine.{field}"
    messages = {fault.where: fault.message for fault in references.faults({"mine": config()})}
    assert messages[where] == (
        f"no stage 'sft' in this run, and 'stage:sft' is the default of this setting. Set {where}=base to use the base "
        f"model (in the recipe: {field}: base)"
    )
    with_another = references.faults({"mine": config(), "sft_2": kinds()["sft"].config()})
    messages = {fault.where: fault.message for fault in with_another}
    assert "setting. Did you mean 'stage:sft_2'? Otherwise set stages.mine." in messages[where]
    assert where not in {fault.where for fault in references.faults({"mine": config(**{field: "base"})})}


def test_a_recipe_of_dpo_alone_plans_as_the_error_says(overrides: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [base, stage@stages.dpo: dpo, _self_]\n")
    dpo_overrides = [*overrides[:2], next(word for word in overrides if word.startswith("stages.dpo."))]
    with pytest.raises(ConfigError) as caught:
        make_plan(str(recipe), dpo_overrides)
    assert str(caught.value).startswith("stages.dpo.init: no stage 'sft' in this run, and 'stage:sft' is the default")
    remedy = str(caught.value).split("Set ")[1].split()[0]
    assert remedy == "stages.dpo.init=base"
    assert [stage.name for stage in make_plan(str(recipe), [*dpo_overrides, remedy]).stages] == ["dpo"]


def test_a_file_next_to_the_recipe_is_not_found_from_another_folder(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    here.mkdir()
    recipes.mkdir()
    monkeypatch.chdir(here)
    recipe = recipes / "mine.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\nsummary: mine\n")
    advice = "relative paths start at the folder in which the command runs, not at the recipe's; write "
    for file, override, meant in (
        ("score.py", "stages.evaluate.metrics=[{name: a, source: score.py:f}]", f"{recipes}/score.py:f"),
        ("rows.jsonl", "stages.sft.data.source=path:rows.jsonl", f"path:{recipes}/rows.jsonl"),
    ):
        words = f"no file {here}/{file}"
        with pytest.raises(AlignmentError) as caught:
            make_plan(str(recipe), [*overrides, override])
        assert words in str(caught.value)
        assert "relative paths" not in str(caught.value)
        (recipes / file).write_text("def f(a, b, c): ...")
        with pytest.raises(AlignmentError) as caught:
            make_plan(str(recipe), [*overrides, override])
        assert words in str(caught.value)
        assert f"{advice}{meant}" in str(caught.value)


def test_a_data_file_with_a_similar_name_is_suggested(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "birds.jsonl").write_text("")
    with pytest.raises(DataError, match=rf"no file {tmp_path}/bird\.jsonl\n  → did you mean {tmp_path}/birds\.jsonl\?"):
        plan(f"stages.sft.data.source=path:{tmp_path}/bird.jsonl")


def test_a_row_that_does_not_fit_is_named_by_file_and_line(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    file.write_text(file.read_text() + '{"messages": []}\n')
    with pytest.raises(
        DataError, match=rf"preferences\.jsonl:{NUM_PAIRS + 1}: 'messages' must be a list of turns and not empty"
    ):
        plan()


def test_unknown_columns_name_the_stage_and_the_row_that_it_needs(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text('{"txt": "A robin sang."}\n')
    with pytest.raises(DataError) as caught:
        plan("+stage@stages.cpt=cpt", f"stages.cpt.data.source=path:{file}")
    assert str(caught.value) == (
        f"stages.cpt.data: no known format has the columns 'txt' of {file}\n"
        '  → this stage needs rows like {"text": "The shop is closed on Monday."}, or another form of docs/data.md; '
        "rename the columns, or map them: stages.cpt.data.columns={text: YOURS}"
    )


def test_faulty_rows_may_be_skipped_by_the_plan_too(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    before = plan()
    file.write_text(file.read_text() + '{"messages": []}\n')
    skipping = [f"stages.{stage}.data.{key}" for stage in ("reward", "dpo", "ppo") for key in SKIP]
    after = plan(*skipping)
    assert changed(before, after) == {"reward", "dpo", "ppo", "evaluate", "report"}, "the content is another"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:NUM_PAIRS]))
    assert changed(before, plan(*skipping)) == set(), "what a faulty row would do shapes no result"


def test_a_format_is_named_right_or_refused(plan: MakePlan) -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.dpo\.data\.format: 'preferense' is not a format; did you mean 'pref"
    ):
        plan("stages.dpo.data.format=preferense")
    assert changed(plan(), plan("stages.dpo.data.format=preference")) == {"dpo", "evaluate", "report"}


def test_weights_without_masters_are_other_results(plan: MakePlan) -> None:
    off = "stages.dpo.adapter.master_weights=false"
    full = plan("stages.dpo.adapter.kind=full")
    assert changed(full, plan("stages.dpo.adapter.kind=full", off)) == {"dpo", "evaluate", "report"}


def test_a_folder_of_files_counts_by_what_is_in_it(plan: MakePlan, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes((tmp_path / "preferences.jsonl").read_bytes())
    source = f"stages.dpo.data.source=path:{folder}"
    before = plan(source)
    assert changed(before, plan(source)) == set()
    (folder / "b.jsonl").write_bytes((tmp_path / "preferences.jsonl").read_bytes())
    assert changed(before, plan(source)) == {"dpo", "evaluate", "report"}


def test_what_is_mixed_in_counts_by_its_content_and_its_share(plan: MakePlan, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes((tmp_path / "preferences.jsonl").read_bytes())

    def mix(**part: object) -> str:
        settings = ", ".join(f"{key}: {value}" for key, value in {"source": f"path:{other}", **part}.items())
        return f"stages.dpo.data.mix=[{{{settings}}}]"

    before = plan(mix(share=0.2))
    dpo = next(stage for stage in before.stages if stage.name == "dpo")
    assert dpo.extra_data == {"data.mix[0]": other}
    assert changed(plan(), before) == {"dpo", "evaluate", "report"}
    assert changed(before, plan(mix(share=0.3))) == {"dpo", "evaluate", "report"}
    assert changed(before, plan(mix())) == {"dpo", "evaluate", "report"}
    other.write_text(other.read_text() * 2)
    assert changed(before, plan(mix(share=0.2))) == {"dpo", "evaluate", "report"}
    for part, message in (
        ({"share": 0.2, "count": 3}, r"stages\.dpo\.data\.mix\[0\]: set share or count, not both"),
        (
            {"share": f"0.5}}, {{source: 'path:{other}', share: 0.5"},
            r"stages\.dpo\.data\.mix: the shares add up to 1, which leaves no room",
        ),
        ({"share": 1.0}, r"stages\.dpo\.data\.mix\[0\]\.share: 1.0 is not allowed; above 0 and below 1"),
        ({"share": 0.2, "limit": 0}, r"stages\.dpo\.data\.mix\[0\]\.limit: 0 is not allowed; a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(mix(**part))


def test_a_hub_model_that_is_not_here_is_planned_by_its_name(plan: MakePlan) -> None:
    planned = plan("model.source=hub:org/name@v1")
    assert (planned.base.ready, planned.base.identity) == (False, "hub:org/name@v1")


def test_a_hub_model_that_is_here_is_planned_by_its_commit(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch moves on, and a result would be taken for one of another model."""
    snapshot = (tmp_path / "model").rename(tmp_path / COMMIT)
    asked: list[object] = []

    def snapshot_download(repository: str, **options: object) -> str:
        asked.append((repository, options["revision"], options["local_files_only"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", lambda *_, **__: [])
    planned = plan("model.source=hub:org/name@v1")
    assert (planned.base.ready, planned.base.identity) == (True, f"hub:org/name@{COMMIT}")
    assert asked == [("org/name", "v1", True)], "planning downloads nothing"


def test_a_hub_model_of_which_nobody_knows_whether_it_is_complete_is_fetched_by_the_run(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program loaded its weights alone, and without the generation config answers would not end."""
    snapshot = (tmp_path / "model").rename(tmp_path / COMMIT)

    def unlisted(*_: object, **__: object) -> None:
        raise CachedRepoTreeNotFoundError("no list")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", unlisted)
    planned = plan("model.source=hub:org/name@v1")
    assert (planned.base.ready, planned.base.identity) == (False, f"hub:org/name@{COMMIT}")


def test_a_folder_of_pickles_is_no_model(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors weights are read, never pickles"):
        plan()


def test_a_size_that_stages_choose_themselves_is_shown_where_one_was_chosen(plan: MakePlan) -> None:
    planned = plan("stages.sft.optim.micro_batch_tokens=auto")
    (line,) = [line for line in shown(planned).splitlines() if "micro_batch_tokens" in line]
    assert line == "sft will choose optim.micro_batch_tokens before its first step"
    sft = planned.stages[0]
    key = memory_key(sft.config, sft.identity, sft.inputs)
    size = ChosenSize(tokens=4096, machine="CPU, 2 cores, 25 GB", launch="1 process")
    remember(cache_file(planned.output / "artifacts", key), key, size)
    assert f"{line}: so far 4,096 tokens on CPU, 2 cores, 25 GB (1 process)\n" in shown(planned)
    spec = read_spec(write_stage_file(planned, sft, planned.config.launch, git_commit=""))
    assert memory_key(spec.config, spec.identity, spec.inputs) == key, "the worker looks where the plan does"


def shown(plan: Plan) -> str:
    screen = StringIO()
    show_plan(Console(file=screen, width=200), plan)
    return screen.getvalue()


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "evaluate"])
def test_an_unknown_kind_is_refused_whoever_needs_the_stage(overrides: list[str], stage: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan("quickstart", [*overrides, f"stages.{stage}.kind=mine"])
    first, *others = str(caught.value).splitlines()
    assert first.startswith(f"stages.{stage}.kind: 'mine' is not a kind of stage")
    assert others == []

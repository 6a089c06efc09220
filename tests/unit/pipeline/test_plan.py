"""What runs, what is reused, and why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from alignment.config.model import NEW_TOKENS
from alignment.core.errors import ArtifactError, ConfigError, DataError, ModelError
from alignment.job import memory_key
from alignment.pipeline.execute.notes import frozen_rows
from alignment.pipeline.execute.worker_protocol import write_stage_file
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.plan.row_counts import expected_steps
from alignment.pipeline.remote.remote_checkpoints import CHECKPOINT_MANIFEST
from alignment.records.training import ChosenSize, cache_file, remember
from alignment.stages.registry import read_spec
from alignment.training import checkpoints
from tests.hub import COMMIT, weights_file
from tests.unit.pipeline.conftest import (
    NUM_PAIRS,
    MakePlan,
    changed,
    fingerprints,
    leave_all,
    leave_artifact,
    screened,
    stage_of,
    write,
    write_rows,
)

ALL = ["sft", "evaluate_sft", "reward", "dpo", "ppo", "evaluate", "report"]
OF_DPO = ["dpo", "evaluate", "report"]
OF_PAIRS = ["reward", "dpo", "ppo", "evaluate", "report"]


def outcome(plan: Plan) -> dict[str, str]:
    return {stage.name: f"{stage.action.value}  {stage.reason}" for stage in plan.stages}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.dpo.beta=0.3", OF_DPO),
        ("stages.reward.optim.epochs=2", ["reward", "ppo", "evaluate", "report"]),
        ("seed=1", ALL),
        ("stages.sft.data.fraction=0.5", ALL),
        ("stages.dpo.too_long.max_share=0.5", []),
        ("stages.evaluate.few_shot.count=5", []),  # the quickstart has no such arm
        ("launch.num_processes=2", []),
        ("stages.sft.optim.micro_batch_tokens=auto", []),
    ],
)
def test_a_change_re_runs_what_it_changes_and_nothing_else(plan: MakePlan, override: str, stages: list[str]) -> None:
    assert [stage.name for stage in plan().stages] == ALL
    assert changed(plan(), plan(override)) == stages


def test_the_content_of_data_counts_and_its_place_does_not(plan: MakePlan, tmp_path: Path) -> None:
    before, file = plan(), tmp_path / "preferences.jsonl"
    moved = write(tmp_path / "elsewhere.jsonl", file.read_text())
    assert changed(before, plan(f"stages.dpo.data.source=path:{moved}")) == []
    folder = f"stages.dpo.data.source=path:{tmp_path}/pairs"
    write(tmp_path / "pairs/a.jsonl", file.read_text())
    in_folder = plan(folder)
    write(tmp_path / "pairs/b.jsonl", file.read_text())
    assert changed(in_folder, plan(folder)) == OF_DPO
    write_rows(file, {**json.loads(file.read_text().splitlines()[0]), "chosen": "It is on 21 March."})
    assert changed(before, plan()) == OF_PAIRS


def test_what_is_mixed_in_counts_by_its_content_and_its_share(plan: MakePlan, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    write(other, (tmp_path / "preferences.jsonl").read_text())

    def mixed(settings: str = "") -> Plan:
        return plan(f"stages.dpo.data.mix=[{{source: 'path:{other}'{settings}}}]")

    before = mixed(", share: 0.2")
    assert stage_of(before, "dpo").extra_data == {"data.mix[0]": other}
    assert changed(plan(), before) == changed(before, mixed(", share: 0.3")) == changed(before, mixed()) == OF_DPO
    other.write_text(other.read_text() * 2)
    assert changed(before, mixed(", share: 0.2")) == OF_DPO


def test_faulty_rows_are_named_or_skipped_by_the_plan_too(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    before, sound = plan(), file.read_text()
    file.write_text(sound + '{"messages": []}\n')
    with pytest.raises(DataError, match=rf"preferences\.jsonl:{NUM_PAIRS + 1}: 'messages'"):
        plan()
    skipping = [
        f"stages.{stage}.data.{key}"
        for stage in ("reward", "dpo", "ppo")
        for key in ("on_error=skip", "max_skipped=0.5")
    ]
    assert changed(before, plan(*skipping)) == OF_PAIRS, "the content is another"
    file.write_text(sound)
    assert changed(before, plan(*skipping)) == [], "what a faulty row would do shapes no result"


def template(tmp_path: Path, text: str = "{{ messages[0]['content'] }}{{ mood }}") -> str:
    return f"model.chat_template=path:{write(tmp_path / 'mine.jinja', text)}"


@pytest.mark.parametrize(
    ("chosen", "hint"),
    [("{{ messages }}{{ mood }}", "did you mean 'mood'?"), ("chatml", "has no options"), (None, "has no options")],
)
def test_an_option_that_no_template_reads_is_refused(
    plan: MakePlan, tmp_path: Path, chosen: str | None, hint: str
) -> None:
    """The base's own template is looked at where no other is named."""
    named = [f"model.chat_template={chosen}"] if chosen == "chatml" else [template(tmp_path, chosen)] if chosen else []
    write(tmp_path / "model/chat_template.jinja", "{{ messages }}")
    with pytest.raises(ConfigError) as caught:
        plan(*named, "model.template_options.moo=calm")
    assert (caught.value.where, hint in caught.value.message) == ("model.template_options.moo", True)


def test_the_content_of_the_base_model_counts_and_its_place_does_not(plan: MakePlan, tmp_path: Path) -> None:
    before = plan()
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = f"model.source=path:{tmp_path / 'moved'}"
    assert changed(before, plan(moved)) == []
    leave_artifact(before.stages[0])
    from_elsewhere = f"stages.dpo.init=path:{before.stages[0].artifact}"
    dpo = plan(moved, from_elsewhere)
    (tmp_path / "moved/model.safetensors").write_bytes(weights_file(b"others"))
    assert "sft" in changed(before, plan(moved))
    assert "dpo" in changed(dpo, plan(moved, from_elsewhere)), "its adapter would stand on another base"


def test_every_file_that_a_model_is_read_from_counts(plan: MakePlan, tmp_path: Path) -> None:
    names = ("config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "merges.txt")
    for name in names:
        write(tmp_path / "model" / name, "{}")
    before = plan()
    for name in names:
        write(tmp_path / "model" / name, "{ }")
        assert "sft" in changed(before, plan())
        write(tmp_path / "model" / name, "{}")


@pytest.mark.parametrize("state", ["absent", "complete", "unlisted"])
def test_a_hub_model_is_planned_by_its_commit_if_it_is_here_and_fetched_unless_it_is_complete(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A branch moves on, and another program may have loaded the weights without the generation config."""
    asked: list[object] = []
    if state != "absent":
        snapshot = (tmp_path / "model").rename(tmp_path / COMMIT)

        def snapshot_download(repository: str, **options: object) -> str:
            asked.append((repository, options["revision"], options["local_files_only"]))
            return str(snapshot)

        def tree(*_: object, **__: object) -> list[object]:
            if state == "unlisted":
                raise CachedRepoTreeNotFoundError("no list")
            return []

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", tree)
    planned = plan("model.source=hub:org/name@v1")
    revision = "v1" if state == "absent" else COMMIT
    assert (planned.base.ready, planned.base.identity) == (state == "complete", f"hub:org/name@{revision}")
    assert asked == [("org/name", "v1", True)] * (state != "absent"), "planning downloads nothing"


def test_frozen_rows_of_new_tokens_are_said_once(plan: MakePlan, tmp_path: Path) -> None:
    assert frozen_rows(plan()) is None
    write(tmp_path / "model" / NEW_TOKENS, '["<|think|>"]')
    note = frozen_rows(plan())
    assert note is not None
    assert note.startswith("sft does not train the rows of the new tokens <|think|>")
    assert "stages.sft.adapter.modules_to_save=[embed_tokens]" in note
    assert "\n".join(screened(plan())).count("<|think|>") == 1
    assert frozen_rows(plan("adapter=full")) is None
    assert frozen_rows(plan("stages.sft.adapter.modules_to_save=[embed_tokens]")) is None
    leave_all(plan())
    assert frozen_rows(plan()) is None, "nothing starts from them any more"


def test_a_reason_says_what_differs_from_the_nearest_result(plan: MakePlan, tmp_path: Path) -> None:
    first = plan()
    assert set(outcome(first).values()) == {"run  no result yet"}
    leave_all(first)
    near = {name: f"{name}-{value[:8]}" for name, value in fingerprints(first).items()}
    assert outcome(plan()) == {name: f"reuse  {artifact}" for name, artifact in near.items()}
    assert [name for name, words in outcome(plan("name=again")).items() if words.startswith("run")] == ["report"]
    other = write(tmp_path / "other.jsonl", (tmp_path / "conversations.jsonl").read_text() * 2)
    arms = "stages.evaluate.arms=[base,base+prompt,'stage:sft','stage:dpo']"
    template_reason = "chat template the tokenizer's own → [0-9a-f]{8}, dtype bfloat16 → float32"
    for overrides, stage, words in (
        (["stages.dpo.beta=0.3"], "dpo", "beta 0.1 → 0.3"),
        (["stages.dpo.beta=0.3"], "evaluate", "input dpo changed"),
        ([f"stages.sft.data.source=path:{other}"], "sft", "data changed"),
        (["seed=1"], "sft", "seed 42 → 1"),
        (["stages.sft.packing=true"], "dpo", "input sft changed"),
        ([arms], "evaluate", "arm ppo removed"),
        (["model.dtype=float32", "model.chat_template=chatml"], "sft", template_reason),
    ):
        assert re.search(rf"{words}.* \(nearest: {near[stage]}\)", outcome(plan(*overrides))[stage])


def test_the_nearest_result_is_of_this_run_or_has_the_fewest_differences(plan: MakePlan) -> None:
    far, close = plan("stages.dpo.beta=0.2", "stages.dpo.loss=ipo"), plan("stages.dpo.beta=0.2")
    for planned in (far, close):
        leave_artifact(stage_of(planned, "dpo"))
    nearest = {
        name: f"(nearest: dpo-{fingerprints(planned)['dpo'][:8]})" for name, planned in (("far", far), ("close", close))
    }
    assert outcome(plan("stages.dpo.beta=0.3"))["dpo"] == f"run  beta 0.2 → 0.3 {nearest['close']}"
    record = {"stages": {stage.name: {"artifact": str(stage.artifact)} for stage in far.stages}}
    write(far.run_folder / "run.json", json.dumps(record))
    assert outcome(plan("stages.dpo.beta=0.3"))["dpo"] == f"run  beta 0.2 → 0.3, loss ipo → sigmoid {nearest['far']}"


def test_an_interrupted_stage_goes_on_from_its_last_complete_checkpoint(plan: MakePlan) -> None:
    assert checkpoints.MANIFEST == CHECKPOINT_MANIFEST
    for step, complete in ((5, True), (20, True), (100, False)):
        folder = plan().stages[0].work / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        if complete:
            (folder / CHECKPOINT_MANIFEST).write_text("{}")
    assert outcome(plan())["sft"] == "resume  from checkpoint-20"


@pytest.mark.parametrize(
    ("content", "verified", "problem"),
    [("", False, "missing or cut short"), ('{"step": 2}\n', True, "content differs from its manifest")],
)
def test_a_damaged_result_is_made_again(overrides: list[str], content: str, problem: str, *, verified: bool) -> None:
    first = make_plan("quickstart", overrides)
    leave_all(first)
    artifact = first.stages[0].artifact
    (artifact / "metrics.jsonl").write_text(content)
    (of_sft, *others) = outcome(make_plan("quickstart", overrides, verified=verified)).values()
    assert of_sft.startswith(f"run  {artifact.name} is damaged: metrics.jsonl: {problem}; ")
    assert all(words.startswith("reuse") for words in others)
    elsewhere = [*overrides, f"output={artifact.parents[2]}/other", f"stages.dpo.init=path:{artifact}"]
    with pytest.raises(ArtifactError, match=problem):
        make_plan("quickstart", elsewhere, verified=verified)


def test_a_result_whose_fingerprint_only_begins_alike_is_not_reused(plan: MakePlan) -> None:
    sft = plan().stages[0]
    leave_artifact(replace(sft, fingerprint=sft.fingerprint[:8] + "0" * 56))
    with pytest.raises(ArtifactError, match="starts with the same characters"):
        plan()


def test_another_run_s_artifact_and_a_model_folder_fit_a_slot_of_their_kind(plan: MakePlan, tmp_path: Path) -> None:
    first = plan()
    leave_all(first)
    artifacts = {stage.name: stage.artifact for stage in first.stages}
    later = plan(f"stages.dpo.init=path:{artifacts['sft']}", f"stages.ppo.reward=path:{artifacts['reward']}")
    assert changed(first, later) == []
    folder = plan(f"stages.dpo.init=path:{tmp_path / 'model'}")
    paths = [stage_of(planned, "dpo").inputs["init"].path for planned in (later, folder)]
    assert paths == [artifacts["sft"], tmp_path / "model"]
    for slot, name, kind in (("dpo.init", "reward", "reward"), ("ppo.reward", "sft", "policy")):
        with pytest.raises(ModelError, match=f"contains an artifact of kind {kind}"):
            plan(f"stages.{slot}=path:{artifacts[name]}")


def test_a_size_that_stages_choose_themselves_is_shown_where_one_was_chosen(plan: MakePlan) -> None:
    planned = plan("stages.sft.optim.micro_batch_tokens=auto")
    (line,) = [line for line in screened(planned) if "micro_batch_tokens" in line]
    sft = planned.stages[0]
    key = memory_key(sft.config, sft.identity, sft.inputs)
    size = ChosenSize(tokens=4096, machine="CPU, 2 cores, 25 GB", launch="1 process")
    remember(cache_file(planned.output / "artifacts", key), key, size)
    assert f"{line}: so far 4,096 tokens on CPU, 2 cores, 25 GB (1 process)" in screened(planned)
    spec = read_spec(write_stage_file(planned, sft, planned.config.launch, git_commit=""))
    assert memory_key(spec.config, spec.identity, spec.inputs) == key, "the worker looks where the plan does"


def test_a_recipe_of_dpo_alone_plans_as_the_error_says(overrides: list[str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.yaml", "defaults: [base, stage@stages.dpo: dpo, _self_]\n")
    of_dpo = [*overrides[:2], next(word for word in overrides if word.startswith("stages.dpo."))]
    with pytest.raises(ConfigError) as caught:
        make_plan(recipe, of_dpo)
    remedy = str(caught.value).split("Set ")[1].split()[0]
    assert (caught.value.where, remedy) == ("stages.dpo.init", "stages.dpo.init=base")
    assert [stage.name for stage in make_plan(recipe, [*of_dpo, remedy]).stages] == ["dpo"]


def test_a_plan_draws_which_stage_starts_from_which(plan: MakePlan) -> None:
    leave_artifact(stage_of(plan(), "sft"))
    chosen = ("launch.num_processes=2", "launch=zero2", "adapter@stages.dpo.adapter=full", "tracking=wandb")
    planned = plan(*chosen, "stages.dpo.optim.max_steps=7", "stages.reward.optim.max_steps=5")
    lines = screened(planned)
    assert lines[1].startswith("model: path:")
    assert lines[2] == "launch: 2 processes with zero2 on this machine; tracking: Weights & Biases"
    drawn = [line.split() for line in lines if re.search("─►|◄|^base", line)]
    rows = {stage.name: str(stage.seen["data"].rows) for stage in planned.stages if stage.seen}
    untrained = ["base,", "base+prompt,"]
    assert [[word for word in line if word not in ("lora", "rank", "16", "no", "result", "yet")] for line in drawn] == [
        ["base"],
        ["└─►", "sft", rows["sft"], "2", "reuse", stage_of(planned, "sft").artifact.name],
        ["├─►", "reward", rows["reward"], "5", "run"],
        ["├─►", "dpo", "full", rows["dpo"], "7", "run"],
        ["└─►", "ppo", "◄", "reward", rows["ppo"], "12", "run"],
        ["evaluate_sft", "◄", "sft,", "base", rows["evaluate_sft"], "run"],
        ["evaluate", "◄", "sft,", "reward,", *untrained, "dpo,", "ppo", rows["evaluate"], "run"],
        ["report", "◄", "all", "stages", "run"],
    ]


@pytest.mark.parametrize(
    ("settings", "stage", "steps"),
    [
        (["optim.max_steps=7"], "dpo", 7),
        (["optim.epochs=2"], "dpo", 6),
        (["data.fraction=0.5", "optim.batch_size=2"], "dpo", 6),
        (["validation={every: 1, share: 0.5}", "optim.batch_size=2"], "dpo", 6),
        (["eval_fraction=0.5", "optim.batch_size=2"], "reward", 6),
        (["packing=true"], "sft", None),
        (["updates=9"], "ppo", 9),
        ([], "evaluate", None),
    ],
)
def test_steps_follow_from_rows_and_settings(
    settings: list[str], stage: str, steps: int | None, plan: MakePlan, tmp_path: Path
) -> None:
    pairs = f"stages.{stage}.data.source=path:{tmp_path / 'preferences.jsonl'}"
    own = [pairs] if stage in ("dpo", "reward") else []
    planned = stage_of(plan(*own, *(f"stages.{stage}.{setting}" for setting in settings)), stage)
    assert expected_steps(planned.config, planned.seen) == steps

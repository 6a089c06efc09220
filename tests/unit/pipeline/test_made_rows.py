"""Data that another stage of the recipe makes: order, fingerprints, refusals, and what a plan says before it exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.cli import main
from alignment.commands.preview.verb import show_preview
from alignment.core.artifacts import ROWS_FILE, Manifest, publish, verify
from alignment.core.errors import ArtifactError, ConfigError, DataError
from alignment.pipeline.execute.notes import of_plan
from alignment.pipeline.execute.plan_table import show_plan
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.rehearsal import rehearse
from alignment.pipeline.execute.worker_protocol import write_stage_file
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.stages.stage_file import read_spec
from alignment.worker import _refuse_changed_data
from tests.sampled import asked
from tests.unit.pipeline.conftest import leave_artifact

RECIPE = """
defaults: [base, stage@stages.sample: sample, stage@stages.dpo: dpo, stage@stages.again: sample, stage@stages.more: dpo,
           stage@stages.evaluate: evaluate, _self_]
summary: two rounds
stages:
  sample: {policy: base, reward: null, scorers: [{source: length, target: 3}], data: {source: "path:PROMPTS"}}
  dpo: {init: base, data: {source: "stage:sample"}}
  again: {policy: "stage:dpo", reward: null, scorers: [{source: length, target: 3}], data: {source: "path:PROMPTS"}}
  more: {init: "stage:dpo", data: {source: "stage:again"}}
  evaluate: {arms: ["stage:dpo", "stage:more"], reference: "stage:dpo", reward: null, data: {source: "path:HELDOUT"}}
"""
PAIR = {"messages": asked(0)["messages"], "chosen": "A.", "rejected": "B."}
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, overrides: list[str]) -> MakePlan:
    """Plans two rounds with more overrides."""
    prompts, heldout = tmp_path / "prompts.jsonl", tmp_path / "held.jsonl"
    prompts.write_text("".join(json.dumps(asked(number)) + "\n" for number in range(12)))
    heldout.write_text(json.dumps(asked(3)) + "\n")
    recipe = tmp_path / "rounds.yaml"
    recipe.write_text(RECIPE.replace("PROMPTS", str(prompts)).replace("HELDOUT", str(heldout)))
    return lambda *more: make_plan(str(recipe), [*overrides[:2], *more])


def named(plan: Plan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan.stages}


def changed(before: Plan, after: Plan) -> list[str]:
    others = named(after)
    return [name for name, stage in named(before).items() if others[name].fingerprint != stage.fingerprint]


def leave_rows(stage: PlannedStage, rows: list[dict[str, Any]]) -> Path:
    """Publishes a result with these rows."""
    content = stage.work / "content"
    content.mkdir(parents=True)
    (content / ROWS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity, fingerprint = stage.identity, stage.fingerprint
    publish(
        content, stage.artifact, Manifest(stage=stage.name, kind="rows", fingerprint=fingerprint, identity=identity)
    )
    stage.work.rmdir()
    return stage.artifact / ROWS_FILE


def refusal(plan: MakePlan, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    return str(caught.value)


def test_a_stage_may_learn_margins_from_pairs_that_another_stage_samples(plan: MakePlan) -> None:
    assert changed(plan(), plan("stages.more.margin=0.5")) == ["more", "evaluate"]


def test_rounds_are_a_chain_that_the_run_records(plan: MakePlan) -> None:
    planned = plan()
    assert [stage.name for stage in planned.stages] == ["sample", "dpo", "again", "more", "evaluate"]
    more = named(planned)["more"]
    assert more.inputs["data.source"].path == named(planned)["again"].artifact
    assert more.data == named(planned)["again"].artifact / ROWS_FILE
    assert more.input_fingerprints["data.source"] == named(planned)["again"].fingerprint
    planned.run_folder.mkdir(parents=True)
    entries = RunRecorder(planned).record.stages
    assert entries["more"].inputs == {"init": "stage:dpo", "data.source": "stage:again"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.again.temperature=0.7", ["again", "more", "evaluate"]),
        ("stages.more.beta=0.3", ["more", "evaluate"]),
        ("stages.dpo.beta=0.3", ["dpo", "again", "more", "evaluate"]),
        ("stages.sample.completions_per_prompt=5", ["sample", "dpo", "again", "more", "evaluate"]),
        ("stages.again.batch_size=3", []),
        ("stages.more.data.limit=3", ["more", "evaluate"]),
        ("launch.num_processes=2", []),
    ],
)
def test_a_change_runs_its_own_round_and_later_ones_again(plan: MakePlan, override: str, stages: list[str]) -> None:
    assert changed(plan(), plan(override)) == stages


def test_a_reason_names_the_stage_whose_rows_change(plan: MakePlan) -> None:
    for stage in plan().stages:
        leave_rows(stage, [PAIR]) if stage.name in ("sample", "again") else leave_artifact(stage)
    reasons = {stage.name: stage.reason for stage in plan("stages.again.min_margin=0.5").stages}
    assert reasons["again"].startswith("min_margin 0 → 0.5 (nearest: again-")
    assert reasons["more"].startswith("input again changed (nearest: more-")
    assert reasons["dpo"].startswith("dpo-")


def test_a_stage_with_stored_parts_continues_from_them(plan: MakePlan) -> None:
    folder = plan().stages[0].work / "checkpoints"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"part-answering-{number}-0123.json").write_text("{}")
    first = plan().stages[0]
    assert (first.action, first.reason) == (Action.resume, "from 3 stored parts")


def test_a_mixed_in_source_may_be_a_stage_too(plan: MakePlan) -> None:
    mixed = named(plan("stages.more.data.mix=[{source: 'stage:sample', count: 1}]"))["more"]
    assert mixed.extra_data == {"data.mix[0]": mixed.inputs["data.mix[0].source"].path / ROWS_FILE}  # type: ignore[operator]
    assert mixed.unmade == ("again", "sample")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.more.data.source=stage:dpo",
            "stages.more.data.source: 'stage:dpo' is a policy; this slot takes a set of rows. "
            "Use 'stage:sample' or 'stage:again'.",
        ),
        ("stages.more.data.source=stage:agian", "no stage 'agian' in this run; did you mean 'again'?"),
        ("stages.sample.policy=stage:more", "stages.sample: depends on itself: sample → more → dpo → sample"),
        (
            "stages.sample.select=best",
            "'chosen' is missing: the row does not have two answers to compare; use "
            "stages.sample.select=best_worst or stages.sample.select=all_pairs",
        ),
        ("stages.more.data.format=kto", "'label' is missing"),
        ("stages.dpo.init=stage:sample", "'stage:sample' is a set of rows; this slot takes a policy"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_while_planning(plan: MakePlan, override: str, message: str) -> None:
    assert message in refusal(plan, override)


def test_rows_that_lack_what_a_scorer_reads_are_refused(plan: MakePlan) -> None:
    message = refusal(plan, "stages.again.data.source=stage:sample", "stages.again.scorers=[{source: exact_answer}]")
    assert "stages.again.data.source: 'stage:sample' makes rows like" in message
    assert "that stage cannot make suitable rows" in message


def test_data_of_a_validation_is_checked_like_the_stage_s_own(plan: MakePlan) -> None:
    validation = "{every: 1, data: {source: 'stage:sample'}}"
    message = refusal(plan, f"stages.more.validation={validation}", "stages.sample.select=labels")
    assert "stages.dpo.data.source: 'stage:sample' makes rows like" in message
    assert "stages.more.validation.data.source: 'stage:sample' makes rows like" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.sample.select=best", "stages.sample.min_margin=0.5"], "only select 'best_worst' and 'all_pairs'"),
        (["stages.sample.threshold=0.5"], "only select 'best' and 'labels'"),
        (["stages.sample.completions_per_prompt=1"], "1, but select 'best_worst' compares the answers to a prompt"),
        (["stages.sample.reward=base"], "'base' is a language model"),
        (
            ["stages.sample.scorers=[{source: reward}]"],
            "'reward' needs the model in stages.sample.reward",
        ),
    ],
)
def test_settings_of_a_sampling_stage_that_contradict_each_other_are_refused(
    plan: MakePlan, overrides: list[str], message: str
) -> None:
    assert message in refusal(plan, *overrides)


def test_a_reward_model_that_scores_nothing_is_refused(plan: MakePlan, tmp_path: Path) -> None:
    message = refusal(plan, f"stages.sample.reward=path:{tmp_path}/model")
    assert "is unused: no scorer is 'reward'; write null, or add the scorer" in message


def test_the_evaluation_s_prompts_are_left_out_unless_others_are_named(plan: MakePlan, tmp_path: Path) -> None:
    first = plan()
    assert named(first)["sample"].extra_data == {"leave_out[0]": tmp_path / "held.jsonl"}
    other = named(plan(f"stages.sample.leave_out=[{{source: 'path:{tmp_path}/prompts.jsonl'}}]"))["sample"]
    assert other.extra_data == {"leave_out[0]": tmp_path / "prompts.jsonl"}
    (tmp_path / "held.jsonl").write_text(json.dumps(asked(4)) + "\n")
    assert changed(first, plan())[0] == "sample"


def test_an_evaluation_of_made_rows_is_not_left_out_of_them(plan: MakePlan) -> None:
    planned = named(plan("stages.evaluate.data.source=stage:sample"))
    assert planned["sample"].extra_data == {}
    assert planned["evaluate"].unmade == ("sample",)


# ---- before the rows exist, and after --------------------------------------------------------------------------------


def printed(planned: Plan) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        show_plan(console, planned)
    return captured.get()


def test_a_plan_says_which_rows_do_not_exist_yet(plan: MakePlan) -> None:
    assert "more reads the rows of again, which has no result yet" in printed(plan())
    leave_rows(named(plan())["sample"], [PAIR])
    shown = printed(plan())
    assert "dpo reads rows" not in shown
    assert "more reads the rows of again, which has no result yet" in shown


def test_rows_that_exist_are_read_while_planning(plan: MakePlan) -> None:
    sample = named(plan())["sample"]
    assert named(plan())["dpo"].seen == {}
    leave_rows(sample, [{**PAIR, "chosen": f"{number}."} for number in range(3)])
    assert named(plan())["dpo"].seen["data"].rows == 3
    assert any("there are only 3 rows" in note for note in of_plan(plan()))


def test_rows_that_exist_and_are_faulty_stop_the_plan(plan: MakePlan) -> None:
    leave_rows(named(plan())["sample"], [{**PAIR, "chosen": ""}])
    with pytest.raises(DataError, match="'chosen'"):
        plan()


def test_a_stage_is_not_rehearsed_on_rows_that_do_not_exist(plan: MakePlan) -> None:
    announced: list[str] = []
    sample, dpo, _, more, _ = plan().stages
    rehearse(plan(), [sample, dpo, more], announce=announced.append)
    assert announced == []


def test_a_preview_says_that_the_rows_do_not_exist_yet(plan: MakePlan, tmp_path: Path, overrides: list[str]) -> None:
    plan()
    console = Console(width=200)
    with console.capture() as captured:
        code = show_preview(console, str(tmp_path / "rounds.yaml"), overrides[:2], stage="dpo", rows=1, html=None)
    assert code == 0
    assert captured.get() == "dpo: its rows do not exist until sample has run\n"


def test_doctor_names_the_file_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "stage:sample"]) == 3
    assert "path:artifacts/STAGE-FINGERPRINT/rows.jsonl" in capsys.readouterr().err


def test_the_worker_refuses_rows_that_changed_since_they_were_made(plan: MakePlan) -> None:
    planned = plan()
    rows = leave_rows(named(planned)["sample"], [PAIR])
    spec = read_spec(write_stage_file(planned, named(planned)["dpo"], planned.config.launch, git_commit=""))
    assert verify(rows.parent, content=True).kind == "rows"
    _refuse_changed_data(spec)
    rows.write_text(rows.read_text().replace("A.", "C."))
    with pytest.raises(ArtifactError, match="content differs from its manifest"):
        _refuse_changed_data(spec)


def test_a_metric_that_chose_the_rows_is_named(plan: MakePlan) -> None:
    notes = of_plan(plan("stages.evaluate.metrics=[{name: brevity, source: length, target: 3}]"))
    assert any("evaluate judges by brevity, which sample optimises (scorers[0])" in note for note in notes)

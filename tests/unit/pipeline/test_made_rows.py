"""Data and teachers that other stages of the recipe make: order, fingerprints, refusals, and rows before they exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.core.artifacts import ROWS_FILE, Manifest, publish, verify
from alignment.core.errors import ArtifactError, ConfigError, DataError
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute.notes import of_plan
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.worker_protocol import write_stage_file
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.stages.registry import read_spec
from alignment.worker import _refuse_changed_data
from tests.generating import asked
from tests.unit.pipeline.conftest import changed, screened, stage_of, write, write_rows

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
def prompts(tmp_path: Path) -> str:
    return write_rows(tmp_path / "prompts.jsonl", *(asked(number) for number in range(12)))


@pytest.fixture
def plan(tmp_path: Path, overrides: list[str], prompts: str) -> MakePlan:
    heldout = write_rows(tmp_path / "held.jsonl", asked(3))
    recipe = write(tmp_path / "rounds.yaml", RECIPE.replace("PROMPTS", prompts).replace("HELDOUT", heldout))
    return lambda *more: make_plan(recipe, [*overrides[:2], *more])


def leave_rows(stage: PlannedStage, *rows: dict[str, Any]) -> Path:
    content = stage.work / "content"
    write_rows(content / ROWS_FILE, *rows)
    manifest = Manifest(stage=stage.name, kind="rows", fingerprint=stage.fingerprint, identity=stage.identity)
    publish(content, stage.artifact, manifest)
    stage.work.rmdir()
    return stage.artifact / ROWS_FILE


def refusal(plan: MakePlan, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(plan(*overrides))
    return str(caught.value)


def test_rounds_are_a_chain_that_the_run_records(plan: MakePlan) -> None:
    planned = plan()
    assert [stage.name for stage in planned.stages] == ["sample", "dpo", "again", "more", "evaluate"]
    more, again = stage_of(planned, "more"), stage_of(planned, "again")
    assert (more.inputs["data.source"].path, more.data) == (again.artifact, again.artifact / ROWS_FILE)
    assert more.input_fingerprints["data.source"] == again.fingerprint
    planned.run_folder.mkdir(parents=True)
    entries = RunRecorder(planned).record.stages
    assert entries["more"].inputs == {"init": "stage:dpo", "data.source": "stage:again"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.again.temperature=0.7", ["again", "more", "evaluate"]),
        ("stages.dpo.beta=0.3", ["dpo", "again", "more", "evaluate"]),
        ("stages.again.batch_size=3", []),
    ],
)
def test_a_change_runs_its_own_round_and_later_ones_again(plan: MakePlan, override: str, stages: list[str]) -> None:
    assert changed(plan(), plan(override)) == stages


ROWS_LIKE = "'stage:sample' makes rows like"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["stages.more.data.source=stage:dpo"],
            ["stages.more.data.source: 'stage:dpo' is a policy; this slot takes a set of rows.",
             "Use 'stage:sample' or 'stage:again'."],
        ),
        (["stages.sample.policy=stage:more"], ["stages.sample: depends on itself: sample → more → dpo → sample"]),
        (["stages.sample.select=best"], ["'chosen' is missing", "select=best_worst or stages.sample.select=all_pairs"]),
        (
            ["stages.again.data.source=stage:sample", "stages.again.scorers=[{source: exact_answer}]"],
            [f"stages.again.data.source: {ROWS_LIKE}", "that stage cannot make suitable rows"],
        ),
        (
            ["stages.more.validation={every: 1, data: {source: 'stage:sample'}}", "stages.sample.select=labels"],
            [f"stages.dpo.data.source: {ROWS_LIKE}", f"stages.more.validation.data.source: {ROWS_LIKE}"],
        ),
        (["stages.sample.select=best", "stages.sample.min_margin=0.5"], ["only select 'best_worst' and 'all_pairs'"]),
        (["stages.sample.scorers=[{source: reward}]"], ["'reward' needs the model in stages.sample.reward"]),
    ],
)  # fmt: skip
def test_useless_rows_and_settings_of_sampling_are_refused(
    plan: MakePlan, settings: list[str], words: list[str]
) -> None:
    message = refusal(plan, *settings)
    assert [word for word in words if word not in message] == []


def test_the_evaluation_s_prompts_are_left_out_by_default(plan: MakePlan, tmp_path: Path, prompts: str) -> None:
    first = plan()
    assert stage_of(first, "sample").extra_data == {"leave_out[0]": tmp_path / "held.jsonl"}
    mixed = stage_of(plan(f"stages.evaluate.data.mix=[{{source: 'path:{prompts}', count: 1}}]"), "sample")
    assert list(mixed.extra_data.values()) == [tmp_path / "held.jsonl", Path(prompts)]
    other = stage_of(plan(f"stages.sample.leave_out=[{{source: 'path:{prompts}'}}]"), "sample")
    assert other.extra_data == {"leave_out[0]": Path(prompts)}
    write_rows(tmp_path / "held.jsonl", asked(4))
    assert changed(first, plan())[0] == "sample"
    of_made_rows = plan("stages.evaluate.data.source=stage:sample")
    assert stage_of(of_made_rows, "sample").extra_data == {}
    assert stage_of(of_made_rows, "evaluate").unmade == ("sample",)


def test_rows_are_read_while_planning_as_soon_as_they_exist(plan: MakePlan) -> None:
    planned = plan()
    assert "more reads the rows of again, which has no result yet" in screened(planned)
    assert stage_of(planned, "dpo").seen == {}
    leave_rows(stage_of(planned, "sample"), *({**PAIR, "chosen": f"{number}."} for number in range(3)))
    planned = plan()
    assert [line[:4] for line in screened(planned) if "has no result yet" in line] == ["more"]
    assert stage_of(planned, "dpo").seen["data"].rows == 3
    assert any("there are only 3 rows" in note for note in of_plan(planned))


def test_rows_that_exist_and_are_faulty_stop_the_plan(plan: MakePlan) -> None:
    leave_rows(stage_of(plan(), "sample"), {**PAIR, "chosen": ""})
    with pytest.raises(DataError, match="'chosen'"):
        plan()


def test_the_worker_refuses_rows_that_changed_since_they_were_made(plan: MakePlan) -> None:
    planned = plan()
    rows = leave_rows(stage_of(planned, "sample"), PAIR)
    spec = read_spec(write_stage_file(planned, stage_of(planned, "dpo"), planned.config.launch, git_commit=""))
    assert verify(rows.parent, content=True).kind == "rows"
    _refuse_changed_data(spec)
    rows.write_text(rows.read_text().replace("A.", "C."))
    with pytest.raises(ArtifactError, match="content differs from its manifest"):
        _refuse_changed_data(spec)


DRAFTS = """
defaults: [base, stage@stages.sft: KIND, stage@stages.draft: draft, stage@stages.small: distil, _self_]
summary: a policy, its draft and a smaller student
stages:
  sft: {init: base, data: {source: "path:ROWS"}}
  draft: {init: "stage:sft", teacher: "stage:sft", data: {source: "path:PROMPTS"}}
  small: {init: "stage:draft", teacher: "stage:sft", data: {source: "path:PROMPTS"}}
"""


@pytest.fixture
def drafts(tmp_path: Path, overrides: list[str], prompts: str) -> MakePlan:
    answer = {"role": "assistant", "content": "In the hall."}
    rows = ({"messages": [*asked(number)["messages"], answer]} for number in range(12))
    text = DRAFTS.replace("PROMPTS", prompts).replace("ROWS", write_rows(tmp_path / "rows.jsonl", *rows))
    write(tmp_path / "model/config.json", json.dumps({"num_hidden_layers": 12}))

    def planned(*more: str, kind: str = "sft") -> Plan:
        return make_plan(write(tmp_path / "drafts.yaml", text.replace("KIND", kind)), [*overrides[:2], *more])

    return planned


def test_the_teacher_s_content_counts_and_its_name_does_not(drafts: MakePlan) -> None:
    before = drafts()
    assert changed(before, drafts("stages.small.teacher=base")) == ["small"]
    assert changed(before, drafts("stages.sft.optim.epochs=2")) == ["sft", "draft", "small"]
    config: Any = before.config.stages["draft"]
    assert (config.kind, config.layers, config.adapter.kind, config.timed_prompts) == ("distil", 8, "full", 8)
    assert config.method == "tokens"


@pytest.mark.parametrize(
    ("changes", "where", "word"),
    [
        (["draft.layers=null"], "draft.init", "the teacher itself"),
        (["draft.method=sequence", "draft.loss_temperature=2"], "draft.loss_temperature", "leave it at 1"),
        (["draft.adapter.kind=prefix"], "draft.timed_prompts", "use 0"),
        (["draft.adapter.kind=lora", "draft.adapter.chain=continue"], "draft.adapter.chain", "merged"),
        (["draft.layers=12"], "draft.layers", "stage:sft has 12 layers"),
        (["small.layers=8"], "small.layers", "stage:draft has 8 layers"),
    ],
)
def test_a_student_that_cannot_learn_is_refused(drafts: MakePlan, changes: list[str], where: str, word: str) -> None:
    message = refusal(drafts, *(f"stages.{change}" for change in changes))
    assert (f"stages.{where}: " in message, word in message) == (True, True)

"""A run folder as records and tables, by value."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.records.worker import Progress, Status
from tests.unit.report.conftest import FakeRun, digest


@pytest.fixture
def loaded(fake_run: FakeRun) -> alignment.Run:
    fake_run.write()
    return alignment.load_run(fake_run.folder)


def test_stages_have_their_results_settings_and_usage(loaded: alignment.Run, fake_run: FakeRun) -> None:
    assert list(loaded.stages) == ["sft", "reward", "dpo", "ppo", "evaluate", "report"]
    assert loaded.state == "killed", "it is recorded as running, and nothing holds its lock"
    dpo = loaded.stages["dpo"]
    assert (dpo.kind, dpo.state, dpo.artifact) == ("dpo", "done", fake_run.artifact("dpo"))
    assert dpo.settings["beta"] == 0.1
    assert dpo.entry.inputs == {"init": "stage:sft"}
    assert dpo.manifest.fingerprint == digest("dpo")
    assert dpo.usage == {"seconds": 402.9, "peak_rss_bytes": 2.4e9}
    assert loaded.stages["reward"].metrics == {"eval_accuracy": 0.9667, "rows": 270.0}
    assert loaded.stages["report"].artifact is None
    assert loaded.settings["seed"] == 42
    assert loaded.name == "quickstart"


def test_arms_have_intervals_and_differences_have_verdicts(loaded: alignment.Run) -> None:
    evaluation = loaded.evaluation
    assert evaluation is loaded.evaluations["evaluate"]
    arm = evaluation.arm("stage:dpo")
    assert arm.metrics["quality"] == alignment.Interval(mean=0.71, low=0.71 - 0.045, high=0.71 + 0.045)
    arms = loaded.arms_frame()
    row = arms[(arms["arm"] == "dpo") & (arms["metric"] == "quality")].iloc[0]
    assert row.tolist() == ["evaluate", "dpo", "quality", 0.71, 0.71 - 0.045, 0.71 + 0.045]
    assert set(arms["arm"]) == {"base", "base+prompt", "sft", "dpo", "ppo"}
    differences = loaded.differences_frame().set_index(["arm", "against"])
    assert differences.loc[("dpo", "sft"), "difference"] == 0.09
    assert differences.loc[("dpo", "sft"), "metric"] == "quality"
    assert differences["verdict"].to_dict() == {
        ("base+prompt", "base"): "better",
        ("sft", "base"): "better",
        ("sft", "base+prompt"): "better",
        ("dpo", "sft"): "better",
        ("ppo", "sft"): "no real difference",
        ("ppo", "dpo"): "worse",
    }


def test_curves_are_those_of_the_report(loaded: alignment.Run, fake_run: FakeRun) -> None:
    series = {line.key: line for line in loaded.stages["dpo"].curves()}
    rows = fake_run.metrics["dpo"]
    assert series["rewards/margins"].points == [(float(row["step"]), row["rewards/margins"]) for row in rows]
    assert series["rewards/margins"].over == "step"
    assert "lr" not in series
    table = loaded.stages["dpo"].frame()
    assert table.columns[:2].tolist() == ["step", "seconds"]
    assert table["loss"].tolist() == [row["loss"] for row in rows]
    assert loaded.stages["evaluate"].curves() == []
    assert loaded.stages["evaluate"].frame().columns.tolist() == ["step"]


def test_tables_of_stages_settings_and_answers(loaded: alignment.Run, fake_run: FakeRun) -> None:
    stages = loaded.stages_frame().set_index("stage")
    assert stages.loc["dpo", ["kind", "state", "seconds", "peak_rss_bytes"]].tolist() == ["dpo", "done", 402.9, 2.4e9]
    assert math.isnan(stages.loc["report", "seconds"])
    settings = loaded.settings_frame().set_index("key")["value"]
    assert settings["stages.dpo.beta"] == 0.1
    answers = loaded.answers_frame()
    assert len(answers) == 40 * 5
    first = answers[(answers["id"] == "heldout-000") & (answers["arm"] == "dpo")].iloc[0]
    expected = fake_run.samples[0]["answers"]["stage:dpo"]
    assert (first["answer"], first["quality"]) == (expected["text"], expected["scores"]["quality"])
    assert first["prompt"].startswith("Summarise this note")
    fake_run.samples[0]["answers"]["stage:dpo"]["scores"]["answer"] = 0.5
    fake_run.write()
    first = loaded.answers_frame().query("id == 'heldout-000' and arm == 'dpo'").iloc[0]
    assert (first["answer"], first["score/answer"]) == (expected["text"], 0.5)


def test_a_run_against_itself_differs_in_nothing(fake_run: FakeRun) -> None:
    fake_run.run["stages"]["evaluate"]["artifact"] = str(fake_run.artifact("evaluate"))  # a path, as the driver writes
    fake_run.write()
    run = alignment.load_run(fake_run.folder)
    differences = run.against(run)
    assert {(difference.arm, difference.metric.name) for difference in differences} >= {("stage:dpo", "quality")}
    assert all(difference.none_at_all for difference in differences)


def test_a_damaged_file_of_answers_is_an_error_that_names_it(fake_run: FakeRun) -> None:
    fake_run.run["stages"]["evaluate"]["artifact"] = str(fake_run.artifact("evaluate"))
    fake_run.write()
    file = fake_run.artifact("evaluate") / "samples.jsonl"
    file.write_text(file.read_text()[:-20])
    run = alignment.load_run(fake_run.folder)
    for read in (run.answers, run.answers_frame, lambda: run.against(run)):
        with pytest.raises(alignment.ArtifactError, match="unreadable") as caught:
            read()
        assert caught.value.where == str(file)


def test_a_run_that_is_not_done_says_how_far_it_is(fake_run: FakeRun) -> None:
    fake_run.run["stages"]["dpo"]["state"] = "running"
    fake_run.run["stages"]["ppo"]["state"] = "failed"
    fake_run.run["stages"]["evaluate"]["state"] = "waiting"
    fake_run.write()
    work = fake_run.artifact("dpo").with_name(fake_run.artifact("dpo").name + ".work")
    Progress(phase="training", step=12, total=57).write(work)
    (fake_run.folder / "ppo").mkdir()
    Status(state="failed", exit_code=6, error="the loss is NaN").write(fake_run.folder / "ppo")
    with (work / "content/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 58, "lo')
    run = alignment.load_run(fake_run.folder)
    dpo = run.stages["dpo"]
    assert (dpo.artifact, dpo.manifest, dpo.metrics, dpo.usage) == (None, None, {}, {})
    assert dpo.progress == Progress(phase="training", step=12, total=57)
    assert len(dpo.steps()) == 57, "a line that is being written does not count yet"
    assert run.stages["ppo"].error == "the loss is NaN"
    assert run.evaluation is None
    assert run.answers() == []
    assert run.arms_frame().empty
    assert run.arms_frame().columns.tolist() == ["evaluation", "arm", "metric", "mean", "low", "high"]


def test_a_run_that_was_moved_with_its_artifacts_is_read(fake_run: FakeRun, tmp_path: Path) -> None:
    fake_run.write()
    shutil.copytree(tmp_path, tmp_path.parent / "moved")
    shutil.rmtree(fake_run.root / "artifacts")
    run = alignment.load_run(tmp_path.parent / "moved/runs/quickstart")
    assert run.stages["dpo"].artifact == tmp_path.parent / "moved/artifacts" / fake_run.artifact("dpo").name


def test_what_is_missing_or_damaged_is_an_error(fake_run: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(alignment.ArtifactError, match="no run is recorded here") as caught:
        alignment.load_run(tmp_path / "nowhere")
    assert caught.value.exit_code == 7
    fake_run.write()
    steps = fake_run.artifact("dpo") / "metrics.jsonl"
    steps.write_text("torn\n" + steps.read_text())
    run = alignment.load_run(fake_run.folder)
    with pytest.raises(alignment.ArtifactError, match=r"metrics\.jsonl: unreadable"):
        run.stages["dpo"].steps()
    (fake_run.artifact("evaluate") / "evaluation.json").write_text('{"arms": 3}')
    with pytest.raises(alignment.ArtifactError, match=r"arms: 3 is not a list"):
        alignment.load_run(fake_run.folder)


def test_without_pandas_only_tables_are_missing(loaded: alignment.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert loaded.stages["dpo"].curves()
    tables: list[Any] = [loaded.stages_frame, loaded.arms_frame, loaded.answers_frame, loaded.stages["dpo"].frame]
    for table in tables:
        with pytest.raises(alignment.ConfigError, match=r"pip install 'alignment-pipeline\[pandas\]'"):
            table()


def test_records_are_frozen_and_short_to_print(loaded: alignment.Run) -> None:
    with pytest.raises(AttributeError):
        loaded.state = "done"  # type: ignore[misc]
    assert len(repr(loaded)) < 300
    assert repr(loaded.stages["dpo"]) == "RunStage('dpo', dpo, done)"

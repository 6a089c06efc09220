"""``run.json``, ``sweep.json`` and the outcome of a trial come back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.core.errors import ArtifactError
from alignment.records.interval import Interval
from alignment.records.run import RunRecord, StageEntry
from alignment.records.sweep_record import Goal, Parameter, SweepRecord, Trial, TrialOutcome

ENTRY = StageEntry(
    kind="evaluate",
    state="done",
    artifact="/a/evaluate-0123abcd",
    seconds=2.5,
    inputs={"reference": "stage:sft", "arms": ["base", "stage:dpo"]},
)


def test_a_record_comes_back_with_its_stages_in_order(tmp_path: Path) -> None:
    record = RunRecord(
        name="mine",
        config={"seed": 1, "stages": {"evaluate": {"kind": "evaluate"}}},
        stages={"sft": StageEntry(), "evaluate": ENTRY},
    )
    record.write(tmp_path)
    again = RunRecord.read(tmp_path)
    assert again == record
    assert list(again.stages) == ["sft", "evaluate"]
    assert again.settings_of("evaluate") == {"kind": "evaluate"}
    assert again.settings_of("sft") == {}
    assert ENTRY.references == [("reference", "stage:sft"), ("arms", "base"), ("arms", "stage:dpo")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run is recorded here"),
        ("{", "unreadable"),
        ('{"stages": {"sft": 3}}', r"unreadable: stages\.sft: 3 is not an object"),
        ('{"version": 2}', "has format version 2, but"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        RunRecord.read(tmp_path)


def test_settings_of_a_trial_keep_their_types(tmp_path: Path) -> None:
    trial = Trial(
        number=0,
        run="mine-0",
        state="done",
        settings={"stages.dpo.beta": 0.1, "stages.dpo.optim.batch_size": 8, "adapter": "lora"},
        words=["stages.dpo.beta=0.1"],
        figures=[Interval(mean=0.5, low=0.25, high=0.75), Interval(mean=24.0)],
    )
    arms = {"base": Interval(mean=0.1, low=0.0, high=0.2)}
    record = SweepRecord(
        name="mine",
        recipe="quickstart",
        overrides=[],
        summary="",
        search="grid",
        number=1,
        goals=[Goal(label="gold of stage:dpo", minimize=False, shared_arms=arms)],
        parameters=[Parameter(key="stages.dpo.beta", values=[], low=0.01, high=1.0, log=True)],
        trials=[trial],
        best=[0],
        verdict="",
        importance=[{"stages.dpo.beta": 1.0}],
    )
    record.write(tmp_path)
    again = SweepRecord.read(tmp_path)
    assert again == record
    assert [type(value) for value in again.trials[0].settings.values()] == [float, int, str]


def test_an_outcome_that_is_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "0.json"
    TrialOutcome(code=6, error="a gradient is not finite").write(file)
    assert TrialOutcome.read(file) == TrialOutcome(code=6, error="a gradient is not finite")
    file.write_text('{"code": "six"}')
    with pytest.raises(ArtifactError, match=r"0\.json: unreadable: code: 'six' is not a whole number"):
        TrialOutcome.read(file)

"""``run.json`` comes back as it was written."""

from __future__ import annotations

from pathlib import Path

from alignment.records.run import RunRecord, StageEntry

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

"""``run.json`` as the driver writes it and as older drivers wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.core.errors import ArtifactError
from alignment.core.typed_json import parts
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


def test_references_stand_beside_their_fields() -> None:
    assert ENTRY.references == [("reference", "stage:sft"), ("arms", "base"), ("arms", "stage:dpo")]
    older = parts({"inputs": {"arms": {"sft": "stage:sft"}}}, StageEntry)
    assert older is not None
    assert older.references == [("arms", "stage:sft")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run is recorded here"),
        ("{", "unreadable"),
        ('{"stages": []}', r"unreadable: stages: \[\] is not an object"),
        ('{"stages": {"sft": 3}}', r"unreadable: stages\.sft: 3 is not an object"),
        ('{"version": 2}', "has format version 2, but"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        RunRecord.read(tmp_path)

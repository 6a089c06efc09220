"""A record comes back from its file as it was written; what has another form is refused, or left out of a page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import ArtifactError
from alignment.core.typed_json import (
    KEY,
    LEFT_OUT_IF_EMPTY,
    Cleaning,
    Label,
    NewerVersion,
    parts,
    read,
    read_parts,
    to_json,
    write,
)
from alignment.records.interval import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    name: Label
    gold: Interval | None = None
    figures: dict[str, Interval] = field(default_factory=dict)
    start: float = field(default=0.0, metadata={KEY: "from"})
    counts: list[int] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    rows: int
    arms: list[Arm] = field(default_factory=list)
    setting: str | int | float = ""
    judged: bool = True
    anything: Any = None
    version: int = 2


WHOLE = Table(
    rows=3,
    arms=[Arm(name="sft", gold=Interval(mean=0.5, low=0.25, high=0.75), start=0.5), Arm(name="dpo", counts=[1, 2])],
    setting=4,
    anything={"a": [1, None]},
)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "table.json", WHOLE)
    assert read(tmp_path / "table.json", Table, remedy="") == WHOLE
    raw = json.loads((tmp_path / "table.json").read_text())
    assert raw["version"] == 2
    assert raw["arms"][0] == {
        "name": "sft", "gold": {"mean": 0.5, "low": 0.25, "high": 0.75}, "figures": {}, "from": 0.5,
    }  # fmt: skip
    assert raw["arms"][1]["counts"] == [1, 2]


def test_a_file_of_an_older_version_lacks_keys_and_one_of_this_version_may_have_more() -> None:
    assert parts({"rows": 3, "unknown": 1}, Table) == Table(rows=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "three"}, "rows: 'three' is not a whole number"),
        ({"rows": True}, "rows: True is not a whole number"),
        ({"rows": 3.5}, "rows: 3.5 is not a whole number"),
        ({"judged": 1}, "judged: 1 is not true or false"),
        ({"setting": []}, "setting: [] is not text"),
        ({"arms": 3}, "arms: 3 is not a list"),
        ({"arms": [{"name": "a"}, {"name": 3}]}, "arms[1].name: 3 is not text"),
        ({"arms": [{}]}, "arms[0].name is missing"),
        ({"arms": [{"name": "a", "gold": {"low": 1}}]}, "arms[0].gold.mean is missing"),
        ({"arms": [{"name": "a", "from": 10**400}]}, "arms[0].from: 1000"),
        ({"arms": [{"name": "a", "figures": {"x": []}}]}, "arms[0].figures.x: [] is not an object"),
        ({"arms": [{"name": "a", "figures": []}]}, "arms[0].figures: [] is not an object"),
    ],
)
def test_what_has_another_form_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "table.json").write_text(json.dumps(to_json(WHOLE) | change))
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / "table.json", Table, remedy="make it anew")
    assert str(caught.value).startswith(f"{tmp_path / 'table.json'}: unreadable: {message}")
    assert str(caught.value).endswith("→ make it anew")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"rows": NaN'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ArtifactError, match="unreadable"):
        read(tmp_path / "table.json", Table, remedy="")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other.json", Table, remedy="")


def test_a_newer_form_is_refused_whatever_else_the_file_holds(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"version": 3, "rows": "three"}')
    for reading in (
        lambda: read(tmp_path / "table.json", Table, remedy=""),
        lambda: read_parts(tmp_path / "table.json", Table, CLEANING),
    ):
        with pytest.raises(NewerVersion, match="has format version 3, but this program reads only versions up to 2"):
            reading()


CLEANING = Cleaning(
    prose=str.upper,
    line=lambda line, limit: line[: limit // 16],
    name=lambda name, limit: name[-(limit // 16) :],
    number=lambda number: number if math.isfinite(number) else None,
)


def test_a_page_gets_what_has_its_form_and_can_be_shown() -> None:
    raw = {
        "rows": 3,
        "arms": [
            {"name": "stage:sft", "gold": {"mean": 0.5, "low": math.nan, "high": 0.75}, "from": "x"},
            {"gold": {"mean": 0.5}},
            {"name": "dpo", "gold": {"mean": math.inf}, "figures": {"a": {"mean": 1}, "b": "x"}, "counts": [1, "x", 2]},
            "no arm",
        ],
        "setting": "text",
        "judged": "yes",
    }
    assert parts(raw, Table, CLEANING) == Table(
        rows=3,
        arms=[
            Arm(name="sft", gold=Interval(mean=0.5)),
            Arm(name="dpo", figures={"A": Interval(mean=1.0)}),
        ],
        setting="TEXT",
    )
    assert parts({"rows": "x"}, Table) is None
    assert parts([], Table) is None

"""Records and settings in their canonical forms: read back as written, fingerprinted, and refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from alignment.config.model import AdapterKind
from alignment.core.errors import ArtifactError
from alignment.core.fingerprint import IF_SET, canonical, digest
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
    assert parts({"rows": 3, "unknown": 1}, Table) == Table(rows=3), "an older or newer file lacks or has keys"


@pytest.mark.parametrize(
    ("change", "field_name", "words"),
    [
        ({"rows": True}, "rows", "True is not a whole number"),
        ({"setting": []}, "setting", "[] is not text"),
        ({"arms": 3}, "arms", "3 is not a list"),
        ({"arms": [{"name": "a"}, {"name": 3}]}, "arms[1].name", "3 is not text"),
        ({"arms": [{}]}, "arms[0].name", "missing"),
        ({"arms": [{"name": "a", "gold": {"low": 1}}]}, "arms[0].gold.mean", "missing"),
        ({"arms": [{"name": "a", "from": 10**400}]}, "arms[0].from", "1000"),
        ({"arms": [{"name": "a", "figures": {"x": []}}]}, "arms[0].figures.x", "[] is not an object"),
    ],
)
def test_what_has_another_form_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field_name: str, words: str
) -> None:
    (tmp_path / "table.json").write_text(json.dumps(to_json(WHOLE) | change))
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / "table.json", Table, remedy="make it anew")
    assert (caught.value.where, caught.value.remedy) == (str(tmp_path / "table.json"), "make it anew")
    assert f" {field_name}" in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ArtifactError, match="unreadable"):
        read(tmp_path / "table.json", Table, remedy="")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other.json", Table, remedy="")


def test_the_canonical_form_is_the_same_for_the_same_settings() -> None:
    assert digest({"a": 1, "b": 2.0}) == digest({"b": 2, "a": 1.0})
    assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})
    assert len({digest({"a": value}) for value in ("1", 1, True)}) == 3
    assert canonical([AdapterKind.lora, Colour.red]) == ["lora", 1], "enums stand for their values"


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
        arms=[Arm(name="sft", gold=Interval(mean=0.5)), Arm(name="dpo", figures={"A": Interval(mean=1.0)})],
        setting="TEXT",
    )
    assert parts({"rows": "x"}, Table) is None
    assert parts([], Table) is None


class Colour(Enum):
    red = 1


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), float("inf"), object(), b"x"])
def test_what_has_no_stable_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="no stable form"):
        digest({"a": value})


@dataclass(kw_only=True)
class Settings:
    old: int = 1
    newer: dict[str, int] = field(default_factory=dict, metadata=IF_SET)
    newest: int | None = field(default=None, metadata=IF_SET)


def test_a_setting_that_came_later_counts_only_if_it_is_set() -> None:
    assert canonical(Settings()) == {"old": 1}
    assert canonical(Settings(newer={"a": 1})) == {"old": 1, "newer": {"a": 1}}
    assert canonical(Settings(newest=0)) == {"old": 1, "newest": 0}


@pytest.mark.parametrize("cleaning", [False, True])
def test_a_newer_form_is_refused_whatever_else_the_file_holds(tmp_path: Path, cleaning: bool) -> None:
    file = tmp_path / "table.json"
    file.write_text('{"version": 3, "rows": "three"}')
    with pytest.raises(NewerVersion, match=r"version 3, .* up to 2"):
        read_parts(file, Table, CLEANING) if cleaning else read(file, Table, remedy="")

"""A stage is estimated on its first rows and the rest is counted: records and not lines, and other sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig, MixedConfig
from alignment.data.first_records import fewer_of, times_as_many
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair, Record

PAIR = {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}
RANKED = {"prompt": "2 + 2?", "completions": [{"text": f"{score}.", "score": score} for score in (4, 5, 6)]}


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "record", "limit", "times"),
    [
        (PAIR, PreferencePair, None, 4.0),
        (PAIR, PreferencePair, 30, 3.0),
        (PAIR, PreferencePair, 10, 1.0),
        (PAIR, LabelledAnswer, None, 8.0),  # ten of its eighty answers are in five lines
        (PAIR, LabelledAnswer, 40, 4.0),
        (RANKED, PreferencePair, None, 10.0),  # ten of its 120 pairs are in four lines
        (RANKED, Conversation, None, 4.0),
    ],
)
def test_records_are_counted_and_not_lines(
    tmp_path: Path, row: dict[str, Any], record: type[Record], limit: int | None, times: float
) -> None:
    file = written(tmp_path / "rows.jsonl", [{**row, "id": str(number)} for number in range(40)])
    assert times_as_many(file, DataConfig(limit=limit), record, 10) == times


def test_rows_without_a_record_are_read_past(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5."}], "label": False}
    file = written(tmp_path / "rows.jsonl", [bad | {"label": number % 2 == 1} for number in range(40)])
    assert times_as_many(file, DataConfig(), Conversation, 10) == 2.0


def test_other_files_are_not_counted(tmp_path: Path) -> None:
    assert times_as_many(tmp_path / "rows.parquet", DataConfig(), Conversation, 10) is None


def test_what_is_mixed_in_shrinks_with_the_stages_own_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "other.jsonl", [PAIR] * 30)
    assert fewer_of(MixedConfig(share=0.25), file, 4.0) == MixedConfig(share=0.25)
    assert fewer_of(MixedConfig(count=9), file, 4.0) == MixedConfig(count=3)
    assert fewer_of(MixedConfig(), file, 4.0) == MixedConfig(limit=8)
    assert fewer_of(MixedConfig(limit=10), file, 4.0) == MixedConfig(limit=3)
    assert fewer_of(MixedConfig(), tmp_path / "rows.json", 4.0) == MixedConfig()
